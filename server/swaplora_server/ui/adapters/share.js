// Who else may ask an adapter.

import { ask } from "../shared/api.js";
import { byId } from "../shared/dom.js";

/** Ask for the tenants, and let these ask it and no others; false if it was left as it is. Raises ApiError. */
export async function share(card) {
  const dialog = byId("share-dialog");
  byId("share-title").textContent = `Share ${card.name}`;
  byId("share-input").value = card.shared_with.join(", ");
  byId("share-cancel").onclick = () => dialog.close("cancel"); // Enter is for the other button
  dialog.returnValue = "";
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  if (dialog.returnValue !== "share") return false;
  const tenants = byId("share-input").value.split(",").map((tenant) => tenant.trim()).filter(Boolean);
  await ask(`v1/adapters/${encodeURIComponent(card.name)}`, { method: "PATCH", json: { shared_with: tenants } });
  return tenants.length ? `shared with ${tenants.map((tenant) => (tenant === "*" ? "everybody" : tenant)).join(", ")}` : "shared with nobody else";
}

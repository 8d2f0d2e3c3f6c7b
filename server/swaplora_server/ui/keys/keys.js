// Keys: those in the server's file, for who may see them all; a new one is shown once.

import { ApiError, ask } from "../shared/api.js";
import { confirmed, showCode } from "../shared/dialog.js";
import { byId, element, table, tell } from "../shared/dom.js";

const COLUMNS = [{ title: "Key" }, { title: "Tenant" }, { title: "Scopes" }, { title: "Expires" }, { title: "Change" }];
let isStarted = false;

/** Called when the part is shown. */
export function showKeys() {
  if (!isStarted) {
    byId("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      act("The new key is good at once.", make);
    });
  }
  isStarted = true;
  refresh();
}

async function refresh() {
  try {
    const { data } = await ask("v1/keys");
    const none = element("p", { class: "empty" }, "The file has no keys yet: make one above.");
    byId("key-list").replaceChildren(data.length ? table("Keys", COLUMNS, data.map(row)) : none);
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    byId("key-list").replaceChildren(element("p", { class: "empty error" }, error.message));
  }
}

function row({ id, tenant, scopes, expires }) {
  const revoke = element("button", { type: "button", class: "quiet danger", "aria-label": `Revoke ${id}`, onclick: () => act(`${id} is revoked.`, () => end(id)) }, "Revoke");
  return [element("code", {}, id), tenant, scopes.join(", "), expires ?? "never", revoke];
}

async function act(words, work) {
  try {
    if ((await work()) === false) return;
    await refresh();
    tell(byId("keys-said"), words);
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    tell(byId("keys-said"), error.message, true);
  }
}

async function make() {
  const scopes = [...byId("key-form").querySelectorAll("[type=checkbox]:checked")].map(({ value }) => value);
  const days = byId("key-days").valueAsNumber;
  const json = { tenant: byId("key-tenant").value.trim(), scopes, ...(days ? { days } : {}) };
  const { id, key } = await ask("v1/keys", { method: "POST", json });
  showCode(`${id}: the server keeps no copy of this`, key);
}

async function end(id) {
  if (!(await confirmed(`Revoke ${id}?`, "Requests that come with it are refused from then on.", "Revoke"))) return false;
  await ask(`v1/keys/${encodeURIComponent(id)}`, { method: "DELETE" });
  return true;
}

// The API key: asked for when the server wants one, kept for this tab alone.

import { byId } from "./dom.js";

const STORED = "swaplora-key";
export const KEY_CHANGED = "key-changed"; // an event of the window
let asking = null;

/** The key in use, or null. */
export const currentKey = () => sessionStorage.getItem(STORED);

/** Ask for a key because `tried` (null: none) was refused; whether there is another one now. One question for all. */
export async function wantKey(tried) {
  if (currentKey() !== tried) return true;
  asking ??= question(tried ? "The server does not take that key." : "This server wants a key.").finally(() => {
    asking = null;
  });
  return asking;
}

async function question(why) {
  const dialog = byId("key-dialog");
  byId("key-why").textContent = `${why} It stays in this tab, until the tab is closed.`;
  byId("key-input").value = "";
  byId("key-forget").hidden = currentKey() === null;
  dialog.returnValue = "";
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  const key = byId("key-input").value.trim();
  byId("key-input").value = "";
  if (dialog.returnValue !== "use" || !key) return false;
  sessionStorage.setItem(STORED, key);
  dispatchEvent(new Event(KEY_CHANGED));
  return true;
}

/** The button that changes the key; `onChange` is called when there is another one, or none any more. */
export function startKey(onChange) {
  byId("key-button").addEventListener("click", async () => {
    if (await question(currentKey() ? "A key is in use." : "Where this server wants a key, give it here.")) onChange();
  });
  byId("key-cancel").addEventListener("click", () => byId("key-dialog").close("cancel")); // Enter is for the other button
  byId("key-forget").addEventListener("click", () => {
    sessionStorage.removeItem(STORED);
    dispatchEvent(new Event(KEY_CHANGED));
    byId("key-dialog").close("forget");
    onChange();
  });
}

// Questions before what cannot be undone, and code to take along.

import { byId, tell } from "./dom.js";

/** Ask; true only if the answer was the button that says `yes`. */
export async function confirmed(title, text, yes) {
  const dialog = byId("confirm-dialog");
  byId("confirm-title").textContent = title;
  byId("confirm-text").textContent = text;
  byId("confirm-yes").textContent = yes;
  dialog.returnValue = "";
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  return dialog.returnValue === "yes";
}

/** Show code with a button that copies it. */
export function showCode(title, code) {
  byId("code-title").textContent = title;
  byId("code-text").textContent = code;
  tell(byId("code-said"), "");
  byId("code-copy").onclick = async () => {
    try {
      await navigator.clipboard.writeText(code);
      tell(byId("code-said"), "Copied.");
    } catch {
      getSelection().selectAllChildren(byId("code-text"));
      tell(byId("code-said"), "Selected: the browser lets this page copy by hand only.");
    }
  };
  const dialog = byId("code-dialog");
  dialog.addEventListener("close", forgetCode, { once: true });
  dialog.showModal();
}

/** It may be a key's secret, which is not to be found in the page later. */
function forgetCode() {
  byId("code-text").textContent = "";
  byId("code-copy").onclick = null;
}

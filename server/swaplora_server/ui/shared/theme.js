// Light or dark: as the system has it, until the button says otherwise.

import { byId } from "./dom.js";

const SCHEMES = { system: "light dark", light: "light", dark: "dark" };
const STORED = "swaplora-theme";

/** The button goes round the three; what was chosen stays. */
export function startTheme() {
  const names = Object.keys(SCHEMES);
  const use = (name) => {
    document.documentElement.style.colorScheme = SCHEMES[name];
    byId("theme-button").textContent = `Theme: ${name}`;
    localStorage.setItem(STORED, name);
  };
  const stored = localStorage.getItem(STORED);
  let chosen = Object.hasOwn(SCHEMES, stored) ? stored : "system";
  use(chosen);
  byId("theme-button").addEventListener("click", () => {
    chosen = names[(names.indexOf(chosen) + 1) % names.length];
    use(chosen);
  });
}

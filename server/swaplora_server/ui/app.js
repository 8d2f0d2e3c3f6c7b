// The page's start: its tabs, and what each of them does when it is shown.

import { showAdapters } from "./adapters/adapters.js";
import { showCompare } from "./compare/compare.js";
import { showEvaluations } from "./evaluations/evaluations.js";
import { showInspect } from "./inspect/inspect.js";
import { showKeys } from "./keys/keys.js";
import { showLive } from "./live/live.js";
import { showMixtures } from "./mixtures/mixtures.js";
import { byId } from "./shared/dom.js";
import { currentKey, KEY_CHANGED, startKey } from "./shared/key.js";
import { loadModels } from "./shared/models.js";
import { goTo } from "./shared/parts.js";
import { startTheme } from "./shared/theme.js";

const PARTS = { compare: showCompare, adapters: showAdapters, mixtures: showMixtures, inspect: showInspect, evaluations: showEvaluations, live: showLive, keys: showKeys };
const tabs = [...document.querySelectorAll("[role=tab]")];
let leave = () => {};

/** Show one part, and end what the one before was doing. */
function show(part) {
  leave();
  for (const tab of tabs) {
    const isShown = tab.getAttribute("aria-controls") === part;
    tab.setAttribute("aria-selected", String(isShown));
    tab.tabIndex = isShown ? 0 : -1;
    byId(tab.getAttribute("aria-controls")).hidden = !isShown;
  }
  leave = PARTS[part]() ?? (() => {});
}

/** The part that the address names after its #, else the first. */
function wanted() {
  const part = location.hash.slice(1);
  return Object.hasOwn(PARTS, part) ? part : "compare";
}

/** Only who came with a key can have more of them. */
function showTabs() {
  byId("tab-keys").hidden = currentKey() === null;
}

for (const tab of tabs) {
  tab.addEventListener("click", () => goTo(tab.getAttribute("aria-controls")));
  tab.addEventListener("keydown", (event) => {
    const there = tabs.filter(({ hidden }) => !hidden);
    const index = there.indexOf(tab);
    const to = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: -1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const next = there.at(to % there.length);
    next.focus();
    next.click();
  });
}

/** Show the part that is wanted, and what every part has. */
function restart() {
  show(wanted());
  if (wanted() !== "compare") loadModels().catch(() => {}); // the part that is shown tells of it
}

showTabs();
addEventListener(KEY_CHANGED, showTabs);
startTheme();
startKey(restart);
addEventListener("hashchange", () => show(wanted()));
restart();

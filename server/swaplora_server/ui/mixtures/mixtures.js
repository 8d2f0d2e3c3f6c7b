// Mixtures: adapters under one name, among which every token chooses; made, deleted, and traced.

import { ApiError, ask } from "../shared/api.js";
import { confirmed } from "../shared/dialog.js";
import { byId, element, table, tell } from "../shared/dom.js";
import { startTrace, traceOf } from "./trace.js";

const COLUMNS = [{ title: "Name" }, { title: "Members" }, { title: "A token takes", isNumber: true }, { title: "Temperature", isNumber: true }, { title: "Change" }];
let mixtures = [];
let chosen = null; // a name
let isStarted = false;

/** Called when the part is shown. */
export function showMixtures() {
  if (!isStarted) start();
  isStarted = true;
  refresh();
}

function start() {
  byId("mixture-form").addEventListener("submit", (event) => {
    event.preventDefault();
    told(save);
  });
  startTrace();
}

/** Do what was asked for, and say below the form what came of it. */
async function told(act) {
  try {
    const words = await act();
    if (words === null) return;
    await refresh();
    tell(byId("mixture-said"), words);
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    tell(byId("mixture-said"), `Refused: ${error.message}`, true);
  }
}

async function save() {
  const name = byId("mixture-name").value;
  const members = byId("mixture-members").value.split(",").map((member) => member.trim()).filter(Boolean);
  const json = { name, members, top_k: byId("mixture-top-k").valueAsNumber, temperature: byId("mixture-temperature").valueAsNumber };
  await ask("v1/mixtures", { method: "POST", json });
  choose(name);
  return `${name} is saved: requests from now on follow it.`;
}

async function remove(name) {
  if (!(await confirmed(`Delete the mixture ${name}?`, "Its members stay.", "Delete"))) return null;
  await ask(`v1/mixtures/${encodeURIComponent(name)}`, { method: "DELETE" });
  if (chosen === name) choose(null);
  return `${name} is deleted.`;
}

async function refresh() {
  try {
    mixtures = (await ask("v1/mixtures")).data;
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    byId("mixture-list").replaceChildren(element("p", { class: "empty error" }, error.message));
    return;
  }
  showList();
}

function showList() {
  const none = element("p", { class: "empty" }, "No mixtures yet: of each, every token takes the members that are likest to it.");
  const focused = document.activeElement?.dataset?.mixture;
  byId("mixture-list").replaceChildren(mixtures.length ? table("Mixtures", COLUMNS, mixtures.map(row)) : none);
  if (focused !== undefined) byId("mixture-list").querySelector(`[data-mixture="${CSS.escape(focused)}"]`)?.focus();
}

function row({ name, members, top_k: most, temperature }) {
  const isChosen = name === chosen;
  const open = element("button", { type: "button", class: "link", "data-mixture": name, "aria-pressed": String(isChosen), onclick: () => { choose(name); showList(); } }, name);
  const end = element("button", { type: "button", class: "quiet danger", "aria-label": `Delete mixture ${name}`, onclick: () => told(() => remove(name)) }, "Delete");
  return { cells: [open, members.join(", "), `${most} of ${members.length}`, String(temperature), end], class: isChosen ? "chosen" : null };
}

function choose(name) {
  chosen = name;
  traceOf(name);
}

// The gate of one adapter: what new versions must show, what each has shown over time, and which one is current.

import { allCards, ApiError, ask } from "../shared/api.js";
import { confirmed } from "../shared/dialog.js";
import { byId, element, table, tell } from "../shared/dom.js";
import { count, moment, short } from "../shared/format.js";
import { makeCurrent } from "../shared/current.js";
import { cellsOf, RATE_COLUMNS } from "./bars.js";
import { scroll } from "./results.js";
import { readTask } from "./task.js";

const COLUMNS = [{ title: "Version", isNumber: true }, { title: "Standing" }, { title: "Task" }, ...RATE_COLUMNS, { title: "Asked" }];
const AGAIN_MS = 1000;
let timer = 0;

const pathOf = (name) => `v1/adapters/${encodeURIComponent(name)}`;
const chosen = () => byId("gate-adapter").value;

/** Once, before the part is shown first. */
export function startGate() {
  byId("gate-adapter").addEventListener("change", () => showAdapter());
  byId("gate-form").addEventListener("submit", (event) => {
    event.preventDefault();
    act("The gate is set: new versions are current once they have passed.", set);
  });
  byId("gate-remove").addEventListener("click", () => act("The gate is removed: new versions are current at once.", remove));
}

/** The adapters to choose from, anew, and the one that is chosen. */
export async function showGate() {
  try {
    const own = (await allCards()).filter(({ shared_with: shared }) => shared !== null).map(({ name }) => name);
    const before = chosen();
    byId("gate-adapter").replaceChildren(...own.map((name) => element("option", { value: name }, name)));
    if (own.includes(before)) byId("gate-adapter").value = before;
    byId("gate-part").hidden = !own.length;
    if (own.length) await showAdapter();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    tell(byId("gate-said"), error.message, true);
  }
}

async function act(words, work) {
  try {
    if ((await work()) === false) return;
    await showAdapter();
    tell(byId("gate-said"), words);
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    tell(byId("gate-said"), error.message, true);
  }
}

async function set() {
  const task = await readTask("gate");
  const kept = await readTask("gate-keep");
  const must_keep = kept.trim() ? { task: kept, max_drop: byId("gate-drop").valueAsNumber } : null;
  const path = pathOf(chosen());
  const { stop } = (await ask(path)).gated ? await ask(`${path}/gate`) : { stop: [] }; // what has no field here is kept
  const json = { task, min_score: byId("gate-score").valueAsNumber, must_keep, max_tokens: byId("gate-tokens").valueAsNumber, stop };
  await ask(`${path}/gate`, { method: "PUT", json });
}

async function remove() {
  if (!(await confirmed(`Remove the gate of ${chosen()}?`, "Each new version is current at once then.", "Remove"))) return false;
  await ask(`${pathOf(chosen())}/gate`, { method: "DELETE" });
  return true;
}

/** The gate and the versions of the chosen one; looked at again while a candidate waits. */
async function showAdapter() {
  clearTimeout(timer);
  const name = chosen();
  try {
    const card = await ask(pathOf(name));
    const gate = card.gated ? await ask(`${pathOf(name)}/gate`) : null;
    if (name !== chosen()) return;
    byId("gate-remove").hidden = gate === null;
    byId("gate-told").textContent = gate === null ? `${name} has no gate: each new version is current at once.` : wordsOf(gate);
    const focused = document.activeElement?.dataset?.version;
    byId("gate-versions").replaceChildren(...versionsView(card, gate));
    if (focused !== undefined) byId("gate-versions").querySelector(`[data-version="${focused}"]`)?.focus();
    const isWaiting = card.versions.some(({ standing, version }) => standing === "candidate" && version > card.version);
    if (isWaiting && gate !== null && !byId("evaluations").hidden) timer = setTimeout(showAdapter, AGAIN_MS);
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    tell(byId("gate-said"), error.message, true);
  }
}

function wordsOf({ task, min_score: least, must_keep: kept }) {
  const drop = kept ? `, and at most ${kept.max_drop} less than the current version at ${count(kept.num_items, "item")} (${short(kept.digest)})` : "";
  return `New versions must score ${least} at ${count(task.num_items, "item")} (${short(task.digest)})${drop}.`;
}

function versionsView(card, gate) {
  const newest = card.versions.toReversed();
  const rows = newest.flatMap((version) => {
    const scores = version.scores.length ? version.scores : [null];
    return scores.map((score, index) => [
      index ? "" : String(version.version),
      index ? "" : standingOf(card, version),
      score ? short(score.task) : "–",
      ...(score ? cellsOf(score, gate?.task.digest === score.task ? gate.min_score : null) : ["–", "", ""]),
      score ? moment(score.ended) : "",
    ]);
  });
  const reasons = newest.filter(({ verdict }) => verdict?.reason).map(({ version, verdict }) => element("li", {}, `${card.name}@${version}: ${verdict.reason}`));
  return [
    scroll("Versions over time", table(`What the versions of ${card.name} scored`, COLUMNS, rows)),
    reasons.length ? element("ul", { class: "warnings" }, reasons) : null,
  ].filter(Boolean);
}

function standingOf(card, { version, standing }) {
  if (version === card.version) return element("strong", {}, standing ? `current, ${standing}` : "current");
  const use = element("button", {
    type: "button",
    "data-version": String(version),
    "aria-label": `Make version ${version} current`,
    onclick: () => act(`Version ${version} is current.`, () => makeCurrent(card.name, version)),
  }, version < card.version ? "Roll back" : "Promote");
  return element("span", { class: "actions" }, standing ? `${standing} ` : "", use);
}

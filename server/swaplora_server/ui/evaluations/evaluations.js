// Evaluations: tasks asked of several models, watched, and what came of them; and the gates of adapters.

import { ApiError, ask } from "../shared/api.js";
import { confirmed } from "../shared/dialog.js";
import { byId, element, table, tell } from "../shared/dom.js";
import { count, moment, short } from "../shared/format.js";
import { loadModels } from "../shared/models.js";
import { showGate, startGate } from "./gate.js";
import { resultsView } from "./results.js";
import { readTask } from "./task.js";

const COLUMNS = [{ title: "Begun" }, { title: "Task" }, { title: "Models" }, { title: "State" }, { title: "Change" }];
const MOST = 50; // that are listed, the newest
const AGAIN_MS = 1000;
const IDLE_MS = 4000;
let chosen = null; // an id
let isStarted = false;

/** Called when the part is shown; what it returns ends it. */
export function showEvaluations() {
  if (!isStarted) start();
  isStarted = true;
  const ended = new AbortController();
  loadModels().catch(() => {}); // the list below tells of it
  follow(ended.signal);
  showGate();
  return () => ended.abort();
}

function start() {
  byId("evaluation-form").addEventListener("submit", (event) => {
    event.preventDefault();
    begin();
  });
  startGate();
}

async function begin() {
  const said = byId("evaluation-said");
  const button = byId("evaluation-start");
  button.disabled = true;
  try {
    const task = await readTask("evaluation");
    const models = byId("evaluation-models").value.split(",").map((name) => name.trim()).filter(Boolean);
    const stop = byId("evaluation-stop").value;
    const json = { task, models, max_tokens: byId("evaluation-tokens").valueAsNumber, ...(stop ? { stop: [stop] } : {}) };
    const { id } = await ask("v1/evaluations", { method: "POST", json });
    chosen = id;
    tell(said, "It has begun, behind all other requests.");
    await refresh();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    tell(said, `Refused: ${error.message}`, true);
  } finally {
    button.disabled = false;
  }
}

/** Look again and again: often while one runs. */
async function follow(signal) {
  while (!signal.aborted) {
    const isOpen = document.hidden ? false : await refresh(signal);
    await new Promise((resolve) => setTimeout(resolve, isOpen ? AGAIN_MS : IDLE_MS));
  }
}

/** Whether one of them runs or waits. */
async function refresh(signal) {
  try {
    const { data } = await ask(`v1/evaluations?limit=${MOST}`, { signal });
    if (signal?.aborted) return false;
    showList(data);
    await showChosen(data, signal);
    return data.some(({ ended }) => ended === null);
  } catch (error) {
    if (error.name === "AbortError") return false;
    if (!(error instanceof ApiError)) throw error;
    byId("evaluation-list").replaceChildren(element("p", { class: "empty error" }, error.message));
    return false;
  }
}

function showList(evaluations) {
  const focused = document.activeElement?.dataset?.evaluation;
  const none = element("p", { class: "empty" }, "No evaluations yet: begin one above.");
  byId("evaluation-list").replaceChildren(evaluations.length ? table("Evaluations", COLUMNS, evaluations.map(row)) : none);
  if (focused !== undefined) byId("evaluation-list").querySelector(`[data-evaluation="${CSS.escape(focused)}"]`)?.focus();
}

function row(evaluation) {
  const { id, ended } = evaluation;
  const choose = element(
    "button",
    { type: "button", class: "link", "data-evaluation": id, "aria-pressed": String(id === chosen), onclick: () => { chosen = id; refresh(); } },
    moment(evaluation.created),
  );
  const end = ended === null ? button("Cancel", evaluation, () => ask(`v1/evaluations/${id}/cancel`, { method: "POST" })) : button("Delete", evaluation, () => forget(id));
  const whose = evaluation.gate === null ? "" : ` (the gate of ${evaluation.gate})`;
  const cells = [
    choose,
    `${count(evaluation.task.num_items, "item")}, ${short(evaluation.task.digest)}`,
    evaluation.models.map(({ model }) => model).join(", ") + whose,
    stateOf(evaluation),
    end,
  ];
  return { cells, class: id === chosen ? "chosen" : null };
}

function stateOf({ state, progress: { done, total } }) {
  if (state !== "running" && state !== "queued") return state;
  return element("span", { class: "nowrap" }, element("progress", { max: String(total), value: String(done), "aria-label": `${state}, ${done} of ${total}` }), ` ${done} of ${total}`);
}

function button(label, { id, created }, act) {
  return element("button", {
    type: "button",
    class: "quiet",
    "data-evaluation": `${label} ${id}`,
    "aria-label": `${label} the evaluation of ${moment(created)}`,
    onclick: async () => {
      try {
        await act();
        await refresh();
      } catch (error) {
        if (!(error instanceof ApiError)) throw error;
        tell(byId("evaluation-said"), error.message, true);
      }
    },
  }, label);
}

async function forget(id) {
  if (!(await confirmed("Delete this evaluation?", "What came of it will be gone for good.", "Delete"))) return;
  await ask(`v1/evaluations/${id}`, { method: "DELETE" });
  if (chosen === id) chosen = null;
}

let shown = null; // what the view below is of: it is made anew only if that has changed
let last = null; // the evaluation that it shows

async function showChosen(evaluations, signal) {
  chosen ??= evaluations.at(0)?.id ?? null;
  const listed = evaluations.find(({ id }) => id === chosen);
  const mayBeOlder = !listed && chosen !== null && evaluations.length === MOST;
  if (mayBeOlder && last?.id === chosen && last.ended !== null) return;
  const whole = mayBeOlder ? await asked(chosen, signal) : null;
  const found = listed ?? whole;
  const now = found ? JSON.stringify([chosen, found.state, found.progress]) : null;
  if (now === shown && now !== null) return;
  shown = now;
  last = found ? (whole ?? (await ask(`v1/evaluations/${chosen}`, { signal }))) : null;
  const view = last ? resultsView(last) : [element("p", { class: "empty" }, "What came of an evaluation is shown here.")];
  if (!signal?.aborted) byId("evaluation").replaceChildren(...view);
}

/** One that is older than those that are listed; null once it is gone. */
async function asked(id, signal) {
  try {
    return await ask(`v1/evaluations/${id}`, { signal });
  } catch (error) {
    if (error instanceof ApiError && error.status === 404) return null;
    throw error;
  }
}

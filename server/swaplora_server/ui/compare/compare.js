// Compare: one prompt, two to six answerers side by side.

import { ApiError } from "../shared/api.js";
import { byId, tell } from "../shared/dom.js";
import { loadModels } from "../shared/models.js";
import { Answer } from "./answer.js";

const MOST = 6; // as many connections as browsers have to one server
const LEAST = 2;
const LEGENDS = {
  plain: "",
  difference: "underlined: not in the first answer",
  probability: "stronger colour: less likely; click a token, or use the arrow keys",
};
const answers = [];
let running = null; // what stops the run
let isStarted = false;

/** Called when the part is shown. */
export function showCompare() {
  if (!isStarted) start();
  isStarted = true;
  fill();
}

/** Put a model among the answerers: in an empty place, or a new one. */
export function addAnswerer(model) {
  const free = answers.find((answer) => answer.model === "");
  if (free) free.name.value = model;
  else if (answers.length < MOST) add(model);
  else answers.at(-1).name.value = model;
}

function start() {
  byId("compare-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) running.abort();
    else run();
  });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("compare-form").requestSubmit();
  });
  byId("add-answerer").addEventListener("click", () => add("").name.focus());
  byId("view").addEventListener("change", showView);
}

/** The models that there are, and answerers to begin with. */
async function fill() {
  tell(byId("compare-failed"), "");
  try {
    const models = await loadModels();
    if (answers.every((answer) => answer.model === "")) models.slice(0, 3).forEach(addAnswerer);
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    tell(byId("compare-failed"), error.message, true);
  }
  while (answers.length < LEAST) add("");
}

function add(model) {
  const answer = new Answer(model, requestFor, () => {
    answers.splice(answers.indexOf(answer), 1);
    answer.node.remove();
    bound();
    byId("add-answerer").focus();
  });
  answers.push(answer);
  byId("answers").append(answer.node);
  bound();
  return answer;
}

function bound() {
  byId("add-answerer").disabled = running !== null || answers.length >= MOST;
  for (const answer of answers) answer.removal.disabled = running !== null || answers.length <= LEAST;
}

/** The request that the form stands for. */
function requestFor(model) {
  const [prompt, system, seed] = ["prompt", "system", "seed"].map((id) => byId(id).value);
  const drawn = { temperature: byId("temperature").valueAsNumber, ...(seed ? { seed: Number(seed) } : {}) };
  const fields = { max_tokens: byId("max-tokens").valueAsNumber, ...drawn };
  if (byId("mode").value === "text") return { path: "v1/completions", body: { model, prompt: (system ? `${system}\n` : "") + prompt, ...fields } };
  const messages = [...(system ? [{ role: "system", content: system }] : []), { role: "user", content: prompt }];
  return { path: "v1/chat/completions", body: { model, messages, ...fields } };
}

async function run() {
  if (!answers.every((answer) => answer.name.reportValidity())) return;
  running = new AbortController();
  busy(true);
  byId("compare-said").textContent = "asking";
  const whole = await Promise.all(answers.map((answer) => answer.run(running.signal))).finally(() => {
    running = null;
    busy(false);
  });
  showView();
  byId("compare-said").textContent = `${whole.filter(Boolean).length} of ${answers.length} have answered`;
}

function busy(isBusy) {
  byId("run").textContent = isBusy ? "Stop" : "Run";
  bound();
}

function showView() {
  const view = document.querySelector("input[name=view]:checked").value;
  byId("legend").textContent = LEGENDS[view];
  answers.forEach((answer, index) => answer.show(view, index ? answers[0] : null));
}

// What came of one evaluation: rates with their intervals, and each two models on the items that both have answered.

import { element, table } from "../shared/dom.js";
import { count, digits } from "../shared/format.js";
import { cellsOf, RATE_COLUMNS } from "./bars.js";

const COLUMNS = [{ title: "Model" }, { title: "Metric" }, { title: "Items", isNumber: true }, ...RATE_COLUMNS];
const PAIRS = [{ title: "First" }, { title: "Second" }, { title: "Items", isNumber: true }, { title: "Only first", isNumber: true }, { title: "Only second", isNumber: true }, { title: "p", isNumber: true }];

/** The nodes of an evaluation. */
export function resultsView(evaluation) {
  const { results, comparisons, progress, task, error, state } = evaluation;
  const rows = results.flatMap((result) => Object.entries(result.metrics).map(([metric, score]) => [nameOf(result), metric, String(score.num), ...cellsOf(score)]));
  const pairs = comparisons.filter(({ num }) => num).map(({ models, num, only_first, only_second, p_value }) => [...models, String(num), String(only_first), String(only_second), digits(p_value)]);
  return [
    element("h3", {}, `${state}: ${progress.done} of ${count(progress.total, "answer")}`),
    error && element("p", { class: "told error" }, `${error.message} (${error.code})`),
    element("p", { class: "muted note" }, `${evaluation.id}, task ${task.digest.slice(0, 19)}, at most ${count(evaluation.max_tokens, "token")}`),
    rows.length ? scroll("Rates", table("Rates of each model", COLUMNS, rows)) : element("p", { class: "empty" }, "Nothing is answered yet."),
    pairs.length ? element("h4", {}, "Items that only one of two got right") : null,
    pairs.length ? scroll("Pairs", table("Each two models", PAIRS, pairs)) : null,
  ].filter(Boolean);
}

const nameOf = ({ model, name, version }) => (name === null || model.includes("@") ? model : `${model} (${version})`);

/** A wide table in a box that scrolls. */
export const scroll = (label, inner) => element("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": label }, inner);

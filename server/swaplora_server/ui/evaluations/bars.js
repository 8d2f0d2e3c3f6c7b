// A rate with its interval, as a bar beside its number.

import { element, shape } from "../shared/dom.js";

const WIDTH = 120;

/** An SVG from 0 to 1: the mean as a bar, the 95 % interval as a line over it, and a mark where a gate wants it to be. */
export function bar({ mean, low, high }, wanted = null) {
  const at = (value) => (value * WIDTH).toFixed(1);
  const mark = wanted === null ? [] : [shape("line", { class: "wanted", x1: at(wanted), x2: at(wanted), y1: 0, y2: 14 })];
  return shape(
    "svg",
    { class: "rate", viewBox: `0 0 ${WIDTH} 14`, "aria-hidden": "true" },
    shape("rect", { class: "whole", x: 0, y: 3, width: WIDTH, height: 8 }),
    shape("rect", { class: "mean", x: 0, y: 3, width: at(mean), height: 8 }),
    shape("line", { class: "interval", x1: at(low), x2: at(high), y1: 7, y2: 7 }),
    ...mark,
  );
}

/** `0.667` */
export const rate = (value) => value.toFixed(3);

/** `0.391 to 0.862` */
export const between = ({ low, high }) => `${rate(low)} to ${rate(high)}`;

/** The cells of a rate: a number, its interval, a bar. */
export const cellsOf = (score, wanted = null) => [rate(score.mean), element("span", { class: "nowrap" }, between(score)), bar(score, wanted)];

/** The columns of these. */
export const RATE_COLUMNS = [{ title: "Mean", isNumber: true }, { title: "95 %" }, { title: "0 to 1" }];

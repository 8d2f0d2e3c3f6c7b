// A small chart of the last minutes: a line, and the number that it ends at.

import { element, shape } from "../shared/dom.js";

const [WIDTH, HEIGHT] = [240, 48];
export const KEPT = 90; // looks

export class Chart {
  #values = [];

  /** `limit` is what is at the top, if that is known; `format` writes a value. */
  constructor(title, format, limit = null) {
    this.format = format;
    this.limit = limit;
    this.value = element("p", { class: "value" }, "–");
    this.note = element("p", { class: "note" });
    this.line = shape("path", { class: "line" });
    this.area = shape("path", { class: "area" });
    const drawing = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" }, this.area, this.line);
    this.node = element("section", { class: "gauge" }, element("h3", {}, title), this.value, drawing, this.note);
  }

  /** One more look. `limit` may have changed, `note` says more. */
  add(value, { limit = this.limit, note = "" } = {}) {
    this.#values = [...this.#values, value].slice(-KEPT);
    this.limit = limit;
    this.value.textContent = this.format(value);
    this.note.textContent = note;
    const top = Math.max(limit ?? 0, ...this.#values) || 1;
    const points = this.#values.map((each, index) => `${((index + KEPT - this.#values.length) * WIDTH) / (KEPT - 1)},${HEIGHT - 1 - (each / top) * (HEIGHT - 2)}`);
    const first = points[0].split(",")[0];
    this.line.setAttribute("d", `M${points.join("L")}`);
    this.area.setAttribute("d", `M${first},${HEIGHT}L${points.join("L")}L${WIDTH},${HEIGHT}Z`);
  }
}

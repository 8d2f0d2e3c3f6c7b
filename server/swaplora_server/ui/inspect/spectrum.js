// A module's singular values, largest first, as bars.

import { shape } from "../shared/dom.js";
import { count, digits } from "../shared/format.js";

const [WIDTH, HEIGHT] = [280, 120];

/** An SVG whose description says the values. */
export function spectrum(values) {
  const most = values[0] || 1;
  const step = WIDTH / values.length;
  const told = values.slice(0, 8).map(digits).join(", ") + (values.length > 8 ? ", …" : "");
  const bars = values.map((value, index) => {
    const height = Math.max(1, (value / most) * HEIGHT);
    const bar = { class: "bar-of", x: index * step, y: HEIGHT - height, width: Math.max(0.5, step - Math.min(2, step / 4)), height };
    return shape("rect", bar, shape("title", {}, `${index + 1}: ${digits(value)}`));
  });
  const label = `${count(values.length, "singular value")}: ${told}`;
  return shape("svg", { class: "spectrum", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label, preserveAspectRatio: "none" }, ...bars);
}

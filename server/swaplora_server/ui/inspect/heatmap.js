// The map: a row for each layer, a column for each module of a layer, stronger in colour where more is done.

import { element } from "../shared/dom.js";
import { digits } from "../shared/format.js";

const NONE = "–"; // the layer of what is outside of all layers
const ORDER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]; // as a layer computes them

/** A module's path as { layer, part }: `model.layers.3.mlp.up_proj` is up_proj of layer 3. */
export function placed(path) {
  const match = /^(?:.*\.)?(\d+)\.(.+)$/.exec(path);
  return match ? { layer: Number(match[1]), part: match[2].replace(/^(self_attn|mlp|attn|attention)\./, "") } : { layer: null, part: path.replace(/^model\./, "") };
}

const rank = (part) => (ORDER.includes(part) ? ORDER.indexOf(part) : ORDER.length);

/**
 * A table of buttons, of which one can be tabbed to and the arrow keys lead to the others. `chosen` is the module that
 * is shown beside it, `choose` is called with another.
 */
export function heatMap(modules, measure, { title, isSigned }, chosen, choose) {
  const cells = modules.map((module) => ({ ...placed(module.module), module, value: module[measure] }));
  const parts = [...new Set(cells.map(({ part }) => part))].toSorted((one, other) => rank(one) - rank(other));
  const layers = [...new Set(cells.map(({ layer }) => layer))].toSorted((one, other) => (one ?? Infinity) - (other ?? Infinity));
  const most = Math.max(...cells.map(({ value }) => Math.abs(value ?? 0)), Number.MIN_VALUE);
  const found = new Map(cells.map((cell) => [`${cell.layer} ${cell.part}`, cell]));
  const rows = layers.map((layer) =>
    parts.map((part) => {
      const cell = found.get(`${layer} ${part}`);
      return cell ? button(cell, most, isSigned, chosen, pick) : null;
    }),
  );
  function pick(target, module) {
    for (const other of rows.flat().filter(Boolean)) {
      other.setAttribute("aria-pressed", String(other === target));
      other.tabIndex = other === target ? 0 : -1;
    }
    target.focus();
    choose(module);
  }
  const body = layers.map((layer, index) =>
    element("tr", {}, element("th", { scope: "row" }, layer === null ? NONE : String(layer)), rows[index].map((each) => element("td", {}, each))),
  );
  return element(
    "table",
    { class: "heat", onkeydown: (event) => move(event, rows) },
    element("caption", {}, `${title}: full colour is ${digits(most)}`),
    element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "layer"), parts.map((part) => element("th", { scope: "col" }, element("span", {}, part))))),
    element("tbody", {}, body),
  );
}

function button({ layer, part, module, value }, most, isSigned, chosen, pick) {
  const isChosen = module === chosen;
  const isKnown = typeof value === "number";
  const words = isKnown ? digits(value) : "not known";
  return element("button", {
    type: "button",
    class: isSigned && value < 0 ? "below" : null,
    tabindex: isChosen ? "0" : "-1",
    "aria-pressed": String(isChosen),
    "aria-label": `${part}${layer === null ? "" : `, layer ${layer}`}: ${words}`,
    title: `${part}${layer === null ? "" : `, layer ${layer}`}: ${words}`,
    "--heat": String(isKnown ? Math.abs(value) / most : 0),
    onclick: ({ currentTarget }) => pick(currentTarget, module),
  });
}

function move(event, rows) {
  const by = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
  if (!by) return;
  event.preventDefault();
  let row = rows.findIndex((each) => each.includes(event.target));
  let column = rows[row]?.indexOf(event.target);
  do {
    row += by[0];
    column += by[1];
  } while (rows[row]?.[column] === null);
  rows[row]?.[column]?.click();
}

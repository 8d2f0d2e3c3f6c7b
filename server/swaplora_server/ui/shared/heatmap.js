// A map: rows by columns, stronger in colour where the value is larger.

import { element } from "./dom.js";

/**
 * A table of buttons, of which one can be tabbed to and the arrow keys lead to the others. `rows` and `columns` are
 * { key, title } in order, `cells` { row, column, words, value, item }: `words` is how a cell is called, `value` null
 * where it is not known, and full colour is `most`. `chosen` is the item of the cell that is shown beside the map,
 * `choose` is called with another.
 */
export function heatMap({ caption, corner, rows, columns, cells, most, isSigned = false }, chosen, choose) {
  const found = new Map(cells.map((cell) => [`${cell.row} ${cell.column}`, cell]));
  let current = null;
  const pick = (target, item) => {
    if (current) press(current, false);
    current = press(target, true);
    target.focus();
    choose(item);
  };
  const made = (cell) => {
    const button = buttonOf(cell, most, isSigned, pick);
    if (cell.item === chosen) current = press(button, true);
    return button;
  };
  const buttons = rows.map((row) =>
    columns.map((column) => {
      const cell = found.get(`${row.key} ${column.key}`);
      return cell ? made(cell) : null;
    }),
  );
  return element(
    "table",
    { class: "heat", onkeydown: (event) => move(event, buttons) },
    element("caption", {}, caption),
    element("thead", {}, element("tr", {}, element("th", { scope: "col" }, corner), columns.map(({ title }) => element("th", { scope: "col" }, element("span", {}, title))))),
    element("tbody", {}, rows.map(({ title }, index) => element("tr", {}, element("th", { scope: "row" }, title), buttons[index].map((each) => element("td", {}, each))))),
  );
}

function press(button, isChosen) {
  button.setAttribute("aria-pressed", String(isChosen));
  button.tabIndex = isChosen ? 0 : -1;
  return button;
}

function buttonOf({ words, value, item }, most, isSigned, pick) {
  return element("button", {
    type: "button",
    class: isSigned && value < 0 ? "below" : null,
    tabindex: "-1",
    "aria-pressed": "false",
    "aria-label": words,
    title: words,
    "--heat": String(value === null ? 0 : Math.abs(value) / most),
    onclick: ({ currentTarget }) => pick(currentTarget, item),
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

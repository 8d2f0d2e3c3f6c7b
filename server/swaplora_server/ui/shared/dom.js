// Elements. What comes from a server is only ever text here, and never markup.

/** The element with an id that the page has. */
export const byId = (id) => document.getElementById(id);

/** A new element: attributes, listeners (`onclick`), properties of an own name (`value`, `checked`, …), children. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) set(made, name, value);
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

/** The same for SVG. */
export function shape(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function set(made, name, value) {
  if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
  else if (name.startsWith("--")) made.style.setProperty(name, value);
  else if (["value", "checked", "disabled", "hidden", "htmlFor"].includes(name)) made[name] = value;
  else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
}

/** Say something below a form: plain, or as an error, which readers of screens hear at once. */
export function tell(place, text, isError = false) {
  place.classList.toggle("error", isError);
  place.setAttribute("role", isError ? "alert" : "status");
  place.textContent = text;
}

/** A table whose cells are texts or nodes; `columns` are { title, isNumber }. */
export function table(caption, columns, rows) {
  const kind = (index) => (columns[index].isNumber ? "number" : null);
  return element(
    "table",
    {},
    element("caption", { class: "hidden" }, caption),
    element("thead", {}, element("tr", {}, columns.map(({ title }, index) => element("th", { scope: "col", class: kind(index) }, title)))),
    element(
      "tbody",
      {},
      rows.map((row) => {
        const { cells, ...attributes } = Array.isArray(row) ? { cells: row } : row;
        return element("tr", attributes, cells.map((cell, index) => element("td", { class: kind(index) }, cell)));
      }),
    ),
  );
}

// What the tokens of one prompt take of a mixture: a map of layers by tokens for each member.

import { ApiError, ask } from "../shared/api.js";
import { byId, element, tell } from "../shared/dom.js";
import { digits } from "../shared/format.js";
import { heatMap } from "../shared/heatmap.js";
import { layerRows, placed } from "../shared/modules.js";

let mixture = null; // its name
let asking = null;

export function startTrace() {
  byId("trace-form").addEventListener("submit", (event) => {
    event.preventDefault();
    asking?.abort();
    asking = new AbortController();
    look(asking.signal);
  });
}

/** Have prompts traced through this mixture from now on; none where it is null. */
export function traceOf(name) {
  if (name === mixture) return;
  asking?.abort();
  mixture = name;
  byId("trace").hidden = name === null;
  byId("trace-title").textContent = `What tokens take of ${name}`;
  byId("trace-view").replaceChildren();
  tell(byId("trace-said"), "");
}

async function look(signal) {
  const said = byId("trace-said");
  tell(said, "looking");
  try {
    const json = { prompt: byId("trace-prompt").value };
    const found = await ask(`v1/mixtures/${encodeURIComponent(mixture)}/trace`, { method: "POST", json, signal });
    tell(said, "");
    byId("trace-view").replaceChildren(...view(found));
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!(error instanceof ApiError)) throw error;
    tell(said, `Refused: ${error.message}`, true);
  }
}

function view({ members, tokens, modules }) {
  const side = element("aside", { class: "module", role: "region", "aria-live": "polite", "aria-label": "The chosen token" });
  const map = element("div", { class: "map tokens" });
  const cells = cellsOf(members, tokens, modules);
  const chosen = { cell: cells[0] };
  const choose = (cell) => {
    chosen.cell = cell;
    side.replaceChildren(...cellView(cell, members));
  };
  const show = (member) => map.replaceChildren(heatMap(mapOf(members, tokens, cells, member), chosen.cell, choose));
  const choices = members.map((name, member) =>
    element("label", {}, element("input", { type: "radio", name: "member", value: String(member), checked: member === 0, onchange: () => show(member) }), ` ${name}`),
  );
  choose(chosen.cell);
  show(0);
  return [element("fieldset", { class: "choice" }, element("legend", {}, "Show"), choices), element("div", { class: "split-view" }, map, side)];
}

/** Of each layer and token: what it takes of each member, as a mean over the layer's modules, and at each of these. */
function cellsOf(members, tokens, modules) {
  const layers = Map.groupBy(modules, ({ layer }) => layer);
  return [...layers].flatMap(([layer, inside]) =>
    tokens.map(({ text }, token) => {
      const taken = inside.map(({ module, members: numbers, shares }) => ({ part: placed(module).part, of: numbers[token].map((member, place) => ({ member, share: shares[token][place] })) }));
      const means = members.map(() => 0);
      for (const { member, share } of taken.flatMap(({ of }) => of)) means[member] += share / inside.length;
      return { layer, token, title: `${JSON.stringify(text)}${layer === null ? "" : `, layer ${layer}`}`, taken, means };
    }),
  );
}

function mapOf(members, tokens, cells, member) {
  return {
    caption: `what each token takes of ${members[member]}, as a mean over a layer's modules: full colour is all`,
    corner: "layer",
    rows: layerRows(cells.map(({ layer }) => layer)),
    columns: tokens.map(({ text }, token) => ({ key: token, title: text })),
    cells: cells.map((cell) => ({ row: cell.layer, column: cell.token, words: `${cell.title}: ${listed(cell.means, members)}`, value: cell.means[member], item: cell })),
    most: 1,
  };
}

const listed = (means, members) => members.map((name, member) => `${name} ${digits(means[member])}`).join(", ");

function cellView({ title, taken, means }, members) {
  const said = (of) => of.map(({ member, share }) => `${members[member]} ${digits(share)}`).join(", ");
  return [
    element("h3", {}, title),
    element("p", {}, listed(means, members)),
    element("dl", {}, taken.flatMap(({ part, of }) => [element("dt", {}, part), element("dd", {}, said(of))])),
  ];
}

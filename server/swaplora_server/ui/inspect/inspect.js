// Inspect: what an adapter does to each module, beside another one if wanted.

import { allCards, ApiError, ask } from "../shared/api.js";
import { byId, element, tell } from "../shared/dom.js";
import { count, digits } from "../shared/format.js";
import { heatMap } from "../shared/heatmap.js";
import { namesOf, suggest } from "../shared/models.js";
import { inOrder, layerRows, placed } from "../shared/modules.js";
import { spectrum } from "./spectrum.js";

// what can be shown of each module: how it is called, and whether 0 is in the middle
const MEASURES = {
  relative_norm: { title: "norm over the base's" },
  norm: { title: "norm" },
  effective_rank: { title: "effective rank" },
  intruders: { title: "intruder dimensions" },
  cosine: { title: "cosine with the other", isSigned: true },
};
let isStarted = false;
let asking = null;
let wanted = ""; // what the next look is to begin with

/** Called when the part is shown; what it returns ends it. */
export function showInspect() {
  if (!isStarted) byId("inspect-form").addEventListener("submit", submitted);
  isStarted = true;
  fill();
  if (wanted) {
    byId("inspect-name").value = wanted;
    wanted = "";
    byId("inspect-form").requestSubmit();
  } else if (!byId("inspection").hasChildNodes()) {
    byId("inspection").append(element("p", { class: "empty" }, "Choose an adapter, or one version as name@2, to see what it does to each module."));
  }
  return () => asking?.abort();
}

/** Have the part look at an adapter when it is shown next. */
export function inspectNext(name) {
  wanted = name;
}

async function fill() {
  try {
    suggest("adapter-names", namesOf(await allCards()));
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    tell(byId("inspect-said"), error.message, true);
  }
}

function submitted(event) {
  event.preventDefault();
  asking?.abort();
  asking = new AbortController();
  look(asking.signal);
}

async function look(signal) {
  const [name, against] = ["inspect-name", "inspect-against"].map((id) => byId(id).value.trim());
  const query = new URLSearchParams({ ...(against ? { against } : {}), ...(byId("inspect-intruders").checked ? { intruders: "true" } : {}) });
  tell(byId("inspect-said"), "looking");
  byId("inspection").setAttribute("aria-busy", "true");
  try {
    const found = await ask(`v1/adapters/${encodeURIComponent(name)}/inspect?${query}`, { signal });
    tell(byId("inspect-said"), "");
    byId("inspection").replaceChildren(...view(found));
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!(error instanceof ApiError)) throw error;
    tell(byId("inspect-said"), error.message, true);
  } finally {
    byId("inspection").removeAttribute("aria-busy");
  }
}

function view(found) {
  const measures = Object.keys(MEASURES).filter((measure) => found.modules.some((module) => typeof module[measure] === "number"));
  const side = element("aside", { class: "module", role: "region", "aria-live": "polite", "aria-label": "The chosen module" });
  const map = element("div", { class: "map" });
  const chosen = { module: null };
  const choose = (module) => {
    chosen.module = module;
    side.replaceChildren(...moduleView(module));
  };
  const show = (measure) => map.replaceChildren(heatMap(mapOf(found.modules, measure), chosen.module, choose));
  const choices = measures.map((measure, index) =>
    element("label", {}, element("input", { type: "radio", name: "measure", value: measure, checked: index === 0, onchange: () => show(measure) }), ` ${MEASURES[measure].title}`),
  );
  if (measures.length) {
    choose(strongest(found.modules, measures[0]));
    show(measures[0]);
  }
  return [
    element("h2", {}, `${found.name}@${found.version}`),
    summary(found),
    element("fieldset", { class: "choice" }, element("legend", {}, "Show"), choices),
    element("div", { class: "split-view" }, map, side),
    notes(found.warnings),
  ].filter(Boolean);
}

function mapOf(modules, measure) {
  const { title, isSigned } = MEASURES[measure];
  const places = modules.map((module) => ({ ...placed(module.module), module, value: typeof module[measure] === "number" ? module[measure] : null }));
  const most = Math.max(...places.map(({ value }) => Math.abs(value ?? 0)), Number.MIN_VALUE);
  return {
    caption: `${title}: full colour is ${digits(most)}`,
    corner: "layer",
    rows: layerRows(places.map(({ layer }) => layer)),
    columns: inOrder(places.map(({ part }) => part)).map((part) => ({ key: part, title: part })),
    cells: places.map(({ layer, part, module, value }) => ({ row: layer, column: part, words: `${titleOf(layer, part)}: ${value === null ? "not known" : digits(value)}`, value, item: module })),
    most,
    isSigned,
  };
}

const titleOf = (layer, part) => (layer === null ? part : `${part}, layer ${layer}`);

const strongest = (modules, measure) => modules.reduce((most, module) => ((module[measure] ?? 0) > (most[measure] ?? 0) ? module : most));

function summary({ modules, against }) {
  const whole = Math.hypot(...modules.map((module) => module.norm));
  const told = [count(modules.length, "module"), `norm ${digits(whole)} in all`];
  if (modules.some((module) => "intruders" in module)) {
    told.push(count(modules.reduce((sum, module) => sum + (module.intruders ?? 0), 0), "intruder dimension"));
  }
  if (against) told.push(`cosine with ${against.name}@${against.version}: ${against.cosine === null ? "none, one changes nothing" : digits(against.cosine)}`);
  return element("p", { class: "muted" }, told.join(" · "));
}

function moduleView(module) {
  const { layer, part } = placed(module.module);
  const facts = {
    rank: module.rank,
    "effective rank": module.effective_rank,
    norm: module.norm,
    "over the base's": module.relative_norm,
    "largest value": module.spectral_norm,
    intruders: module.intruders,
    cosine: module.cosine,
  };
  const known = Object.entries(facts).filter(([, value]) => typeof value === "number");
  return [
    element("h3", {}, titleOf(layer, part)),
    spectrum(module.singular_values),
    element("dl", {}, known.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, digits(value))])),
  ];
}

function notes(warnings) {
  if (!warnings.length) return null;
  return element("details", { class: "notes" }, element("summary", {}, count(warnings.length, "remark")), element("ul", { class: "warnings" }, warnings.map((text) => element("li", {}, text))));
}

// Aliases: names that lead to a version, or split their traffic between several by weight.

import { ApiError, ask } from "../shared/api.js";
import { confirmed } from "../shared/dialog.js";
import { byId, element, tell } from "../shared/dom.js";
import { canaryFields } from "./canary.js";

const FULL = 100;
let onChange = () => {};
let numMade = 0;

/** `refresh` is called after each change. */
export function startAliases(refresh) {
  onChange = refresh;
  byId("alias-new").addEventListener("click", () => openNew("", [{ target: "", weight: FULL }]));
}

/** A new alias between the versions of a card, of which the current one has all the traffic. */
export function splitBetween(card) {
  const targets = card.versions.map(({ version }) => ({ target: `${card.name}@${version}`, weight: version === card.version ? FULL : 0 }));
  openNew(`${card.name}-live`, targets);
}

/** Every alias there is, anew. */
export async function showAliases() {
  try {
    const { data } = await ask("v1/aliases");
    const none = element("p", { class: "empty" }, "No aliases. One can split its traffic between versions.");
    byId("aliases").replaceChildren(...(data.length ? data.map(({ alias, targets, canary }) => editor(alias, targets, false, canary)) : [none]));
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    byId("aliases").replaceChildren(element("p", { class: "empty error" }, error.message));
  }
}

function openNew(alias, targets) {
  byId("aliases").querySelector(".new, .empty")?.remove();
  const made = editor(alias, targets, true);
  byId("aliases").prepend(made);
  made.querySelector("input").focus();
}

/** A form for one alias: a slider for each target. */
function editor(alias, targets, isNew, canary = null) {
  const name = element("input", { value: alias, required: true, maxlength: "256", spellcheck: "false", autocomplete: "off", "aria-label": "Alias" });
  const sides = element("div", { class: "sides" });
  const fields = canaryFields(canary, () => targetsOf(sides));
  const tellShares = () => {
    const rows = [...sides.children];
    const whole = rows.reduce((sum, row) => sum + weightOf(row), 0);
    for (const row of rows) row.querySelector("output").textContent = whole ? `${Number(((100 * weightOf(row)) / whole).toFixed(1))} %` : "–";
    fields.offer();
  };
  const addSide = (target) => {
    sides.append(side(target, tellShares));
    tellShares();
  };
  targets.forEach(addSide);
  const act = (work) => async (event) => {
    event.preventDefault();
    try {
      const words = await work();
      if (words === null) return;
      await onChange();
      tell(byId("aliases-said"), words);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      tell(byId("aliases-said"), error.message, true);
    }
  };
  return element(
    "form",
    { class: isNew ? "alias new" : "alias", onsubmit: act(() => save(isNew ? name.value.trim() : alias, targetsOf(sides), fields.read())) },
    isNew ? name : element("h3", {}, alias),
    sides,
    ...fields.nodes,
    element(
      "div",
      { class: "actions" },
      element("button", { type: "button", class: "quiet", onclick: () => addSide({ target: "", weight: 0 }) }, "Add target"),
      element("span", { class: "spring" }),
      isNew
        ? element("button", { type: "button", class: "quiet", onclick: () => showAliases() }, "Cancel")
        : element("button", { type: "button", class: "quiet danger", "aria-label": `Delete alias ${alias}`, onclick: act(() => remove(alias)) }, "Delete"),
      fields.warning,
      element("button", { class: "primary" }, "Save"),
    ),
  );
}

function side({ target, weight }, onChanged) {
  numMade += 1;
  const id = `weight-${numMade}`;
  return element(
    "div",
    { class: "side" },
    element("input", { class: "target", value: target, list: "models", required: true, maxlength: "256", spellcheck: "false", autocomplete: "off", "aria-label": "Target", placeholder: "name or name@version", oninput: onChanged }),
    element("input", { type: "range", id, min: "0", max: String(Math.max(FULL, weight)), value: String(weight), "aria-label": `Weight of ${target || "this target"}`, oninput: onChanged }),
    element("output", { for: id }),
    element("button", { type: "button", class: "quiet", "aria-label": `Remove ${target || "this target"}`, title: "Remove", onclick: ({ target: button }) => { button.closest(".side").remove(); onChanged(); } }, "×"),
  );
}

const pathOf = (alias) => `v1/aliases/${alias.split("/").map(encodeURIComponent).join("/")}`; // an alias may have slashes

const weightOf = (row) => row.querySelector("[type=range]").valueAsNumber;

const targetsOf = (sides) => [...sides.children].map((row) => ({ target: row.querySelector(".target").value.trim(), weight: weightOf(row) }));

async function save(alias, targets, canary) {
  await ask(pathOf(alias), { method: "PUT", json: { targets, ...canary } });
  return `${alias} is saved: requests from now on follow it.`;
}

async function remove(alias) {
  if (!(await confirmed(`Delete the alias ${alias}?`, "What it leads to stays.", "Delete"))) return null;
  await ask(pathOf(alias), { method: "DELETE" });
  return `${alias} is deleted.`;
}

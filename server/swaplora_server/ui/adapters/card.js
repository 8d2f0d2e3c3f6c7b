// One adapter: its facts, its versions, and what can be done with it.

import { ApiError, ask } from "../shared/api.js";
import { confirmed } from "../shared/dialog.js";
import { element, table, tell } from "../shared/dom.js";
import { bytes, count, moment, short } from "../shared/format.js";
import { goTo } from "../shared/parts.js";
import { addAnswerer } from "../compare/compare.js";
import { inspectNext } from "../inspect/inspect.js";
import { makeCurrent } from "../shared/current.js";
import { splitBetween } from "./aliases.js";
import { share } from "./share.js";

const COLUMNS = [{ title: "Version", isNumber: true }, { title: "Digest" }, { title: "Made" }, { title: "Size", isNumber: true }, { title: "Gate" }, { title: "Change" }];

/** The nodes of a card; `refresh` is called after each change. */
export function cardView(card, refresh) {
  const said = element("p", { class: "told", role: "status" });
  const path = `v1/adapters/${encodeURIComponent(card.name)}`;

  /** A button that asks for something, and tells what came of it. */
  const action = (label, done, act, attributes = {}) =>
    element("button", {
      type: "button",
      ...attributes,
      onclick: async ({ target }) => {
        target.disabled = true;
        tell(said, `${label} …`);
        try {
          const words = await act();
          if (words !== false) {
            await refresh();
            tell(document.querySelector("#card .told") ?? said, words ?? done);
          } else tell(said, "");
        } catch (error) {
          if (!(error instanceof ApiError)) throw error;
          tell(said, error.message, true);
        }
        target.disabled = false;
      },
    }, label);

  const isOwn = card.shared_with !== null; // else another tenant's, which may be asked and no more
  const pin = card.pinned
    ? action("Unpin", "no longer kept in memory", () => change(path, { pinned: false }))
    : action("Pin", "kept in memory", () => change(path, { pinned: true }));
  const warm = action("Warm", "in memory", () => ask(`${path}/warm`, { method: "POST" }).then(() => "in memory"));
  const shared = action("Share", "", () => share(card));
  const remove = action("Delete", "", () => removeAll(card, path), { class: "danger" });
  return [
    element("h2", {}, card.name),
    element("div", { class: "actions" }, ...(isOwn ? [pin] : []), warm, ...links(card, isOwn), element("span", { class: "spring" }), ...(isOwn ? [shared, remove] : [])),
    said,
    warnings(card),
    facts(card),
    versions(card, path, isOwn && action),
  ].filter(Boolean);
}

const change = (path, json) => ask(path, { method: "PATCH", json }).then(() => undefined);

function links(card, isOwn) {
  const to = (label, part, act) =>
    element("button", { type: "button", onclick: () => { act(); goTo(part); } }, label);
  const compare = to("Compare", "compare", () => addAnswerer(card.name));
  return isOwn ? [compare, to("Inspect", "inspect", () => inspectNext(card.name))] : [compare];
}

async function removeAll(card, path) {
  const text = `${card.name} and its ${count(card.versions.length, "version")} will be gone for good. Requests that run end on what they hold.`;
  if (!(await confirmed(`Delete ${card.name}?`, text, "Delete"))) return false;
  const { state } = await ask(`${path}?timeout=2`, { method: "DELETE" });
  return `${card.name} is ${state}`;
}

function warnings(card) {
  const told = [...card.warnings];
  if (card.reason) told.unshift(`It cannot be used: ${card.reason}`);
  if (card.last_failure) told.push(`It could not be replaced: ${card.last_failure.reason}`);
  return told.length ? element("ul", { class: "warnings" }, told.map((text) => element("li", {}, text))) : null;
}

function facts(card) {
  const known = {
    kind: card.kind.join(", "),
    rank: String(card.rank),
    targets: card.targets.join(", "),
    parameters: card.parameters.toLocaleString("en"),
    base: card.base,
    source: card.source,
    digest: card.digest,
    ...(card.shared_with?.length ? { "shared with": card.shared_with.map((tenant) => (tenant === "*" ? "everybody" : tenant)).join(", ") } : {}),
    ...(card.provenance ? { "made from": JSON.stringify(card.provenance) } : {}),
  };
  return element("dl", {}, Object.entries(known).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value ?? "–")]));
}

/** Without `action` they are only told. */
function versions(card, path, action) {
  const rows = card.versions.toSorted((one, other) => other.version - one.version).map((version) => ({
    class: version.version === card.version ? "current" : null,
    cells: [
      String(version.version),
      element("code", { title: version.digest }, short(version.digest)),
      moment(version.created),
      bytes(version.bytes),
      version.standing ?? "–",
      version.version === card.version ? "current" : action ? versionActions(card, version.version, path, action) : "",
    ],
  }));
  const split = element("button", { type: "button", onclick: () => splitBetween(card) }, "Split traffic");
  const scroll = element("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Versions" }, table(`Versions of ${card.name}`, COLUMNS, rows));
  return element("section", { class: "versions" }, element("div", { class: "bar" }, element("h3", {}, "Versions"), split), scroll);
}

function versionActions(card, version, path, action) {
  const label = version < card.version ? "Roll back" : "Make current";
  const use = action(label, `version ${version} is current`, async () => ((await makeCurrent(card.name, version)) ? undefined : false), { "aria-label": `${label} to version ${version}` });
  const remove = action(
    "Delete",
    `version ${version} is deleted`,
    async () => {
      if (!(await confirmed(`Delete ${card.name}@${version}?`, "This version will be gone for good.", "Delete"))) return false;
      await ask(`${path}?version=${version}&timeout=2`, { method: "DELETE" });
      return undefined;
    },
    { class: "quiet danger", "aria-label": `Delete version ${version}` },
  );
  return element("span", { class: "actions" }, use, remove);
}

// Adapters: what there is, where it is, and what can be done with it.

import { allCards, ApiError } from "../shared/api.js";
import { byId, element, table } from "../shared/dom.js";
import { ago, bytes } from "../shared/format.js";
import { showAliases, startAliases } from "./aliases.js";
import { cardView } from "./card.js";
import { startUpload } from "./upload.js";

const COLUMNS = [
  { title: "Name" },
  { title: "Version", isNumber: true },
  { title: "Where" },
  { title: "Rank", isNumber: true },
  { title: "Size", isNumber: true },
  { title: "Running", isNumber: true },
  { title: "Last used" },
];
const PLACES = { device: "in memory", host: "beside the GPU", disk: "on disk" };
const AGAIN_MS = 4000;
let cards = [];
let chosen = null; // a name
let isStarted = false;

/** Called when the part is shown; what it returns ends it. */
export function showAdapters() {
  if (!isStarted) start();
  isStarted = true;
  refresh();
  const timer = setInterval(() => document.hidden || refreshList(), AGAIN_MS);
  return () => clearInterval(timer);
}

function start() {
  startUpload(async (card) => {
    chosen = card.name;
    await refresh();
  });
  startAliases(refresh);
  byId("adapter-filter").addEventListener("input", showList);
}

/** Everything, anew. */
async function refresh() {
  await refreshList();
  showCard();
  await showAliases();
}

async function refreshList() {
  try {
    cards = await allCards();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    byId("adapter-list").replaceChildren(element("p", { class: "empty error" }, error.message));
    return;
  }
  showList();
}

function showList() {
  const wanted = byId("adapter-filter").value.trim().toLowerCase();
  const shown = cards.filter((card) => card.name.toLowerCase().includes(wanted));
  if (!shown.length) {
    const why = cards.length ? "None has that in its name." : "No adapters yet: upload one above.";
    byId("adapter-list").replaceChildren(element("p", { class: "empty" }, why));
    return;
  }
  const focused = document.activeElement?.dataset?.adapter;
  byId("adapter-list").replaceChildren(table("Adapters", COLUMNS, shown.map(row)));
  if (focused !== undefined) byId("adapter-list").querySelector(`[data-adapter="${CSS.escape(focused)}"]`)?.focus();
}

function row(card) {
  const name = element(
    "button",
    { type: "button", class: "link", "data-adapter": card.name, "aria-pressed": String(card.name === chosen), onclick: () => choose(card.name) },
    card.name,
  );
  const cells = [
    name,
    String(card.version),
    placeOf(card),
    String(card.rank),
    bytes(card.bytes),
    card.in_flight ? String(card.in_flight) : "–",
    card.shared_with === null ? "–" : card.last_used === null ? "never" : ago(card.last_used),
  ];
  return { cells, class: card.name === chosen ? "chosen" : null };
}

/** Its state in words, with a mark for the eye. */
function placeOf(card) {
  const words = ["resident", "stored"].includes(card.state) ? PLACES[card.tier] : card.state;
  const pinned = card.pinned ? ", pinned" : "";
  return element("span", { class: `place ${card.state === "failed" ? "failed" : card.tier}` }, words + pinned);
}

async function choose(name) {
  chosen = name;
  showList();
  showCard();
}

function showCard() {
  const card = cards.find(({ name }) => name === chosen);
  const empty = element("p", { class: "empty" }, "Choose an adapter to see its versions.");
  byId("card").replaceChildren(...(card ? cardView(card, refresh) : [empty]));
}

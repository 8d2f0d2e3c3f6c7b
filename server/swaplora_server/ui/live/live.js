// Live: what the server is doing, from its metrics, every two seconds while this is looked at.

import { allCards, ApiError, askText } from "../shared/api.js";
import { byId, element, table, tell } from "../shared/dom.js";
import { bytes, count, digits } from "../shared/format.js";
import { Chart } from "./chart.js";
import { Scrape } from "./scrape.js";

const AGAIN_MS = 2000;
const WINDOW = 5; // looks that a rate is over: tokens are counted at the end of their request
const whole = (value) => value.toFixed(0);
const share = (value) => `${digits(100 * value)} %`;
const charts = {
  running: new Chart("Running", whole),
  waiting: new Chart("Waiting", whole),
  tokens: new Chart("Tokens a second", digits),
  requests: new Chart("Requests a second", digits),
  first: new Chart("To the first token", (seconds) => (seconds ? `${digits(1000 * seconds)} ms` : "–")),
  kv: new Chart("KV cache", share, 1),
  adapters: new Chart("Adapter memory", bytes),
  evictions: new Chart("Evictions", whole),
};
const COLUMNS = [
  { title: "Adapter" },
  { title: "Where" },
  { title: "Memory", isNumber: true },
  { title: "Running", isNumber: true },
  { title: "Requests", isNumber: true },
  { title: "Tokens", isNumber: true },
  { title: "There at once", isNumber: true },
  { title: "Evicted", isNumber: true },
];
const PLACES = { device: "in memory", host: "beside the GPU", disk: "on disk" };
let looks = [];

/** Called when the part is shown; what it returns ends it. */
export function showLive() {
  if (!byId("gauges").hasChildNodes()) byId("gauges").append(...Object.values(charts).map(({ node }) => node));
  const ended = new AbortController();
  follow(ended.signal);
  return () => ended.abort();
}

async function follow(signal) {
  while (!signal.aborted) {
    if (!document.hidden) await look(signal);
    await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
  }
}

async function look(signal) {
  try {
    const now = new Scrape(await askText("metrics", { signal }), performance.now());
    looks = [...looks, now].slice(-WINDOW);
    const running = await inFlight(signal);
    if (signal.aborted) return;
    tell(byId("live-said"), "");
    draw(now, looks[0]);
    byId("live-adapters").replaceChildren(adaptersView(now, running));
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!(error instanceof ApiError)) throw error;
    tell(byId("live-said"), error.code === "insufficient_scope" ? "Only a key with the scope metrics:read may see the metrics." : error.message, true);
  }
}

/** Name → requests that run on it, as the cards have it; empty where the key may not see them. */
async function inFlight(signal) {
  try {
    return new Map((await allCards(signal)).map((card) => [card.name, card.in_flight]));
  } catch (error) {
    if (error instanceof ApiError) return new Map();
    throw error;
  }
}

function draw(now, before) {
  const [blocks, free] = [now.sum("swaplora_kv_blocks"), now.sum("swaplora_kv_blocks_free")];
  const [budget, beside] = [now.sum("swaplora_adapter_budget_bytes"), now.sum("swaplora_adapter_host_bytes")];
  const awaited = now.all("vllm:lora_requests_info")[0]?.labels.waiting_lora_adapters;
  charts.running.add(now.sum("swaplora_running_sequences"), { note: "sequences in the batch" });
  charts.waiting.add(now.sum("swaplora_waiting_sequences"), { note: awaited ? `being loaded: ${awaited}` : "sequences in the queue" });
  charts.tokens.add(now.rate("swaplora_generated_tokens_total", before), { note: "of requests that ended" });
  charts.requests.add(now.rate("swaplora_generations_total", before), { note: `${now.sum("swaplora_generations_total")} in all` });
  charts.first.add(meanSince("swaplora_time_to_first_token_seconds", now, before), { note: "mean of the last ten seconds" });
  charts.kv.add(blocks ? (blocks - free) / blocks : 0, { note: `${blocks - free} of ${count(blocks, "block")}` });
  charts.adapters.add(now.sum("swaplora_adapter_resident_bytes"), { limit: budget, note: `of ${bytes(budget)}${beside ? `, ${bytes(beside)} beside the GPU` : ""}` });
  charts.evictions.add(now.sum("swaplora_adapter_evictions_total"), { note: `${count(now.sum("swaplora_preemptions_total"), "preemption")}` });
}

/** The mean of a summary's values between two looks; 0 where there were none. */
function meanSince(name, now, before) {
  const grown = (end) => now.sum(`${name}_${end}`) - before.sum(`${name}_${end}`);
  return grown("count") > 0 ? grown("sum") / grown("count") : 0;
}

function adaptersView(now, running) {
  const names = now.all("swaplora_adapter_bytes").map(({ labels }) => labels.adapter);
  if (!names.length) return element("p", { class: "empty" }, "No adapters yet.");
  const used = names.toSorted((one, other) => now.sum("swaplora_adapter_generations_total", { adapter: other }) - now.sum("swaplora_adapter_generations_total", { adapter: one }) || (one < other ? -1 : 1));
  return table("Adapters in use", COLUMNS, used.map((adapter) => adapterRow(now, adapter, running)));
}

function adapterRow(now, adapter, running) {
  const sum = (name) => now.sum(`swaplora_adapter_${name}`, { adapter });
  const place = now.all("swaplora_adapter_residency").find(({ labels, value }) => labels.adapter === adapter && value)?.labels.tier;
  const [hits, misses] = [sum("hits_total"), sum("misses_total")];
  return [
    adapter,
    element("span", { class: `place ${place}` }, PLACES[place] ?? "–"),
    bytes(sum("bytes")),
    running.has(adapter) ? String(running.get(adapter)) : "–",
    String(sum("generations_total")),
    String(sum("generated_tokens_total")),
    hits + misses ? share(hits / (hits + misses)) : "–",
    String(sum("evictions_total")),
  ];
}

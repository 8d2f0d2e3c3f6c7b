// One answerer: its name, what it answers as it comes, and how fast.

import { ApiError, stream } from "../shared/api.js";
import { showCode } from "../shared/dialog.js";
import { element, tell } from "../shared/dom.js";
import { count, digits } from "../shared/format.js";
import { missingIn } from "./diff.js";
import { PieceReader } from "./pieces.js";
import { asCurl, asPython } from "./snippets.js";

const percent = (logprob) => `${(100 * Math.exp(logprob)).toPrecision(3)} %`;

export class Answer {
  #pieces = [];
  #chosen = -1; // the piece whose likelihood is told
  #view = "plain";
  #missing = null; // for each piece whether the one compared with lacks it

  /** `request` makes { path, body } for a model; `remove` takes this answerer away. */
  constructor(model, request, remove) {
    this.request = request;
    this.name = element("input", { value: model, list: "models", "aria-label": "Answerer", required: true, spellcheck: "false", autocomplete: "off" });
    this.removal = element("button", { type: "button", class: "quiet", onclick: remove, "aria-label": "Remove this answerer", title: "Remove" }, "×");
    this.stats = element("p", { class: "stats" }, "not asked yet");
    this.text = element("div", {
      class: "text",
      tabindex: "0",
      role: "group",
      "aria-label": "Answer",
      onkeydown: (event) => this.#step(event),
      onclick: (event) => this.#choose([...this.text.children].indexOf(event.target)),
    });
    this.detail = element("p", { class: "detail" });
    this.node = element(
      "article",
      { class: "answer" },
      element("header", {}, this.name, this.removal),
      this.stats,
      this.text,
      this.detail,
      element(
        "footer",
        {},
        element("button", { type: "button", class: "quiet", onclick: () => showCode("As curl", asCurl(this.request(this.model))) }, "curl"),
        element("button", { type: "button", class: "quiet", onclick: () => showCode("As Python", asPython(this.request(this.model))) }, "Python"),
      ),
    );
  }

  get model() {
    return this.name.value.trim();
  }

  get texts() {
    return this.#pieces.map((piece) => piece.text);
  }

  /** Ask; what comes is shown at once. True if it came whole; an error is told in its place. */
  async run(signal) {
    const { path, body } = this.request(this.model);
    const asked = performance.now();
    const reader = new PieceReader();
    const said = { who: body.model, first: null, last: null, usage: null, reason: null };
    this.#clear();
    try {
      const wanted = { ...body, stream: true, stream_options: { include_usage: true }, ...logprobsOf(path) };
      for await (const chunk of stream(path, wanted, signal, (headers) => (said.who = headers.get("x-swaplora-adapter") ?? body.model))) {
        said.usage = chunk.usage ?? said.usage;
        for (const choice of chunk.choices) {
          said.reason = choice.finish_reason ?? said.reason;
          const pieces = reader.read(choice);
          if (!pieces.length) continue;
          said.last = performance.now() - asked;
          said.first ??= said.last;
          this.#add(pieces);
          this.#tellSpeed(said);
        }
      }
      this.#tellSpeed(said);
      return true;
    } catch (error) {
      if (error.name === "AbortError") this.stats.textContent += " · stopped";
      else if (error instanceof ApiError) this.#refuse(error);
      else throw error;
      return false;
    }
  }

  /** Show the pieces plain, by likelihood, or those that `other` (an Answer, or null: none) lacks. */
  show(view, other) {
    this.#view = view;
    this.#missing = view === "difference" && other !== null ? missingIn(other.texts, this.texts) : null;
    this.#pieces.forEach((_, index) => this.#mark(this.text.children[index], index)); // behind them may be a refusal
    this.#choose(-1);
    if (this.#missing === null) return;
    const differing = this.#missing.filter(Boolean).length;
    this.detail.textContent = differing ? `${differing} of ${count(this.texts.length, "piece")} not in ${other.model}` : `as ${other.model}`;
  }

  #clear() {
    this.#pieces = [];
    this.#missing = null;
    this.#choose(-1);
    this.text.replaceChildren();
    this.node.classList.remove("failed");
    this.node.setAttribute("aria-busy", "true");
    this.stats.textContent = "waiting";
  }

  #add(pieces) {
    const isAtEnd = this.text.scrollTop + this.text.clientHeight >= this.text.scrollHeight - 4;
    for (const piece of pieces) {
      const node = element("span", { class: piece.isThought ? "thought" : null }, piece.text);
      this.#pieces.push(piece);
      this.#mark(node, this.#pieces.length - 1);
      this.text.append(node);
    }
    if (isAtEnd) this.text.scrollTop = this.text.scrollHeight;
  }

  #mark(node, index) {
    const { logprob } = this.#pieces[index];
    const isUnlikely = this.#view === "probability" && logprob !== null;
    node.classList.toggle("likely", isUnlikely);
    node.style.setProperty("--surprise", isUnlikely ? String(1 - Math.exp(logprob)) : "0");
    node.classList.toggle("missing", Boolean(this.#missing?.[index]));
  }

  #tellSpeed({ who, first, last, usage, reason }) {
    const tokens = usage?.completion_tokens ?? this.#pieces.length;
    const parts = who === this.model ? [] : [who];
    if (first !== null) parts.push(`first after ${first.toFixed(0)} ms`);
    if (tokens > 1 && last > first) parts.push(`${digits(((tokens - 1) * 1000) / (last - first))} tok/s`);
    parts.push(count(tokens, "token"));
    if (usage !== null && reason === "length") parts.push("cut");
    this.stats.textContent = parts.join(" · ");
    if (usage !== null) this.node.removeAttribute("aria-busy");
  }

  #refuse(error) {
    this.node.classList.add("failed");
    this.node.removeAttribute("aria-busy");
    this.stats.textContent = error.status ? `refused: ${error.code}` : "not answered";
    this.text.append(element("span", { class: "refusal" }, error.message));
  }

  /** The arrow keys go from token to token. */
  #step(event) {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by === undefined || this.#view !== "probability" || !this.#pieces.length) return;
    event.preventDefault();
    this.#choose(Math.min(Math.max(this.#chosen + by, 0), this.#pieces.length - 1));
  }

  #choose(index) {
    this.text.children[this.#chosen]?.classList.remove("chosen");
    this.#chosen = this.#view === "probability" && this.#pieces[index] ? index : -1;
    this.text.children[this.#chosen]?.classList.add("chosen");
    const piece = this.#pieces[this.#chosen];
    if (!piece || piece.logprob === null) {
      tell(this.detail, "");
      return;
    }
    const others = (piece.alternatives ?? []).filter(([token]) => token !== piece.text);
    const told = [[piece.text, piece.logprob], ...others].map(([token, logprob]) => `${JSON.stringify(token)} ${percent(logprob)}`);
    tell(this.detail, told.join(", "));
  }
}

/** The fields that ask for the log-probabilities, in the words of the route. */
const logprobsOf = (path) => (path.endsWith("chat/completions") ? { logprobs: true, top_logprobs: 3 } : { logprobs: 3 });

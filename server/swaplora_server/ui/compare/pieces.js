// An answer as it comes: its text, in pieces that know how likely they were.

/** One piece: `text`, its natural logarithm of probability (null: not told), the likeliest in its place. */
const piece = (text, logprob, alternatives, isThought) => ({ text, logprob, alternatives, isThought });

/**
 * Makes pieces of the chunks of a stream. Their texts together are the text that the API gave, always: a token is a
 * piece of its own where the bytes of a chunk's tokens are the chunk's text, and else the chunk is one piece.
 */
export class PieceReader {
  #waiting = []; // tokens whose characters are not whole yet

  /** The pieces of a choice of a chunk. */
  read(choice) {
    const thought = choice.delta?.reasoning_content ?? "";
    const content = choice.delta ? (choice.delta.content ?? "") : choice.text;
    const tokens = [...this.#waiting, ...tokensOf(choice.logprobs)];
    if (!thought && !content) {
      this.#waiting = tokens;
      return [];
    }
    this.#waiting = [];
    const text = thought + content;
    const split = splitByTokens(tokens, Boolean(thought));
    const isWhole = split.map((each) => each.text).join("") === text;
    return isWhole ? split : [piece(text, likelihood(tokens), null, Boolean(thought))];
  }
}

/** Of a chat's or a completion's log-probabilities: { bytes or text, logprob, alternatives }. */
function tokensOf(logprobs) {
  if (logprobs?.content) {
    return logprobs.content.map(({ bytes, logprob, top_logprobs: top }) => ({
      bytes: Uint8Array.from(bytes ?? []),
      logprob,
      alternatives: top.map((other) => [other.token, other.logprob]),
    }));
  }
  return (logprobs?.tokens ?? []).map((token, index) => ({
    bytes: new TextEncoder().encode(token),
    logprob: logprobs.token_logprobs[index],
    alternatives: Object.entries(logprobs.top_logprobs?.[index] ?? {}),
  }));
}

/** A piece for each run of tokens whose bytes end a character. */
function splitByTokens(tokens, isThought) {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  const pieces = [];
  let run = [];
  for (const token of tokens) {
    run.push(token);
    const text = decoder.decode(token.bytes, { stream: true });
    if (!text) continue;
    pieces.push(piece(text, likelihood(run), run.length === 1 ? token.alternatives : null, isThought));
    run = [];
  }
  return pieces;
}

/** Of all of some tokens together. */
function likelihood(tokens) {
  const known = tokens.map((token) => token.logprob).filter((logprob) => typeof logprob === "number");
  return known.length ? known.reduce((sum, logprob) => sum + logprob, 0) : null;
}

// The public API, as any other client asks it: with a key where there is one, and errors by their code.

import { currentKey, wantKey } from "./key.js";

/** An answer that is no success. `code` is stable; 0 is the status of a server that could not be reached. */
export class ApiError extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** The address of a route: below the page's own, so that what a proxy puts before both is kept. */
export const address = (path) => new URL(path, document.baseURI);

/** What the answer's JSON says. Raises ApiError. */
export async function ask(path, { method = "GET", json, signal } = {}) {
  const answer = await send(path, { method, json, signal });
  return answer.json();
}

/** What the answer says, as text. Raises ApiError. */
export async function askText(path, { signal } = {}) {
  const answer = await send(path, { method: "GET", signal });
  return answer.text();
}

/** The answer, and the objects of its server-sent events one by one. Raises ApiError, also for an event of an error. */
export async function* stream(path, json, signal, onAnswer) {
  const answer = await send(path, { method: "POST", json, signal });
  onAnswer(answer.headers);
  for await (const data of events(answer.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(answer.status, event.error.code, event.error.message);
    yield event;
  }
}

async function send(path, request) {
  for (;;) {
    const key = currentKey();
    const answer = await once(path, request, key);
    if (answer.ok) return answer;
    const error = await errorOf(answer.status, await answer.text());
    if (answer.status !== 401 || !(await wantKey(key))) throw error;
  }
}

async function once(path, { method, json, signal }, key) {
  const headers = { ...authorization(key), ...(json === undefined ? {} : { "Content-Type": "application/json" }) };
  const body = json === undefined ? undefined : JSON.stringify(json);
  try {
    return await fetch(address(path), { method, headers, body, signal, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "unreachable", "the server cannot be reached");
  }
}

/** The headers that say who asks. */
const authorization = (key) => (key ? { Authorization: `Bearer ${key}` } : {});

function errorOf(status, text) {
  try {
    const { code, message } = JSON.parse(text).error;
    return new ApiError(status, code, message);
  } catch {
    return new ApiError(status, "unknown", `the server answered ${status}`);
  }
}

async function* events(body) {
  let rest = "";
  for await (const text of body.pipeThrough(new TextDecoderStream())) {
    const parts = (rest + text).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ")) yield part.slice(6);
    }
  }
}

/** PUT a form, with the share that has been sent told on the way. Raises ApiError. */
export async function upload(path, form, onShare) {
  for (;;) {
    const key = currentKey();
    const { status, text } = await sendForm(path, form, onShare, key);
    if (status >= 200 && status < 300) return JSON.parse(text);
    const error = errorOf(status, text);
    if (status !== 401 || !(await wantKey(key))) throw error;
  }
}

function sendForm(path, form, onShare, key) {
  const request = new XMLHttpRequest(); // fetch does not say how much has been sent
  return new Promise((resolve, reject) => {
    request.open("PUT", address(path));
    for (const [name, value] of Object.entries(authorization(key))) request.setRequestHeader(name, value);
    request.upload.onprogress = ({ loaded, total }) => onShare(total ? loaded / total : 0);
    request.onload = () => resolve({ status: request.status, text: request.responseText });
    request.onerror = () => reject(new ApiError(0, "unreachable", "the server ended the upload, or cannot be reached"));
    request.send(form);
  });
}

/** Every card, in order of name. */
export async function allCards(signal) {
  const cards = [];
  for (;;) {
    const after = cards.length ? `&after=${encodeURIComponent(cards.at(-1).name)}` : "";
    const page = await ask(`v1/adapters?limit=1000${after}`, { signal });
    cards.push(...page.data);
    if (!page.has_more) return cards;
  }
}

// The same request as a line of curl, and as a program with openai-python. A key is named, never shown.

import { address } from "../shared/api.js";
import { currentKey } from "../shared/key.js";

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

/** For a POSIX shell. */
export function asCurl({ path, body }) {
  const key = currentKey() ? ` \\\n  -H "Authorization: Bearer $SWAPLORA_API_KEY"` : "";
  return `curl -s ${quoted(address(path).href)} \\\n  -H 'Content-Type: application/json'${key} \\\n  -d ${quoted(JSON.stringify(body))}`;
}

/** For openai-python. */
export function asPython({ path, body }) {
  const key = currentKey() ? `os.environ["SWAPLORA_API_KEY"]` : `"none"`;
  const call = path.endsWith("chat/completions") ? "chat.completions" : "completions";
  const text = call === "completions" ? "choices[0].text" : "choices[0].message.content";
  const fields = Object.entries(body).map(([name, value]) => `    ${name}=${literal(value)},\n`);
  return [
    currentKey() ? "import os\n\n" : "",
    "from openai import OpenAI\n\n",
    `client = OpenAI(base_url=${JSON.stringify(address("v1").href)}, api_key=${key})\n`,
    `answer = client.${call}.create(\n${fields.join("")})\n`,
    `print(answer.${text})\n`,
  ].join("");
}

/** JSON is Python but for three words; a text of it is one of Python's too. */
function literal(value) {
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}: ${literal(each)}`).join(", ")}}`;
}

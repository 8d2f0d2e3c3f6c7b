// Task files: pasted, or chosen from the disk.

import { byId } from "../shared/dom.js";

/** The task of a form, whose fields' ids begin with `name`: of the chosen file, else what was pasted. */
export async function readTask(name) {
  const [file] = byId(`${name}-file`)?.files ?? [];
  return file ? file.text() : byId(`${name}-task`).value;
}

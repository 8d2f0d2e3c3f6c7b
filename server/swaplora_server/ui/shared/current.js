// Which version a name stands for: changed, and by force only where somebody has read why not.

import { ApiError, ask } from "./api.js";
import { confirmed } from "./dialog.js";

/** Let a name stand for a version; false if it has not passed the gate, and was not to be forced. Raises ApiError. */
export async function makeCurrent(name, version) {
  const path = `v1/adapters/${encodeURIComponent(name)}`;
  const json = { current: version };
  const { versions, gated, version: current } = await ask(path);
  const { standing, verdict } = versions.find((each) => each.version === version) ?? {};
  if (!gated || version === current || standing === null || standing === "passed") {
    await ask(path, { method: "PATCH", json });
    return true;
  }
  const why = verdict?.reason ?? "It is not judged yet.";
  if (!(await confirmed(`Make ${name}@${version} current though it has not passed?`, why, "Make it current"))) return false;
  await ask(`${path}?force=true`, { method: "PATCH", json });
  return true;
}

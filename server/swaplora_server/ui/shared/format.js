// Numbers and times for a person to read.

/** `512 B`, `1.5 MiB`. */
export function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; count >= 1024 && unit < units.length - 1; unit += 1) count /= 1024;
  return `${Number(count.toFixed(1))} ${units[unit]}`;
}

/** Three digits: `0.0138`, `2.4`, `1234`. */
export const digits = (value) => (Math.abs(value) >= 100 ? value.toFixed(0) : String(Number(value.toPrecision(3))));

/** `12 s ago`, `3 h ago`, from seconds since 1970. */
export function ago(seconds) {
  const units = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  const passed = Math.max(0, Date.now() / 1000 - seconds);
  const [name, length] = units.find(([, length]) => passed >= length) ?? units.at(-1);
  return `${Math.floor(passed / length)} ${name} ago`;
}

/** `2026-11-27 12:45`, from seconds since 1970. */
export function moment(seconds) {
  const at = new Date(seconds * 1000);
  const two = (number) => String(number).padStart(2, "0");
  return `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())} ${two(at.getHours())}:${two(at.getMinutes())}`;
}

/** `1 token`, `2 tokens`. */
export const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

/** The beginning of a digest. */
export const short = (digest) => digest.replace("sha256:", "").slice(0, 12);

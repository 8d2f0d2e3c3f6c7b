// What /metrics says, as numbers by name and labels.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;
const ESCAPES = { "\\n": "\n", '\\"': '"', "\\\\": "\\" };

/** One look at the server. */
export class Scrape {
  #samples = new Map(); // name → [{ labels, value }]

  constructor(text, at) {
    this.at = at; // milliseconds
    for (const line of text.split("\n")) {
      const match = LINE.exec(line);
      if (!match) continue;
      const labels = Object.fromEntries([...(match[2] ?? "").matchAll(LABEL)].map(([, name, value]) => [name, value.replaceAll(/\\[n"\\]/g, (each) => ESCAPES[each])]));
      const value = Number(match[3].replace("Inf", "Infinity"));
      this.#samples.set(match[1], [...(this.#samples.get(match[1]) ?? []), { labels, value }]);
    }
  }

  /** The series of a name: [{ labels, value }]. */
  all(name) {
    return this.#samples.get(name) ?? [];
  }

  /** The sum of those of a name whose labels are as wanted. */
  sum(name, wanted = {}) {
    const isWanted = ({ labels }) => Object.entries(wanted).every(([label, value]) => labels[label] === value);
    return this.all(name).filter(isWanted).reduce((sum, { value }) => sum + value, 0);
  }

  /** How much a counter has grown in a second since an earlier look; 0 where the server began anew. */
  rate(name, before, wanted) {
    const seconds = (this.at - before.at) / 1000;
    return seconds > 0 ? Math.max(0, this.sum(name, wanted) - before.sum(name, wanted)) / seconds : 0;
  }
}

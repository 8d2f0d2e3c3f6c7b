// Modules of the base: where one stands, and in which order.

const ORDER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]; // as a layer computes them

/** A module's path as { layer, part }: `model.layers.3.mlp.up_proj` is up_proj of layer 3. */
export function placed(path) {
  const match = /^(?:.*\.)?(\d+)\.(.+)$/.exec(path);
  return match ? { layer: Number(match[1]), part: match[2].replace(/^(self_attn|mlp|attn|attention)\./, "") } : { layer: null, part: path.replace(/^model\./, "") };
}

const rank = (part) => (ORDER.includes(part) ? ORDER.indexOf(part) : ORDER.length);

/** The different parts, as a layer computes them. */
export const inOrder = (parts) => [...new Set(parts)].toSorted((one, other) => rank(one) - rank(other));

/** The different layers as rows of a map; what is outside of all layers comes last. */
export const layerRows = (layers) =>
  [...new Set(layers)].toSorted((one, other) => (one ?? Infinity) - (other ?? Infinity)).map((layer) => ({ key: layer, title: layer === null ? "–" : String(layer) }));

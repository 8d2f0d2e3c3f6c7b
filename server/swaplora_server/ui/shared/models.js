// Who can be asked: the names that fields suggest, and the base, which the page's head shows.

import { allCards, ApiError, ask } from "./api.js";
import { byId, element } from "./dom.js";

/** The ids of all models, the base first; fields suggest them from then on, and versions too. Raises ApiError. */
export async function loadModels() {
  const models = (await ask("v1/models")).data.map((model) => model.id);
  byId("base").textContent = models[0];
  suggest("models", [...models, ...(await versionNames())]);
  return models;
}

/** Of adapters that have more than one, where the key may see them. */
async function versionNames() {
  try {
    return namesOf((await allCards()).filter((card) => card.versions.length > 1));
  } catch (error) {
    if (error instanceof ApiError) return [];
    throw error;
  }
}

/** Of each card its name and its versions'. */
export const namesOf = (cards) => cards.flatMap((card) => [card.name, ...card.versions.map(({ version }) => `${card.name}@${version}`)]);

/** Have the fields of a list suggest these names. */
export function suggest(list, names) {
  byId(list).replaceChildren(...[...new Set(names)].map((value) => element("option", { value })));
}

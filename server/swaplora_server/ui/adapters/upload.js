// Uploads: two files chosen or dropped, sent with progress, and what the server says of them.

import { ApiError, upload } from "../shared/api.js";
import { byId, tell } from "../shared/dom.js";
import { bytes } from "../shared/format.js";

const PARTS = { config: "adapter_config.json", weights: "adapter_model.safetensors" };
let chosen = {}; // part → File

/** `onCard` is called with the card of what was uploaded. */
export function startUpload(onCard) {
  byId("upload-files").addEventListener("change", ({ target }) => choose([...target.files], ""));
  const drop = byId("drop");
  drop.addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", async (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    const { files, folder } = await dropped(event.dataTransfer);
    choose(files, folder);
  });
  byId("upload-form").addEventListener("submit", (event) => {
    event.preventDefault();
    send(onCard);
  });
}

/** The files that were dropped, or those in a folder that was, with its name. */
async function dropped({ items, files }) {
  const folder = [...items].map((item) => item.webkitGetAsEntry()).find((entry) => entry?.isDirectory);
  if (!folder) return { files: [...files], folder: "" };
  const entries = await new Promise((resolve, reject) => folder.createReader().readEntries(resolve, reject));
  const inner = entries.filter((entry) => entry.isFile).map((entry) => new Promise((resolve, reject) => entry.file(resolve, reject)));
  return { files: await Promise.all(inner), folder: folder.name };
}

/** The two among some files: by their names, else by their endings if there is one of each. */
function choose(files, folder) {
  const named = (part) => files.find(({ name }) => name === PARTS[part]);
  const ending = (end) => {
    const found = files.filter(({ name }) => name.endsWith(end));
    return found.length === 1 ? found[0] : undefined;
  };
  chosen = { config: named("config") ?? ending(".json"), weights: named("weights") ?? ending(".safetensors") };
  const missing = Object.keys(PARTS).filter((part) => !chosen[part]).map((part) => PARTS[part]);
  const told = Object.values(chosen).filter(Boolean).map(({ name, size }) => `${name} (${bytes(size)})`);
  tell(byId("upload-chosen"), missing.length ? `Missing: ${missing.join(", ")}` : told.join(", "), missing.length > 0);
  tell(byId("upload-said"), "");
  const name = byId("upload-name");
  if (!name.value && folder) name.value = folder;
  name.focus();
}

async function send(onCard) {
  const said = byId("upload-said");
  if (!chosen.config || !chosen.weights) {
    tell(said, "Choose both files first: adapter_config.json and adapter_model.safetensors.", true);
    return;
  }
  const name = byId("upload-name").value;
  const form = new FormData();
  form.append("config", chosen.config);
  form.append("weights", chosen.weights);
  const query = byId("upload-convert").checked ? "?convert=svd" : "";
  const progress = byId("upload-progress");
  busy(true);
  tell(said, "sending");
  try {
    const card = await upload(`v1/adapters/${encodeURIComponent(name)}${query}`, form, (share) => {
      progress.value = share;
      if (share === 1) tell(said, "being checked");
    });
    const isHeld = card.stored.version !== card.version;
    const from = isHeld ? `and ${card.name} stands for version ${card.version} until it has passed the gate` : "and answers from now on";
    tell(said, `${card.name}@${card.stored.version} is stored, ${from}.`);
    chosen = {};
    byId("upload-form").reset();
    tell(byId("upload-chosen"), "");
    onCard(card);
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    tell(said, `Refused: ${error.message}`, true);
  } finally {
    busy(false);
  }
}

function busy(isBusy) {
  byId("upload-start").disabled = isBusy;
  byId("upload-progress").hidden = !isBusy;
  byId("upload-progress").value = 0;
}

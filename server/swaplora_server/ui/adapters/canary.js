// The canary of a split: the side that gets no more requests once too many of its own fail.

import { element } from "../shared/dom.js";
import { moment } from "../shared/format.js";

// the bounds and what is meant unless it is said, as the API has them; the share is shown in percent
const NEW = { max_error_rate: 0.05, min_requests: 20, window_seconds: 300 };

/**
 * The nodes of a form for a canary, or for none where it is null: `offer` is to be called when the sides have changed,
 * which `targetsOf` tells, and `read` gives what a request says of it. `warning` says that saving removes the canary.
 */
export function canaryFields(canary, targetsOf) {
  const { max_error_rate: rate, min_requests: least, window_seconds: seconds } = canary ?? NEW;
  let wanted = canary?.target ?? "";
  const target = element("select", { onchange: () => { wanted = target.value; show(); } });
  const most = number({ min: "0", max: "99.999", step: "any", value: String(Number((100 * rate).toPrecision(12))) });
  const requests = number({ min: "1", max: "1000000", value: String(least) });
  const window = number({ min: "1", max: "86400", step: "any", value: String(seconds) });
  const bounds = element(
    "div",
    { class: "canary" },
    element("label", {}, "More than ", most, " % failed"),
    element("label", {}, "of at least ", requests, " requests"),
    element("label", {}, "in the last ", window, " s"),
  );
  const warning = element("span", { class: "error", role: "status", hidden: true });
  const show = () => {
    warning.hidden = !canary || target.value !== "";
    warning.textContent = warning.hidden ? "" : `Saving removes the canary ${canary.target}.`;
    bounds.hidden = target.value === "";
    for (const field of [most, requests, window]) field.disabled = bounds.hidden; // what is not sent is not checked
  };
  const offer = () => {
    const versions = targetsOf().map((side) => side.target).filter((name) => name.includes("@"));
    const names = [...new Set(versions)];
    target.replaceChildren(element("option", { value: "" }, "none"), ...names.map((name) => element("option", { value: name }, name)));
    target.value = names.includes(wanted) ? wanted : "";
    show();
  };
  const read = () =>
    target.value === ""
      ? {}
      : { canary: { target: target.value, max_error_rate: Number((most.valueAsNumber / 100).toPrecision(12)), min_requests: requests.valueAsNumber, window_seconds: window.valueAsNumber } };
  const state = canary && element("p", { class: canary.stepped_back ? "told error" : "told" }, wordsOf(canary));
  const choice = element("label", {}, "Canary ", target);
  return { nodes: [state, choice, bounds].filter(Boolean), warning, offer, read };
}

const number = (attributes) => element("input", { type: "number", required: true, ...attributes });

const wordsOf = ({ target, stepped_back: at, reason }) =>
  at ? `${target} gets no more requests since ${moment(at)}: ${reason}. Give it a weight again and save to try it once more.` : `${target} is tried: its weight is 0 once too many of its requests fail.`;

// Which part of the page is shown: the address says it after its #.

/** Go to a part. The address alone would move the focus, which whoever uses the keyboard has on a tab. */
export function goTo(part) {
  history.pushState(null, "", `#${part}`);
  dispatchEvent(new HashChangeEvent("hashchange"));
}

// Which pieces of one answer are not in another, in their order: all that a longest common subsequence leaves out.

const MOST = 4_000_000; // pieces of one times pieces of the other: 8 MB, some milliseconds

/** For each text of `ours` whether it is missing in `theirs`; where both are too long, from the first difference on. */
export function missingIn(theirs, ours) {
  const start = sharedStart(theirs, ours);
  const [left, right] = [theirs.slice(start), ours.slice(start)];
  const isMissing = ours.map((_, index) => index >= start);
  if (left.length * right.length > MOST) return isMissing;
  const width = right.length + 1;
  const longest = lengths(left, right, width);
  for (let i = 0, j = 0; i < left.length && j < right.length; ) {
    if (left[i] === right[j]) {
      isMissing[start + j] = false;
      i += 1;
      j += 1;
    } else if (longest[(i + 1) * width + j] >= longest[i * width + j + 1]) i += 1;
    else j += 1;
  }
  return isMissing;
}

function sharedStart(left, right) {
  let start = 0;
  while (start < left.length && start < right.length && left[start] === right[start]) start += 1;
  return start;
}

/** [i, j] → the longest common subsequence of what follows i in `left` and j in `right`. */
function lengths(left, right, width) {
  const longest = new Uint16Array((left.length + 1) * width);
  for (let i = left.length - 1; i >= 0; i -= 1) {
    for (let j = right.length - 1; j >= 0; j -= 1) {
      longest[i * width + j] =
        left[i] === right[j]
          ? longest[(i + 1) * width + j + 1] + 1
          : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
    }
  }
  return longest;
}

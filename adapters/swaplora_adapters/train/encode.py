"""Examples as token ids, and which of these are learnt: answers alone, each with the token that ends it."""

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any

from jinja2 import TemplateError

from swaplora_adapters.train.data import Data, DataError, Example

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # a chat template's own, around what the assistant says


class EncodingError(ValueError):
    """An example of which nothing can be made with this base."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """One example; both lists have the same length."""

    ids: Sequence[int]
    is_learnt: Sequence[bool]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Limit:
    """How many tokens an example may have, and whether the beginning of a longer one is cut off."""

    max_tokens: int
    may_cut: bool


class Encoder:
    """Makes the tokens that a server would see for the same prompts, and then the answer's."""

    def __init__(self, tokenizer: Any, eos_token_ids: Set[int]) -> None:
        """`eos_token_ids` end an answer. Raises EncodingError where none does."""
        if tokenizer.eos_token_id is None:
            raise EncodingError("the base's tokenizer has no end-of-sequence token: an answer would never end")
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids | {tokenizer.eos_token_id}
        self._start = self._ids("", special=True)

    def num_leading(self, ids: Sequence[int]) -> int:
        """How many of the first ids begin any text, as a begin-of-sequence token does."""
        return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(ids, self._start, strict=False))))

    def encode(self, example: Example) -> Tokens:
        """Raises EncodingError."""
        if "messages" in example.fields:
            return self._conversation(example.fields["messages"])
        prompt, completion = example.fields["prompt"], example.fields["completion"]
        ids, (start, _) = self._tokenize(prompt + completion, [len(prompt), len(prompt + completion)], special=True)
        return _tokens([*ids, self._tokenizer.eos_token_id], [range(start, len(ids) + 1)])

    def _conversation(self, messages: Sequence[Mapping[str, str]]) -> Tokens:
        template = self._tokenizer.chat_template
        if template is None:
            raise EncodingError("the base has no chat template: write prompt and completion in the place of messages")
        if not isinstance(template, str):
            if "default" not in template:
                raise EncodingError(
                    f"the base has several chat templates, {', '.join(sorted(template))}, and none is called default: "
                    "write prompt and completion in the place of messages"
                )
            template = template["default"]
        try:
            if _MARKS.search(template):
                return self._marked(messages)
            text = self._render(messages)
            turns = [self._turn(messages, n) for n, message in enumerate(messages) if message["role"] == "assistant"]
        except (TemplateError, TypeError) as error:
            raise EncodingError(f"the chat template refuses it: {error}") from error
        for number, (before, after) in turns:
            if not (text.startswith(after) and after.startswith(before)):
                raise EncodingError(
                    f"the chat template writes the beginning otherwise once messages[{number}] is answered or others "
                    "follow: end the conversation there, and make one of each later answer"
                )
        edges = [len(part) for _, parts in turns for part in parts]
        ids, places = self._tokenize(text, edges, special=False)
        return _tokens(ids, [self._answer(ids, *turn) for turn in zip(places[::2], places[1::2], strict=True)])

    def _marked(self, messages: Sequence[Mapping[str, str]]) -> Tokens:
        """As the template itself says what the assistant's is."""
        found = self._tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, marks = found["input_ids"], list(map(bool, found["assistant_masks"]))
        if not any(mark and token in self._eos_token_ids for token, mark in zip(ids, marks, strict=True)):
            raise EncodingError(_NO_END)
        return Tokens(ids, marks)

    def _turn(self, messages: Sequence[Mapping[str, str]], number: int) -> tuple[int, tuple[str, str]]:
        """The text up to an answer, and up to its end."""
        before = self._render(messages[:number], add_generation_prompt=True)
        return number, (before, self._render(messages[: number + 1]))

    def _render(self, messages: Sequence[Mapping[str, str]], **how: bool) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **how))

    def _answer(self, ids: Sequence[int], start: int, end: int) -> range:
        """Up to the token that ends it: what a template writes behind that is nobody's answer."""
        for place in range(start, end):
            if ids[place] in self._eos_token_ids:
                return range(start, place + 1)
        raise EncodingError(_NO_END)

    def _tokenize(self, text: str, edges: Sequence[int], *, special: bool) -> tuple[list[int], list[int]]:
        """The ids of a text, and how many of them come before each edge.

        What comes before an edge has the ids that it has alone, as a server sees it: where the text as a whole has a
        token across the edge, the two sides are tokenized apart.
        """
        ids, places = self._ids(text[: edges[0]], special=special), []
        for start, end in pairwise([*edges, len(text)]):
            places.append(len(ids))
            longer = self._ids(text[:end], special=special)
            ids = longer if longer[: len(ids)] == ids else ids + self._inner_ids(text[start:end])
        return ids, places

    def _inner_ids(self, text: str) -> list[int]:
        """The ids of a text that others come before: SentencePiece's kind begins a text by a space, and no other."""
        for before in _BEFORE:
            own, both = self._ids(before, special=False), self._ids(before + text, special=False)
            if both[: len(own)] == own and self._tokenizer.unk_token_id not in own:
                return both[len(own) :]
        raise EncodingError(f"the tokenizer makes no tokens of {text[:20]!r} apart from what comes before it")

    def _ids(self, text: str, *, special: bool) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=special)["input_ids"]) if text or special else []


_BEFORE = ("0", "|", "a", "\n")  # of which one at least is in no token with what comes behind it
_NO_END = "the chat template ends the assistant's turn with no end-of-sequence token: an answer would never end"


def encode_all(encoder: Encoder, data: Data, examples: Sequence[Example], limit: Limit) -> tuple[list[Tokens], int]:
    """The tokens of `examples`, which are of `data`, and how many of them had their beginnings cut off.

    Raises DataError naming the lines that cannot be encoded, or are longer than the limit and may not be cut.
    """
    found, reasons, num_cut = [], [], 0
    for example in examples:
        try:
            tokens = encoder.encode(example)
        except EncodingError as error:
            reasons.append(f"line {example.line}: {error}")
            continue
        if tokens.length > limit.max_tokens:
            num_cut += 1
            if not limit.may_cut:
                reasons.append(
                    f"line {example.line} has {tokens.length} tokens and may have {limit.max_tokens}: "
                    "shorten it, or have its beginning cut off (too_long truncate)"
                )
            tokens = _cut(tokens, limit.max_tokens, min(encoder.num_leading(tokens.ids), limit.max_tokens - 1))
        if not any(tokens.is_learnt[1:]):
            reasons.append(f"line {example.line} has no answer in its last {limit.max_tokens} tokens")
        found.append(tokens)
    if reasons:
        raise DataError(data.path, reasons)
    return found, num_cut


def _cut(tokens: Tokens, most: int, kept: int) -> Tokens:
    """The first `kept` tokens, and of the last as many as make `most`."""
    last = tokens.length - (most - kept)
    return Tokens([*tokens.ids[:kept], *tokens.ids[last:]], [*tokens.is_learnt[:kept], *tokens.is_learnt[last:]])


def _tokens(ids: Sequence[int], learnt: Sequence[range]) -> Tokens:
    is_learnt = [False] * len(ids)
    for places in learnt:
        for place in places:
            is_learnt[place] = True
    return Tokens(ids, is_learnt)

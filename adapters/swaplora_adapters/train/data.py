"""A file of examples, a line of JSON each, and the part of them that is held out."""

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swaplora_adapters.errors import InvalidAdapterError
from swaplora_adapters.files import strict_json

SHAPES = (frozenset({"prompt", "completion"}), frozenset({"messages"}))
ROLES = ("system", "user", "assistant", "tool")
MAX_COMPLAINTS = 10
_MAX_LINE_BYTES, _MAX_DEPTH = 1 << 26, 8


class DataError(ValueError):
    """Examples that nothing can be learnt from; `reasons` name the lines."""

    def __init__(self, path: Path, reasons: Sequence[str]) -> None:
        more = len(reasons) - MAX_COMPLAINTS
        listed = [*reasons[:MAX_COMPLAINTS], *([f"and {more} lines more"] if more > 0 else [])]
        self.reasons = tuple(f"{path.name}: {reason}" for reason in listed)
        super().__init__("; ".join(self.reasons))


@dataclass(frozen=True, slots=True)
class Example:
    """What is asked, and what is to be answered: the fields of one line."""

    line: int  # from 1
    fields: Mapping[str, Any]

    @property
    def content(self) -> str:
        """Equal for lines that say the same."""
        return json.dumps(self.fields, sort_keys=True)


@dataclass(frozen=True, slots=True)
class Data:
    """The examples of a file, all of one shape."""

    path: Path
    digest: str  # of the file's bytes
    examples: Sequence[Example]

    @property
    def repeated(self) -> Sequence[int]:
        """The lines that say what a line before them does."""
        first: dict[str, int] = {}
        for example in self.examples:
            first.setdefault(example.content, example.line)
        return [example.line for example in self.examples if first[example.content] != example.line]


@dataclass(frozen=True, slots=True)
class Split:
    """What is learnt and what is held out; nothing is in both unless `num_shared` says so."""

    learnt: Sequence[Example]
    held_out: Sequence[Example]
    num_shared: int = 0


def read_data(path: Path) -> Data:
    """Raises OSError, and DataError for a file without examples, for lines that are none and for two shapes in one."""
    content = path.read_bytes()
    examples, reasons = [], []
    shapes: dict[frozenset[str], int] = {}
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = strict_json.loads(line, what="it", max_bytes=_MAX_LINE_BYTES, max_depth=_MAX_DEPTH)
        except InvalidAdapterError as error:
            reasons.append(f"line {number}: {'; '.join(error.reasons)}")
            continue
        complaint = _complaint(fields)
        if complaint is not None:
            reasons.append(f"line {number}: {complaint}")
            continue
        shapes.setdefault(frozenset(fields), number)
        examples.append(Example(number, fields))
    if len(shapes) > 1:
        where = " and ".join(f"{' with '.join(sorted(shape))} (line {line})" for shape, line in shapes.items())
        reasons.append(f"has lines of two shapes, {where}: make a file of each")
    if not examples and not reasons:
        reasons.append("has no example: each line is one, as JSON")
    if reasons:
        raise DataError(path, reasons)
    return Data(path, f"sha256:{hashlib.sha256(content).hexdigest()}", examples)


def split(data: Data, share: float, seed: int) -> Split:
    """Hold out a share of the different examples, at random by the seed; lines that say the same stay together."""
    contents = list(dict.fromkeys(example.content for example in data.examples))
    num_held_out = round(share * len(contents)) if share else 0
    if share and not 0 < num_held_out < len(contents):
        raise DataError(
            data.path,
            [f"a share of {share:g} of {len(contents)} examples holds out {num_held_out}: give another, or 0"],
        )
    held_out = frozenset(random.Random(seed).sample(contents, num_held_out))
    learnt = [example for example in data.examples if example.content not in held_out]
    return Split(learnt, [example for example in data.examples if example.content in held_out])


def split_by_file(data: Data, others: Data) -> Split:
    """Hold out another file's examples, and say how many of them are learnt as well."""
    learnt = {example.content for example in data.examples}
    return Split(data.examples, others.examples, sum(example.content in learnt for example in others.examples))


def _complaint(fields: object) -> str | None:
    """What is wrong with a line that is JSON."""
    if not isinstance(fields, dict):
        return "it is no object"
    if frozenset(fields) not in SHAPES:
        return f"it has {_listed(fields)}: a line has prompt and completion, or messages, and nothing else"
    if "messages" in fields:
        return next(_complaints_of_messages(fields["messages"]), None)
    if wrong := [name for name, value in fields.items() if not isinstance(value, str)]:
        return f"{' and '.join(wrong)} must be text"
    return None if fields["completion"] else "completion is empty: there is nothing to learn"


def _complaints_of_messages(messages: object) -> Iterator[str]:
    if not isinstance(messages, list) or len(messages) < 2:
        yield "messages must be a list of two or more"
        return
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or frozenset(message) != {"role", "content"}:
            has = f"has {_listed(message)}" if isinstance(message, dict) else "is no object"
            yield f"messages[{number}] {has}: a message has role and content, and nothing else"
        elif message["role"] not in ROLES:
            yield f"messages[{number}].role must be one of {', '.join(ROLES)}"
        elif not isinstance(message["content"], str):
            yield f"messages[{number}].content must be text"
        elif message["role"] == "assistant" and not message["content"]:
            yield f"messages[{number}].content is empty: there is nothing to learn"
    roles = [message["role"] for message in messages if isinstance(message, dict) and "role" in message]
    if roles[-1:] != ["assistant"]:
        yield "the last message must be the assistant's: nothing is learnt of what comes after"
    if roles[:1] == ["assistant"]:
        yield "the first message cannot be the assistant's: an answer follows a question"


def _listed(fields: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, sorted(fields))) or "no keys"

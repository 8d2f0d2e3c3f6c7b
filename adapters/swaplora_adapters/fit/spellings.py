"""Names of tensors as PEFT saves them today, made of all those that it reads as the same, and why it reads others not.

Trainers that save a model's own state keep the adapter's name in them, which is PEFT's "default", and DoRA's vectors as
the weights of a module. On bases whose modules transformers has renamed since version 4, PEFT first brings names up to
date, and on the way also takes those without its prefix (`peft.utils.transformers_weight_conversion`).
"""

import re
from collections.abc import Iterable, Mapping

from swaplora_adapters.errors import InvalidAdapterError
from swaplora_adapters.files.complaints import capped, quoted
from swaplora_adapters.fit.base import LegacyNames

PREFIX = "base_model.model."
_OWN_STATE = re.compile(r"(.+\.lora_(?:A|B|E|embedding_A|embedding_B))\.default(\.weight|\.bias)?")
_VECTOR_NAME = ".lora_magnitude_vector"
_VECTOR = re.compile(rf"(.+{re.escape(_VECTOR_NAME)})(?:\.default)?\.weight")
_OTHER_ADAPTER = re.compile(
    r".+\.lora_(?:A|B|E|embedding_A|embedding_B|magnitude_vector)\.(?!weight|bias|default)([^.]+)(?:\..*)?"
)
_WRAPPERS = re.compile(r"(?:^|\.)(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module|module)\.")


def with_current_spelling(names: Iterable[str], legacy_names: LegacyNames | None) -> Mapping[str, str]:
    """The names in a file by the names that PEFT saves today; InvalidAdapterError where two are one."""
    spelled: dict[str, str] = {}
    complaints = []
    for name in names:
        known = spelled.setdefault(_current_spelling(name, legacy_names), name)
        if known is not name:
            complaints.append(f"{quoted(name)} and {quoted(known)} are two names of one tensor")
    if complaints:
        raise InvalidAdapterError(capped(complaints))
    return spelled


def _current_spelling(name: str, legacy_names: LegacyNames | None) -> str:
    if legacy_names is not None and ".lora_" in name:
        name = PREFIX + legacy_names.renamed(name.removeprefix(PREFIX))
    if ".default" in name and (match := _OWN_STATE.fullmatch(name)):
        return match[1] + (match[2] or "")
    match = _VECTOR.fullmatch(name) if name.endswith(".weight") and _VECTOR_NAME in name else None
    return match[1] if match else name


def misspelling(name: str) -> str | None:
    """Why PEFT finds nothing under a name, if it is known how it came about."""
    if match := _WRAPPERS.search(name):
        return (
            f"is a name of a wrapped model ({match[1]}.), under which PEFT finds nothing: unwrap the model to save it"
        )
    if match := _OTHER_ADAPTER.fullmatch(name):
        return f"has the adapter's name {quoted(match[1])} in it, under which PEFT finds nothing: take it out"
    if not name.startswith(PREFIX) and ".lora_" in name:
        return f"lacks the prefix {PREFIX}, without which PEFT finds nothing"
    return None

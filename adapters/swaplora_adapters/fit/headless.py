"""Adapters of a model without its head (PEFT on AutoModel), whose paths begin one module further in."""

import re
from collections.abc import Mapping
from dataclasses import replace

from swaplora_adapters.config.spec import AdapterSpec
from swaplora_adapters.fit.base import BaseLayers
from swaplora_adapters.fit.spellings import PREFIX

_TASKS = (None, "FEATURE_EXTRACTION")


def with_whole_paths(
    spec: AdapterSpec, spelled: Mapping[str, str], layers: BaseLayers
) -> tuple[AdapterSpec, Mapping[str, str]]:
    """The config and the names in the file, as they would be for the model with its head.

    `spelled` are the names in the file by those that PEFT saves today.
    """
    if not _is_headless(spec, spelled, layers):
        return spec, spelled
    names = {f"{PREFIX}{layers.root}.{name.removeprefix(PREFIX)}": written for name, written in spelled.items()}
    target_modules = spec.target_modules if spec.is_all_linear else _whole(spec.target_modules, layers.root)
    return replace(
        spec, target_modules=target_modules, exclude_modules=_whole(spec.exclude_modules, layers.root)
    ), names


def _is_headless(spec: AdapterSpec, spelled: Mapping[str, str], layers: BaseLayers) -> bool:
    if not layers.root or spec.task_type not in _TASKS:
        return False
    paths = [name.removeprefix(PREFIX).partition(".lora_")[0] for name in spelled]
    has_whole_paths = any(path.startswith(f"{layers.root}.") for path in paths)
    return not has_whole_paths and any(
        f"{layers.root}.{path}" in layers.linears or f"{layers.root}.{path}" in layers.embeddings for path in paths
    )


def _whole(modules: frozenset[str] | str, root: str) -> frozenset[str] | str:
    """A pattern of paths; what is listed are ends of paths."""
    return rf"{re.escape(root)}\.(?:{modules})" if isinstance(modules, str) else modules

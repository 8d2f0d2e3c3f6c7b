"""All that an adapter's files must pass before they are published; works as well offline, on any folder."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from swaplora_adapters.config.parse import read_spec
from swaplora_adapters.config.patterns import MAX_WORK
from swaplora_adapters.config.spec import AdapterSpec
from swaplora_adapters.errors import InvalidAdapterError, UnsupportedAdapterError
from swaplora_adapters.files.complaints import capped, quoted
from swaplora_adapters.files.digest import digest_of
from swaplora_adapters.files.disk import raising_storage_errors
from swaplora_adapters.files.tensorfile import DEFAULT_LIMITS, Header, Limits, iter_tensors, read_header
from swaplora_adapters.fit.base import BaseLayers
from swaplora_adapters.store.records import Details
from swaplora_adapters.weights.load import check_fit, survey_values
from swaplora_adapters.weights.placement import Placement
from swaplora_adapters.weights.served import last_names


@dataclass(frozen=True, slots=True)
class Inspection:
    """What the two files hold, once they are known to be sound and to fit."""

    spec: AdapterSpec
    header: Header
    details: Details

    @property
    def digest(self) -> str:
        """The adapter's identity."""
        return self.details.digest


def inspect_files(
    config_path: Path,
    weights_path: Path,
    layers: BaseLayers,
    dtype: torch.dtype = torch.float32,
    *,
    limits: Limits = DEFAULT_LIMITS,
    base_model: str | None = None,
    placement: Placement | None = None,
) -> Inspection:
    """Check both files against the base's `layers`, holding one module at a time in memory.

    `dtype` is what the adapter will be served in, `placement` how it will lie in memory, `base_model` the name to
    compare with the one in the config. Raises InvalidAdapterError with every complaint of the first stage that has any
    (the two files by themselves, their fit to the base, their values), or UnsupportedAdapterError if all of those are
    about what is not served.
    """
    with raising_storage_errors():
        spec, header = _read_both(config_path, weights_path, limits)
        layout = check_fit(spec, header, layers, MAX_WORK)
        survey = survey_values(layout, iter_tensors(weights_path, header), dtype, placement)
        digest = digest_of(spec.canonical, weights_path)
    details = Details(
        digest=digest,
        kinds=layout.kinds,
        rank=survey.rank,
        targets=last_names(survey.paths),
        base_model=spec.base_model_name_or_path,
        num_parameters=survey.num_parameters,
        warnings=tuple(_warnings(spec, survey.has_effect, base_model)),
    )
    return Inspection(spec, header, details)


def _read_both(config_path: Path, weights_path: Path, limits: Limits) -> tuple[AdapterSpec, Header]:
    errors: list[InvalidAdapterError] = []
    try:
        spec = read_spec(config_path)
    except InvalidAdapterError as error:
        errors.append(error)
    try:
        header = read_header(weights_path, limits)
    except InvalidAdapterError as error:
        errors.append(error)
    if errors:
        is_unsupported = all(isinstance(error, UnsupportedAdapterError) for error in errors)
        kind = UnsupportedAdapterError if is_unsupported else InvalidAdapterError
        raise kind(capped([reason for error in errors for reason in error.reasons]))
    return spec, header


def _warnings(spec: AdapterSpec, has_effect: bool, base_model: str | None) -> list[str]:
    warnings = []
    claimed = spec.base_model_name_or_path or ""
    if base_model is not None and _last_part(claimed) not in ("", ".", _last_part(base_model)):
        made_for = quoted(claimed)
        warnings.append(f"made for the base model {made_for}, not {base_model}; its shapes fit")
    if spec.inert:
        warnings.append(f"fields that matter to training alone are ignored: {', '.join(spec.inert)}")
    if not has_effect:
        warnings.append("every lora_B is zero: the adapter changes nothing")
    return warnings


def _last_part(name: str) -> str:
    """What two spellings of one base share: a hub id, a folder and a served name differ in what comes before.

    Folders of Windows too: an adapter may have been trained there.
    """
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower()

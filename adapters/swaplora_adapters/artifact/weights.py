"""LoRA factors as they are served: per module A and B at true rank, checked against the base, the scaling in B.

Files name tensors as PEFT's `save_pretrained` does: `base_model.model.<module path>.lora_A.weight`, and B likewise.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from swaplora_adapters.artifact.base_layers import LinearShape
from swaplora_adapters.artifact.complaints import capped, quoted
from swaplora_adapters.artifact.disk import read_bounded
from swaplora_adapters.artifact.matching import Matcher
from swaplora_adapters.artifact.served import AdapterWeights, ModuleWeights
from swaplora_adapters.artifact.spec import MAX_CONFIG_BYTES, AdapterSpec
from swaplora_adapters.artifact.tensorfile import Header, iter_tensors, read_header
from swaplora_adapters.errors import InvalidAdapterError, UnsupportedAdapterError

PIECE = (1 << 15) - 1  # elements; torch shares work between threads from one more on
OUTPUT_HEADS = frozenset({"lm_head", "embed_out"})
_FACTOR_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_UNSERVED_NAME = re.compile(
    r".*\.(lora_embedding_[AB]|lora_magnitude_vector|lora_[AB]\.bias|modules_to_save|trainable_tokens_delta)(\..*)?"
)


def module_ranks(header: Header) -> dict[str, int]:
    """The rank of every module in a file that passed `check_fit`."""
    matches = ((_FACTOR_NAME.fullmatch(name), info) for name, info in header.tensors.items())
    return {match["module"]: info.shape[0] for match, info in matches if match and match["factor"] == "A"}


def check_fit(spec: AdapterSpec, header: Header, shapes: Mapping[str, LinearShape]) -> None:
    """Raise unless every tensor has a place in the base, and every targeted module its two factors of the right shape.

    `shapes` are the base's linear layers by path. Raises InvalidAdapterError with every complaint, or
    UnsupportedAdapterError if tensors of kinds that are not served are all that is wrong.
    """
    _require_fit(spec, {name: info.shape for name, info in header.tensors.items()}, shapes)


def build_weights(
    digest: str,
    spec: AdapterSpec,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, LinearShape],
    dtype: torch.dtype,
    device: torch.device,
) -> AdapterWeights:
    """Turn a file's tensors into weights to serve: contiguous, on `device`, alpha and rank folded into B.

    They are of `dtype`, or bfloat16 where the file's are and nothing is lost by it. What already is all of that is used
    as it is. Raises like `check_fit`, and InvalidAdapterError for values that are not finite or overflow `dtype`.
    """
    _require_fit(spec, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, shapes)
    return _assemble(digest, spec, tensors.items(), dtype, device)


def load_weights(
    digest: str,
    config_path: Path,
    weights_path: Path,
    shapes: Mapping[str, LinearShape],
    dtype: torch.dtype,
    device: torch.device,
) -> AdapterWeights:
    """`build_weights` from the two files, checked as if for the first time; holds one raw tensor at a time."""
    spec = AdapterSpec.parse(read_bounded(config_path, MAX_CONFIG_BYTES))
    header = read_header(weights_path)
    check_fit(spec, header, shapes)
    return _assemble(digest, spec, iter_tensors(weights_path, header), dtype, device)


def check_values(spec: AdapterSpec, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> bool:
    """Whether any lora_B is not all zeros, so that the adapter changes anything; for tensors that passed `check_fit`.

    Raises InvalidAdapterError naming every tensor whose values are not finite or overflow `dtype` once scaled.
    """
    complaints = []
    has_effect = False
    for factor in _served_factors(spec, tensors, dtype):
        complaints += factor.complaints
        has_effect = has_effect or (factor.letter == "B" and not factor.is_zero)
    if complaints:
        raise InvalidAdapterError(capped(complaints))
    return has_effect


def _assemble(
    digest: str,
    spec: AdapterSpec,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    device: torch.device,
) -> AdapterWeights:
    complaints = []
    factors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for factor in _served_factors(spec, tensors, dtype):
        complaints += factor.complaints
        factors[factor.module][factor.letter] = _laid_out(factor).to(device)
    if complaints:
        raise InvalidAdapterError(capped(complaints))
    modules = {path: ModuleWeights(pair["A"], pair["B"]) for path, pair in factors.items()}
    return AdapterWeights(digest, MappingProxyType(modules))


class _ServedFactor(NamedTuple):
    module: str
    letter: str  # A or B
    tensor: Tensor
    is_zero: bool
    complaints: list[str]


def _laid_out(factor: _ServedFactor) -> Tensor:
    """B column by column: kernels read both factors along the rank."""
    return factor.tensor.t().contiguous().t() if factor.letter == "B" else factor.tensor


def _served_factors(
    spec: AdapterSpec, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> Iterator[_ServedFactor]:
    """Each tensor as it is served, with what is wrong with its values."""
    matcher = Matcher()
    for name, tensor in tensors:
        match = _FACTOR_NAME.fullmatch(name)
        if match is None:
            raise InvalidAdapterError([_stranger_complaint(name)])
        scaling = spec.scaling_of(match["module"], matcher) if match["factor"] == "B" else 1.0
        served, is_finite, is_zero = _scaled(tensor.contiguous(), scaling, dtype)
        complaints = [] if is_finite else [_value_complaint(name, tensor, dtype)]
        yield _ServedFactor(match["module"], match["factor"], served, is_zero, complaints)


def _scaled(tensor: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, bool, bool]:
    """A contiguous tensor times `scaling`, in `dtype`; whether all of the result is finite; whether all of it is zero.

    Worked through in pieces that torch keeps on the calling thread: a load must not hold up what the other cores do.
    """
    dtype = _storage_dtype(tensor.dtype, scaling, dtype)
    is_served = scaling == 1 and tensor.dtype == dtype
    served = tensor if is_served else torch.empty(tensor.shape, dtype=dtype)
    is_finite = is_zero = True
    for source, target in zip(_pieces(tensor), _pieces(served), strict=True):
        if not is_served:
            torch.mul(source.to(torch.float32), scaling, out=target)
        low, high = (extreme.item() for extreme in torch.aminmax(target))
        is_finite = is_finite and math.isfinite(low) and math.isfinite(high)  # a NaN is both extremes
        is_zero = is_zero and low == high == 0
    return served, is_finite, is_zero


def _storage_dtype(stored: torch.dtype, scaling: float, served: torch.dtype) -> torch.dtype:
    """bfloat16 stays so where nothing is lost by it: at half the bytes, a step reads an adapter twice as fast."""
    is_exact = math.frexp(abs(scaling))[0] == 0.5  # a power of two moves the exponent alone
    return torch.bfloat16 if stored == torch.bfloat16 and is_exact else served


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    return (tensor,) if tensor.numel() <= PIECE else torch.split(tensor.view(-1), PIECE)


def _value_complaint(name: str, tensor: Tensor, dtype: torch.dtype) -> str:
    if torch.isfinite(tensor).all():
        return f"{quoted(name)} overflows {str(dtype).removeprefix('torch.')} once it is scaled"
    return f"{quoted(name)} holds NaN or infinity"


def _require_fit(spec: AdapterSpec, found: Mapping[str, tuple[int, ...]], shapes: Mapping[str, LinearShape]) -> None:
    """`found` are the shapes of the file's tensors by name."""
    modules, strangers, unserved = _sorted_by_kind(found)
    matcher = Matcher()
    targeted = {path for path in shapes if is_targeted(spec, path, matcher)}
    complaints = [_stranger_complaint(name) for name in strangers]
    for path, pair in modules.items():
        shape = shapes.get(path)
        if shape is None:  # nor is it matched with patterns: a header may hold many such paths, and long ones
            complaints.append(f"{quoted(path)} is no linear layer of the base model")
            continue
        if path not in targeted:
            complaints.append(f"{quoted(path)} is in the file, but the config does not target it")
        complaints += _module_complaints(path, pair, spec.rank_of(path, matcher), shape)
    missing = targeted - modules.keys()
    complaints += [f"{quoted(path)} is targeted, but not in the file" for path in shapes if path in missing]
    if not modules and not unserved:
        complaints.append("the file holds no LoRA factors")
    if complaints:
        raise InvalidAdapterError(capped([*complaints, *unserved]))
    if unserved:
        raise UnsupportedAdapterError(capped(unserved))


def _sorted_by_kind(
    found: Mapping[str, tuple[int, ...]],
) -> tuple[dict[str, dict[str, tuple[int, ...]]], list[str], list[str]]:
    """The factors' shapes by module and letter, the names that fit nothing, and complaints about kinds not served."""
    modules: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    strangers, unserved = [], []
    for name, shape in found.items():
        if match := _FACTOR_NAME.fullmatch(name):
            modules[match["module"]][match["factor"]] = shape
        elif _UNSERVED_NAME.fullmatch(name):
            unserved.append(f"{quoted(name)} is of a kind that is not supported")
        else:
            strangers.append(name)
    return modules, strangers, unserved


def is_targeted(spec: AdapterSpec, path: str, matcher: Matcher) -> bool:
    """PEFT's all-linear leaves the output head out; it is known by the names that transformers gives it."""
    is_left_out = spec.is_all_linear and path.rpartition(".")[2] in OUTPUT_HEADS
    return not is_left_out and spec.targets(path, matcher)


def _module_complaints(path: str, pair: Mapping[str, tuple[int, ...]], rank: int, shape: LinearShape) -> Iterator[str]:
    for letter, expected in (("A", (rank, shape.in_features)), ("B", (shape.out_features, rank))):
        if letter not in pair:
            yield f"{quoted(path)} has no lora_{letter}.weight"
        elif pair[letter] != expected:
            yield (
                f"{quoted(path)} has lora_{letter}.weight of shape {list(pair[letter])}, "
                f"rank {rank} and the base need {list(expected)}"
            )


def _stranger_complaint(name: str) -> str:
    return f"{quoted(name)} is no name of a LoRA factor (base_model.model.<module>.lora_A.weight, or lora_B)"

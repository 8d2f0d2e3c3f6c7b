"""What an adapter makes of a linear layer's output: factors, a column scale and a shift."""

import torch
from torch import Tensor

from swaplora_adapters.files.complaints import quoted
from swaplora_adapters.weights.dora import row_norms
from swaplora_adapters.weights.parts import Part, Parts
from swaplora_adapters.weights.placement import Place
from swaplora_adapters.weights.served import LinearWeights
from swaplora_adapters.weights.values import converted, is_finite


def build_linear(parts: Parts, place: Place) -> LinearWeights | None:
    """None for biases alone that are the base's own."""
    placed = _placed(parts, place)
    column_scale = _column_scale(parts)
    shift = _shift(parts, column_scale)
    is_scaled = column_scale is not None and bool((column_scale != 1).any())
    parts.has_effect = shift is not None or is_scaled or "tokens" in parts.tensors or parts.has_delta
    if not placed.rank and column_scale is None and shift is None:
        return None
    return placed if column_scale is None and shift is None else placed.with_vectors(column_scale, shift)


def _placed(parts: Parts, place: Place) -> LinearWeights:
    """In one pass over what the file has, where all that is to be done to it is to scale it."""
    if "tokens" in parts.tensors or "lora_B" not in parts.tensors:
        return place(*_factors(parts, parts.dtype), 1.0, parts.dtype).weights
    slot_A, lora_A = _right(parts)
    slot_B, lora_B = parts.tensors["lora_B"]
    placed = place(lora_A, lora_B, slot_A.scaling * slot_B.scaling, parts.dtype)
    parts.note(slot_A, lora_A, *placed.of_A)
    parts.note(slot_B, lora_B, *placed.of_B)
    return placed.weights


def _factors(parts: Parts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """lora_A [rank, in] and lora_B [out, rank], the scaling in lora_B; trained tokens of an output head among them."""
    found = []
    if "lora_B" in parts.tensors:
        found.append(_low_rank(parts, dtype))
    if "tokens" in parts.tensors:
        found.append(_token_rows(parts, dtype))
    if len(found) == 1:
        return found[0]
    if not found:
        shape = parts.layout.layers.linears[parts.path]
        return torch.empty(0, shape.in_features, dtype=dtype), torch.empty(shape.out_features, 0, dtype=dtype)
    (one_A, one_B), (other_A, other_B) = found
    lora_A = torch.cat([converted(one_A, dtype), converted(other_A, dtype)])
    return lora_A, torch.cat([converted(one_B, dtype), converted(other_B, dtype)], 1)


def _low_rank(parts: Parts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    slot_A, lora_A = _right(parts)
    scaling = slot_A.scaling * parts.tensors["lora_B"].slot.scaling
    return parts.checked(slot_A, lora_A, dtype=dtype), parts.scaled("lora_B", scaling, dtype)


def _right(parts: Parts) -> Part:
    """lora_A with all that goes into it but the scaling."""
    slot, tensor = parts.tensors["lora_A"]
    if "lora_E" in parts.tensors:
        tensor = _times_rows(tensor, parts.exact("lora_E", torch.float32))
    if slot.num_repeats > 1:
        tensor = tensor.repeat_interleave(slot.num_repeats, dim=1)
    return Part(slot, tensor)


def _times_rows(tensor: Tensor, factors: Tensor) -> Tensor:
    """AdaLoRA's diag(E) A in float32, a row at a time, as no more is to be worked on at once."""
    product = torch.empty(tensor.shape)
    for source, factor, row in zip(tensor, factors, product, strict=True):
        torch.mul(source.to(torch.float32), factor, out=row)
    return product


def _token_rows(parts: Parts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An output head's own rows for some tokens, as what they differ by from the base's: [k, in], and one-hot [out, k].

    PEFT trains them together with the embedding that the head is tied to.
    """
    ids = list(parts.layout.tokens_of(parts.path))
    weight = parts.weight()
    lora_A = converted(parts.exact("tokens", torch.float32) - weight[ids], dtype)
    lora_B = torch.zeros(weight.shape[0], len(ids), dtype=dtype)
    lora_B[ids, range(len(ids))] = 1
    return lora_A, lora_B


def _column_scale(parts: Parts) -> Tensor | None:
    magnitude = parts.vector("magnitude")
    if magnitude is None:
        return None
    lora_A, lora_B = _factors(parts, torch.float32)
    norms = row_norms(parts.weight(), lora_A.float(), lora_B.float())
    return _finite(parts, magnitude / norms, "lora_magnitude_vector over the norms of the adapted weight")


def _shift(parts: Parts, column_scale: Tensor | None) -> Tensor | None:
    """y = (x Wᵀ + x Aᵀ Bᵀ) * scale + own bias, where what comes in is x Wᵀ + base's bias."""
    bias, lora_bias = parts.vector("bias"), parts.vector("lora_bias")
    if bias is None and lora_bias is None and column_scale is None:
        return None
    shift = torch.zeros(parts.layout.layers.linears[parts.path].out_features)
    base = parts.base("bias")
    if base is not None:
        shift += (base if bias is None else bias) - (base if column_scale is None else base * column_scale)
    elif bias is not None:
        parts.complaints.append(f"{quoted(parts.path)} has a bias in the file, but none in the base")
    if lora_bias is not None:
        shift += lora_bias
    shift = _finite(parts, shift, "the shift of its biases")
    return shift if shift.any() else None


def _finite(parts: Parts, vector: Tensor, what: str) -> Tensor:
    if not is_finite(vector) and not parts.complaints:
        parts.complaints.append(f"{quoted(parts.path)}: {what} is not finite")
    return vector

"""What an adapter makes of an embedding: factors and rows of its own, or with DoRA another embedding."""

import torch
from torch import Tensor, nn

from swaplora_adapters.files.complaints import quoted
from swaplora_adapters.weights.dora import adapted_rows, column_norms
from swaplora_adapters.weights.parts import Parts
from swaplora_adapters.weights.served import EmbeddingWeights
from swaplora_adapters.weights.values import converted, is_finite


def build_embedding(parts: Parts) -> EmbeddingWeights | nn.Module:
    if "tokens" in parts.tensors:
        return _with_tokens(parts)
    if "magnitude" in parts.tensors:
        return _with_dora(parts)
    lora_A, lora_B = _factors(parts, parts.dtype)
    parts.has_effect = parts.has_delta
    return EmbeddingWeights(lora_A, lora_B)


def _factors(parts: Parts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[num_embeddings, rank], and [embedding_dim, rank] with the scaling in it."""
    scaling = parts.tensors["lora_A"].slot.scaling * parts.tensors["lora_B"].slot.scaling
    lora_A, lora_B = parts.scaled("lora_A", 1.0, dtype), parts.scaled("lora_B", scaling, dtype)
    return converted(lora_A, dtype), converted(lora_B, dtype)


def _with_tokens(parts: Parts) -> EmbeddingWeights:
    """PEFT takes the file's rows in the order in which the config lists the tokens."""
    shape = parts.layout.layers.embeddings[parts.path]
    ids, order = torch.tensor(parts.layout.tokens_of(parts.path)).sort()
    parts.has_effect = True
    return EmbeddingWeights(
        torch.empty(shape.num_embeddings, 0, dtype=parts.dtype),
        torch.empty(shape.embedding_dim, 0, dtype=parts.dtype),
        token_ids=ids,
        token_rows=parts.exact("tokens", parts.dtype)[order],
    )


def _with_dora(parts: Parts) -> nn.Module:
    """(E + A Bᵀ) * scale by column, as a table of its own (`peft.tuners.lora.dora.DoraEmbeddingLayer`)."""
    magnitude, weight = parts.vector("magnitude"), parts.weight()
    assert magnitude is not None
    lora_A, lora_B = _factors(parts, torch.float32)
    column_scale = magnitude / column_norms(weight, lora_B.t(), lora_A)
    if not is_finite(column_scale) and not parts.complaints:
        parts.complaints.append(f"{quoted(parts.path)}: lora_magnitude_vector over the norms is not finite")
    rows = [converted(block * column_scale, parts.dtype) for block in adapted_rows(weight, lora_B.t(), lora_A)]
    parts.has_effect = True
    return parts.layout.layers.rebuild(parts.path, {"weight": torch.cat(rows)})

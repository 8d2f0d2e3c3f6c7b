"""Attention of one input whose scores also say how far apart two tokens are, in torch's own operations."""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attend(
    query: Tensor, key: Tensor, value: Tensor, keys_of: Tensor | None, queries_of: Tensor | None, scaling: float
) -> Tensor:
    """score(i, j) = scaling · (q_i · k_j + q_i · keys_of(i - j) + k_j · queries_of(i - j)).

    query, key, value: [length, num_heads, head_dim]. keys_of: [2 · length - 1, num_heads, head_dim], of distances that
    descend from length - 1; queries_of: the same of distances that ascend to it. → [length, num_heads, head_dim]

    What it comes to depends on its length and numbers alone: each part is laid out anew.
    """
    query, key, value = (rows.transpose(0, 1).contiguous() for rows in (query, key, value))
    bias: Tensor | None = None
    if keys_of is not None:
        bias = _of_pairs(query @ keys_of.permute(1, 2, 0).contiguous())
    if queries_of is not None:
        of_keys = _of_pairs(key @ queries_of.permute(1, 2, 0).contiguous()).transpose(1, 2)
        bias = of_keys if bias is None else bias + of_keys
    if bias is not None:
        bias = (bias * scaling)[None]
    out = scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=bias, scale=scaling)
    return out[0].transpose(0, 1)


def _of_pairs(scores: Tensor) -> Tensor:
    """[num_heads, length, 2 · length - 1] → a view [num_heads, length, length]: each row one place further to the left.

    [h, i, j] is scores[h, i, length - 1 - i + j].
    """
    num_heads, length, num_distances = scores.shape
    strides = (length * num_distances, num_distances - 1, 1)
    return scores.as_strided((num_heads, length, length), strides, scores.storage_offset() + length - 1)

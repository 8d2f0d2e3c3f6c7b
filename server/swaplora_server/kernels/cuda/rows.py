"""What lies between the products of a layer of Llama's kind, in Triton: three kernels, each over rows.

They compute in float32 and round where transformers does (`LlamaRMSNorm`, `apply_rotary_pos_emb`, `LlamaMLP`), so that
rope has its bits; a norm's sum is in another order, and SiLU's exponential another one, so that these may be off by one
in the last place. No atomics, fixed shapes: a row's bits do not depend on the rows beside it.

Importing this needs triton: see `require_triton`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_BYTES = 32 << 10  # of a row that is normed: it is in registers
SILU_BLOCK = 1024


@triton.jit(do_not_specialize=("first",))
def add_norm_kernel(
    hidden: tl.tensor,
    delta: tl.tensor,
    weight: tl.tensor,
    summed: tl.tensor,
    out: tl.tensor,
    first: tl.int32,
    eps: tl.float32,
    HAS_DELTA: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """summed = hidden + delta, out = weight · (summed / √(mean(summed²) + eps)). One program a row, from `first` on.

    hidden, delta, summed, out: [num_rows, WIDTH], contiguous, of one dtype; without delta summed is hidden, and not
    written. weight: [WIDTH], of that dtype. BLOCK: a power of two, at least WIDTH
    """
    dims = tl.arange(0, BLOCK)
    at = (first + tl.program_id(0)).to(tl.int64) * WIDTH + dims
    dtype: tl.constexpr = hidden.dtype.element_ty
    row = tl.load(hidden + at, mask=dims < WIDTH, other=0.0).to(tl.float32)
    if HAS_DELTA:
        row = _rounded(row + tl.load(delta + at, mask=dims < WIDTH, other=0.0).to(tl.float32), dtype)
        tl.store(summed + at, row.to(dtype), mask=dims < WIDTH)
    normed = _rounded(row * tl.rsqrt(tl.sum(row * row, 0) / WIDTH + eps), dtype)
    scale = tl.load(weight + dims, mask=dims < WIDTH, other=0.0).to(tl.float32)
    tl.store(out + at, (scale * normed).to(dtype), mask=dims < WIDTH)


@triton.jit(do_not_specialize=("slots", "first"))
def rope_store_kernel(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    query_weight: tl.tensor,
    key_weight: tl.tensor,
    slots: tl.tensor,
    out: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    first: tl.int32,
    eps: tl.float32,
    HAS_NORMS: tl.constexpr,
    QUERY_ROW: tl.constexpr,
    KEY_ROW: tl.constexpr,
    VALUE_ROW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    """Queries turned into `out`; keys turned, and values, into the cache where a row has a slot.

    turned = x · cos + (-x[half:], x[:half]) · sin, x = weight · (x / √(mean(x²) + eps)) first where there are norms.
    One program a row, from `first` on, and KV head, with the GROUP query heads that share it.

    query: [num_rows, KV_HEADS · GROUP, HEAD_DIM], key, value: [num_rows, KV_HEADS, HEAD_DIM], …_ROW elements from row
    to row; cos, sin: [num_rows, HEAD_DIM]; …_weight: [HEAD_DIM]; out: as query, contiguous
    slots: [num_rows], int64, -1: not stored; keys, values: [num_slots, KV_HEADS, HEAD_DIM], contiguous
    HEADS, HALF: powers of two, at least GROUP and half of HEAD_DIM
    """
    row, head = (first + tl.program_id(0)).to(tl.int64), tl.program_id(1)
    cos, sin = cos + row * HEAD_DIM, sin + row * HEAD_DIM
    dims = tl.arange(0, HALF)[None, :]
    is_dim = dims < HEAD_DIM // 2
    heads = tl.arange(0, HEADS)[:, None]
    of_heads = (head * GROUP + heads) * HEAD_DIM + dims
    is_head = (heads < GROUP) & is_dim
    to = out + row * (KV_HEADS * GROUP * HEAD_DIM) + of_heads
    _turn(query + row * QUERY_ROW + of_heads, to, is_head, query_weight, cos, sin, eps, HAS_NORMS, HEAD_DIM, HALF)
    slot = tl.load(slots + row)
    if slot >= 0:
        one = head * HEAD_DIM + dims
        at = slot * (KV_HEADS * HEAD_DIM) + one
        _turn(key + row * KEY_ROW + one, keys + at, is_dim, key_weight, cos, sin, eps, HAS_NORMS, HEAD_DIM, HALF)
        low, high = _halves(value + row * VALUE_ROW + one, is_dim, HEAD_DIM // 2)
        _store_halves(values + at, low, high, is_dim, HEAD_DIM // 2)


@triton.jit
def _turn(
    at: tl.tensor,
    to: tl.tensor,
    mask: tl.tensor,
    weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    eps: tl.float32,
    HAS_NORMS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    """Heads that lie at `at`, of one row, to `to`. Both, and mask: [heads, HALF], of their first halves."""
    half: tl.constexpr = HEAD_DIM // 2
    dims = tl.arange(0, HALF)[None, :]
    low, high = _halves(at, mask, half)
    if HAS_NORMS:
        weight_low, weight_high = _halves(weight + dims, dims < half, half)
        low, high = _normed(low, high, weight_low, weight_high, eps, HEAD_DIM)
    cos_low, cos_high = _halves(cos + dims, dims < half, half)
    sin_low, sin_high = _halves(sin + dims, dims < half, half)
    _store_halves(to, _sum(low, cos_low, -high, sin_low), _sum(high, cos_high, low, sin_high), mask, half)


@triton.jit
def silu_mul_kernel(
    gate: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    GATE_ROW: tl.constexpr,
    UP_ROW: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """out = gate / (1 + exp(-gate)) · up. One program a row and BLOCK of its features.

    gate, up: [num_rows, WIDTH], …_ROW elements from row to row; out: [num_rows, WIDTH], contiguous
    """
    row, dims = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = gate.dtype.element_ty
    x = tl.load(gate + row * GATE_ROW + dims, mask=dims < WIDTH, other=0.0).to(tl.float32)
    other = tl.load(up + row * UP_ROW + dims, mask=dims < WIDTH, other=0.0).to(tl.float32)
    mixed = _rounded(x / (1.0 + tl.exp(-x)), dtype) * other
    tl.store(out + row * WIDTH + dims, mixed.to(dtype), mask=dims < WIDTH)


@triton.jit
def _rounded(x: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """float32, with what is lost where it is kept in a number format."""
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def _halves(at: tl.tensor, mask: tl.tensor, half: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    return tl.load(at, mask=mask, other=0.0), tl.load(at + half, mask=mask, other=0.0)


@triton.jit
def _store_halves(to: tl.tensor, low: tl.tensor, high: tl.tensor, mask: tl.tensor, half: tl.constexpr) -> None:
    tl.store(to, low, mask=mask)
    tl.store(to + half, high, mask=mask)


@triton.jit
def _normed(
    low: tl.tensor,
    high: tl.tensor,
    weight_low: tl.tensor,
    weight_high: tl.tensor,
    eps: tl.float32,
    HEAD_DIM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Of heads [heads, half], each by itself."""
    dtype: tl.constexpr = low.dtype
    low_exact, high_exact = low.to(tl.float32), high.to(tl.float32)
    squares = tl.sum(low_exact * low_exact + high_exact * high_exact, 1)
    unit = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
    low_scaled = weight_low.to(tl.float32) * _rounded(low_exact * unit, dtype)
    high_scaled = weight_high.to(tl.float32) * _rounded(high_exact * unit, dtype)
    return low_scaled.to(dtype), high_scaled.to(dtype)


@triton.jit
def _sum(x: tl.tensor, cos: tl.tensor, other: tl.tensor, sin: tl.tensor) -> tl.tensor:
    """x · cos + other · sin, rounded after each operation."""
    dtype: tl.constexpr = x.dtype
    one = _rounded(x.to(tl.float32) * cos.to(tl.float32), dtype)
    two = _rounded(other.to(tl.float32) * sin.to(tl.float32), dtype)
    return (one + two).to(dtype)


class Span(NamedTuple):
    """Rows `start` to `stop`, and what their adapter has in place of the base's modules, by path."""

    start: int
    stop: int
    replaced: Mapping[str, Any]

    def weight(self, norm: Any) -> Tensor:
        """Of a wrapped norm, the one that these rows have."""
        weight: Tensor = self.replaced.get(norm.path, norm.base).weight
        return weight


class Heads(NamedTuple):
    """What the rows of a layer's attention are made of."""

    kv_heads: int
    group: int  # query heads that share a KV head
    head_dim: int


def norm_warps(width: int) -> int:
    """So that each thread has at most 32 features of a row."""
    warps: int = triton.next_power_of_2(width) // 1024
    return max(1, min(16, warps))


def add_norm(
    hidden: Tensor, delta: Tensor | None, norm: Any, spans: Sequence[Span], eps: float
) -> tuple[Tensor, Tensor]:
    """hidden + delta, and that normed. All [num_rows, width]; `spans` are of all rows."""
    hidden = hidden.contiguous()
    width = hidden.shape[1]
    summed = hidden if delta is None else torch.empty_like(hidden)
    out = torch.empty_like(hidden)
    for span in spans:
        add_norm_kernel[(span.stop - span.start,)](
            hidden, hidden if delta is None else delta.contiguous(), span.weight(norm), summed, out, span.start, eps,
            HAS_DELTA=delta is not None, WIDTH=width, BLOCK=triton.next_power_of_2(width),
            num_warps=norm_warps(width), enable_fp_fusion=False,
        )  # fmt: skip
    return summed, out


def rope_store(
    rows: tuple[Tensor, Tensor, Tensor],
    angles: tuple[Tensor, Tensor],
    slots: Tensor,
    caches: tuple[Tensor, Tensor],
    norms: tuple[Any, Any],
    spans: Sequence[Span],
    eps: float,
    heads: Heads,
) -> Tensor:
    """Turn query and key and store the latter with the value. → queries [num_rows, num_heads, head_dim].

    rows: query, key, value [num_rows, their heads · head_dim]; angles: cos, sin [num_rows, head_dim]; norms: of query
    and key heads, or None
    """
    query = rows[0]
    out = query.new_empty(len(query), heads.kv_heads * heads.group, heads.head_dim)
    is_normed = norms[0] is not None
    for span in spans:
        weights = [span.weight(norm) for norm in norms] if is_normed else [query, query]
        rope_store_kernel[span.stop - span.start, heads.kv_heads](
            *rows, *angles, *weights, slots, out, *caches, span.start, eps,
            HAS_NORMS=is_normed, QUERY_ROW=rows[0].stride(0), KEY_ROW=rows[1].stride(0), VALUE_ROW=rows[2].stride(0),
            KV_HEADS=heads.kv_heads, GROUP=heads.group, HEAD_DIM=heads.head_dim,
            HEADS=triton.next_power_of_2(heads.group), HALF=triton.next_power_of_2(heads.head_dim // 2),
            num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up. All [num_rows, width]."""
    num_rows, width = gate.shape
    out = gate.new_empty(num_rows, width)
    silu_mul_kernel[num_rows, triton.cdiv(width, SILU_BLOCK)](
        gate, up, out, GATE_ROW=gate.stride(0), UP_ROW=up.stride(0), WIDTH=width, BLOCK=SILU_BLOCK,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out

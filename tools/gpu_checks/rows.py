"""What lies between the products of a layer, on the card, against float64; on a CPU, transformers' own forms of it."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from gpu_checks.card import Card
from gpu_checks.report import Report

EPS = 1e-5
# ‖out - exact‖ / ‖exact‖: operands and results are rounded to the dtype, sums are not
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
NUM_ROWS = (1, 3, 64, 300)
WIDTHS = (31, 576, 4096, 14336)  # of a row: RMSNorm takes up to 32 KiB of it
HEADS = ((3, 3, 64), (8, 4, 128), (1, 8, 256), (2, 3, 24))  # of keys, queries to each, their size


def check_rows(report: Report, card: Card) -> dict[str, Any]:
    """Add + RMSNorm, SiLU · up, and rope with the store of keys and values; slot -1 is written nowhere."""
    forms: Any = _triton() if card.is_gpu else SimpleNamespace(add_norm=_add_norm, silu_mul=_silu_mul)
    worst: dict[str, float] = {}

    def note(what: str, dtype: torch.dtype, out: Tensor, exact: Tensor) -> None:
        error = float((out.double() - exact).norm() / exact.norm())
        key = f"{what}, {str(dtype).removeprefix('torch.')}"
        worst[key] = error if not error <= worst.get(key, 0.0) else worst[key]
        report.check(error <= TOLERANCE[dtype], f"{key} {tuple(out.shape)}: off by {error:.1e}")

    for dtype in TOLERANCE:
        for num_rows in NUM_ROWS[: 2 if card.is_dry else None]:
            for width in WIDTHS[: 2 if card.is_dry else None]:
                hidden, delta = (3 * torch.randn(num_rows, width, device=card.device).to(dtype) for _ in range(2))
                note("SiLU · up", dtype, forms.silu_mul(hidden, delta), _silu_mul(hidden.double(), delta.double()))
                if width * dtype.itemsize <= 32 << 10:
                    norm = _norm(width, card.device, dtype)
                    summed, out = forms.add_norm(hidden, delta, norm)
                    report.check(torch.equal(summed, hidden + delta), f"add, {dtype} {num_rows} x {width}: other bits")
                    note("RMSNorm", dtype, out, _normed(summed.double(), norm.base.weight.double()))
            if card.is_gpu:
                for heads in HEADS:
                    for is_normed in (False, True):
                        _check_rope(report, card, forms, note, heads, num_rows, dtype, is_normed=is_normed)
    for key, error in worst.items():
        report.row(f"{key}, against fp64", f"{error:.1e}")
    return {"worst": worst}


def _triton() -> Any:
    """Imported here: a CPU may have none."""
    from swaplora_server.kernels.cuda import rows

    def spans(of: Tensor) -> list[rows.Span]:
        return [rows.Span(0, len(of), {})]

    return SimpleNamespace(
        add_norm=lambda hidden, delta, norm: rows.add_norm(hidden, delta, norm, spans(hidden), EPS),
        silu_mul=rows.silu_mul,
        rope_store=lambda given, angles, slots, caches, norms, heads: rows.rope_store(
            given, angles, slots, caches, norms, spans(given[0]), EPS, rows.Heads(*heads)
        ),
    )


def _norm(width: int, device: torch.device, dtype: torch.dtype) -> Any:
    """As a model has it, wrapped."""
    base = LlamaRMSNorm(width, EPS)
    base.weight = nn.Parameter(torch.randn(width).to(device, dtype), requires_grad=False)
    return SimpleNamespace(path="norm", base=base)


def _add_norm(hidden: Tensor, delta: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    return hidden + delta, norm.base(hidden + delta)


def _silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate) * up


def _normed(rows: Tensor, weight: Tensor) -> Tensor:
    return weight * rows * (rows.square().mean(-1, keepdim=True) + EPS).rsqrt()


def _check_rope(
    report: Report,
    card: Card,
    forms: Any,
    note: Any,
    heads: Sequence[int],
    num_rows: int,
    dtype: torch.dtype,
    *,
    is_normed: bool,
) -> None:
    """Rows of queries, keys and values as one product makes them; the first of several has no slot."""
    kv_heads, group, head_dim = heads
    counts = kv_heads * group, kv_heads, kv_heads
    joined = torch.randn(num_rows, sum(counts) * head_dim, device=card.device).to(dtype)
    given = torch.split(joined, [count * head_dim for count in counts], 1)
    halves = 7 * torch.rand(num_rows, head_dim // 2, device=card.device)
    angles = torch.cat([halves, halves], 1)
    cos_sin = angles.cos().to(dtype), angles.sin().to(dtype)
    slots = torch.randperm(num_rows + 3, device=card.device)[:num_rows]
    slots[: num_rows // 2 and 1] = -1
    kept = (slots >= 0).nonzero()[:, 0]
    room = torch.full((2, num_rows + 4, kv_heads, head_dim), float("nan"), device=card.device, dtype=dtype)
    caches = room[0, 1:], room[1, 1:]  # behind what is nobody's, where slot -1 would be
    norms = tuple(_norm(head_dim, card.device, dtype) if is_normed else None for _ in range(2))
    out = forms.rope_store(given, cos_sin, slots, caches, norms, heads)
    exact = [rows.double().view(num_rows, -1, head_dim) for rows in given]
    if is_normed:
        exact[:2] = [
            _normed(rows, norm.base.weight.double()) for rows, norm in zip(exact[:2], norms, strict=True) if norm
        ]
    exact[:2] = apply_rotary_pos_emb(*exact[:2], *(part.double() for part in cos_sin))
    label = "rope" + (" of normed heads" if is_normed else "")
    note(label, dtype, out, exact[0])
    note(f"{label}, keys stored", dtype, caches[0][slots[kept]], exact[1][kept])
    told = f"{label}, {dtype} {tuple(heads)} {num_rows} rows"
    report.check(torch.equal(caches[1][slots[kept]].double(), exact[2][kept]), f"{told}: values are not as given")
    written = torch.zeros(num_rows + 4, dtype=torch.bool, device=card.device)
    written[slots[kept] + 1] = True
    report.check(bool(room[:, ~written].isnan().all()), f"{told}: a slot of nobody was written")

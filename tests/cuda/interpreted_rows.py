"""What lies between the products of a layer, against float64 and transformers' own; rows are each by itself."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from swaplora_server.kernels.cuda.rows import Heads, Span, add_norm, rope_store, silu_mul

EPS = 1e-5
DTYPES = [torch.float32, torch.float16]
ULP = {torch.float32: 2**-23, torch.float16: 2**-10}  # of 1: the space between neighbours is at most so much of them


def norm_of(width: int, dtype: torch.dtype, path: str = "norm") -> Any:
    """As a model has it, wrapped."""
    base = LlamaRMSNorm(width, EPS)
    base.weight = nn.Parameter(torch.randn(width).to(dtype), requires_grad=False)
    return SimpleNamespace(path=path, base=base)


def all_of(rows: Tensor) -> list[Span]:
    return [Span(0, len(rows), {})]


def is_near(out: Tensor, stock: Tensor, ulps: float) -> bool:
    """Each number is transformers', or a neighbour of it."""
    return bool(((out.double() - stock.double()).abs() <= ulps * ULP[out.dtype] * stock.double().abs()).all())


def are_turned_alike(out: Tensor, stock: Tensor) -> bool:
    """Off by a few of the least differences of the head's largest number: turning adds what may nearly cancel."""
    off = (out.double() - stock.double()).abs().amax(-1)
    return bool(
        (off <= (8 if out.dtype == torch.float32 else 2) * ULP[out.dtype] * stock.double().abs().amax(-1)).all()
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [32, 48, 600])
def test_a_sum_is_normed_as_transformers_norms_it(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    norm = norm_of(width, dtype)
    hidden, delta = (3 * torch.randn(5, width).to(dtype) for _ in range(2))
    summed, out = add_norm(hidden, delta, norm, all_of(hidden), EPS)
    assert torch.equal(summed, hidden + delta)
    assert is_near(out, norm.base(hidden + delta), 4 if dtype == torch.float32 else 1)
    exact = summed.double() * (summed.double().square().mean(-1, keepdim=True) + EPS).rsqrt() * norm.base.weight
    assert is_near(out, exact, 4 if dtype == torch.float32 else 1.01)  # rounded twice
    alone, again = add_norm(summed, None, norm, all_of(summed), EPS)
    assert alone is summed
    assert torch.equal(again, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "is_normed"), [((2, 2, 16), True), ((1, 3, 20), False), ((2, 1, 64), True)])
def test_heads_are_normed_turned_and_stored_as_transformers_does(
    heads: tuple[int, int, int], is_normed: bool, dtype: torch.dtype
) -> None:
    trial = Trial(Heads(*heads), is_normed, dtype, num_rows=5)
    out = trial.run(all_of(trial.rows[0]))
    query, key = trial.stock()
    if is_normed:
        assert are_turned_alike(out, query)
        assert are_turned_alike(trial.stored(), key)
    else:
        assert torch.equal(out, query)
        assert torch.equal(trial.stored(), key)
    assert torch.equal(trial.caches[1][trial.written], trial.heads_of(2)[trial.kept])
    others = [slot for slot in range(len(trial.caches[0])) if slot not in trial.written]
    assert all(cache[others].isnan().all() for cache in trial.caches)
    assert all(memory[0].isnan().all() for memory in trial.nobodys)


class Trial:
    """Rows of queries, keys and values that lie beside each other, as one product makes them; the third has no slot."""

    def __init__(self, heads: Heads, is_normed: bool, dtype: torch.dtype, num_rows: int) -> None:
        torch.manual_seed(sum(heads))
        self.heads = heads
        counts = heads.kv_heads * heads.group, heads.kv_heads, heads.kv_heads
        joined = torch.randn(num_rows, sum(counts) * heads.head_dim).to(dtype)
        self.rows = torch.split(joined, [count * heads.head_dim for count in counts], 1)
        angles = 7 * torch.rand(num_rows, heads.head_dim // 2)
        angles = torch.cat([angles, angles], 1)
        self.angles = angles.cos().to(dtype), angles.sin().to(dtype)
        self.norms = tuple(norm_of(heads.head_dim, dtype, name) if is_normed else None for name in ("q", "k"))
        self.slots = torch.randperm(num_rows + 3)[:num_rows]
        self.slots[2] = -1
        self.kept = (self.slots >= 0).nonzero()[:, 0]
        self.written = self.slots[self.kept].tolist()
        self.nobodys: list[Tensor] = []
        self.caches = self._empty(), self._empty()

    def _empty(self) -> Tensor:
        """Behind as much that is nobody's, where slot -1 would be."""
        slots = len(self.slots) + 3
        memory = torch.full((slots + 1, self.heads.kv_heads, self.heads.head_dim), float("nan"))
        self.nobodys.append(memory.to(self.rows[0].dtype))
        return self.nobodys[-1][1:]

    def heads_of(self, number: int) -> Tensor:
        """[num_rows, heads, head_dim]."""
        return self.rows[number].view(len(self.slots), -1, self.heads.head_dim)

    def stored(self) -> Tensor:
        """Keys of the rows that have a slot."""
        return self.caches[0][self.written]

    def stock(self, norms: Sequence[Any] | None = None) -> tuple[Tensor, Tensor]:
        """Queries, and keys of the rows that have a slot."""
        query, key = (
            heads if norm is None else norm.base(heads)
            for heads, norm in zip((self.heads_of(0), self.heads_of(1)), norms or self.norms, strict=True)
        )
        query, key = apply_rotary_pos_emb(query, key, *self.angles)
        return query, key[self.kept]

    def run(self, spans: Sequence[Span], rows: slice = slice(None)) -> Tensor:
        query, key, value = (each[rows] for each in self.rows)
        cos, sin = (each[rows] for each in self.angles)
        norms = self.norms[0], self.norms[1]
        return rope_store((query, key, value), (cos, sin), self.slots[rows], self.caches, norms, spans, EPS, self.heads)


@pytest.mark.filterwarnings("ignore:overflow")  # of exp(90), as on a card
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_are_opened_as_transformers_does(dtype: torch.dtype) -> None:
    joined = 8 * torch.randn(3, 2 * 1100).to(dtype)
    joined[0, :2] = torch.tensor([-90.0, 90.0])
    gate, up = torch.split(joined, 1100, 1)
    out = silu_mul(gate, up)
    stock = nn.functional.silu(gate) * up
    exact = gate.double() * torch.sigmoid(gate.double()) * up.double()
    tolerance = {torch.float32: 4e-7, torch.float16: 1.01 * 2**-10}[dtype]
    assert ((out - exact).abs() <= tolerance * exact.abs().clamp(min=1)).all()
    assert ((out.double() - stock.double()).abs() <= tolerance * stock.double().abs().clamp(min=1)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_bit_for_bit_alone_and_in_company(dtype: torch.dtype) -> None:
    norm, hidden, delta = norm_of(48, dtype), torch.randn(6, 48).to(dtype), torch.randn(6, 48).to(dtype)
    trial = Trial(Heads(2, 2, 16), True, dtype, num_rows=6)
    together = *add_norm(hidden, delta, norm, all_of(hidden), EPS), silu_mul(hidden, delta), trial.run(all_of(hidden))
    keys = trial.caches[0].clone()
    for row in range(6):
        one = slice(row, row + 1)
        alone = *add_norm(hidden[one], delta[one], norm, [Span(0, 1, {})], EPS), silu_mul(hidden[one], delta[one])
        turned = trial.run([Span(0, 1, {})], one)
        assert all(torch.equal(a[0], b[row]) for a, b in zip((*alone, turned), together, strict=True))
    assert torch.equal(trial.caches[0].nan_to_num(7), keys.nan_to_num(7))


def test_rows_whose_adapter_has_norms_of_its_own_get_those() -> None:
    """And have the bits that they would have if all rows had them."""
    norm, own, hidden = norm_of(48, torch.float32), norm_of(48, torch.float32), torch.randn(5, 48)
    spans = [Span(0, 1, {}), Span(1, 3, {"norm": own.base}), Span(3, 4, {"elsewhere": own.base}), Span(4, 5, {})]
    _, mixed = add_norm(hidden, hidden, norm, spans, EPS)
    _, of_base = add_norm(hidden, hidden, norm, all_of(hidden), EPS)
    _, of_own = add_norm(hidden, hidden, own, all_of(hidden), EPS)
    assert torch.equal(mixed, torch.cat([of_base[:1], of_own[1:3], of_base[3:]]))
    trial = Trial(Heads(2, 2, 16), True, torch.float32, num_rows=5)
    own = norm_of(16, torch.float32)
    out = trial.run([Span(0, 3, {}), Span(3, 5, {"k": own.base})])
    query, key = trial.stock()
    of_own = trial.stock((trial.norms[0], own))[1]
    assert are_turned_alike(out, query)
    assert are_turned_alike(trial.stored(), torch.cat([key[:2], of_own[2:]]))

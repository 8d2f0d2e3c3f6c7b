"""The start-up proof's other half: adapters of every kind on the base itself, as their definition makes them.

Random adapters are put on all that adapters may change: factors, DoRA's column scales, biases, modules of their own,
rows of the embedding. What they must come to is computed by hooks around the modules of the base, which is proven by
then, in a few plain operations. The same sequences then go through the real runner and its kernels, in mixed steps.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from swaplora_adapters.weights.served import AdapterWeights, EmbeddingWeights, ModuleWeights
from swaplora_server.base.layers import AdaptableLayers
from swaplora_server.base.proof import BLOCK_SIZE, Expected, Trial, num_blocks_of, tokens_of
from swaplora_server.engine.lora.modules import LoraEmbedding, LoraLinear, Wrapped, row_dim
from swaplora_server.engine.request import AdapterUse, Request, SamplingParams
from swaplora_server.engine.request import Sequence as Tokens
from swaplora_server.engine.scheduling.batch import rows_of
from swaplora_server.engine.step import Planner, use
from swaplora_server.kernels.backend import Backend, RunningStep, StepRows
from swaplora_server.kernels.step import Segments

# as in the proof of the base: prompts, then decoding rows beside a chunk
_CUTS = ((0, 8, 9), (0, 13, 14), (0, 1, 3))
_RANK = 3
_STRENGTH = 0.1
_INVOKED_AT = (0, 2, 0)  # by sequence: the second's first rows are the base's


@dataclass(frozen=True, slots=True)
class AdapterProof:
    """What each of the proof's sequences uses, and what it must come to."""

    uses: Sequence[tuple[AdapterUse, ...]]
    expected: Expected

    def run(self, model: PreTrainedModel, backend: Backend) -> None:
        """Raises UnsupportedModelError where the model does not add what adapters are."""
        Trial(model, backend, _CUTS, self.uses, _INVOKED_AT).run(self.expected)


@torch.inference_mode()
def adapter_proof(
    model: PreTrainedModel, backend: Backend, wrapped: Mapping[str, Wrapped], layers: AdaptableLayers, tolerance: float
) -> AdapterProof:
    """Make adapters, and what they must come to, while the layers of `model` run one operation at a time."""
    maker = AdapterMaker(model, layers)
    plain, other, scaled, replacing = maker.plain(), maker.plain(), maker.scaled(), maker.replacing(wrapped)
    terms = [(scaled, 1.0)], [(plain, 0.5), (other, -1.0)], [(replacing, 1.0)]
    paths = tuple(wrapped)
    uses = [
        tuple(
            AdapterUse(replace(weights, tables=backend.tables(weights, paths)), scale, weights.digest)
            for weights, scale in own
        )
        for own in terms
    ]
    logits = _defined_logits(model, backend, wrapped, terms)
    return AdapterProof(uses, Expected(logits, tolerance, "with adapters"))


def adding_adapters(model: PreTrainedModel, layers: AdaptableLayers) -> list[AdapterWeights]:
    """Three that add to all linears, without the tables that kernels read; the last as DoRA and biases do."""
    maker = AdapterMaker(model, layers)
    return [maker.plain(), maker.plain(), maker.scaled()]


class AdapterMaker:
    """Draws adapters, the same at every start."""

    def __init__(self, model: PreTrainedModel, layers: AdaptableLayers) -> None:
        self._model = model
        self._dtype, self._device = model.dtype, model.device  # each looks through all of the model
        self._layers = layers
        self._random = torch.Generator().manual_seed(0)
        self._num_made = 0

    def plain(self) -> AdapterWeights:
        """Factors alone, on every linear."""
        return self._named({path: self._factors(path) for path in self._layers.linears})

    def scaled(self) -> AdapterWeights:
        """As DoRA and trained biases are."""
        modules = {
            path: replace(
                self._factors(path),
                column_scale=1 + self._draw(shape.out_features),
                shift=self._draw(shape.out_features),
            )
            for path, shape in self._layers.linears.items()
        }
        return self._named(modules)

    def replacing(self, wrapped: Mapping[str, Wrapped]) -> AdapterWeights:
        """Norms of its own, and two of the smallest linears; factors on other linears; rows of the embedding."""
        sizes = {path: shape.in_features * shape.out_features for path, shape in self._layers.linears.items()}
        smallest = [path for path, size in sizes.items() if size == min(sizes.values())]
        norms = [
            path for path, shapes in self._layers.others.items() if all(len(shape) == 1 for shape in shapes.values())
        ]
        replaced = {path: self._changed(path) for path in dict.fromkeys([*norms, smallest[0], smallest[-1]])}
        modules = {path: self._factors(path) for path in list(sizes)[::3] if path not in replaced}
        embeddings = {path: self._embedding(wrapped[path]) for path in self._layers.embeddings}
        return self._named(modules, embeddings, replaced)

    def _named(
        self,
        modules: Mapping[str, ModuleWeights],
        embeddings: Mapping[str, EmbeddingWeights] | None = None,
        replaced: Mapping[str, nn.Module] | None = None,
    ) -> AdapterWeights:
        self._num_made += 1
        return AdapterWeights(f"proof {self._num_made}", modules, embeddings or {}, replaced or {})

    def _draw(self, *shape: int) -> Tensor:
        return (torch.randn(*shape, generator=self._random) * _STRENGTH).to(self._device)

    def _factors(self, path: str) -> ModuleWeights:
        shape, dtype = self._layers.linears[path], self._dtype
        lora_A = self._draw(_RANK, shape.in_features) / (_STRENGTH * shape.in_features**0.5)
        return ModuleWeights(lora_A.to(dtype), self._draw(_RANK, shape.out_features).to(dtype).t())

    def _changed(self, path: str) -> nn.Module:
        weight = self._layers.read(f"{path}.weight")
        scale = self._draw(len(weight)).cpu()
        changed = weight * (1 + scale.view(-1, *[1] * (weight.dim() - 1)))
        return self._layers.rebuild(path, {"weight": changed}).to(self._device)

    def _embedding(self, module: Wrapped) -> EmbeddingWeights:
        """Rows of other tokens for two of the third sequence's."""
        ids = sorted(tokens_of(2, _CUTS[2][-1], self._model)[:2])
        token_ids = torch.tensor(ids, device=self._device)
        rows = module.base((token_ids + 1)[None] % module.num_embeddings)[0] / getattr(module.base, "embed_scale", 1.0)
        lora_B = self._draw(module.embedding_dim, _RANK) * rows.float().std()
        factors = self._draw(module.num_embeddings, _RANK) / _STRENGTH
        return EmbeddingWeights(factors.to(self._dtype), lora_B.to(self._dtype), token_ids, rows)


Terms = Sequence[tuple[AdapterWeights, float]]


class DefinedRows(NamedTuple):
    """Rows `start` to `stop` of a forward use `terms`."""

    start: int
    stop: int | None  # None: to the last
    terms: Terms


def _defined_logits(
    model: PreTrainedModel, backend: Backend, wrapped: Mapping[str, Wrapped], terms: Sequence[Terms]
) -> Sequence[Tensor]:
    """float32 [length, vocab_size] of each sequence, all of them whole in one forward of the base."""
    scheduled = []
    first = 1
    for index, cuts in enumerate(_CUTS):
        request = Request("proof", tuple(tokens_of(index, cuts[-1], model)), SamplingParams(1), lambda _event: None)
        sequence = Tokens(request, index)
        sequence.block_table = list(range(first, first - (-cuts[-1] // BLOCK_SIZE)))
        first += len(sequence.block_table)
        scheduled.append(rows_of(sequence, 0, cuts[-1]))
    plan = Planner(BLOCK_SIZE).plan(scheduled)
    plan = replace(plan, head_rows=np.arange(plan.runs.num_rows))
    of_base = StepRows(Segments(), None)
    inputs, paged = backend.paged_kv(num_blocks_of(_CUTS), BLOCK_SIZE).begin(plan)
    step = RunningStep(plan, of_base, of_base, paged)
    starts = (plan.runs.starts + _INVOKED_AT).tolist()
    rows = [DefinedRows(*row) for row in zip(starts, plan.runs.stops.tolist(), terms, strict=True)]
    with use(step), ExitStack() as hooks:
        for module in wrapped.values():
            hooks.callback(module.register_forward_hook(Definition(rows)).remove)
        output = model(
            input_ids=inputs.token_ids[None],
            position_ids=inputs.positions[None],
            logits_to_keep=inputs.head_rows,
            use_cache=False,
        )
    return torch.split(output.logits[0].float(), [cuts[-1] for cuts in _CUTS])


class Definition:
    """A hook: what adapters make of a module's output, the definition word for word."""

    def __init__(self, rows: Sequence[DefinedRows]) -> None:
        self._rows = rows

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        assert isinstance(module, Wrapped)
        if not any(True for _ in self._changes(module.path)):
            return output
        output = output.clone()
        for start, stop, weights, scale in self._changes(module.path):
            if isinstance(module, LoraEmbedding):
                _embed(output[0, start:stop], inputs[0][0, start:stop], weights, module)
            elif isinstance(module, LoraLinear):
                x, y = inputs[0].reshape(-1, inputs[0].shape[-1]), output.view(-1, output.shape[-1])
                _project(y[start:stop], x[start:stop], weights, scale, module.path)
            else:
                dim = row_dim(inputs[0])
                length = (output.shape[dim] if stop is None else stop) - start
                cut = (part.narrow(dim, start, length) for part in inputs)
                output.narrow(dim, start, length).copy_(weights.replaced[module.path](*cut))
        return output

    def _changes(self, path: str) -> Iterator[tuple[int, int | None, AdapterWeights, float]]:
        for start, stop, terms in self._rows:
            for weights, scale in terms:
                if path in weights.modules or path in weights.embeddings or path in weights.replaced:
                    yield start, stop, weights, scale


def _project(y: Tensor, x: Tensor, weights: AdapterWeights, scale: float, path: str) -> None:
    own = weights.modules.get(path)
    if own is None:
        y.copy_(weights.replaced[path](x))
        return
    result = y.float() + scale * (x.float() @ own.lora_A.float().t()) @ own.lora_B.float().t()
    if own.column_scale is not None:
        result *= own.column_scale
    if own.shift is not None:
        result += scale * own.shift
    y.copy_(result)


def _embed(y: Tensor, ids: Tensor, weights: AdapterWeights, module: LoraEmbedding) -> None:
    own, factor = weights.embeddings[module.path], getattr(module.base, "embed_scale", 1.0)
    assert own.token_ids is not None
    assert own.token_rows is not None
    for row, token in zip(y, ids, strict=True):
        for other, token_row in zip(own.token_ids, own.token_rows, strict=True):
            if token == other:
                row.copy_(token_row * factor)
        row += (own.lora_A[token].float() @ own.lora_B.float().t() * factor).to(row.dtype)

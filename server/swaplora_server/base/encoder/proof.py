"""The start-up proof of an encoder: packed inputs of several lengths, base and adapters, as stock transformers has it.

What adapters must come to is computed by hooks around the modules of the base, as for decoders.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from swaplora_server.base.adapter_proof import AdapterMaker, DefinedRows, Definition, Terms
from swaplora_server.base.layers import AdaptableLayers
from swaplora_server.base.proof import (
    TOLERANCE,
    UnsupportedModelError,
    deviations,
    is_head,
    tokens_of,
    tolerance_of,
    watching,
)
from swaplora_server.base.upcast import upcast
from swaplora_server.engine.attention import UnsupportedAttentionError
from swaplora_server.engine.lora.modules import Wrapped
from swaplora_server.engine.pooling.encoder_runner import EncoderRunner
from swaplora_server.engine.pooling.kinds import LAST_TOKEN
from swaplora_server.engine.request import AdapterUse, Request, SamplingParams
from swaplora_server.engine.request import Sequence as Tokens
from swaplora_server.engine.scheduling.batch import Batch, rows_of
from swaplora_server.kernels.backend import Backend

UNFIT = (TypeError, ValueError, AttributeError, RuntimeError, IndexError, UnsupportedAttentionError)
"""What a model of an unknown kind may raise."""
_LENGTHS = (9, 14, 3)
_REACHES = ("sliding_window", "position_buckets")  # what some modules call how far a token looks, or tells distances
_BEYOND = 8  # and tokens that one more input has than that
_LONG = 70  # tokens that it has at least: more than two tiles or blocks that kernels work on at a time


@dataclass(frozen=True, slots=True)
class ExpectedStates:
    """What is right, each input alone, and how far from it rounding may lead."""

    inputs: Sequence[Sequence[int]]
    outputs: Sequence[Tensor]  # float32 of each: [length, hidden_size], and a last row of what is pooled, if it is
    tolerance: float  # in standard deviations of a row's numbers


@torch.inference_mode()
def expected_states(model: PreTrainedModel, max_positions: int, products: torch.dtype | None) -> ExpectedStates:
    """Run the proof's inputs through the model as transformers made it.

    `products`: what the linears that stand in will round a float32 model's rows to, if they do.
    """
    reaches = [vars(module).get(name) for module in model.modules() for name in _REACHES]
    longest = max([_LONG, *(reach + _BEYOND for reach in reaches if isinstance(reach, int))])
    lengths = [min(length, max_positions) for length in (*_LENGTHS, longest)]
    inputs = [tokens_of(index, length, model) for index, length in enumerate(lengths)]
    stock = _stock_states(model, inputs)
    if model.dtype != torch.float32:
        with upcast(model):
            exact = _stock_states(model, inputs)
        return ExpectedStates(inputs, exact, tolerance_of(stock, exact))
    if products is None:
        return ExpectedStates(inputs, stock, TOLERANCE)
    with torch.autocast("cpu", dtype=products):
        rounded = _stock_states(model, inputs)
    return ExpectedStates(inputs, stock, tolerance_of(rounded, stock))


def _stock_states(model: PreTrainedModel, inputs: Iterable[Sequence[int]]) -> list[Tensor]:
    tensors = [torch.tensor([tokens], device=model.device) for tokens in inputs]
    outputs = [model(tokens) for tokens in tensors]
    return [_joined(output.last_hidden_state[0], getattr(output, "pooler_output", None)).float() for output in outputs]


def _joined(states: Tensor, pooled: Tensor | None) -> Tensor:
    return states if pooled is None else torch.cat([states, pooled])


class InputTrial:
    """The proof's inputs in a runner of their own, all in one step."""

    def __init__(
        self,
        model: PreTrainedModel,
        pooler: nn.Module | None,
        backend: Backend,
        max_positions: int,
        expected: ExpectedStates,
    ) -> None:
        self._model = model
        self._backend = backend
        self._runner = EncoderRunner(model, pooler, backend, max_positions, model.device)
        self._expected = expected
        self._of_base: Sequence[tuple[AdapterUse, ...]] = [()] * len(expected.inputs)
        self._uses = self._of_base
        self._defined: Sequence[Tensor] = ()  # what these come to
        self._lengths = [len(tokens) for tokens in expected.inputs]

    def prove(self, wrapped: Mapping[str, Wrapped]) -> frozenset[str]:
        """The paths of modules that see one row per token, or input. Raises UnsupportedModelError where it is off."""
        with watching(wrapped) as seen:
            outputs = self._outputs(self._expected.inputs, self._of_base)
        self._compare(outputs, self._expected.outputs, "when inputs are packed")
        num_tokens, num_inputs = sum(self._lengths), len(self._lengths)
        return frozenset(path for path in seen if seen[path] == [num_inputs if is_head(wrapped[path]) else num_tokens])

    @torch.inference_mode()
    def prove_adapters(
        self, wrapped: Mapping[str, Wrapped], layers: AdaptableLayers, alone: AbstractContextManager[None]
    ) -> None:
        """Raises UnsupportedModelError where the model does not add what adapters are.

        `alone`: within it the model may need each input by itself.
        """
        maker = AdapterMaker(self._model, layers)
        plain, other, scaled, replacing = maker.plain(), maker.plain(), maker.scaled(), maker.replacing(wrapped)
        terms = [[(scaled, 1.0)], [(plain, 0.5), (other, -1.0)], [(replacing, 1.0)], [(other, 1.0)]]
        paths = tuple(wrapped)
        uses = [
            tuple(
                AdapterUse(replace(weights, tables=self._backend.tables(weights, paths)), scale, weights.digest)
                for weights, scale in own
            )
            for own in terms
        ]
        with alone:
            self._defined = [
                self._defined_output(*one, wrapped) for one in zip(self._expected.inputs, terms, strict=True)
            ]
        self._uses = uses
        self._compare(self._outputs(self._expected.inputs, uses), self._defined, "with adapters")

    def _defined_output(self, tokens: Sequence[int], terms: Terms, wrapped: Mapping[str, Wrapped]) -> Tensor:
        """Of one input, of which every row that any module sees is changed."""
        definition = Definition([DefinedRows(0, None, terms)])
        with ExitStack() as hooks:
            for module in wrapped.values():
                hooks.callback(module.register_forward_hook(definition).remove)
            return self._outputs([tokens], [()])[0]

    @torch.inference_mode()
    def prove_again(self) -> None:
        """After modules were exchanged for what computes the same. Raises UnsupportedModelError where it is off."""
        self._compare(
            self._outputs(self._expected.inputs, self._of_base), self._expected.outputs, "when layers are fused"
        )
        self._compare(
            self._outputs(self._expected.inputs, self._uses), self._defined, "with adapters, when layers are fused"
        )

    def _outputs(self, inputs: Sequence[Sequence[int]], uses: Sequence[tuple[AdapterUse, ...]]) -> list[Tensor]:
        """Of each input as in `ExpectedStates`, all in one step."""
        scheduled = []
        for number, (tokens, own) in enumerate(zip(inputs, uses, strict=True)):
            request = Request("proof", tuple(tokens), SamplingParams(0), lambda _event: None, own, reads=LAST_TOKEN)
            sequence = Tokens(request, number)
            sequence.block_table = [1]
            scheduled.append(rows_of(sequence, 0, len(tokens)))
        try:
            outputs = self._runner.outputs(Batch(tuple(scheduled)), has_pooled=True)
        except UNFIT as error:
            raise UnsupportedModelError(f"{self._model.config.model_type} does not run packed: {error}") from error
        parts = torch.split(outputs.states, [len(tokens) for tokens in inputs])
        pooled = [None] * len(parts) if outputs.pooled is None else outputs.pooled[:, None].unbind()
        return [_joined(*part).float() for part in zip(parts, pooled, strict=True)]

    def _compare(self, outputs: Sequence[Tensor], right: Sequence[Tensor], case: str) -> None:
        deviation = float(deviations(torch.cat(list(outputs)), torch.cat(list(right))).max())
        if not deviation <= self._expected.tolerance:
            raise UnsupportedModelError(
                f"{self._model.config.model_type} computes something else {case}: "
                f"its states are off by {deviation:.2g} standard deviations"
            )

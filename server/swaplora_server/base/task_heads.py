"""Heads of tasks behind a base: transformers' own code for them, the base taken out and an adapter's weights in it."""

import copy
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions as Outputs

from swaplora_adapters.fit.base import HeadShapes

_CLASSES = {"SEQ_CLS": AutoModelForSequenceClassification}
_NUM_LABELS = 7919  # of the pattern of a head: a number that no other size of a model is


class TaskHeads:
    """What heads a base may have. A pattern of each is made when it is first asked for."""

    def __init__(
        self,
        config: Any,
        root: str,
        given: Mapping[str, Mapping[str, Tensor]] | None = None,
        *,
        needs_pooled: bool = False,
    ) -> None:
        """`root` is what a model with a head calls the base; `given` are parameters of heads that the base has."""
        self._needs_pooled = needs_pooled
        self._config = config
        self._root = root
        self._given = given or {}

    @cached_property
    def shapes(self) -> Mapping[str, HeadShapes]:
        """By PEFT's task type; none of a task that transformers has no head for."""
        return {task: self._shapes(task, pattern) for task, pattern in self._patterns.items()}

    def build(self, task: str, parameters: Mapping[str, Tensor]) -> "TaskHead":
        """A head with these parameters, and the rest as the base has it."""
        whole = {**self._given.get(task, {}), **parameters}
        return TaskHead(self._patterns[task], self._root, whole, self._needs_pooled)

    @cached_property
    def _patterns(self) -> Mapping[str, nn.Module]:
        made = {task: self._pattern(kind) for task, kind in _CLASSES.items()}
        return {task: pattern for task, pattern in made.items() if pattern is not None}

    def _pattern(self, kind: Any) -> nn.Module | None:
        config = copy.deepcopy(self._config)
        config.num_labels = _NUM_LABELS
        config.pad_token_id = None  # by which a head would look for an input's end, which is where it ends
        try:
            with torch.device("meta"):
                model: nn.Module = kind.from_config(config)
        except ValueError:
            return None
        setattr(model, self._root, _States())
        return model.eval()

    def _shapes(self, task: str, pattern: nn.Module) -> HeadShapes:
        shapes = {
            name: tuple(None if size == _NUM_LABELS else size for size in parameter.shape)
            for name, parameter in pattern.named_parameters()
        }
        return HeadShapes(shapes, frozenset(self._given.get(task, {})))


class TaskHead(nn.Module):
    """One adapter's head, a `Reader` of what the base made of one input. Only the engine's thread calls it."""

    def __init__(self, pattern: nn.Module, root: str, parameters: Mapping[str, Tensor], needs_pooled: bool) -> None:
        super().__init__()
        self.needs_pooled = needs_pooled
        self.model = copy.deepcopy(pattern)
        self._root = root
        for name, tensor in parameters.items():
            path, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))

    def forward(self, states: Tensor, pooled: Tensor | None) -> Tensor:
        """states: [num_rows, hidden_size], pooled: [hidden_size] → [num_labels]."""
        base: _States = getattr(self.model, self._root)
        base.output = Outputs(last_hidden_state=states[None], pooler_output=None if pooled is None else pooled[None])
        ids = torch.zeros(1, len(states), dtype=torch.int64, device=states.device)
        logits: Tensor = self.model(input_ids=ids).logits[0]
        base.output = None
        return logits


class _States(nn.Module):
    """Stands where the base was, and says what it said."""

    output: Outputs | None = None

    def forward(self, *_inputs: Any, **_options: Any) -> Outputs | None:
        return self.output

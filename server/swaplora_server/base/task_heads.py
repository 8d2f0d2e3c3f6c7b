"""Heads of tasks behind a base: transformers' own code for them, the base taken out and an adapter's weights in it.

A head reads one vector of an input, or each of its tokens'. Which, is seen and not known by name: a head of random
weights says the same of that vector alone. So the vectors of many inputs are computed at once.
"""

import copy
import enum
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions as Outputs

from swaplora_adapters.fit.base import HeadShapes
from swaplora_server.base.batch_invariant import BatchInvariantMode
from swaplora_server.engine.pooling.kinds import InputStates

_CLASSES = {"SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification}
_SAVED_AS = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}
OF_LAST_TOKEN = frozenset({"SEQ_CLS"})
"""Tasks that need no more of an input than the last token's state."""
_NUM_LABELS = 7919  # of the pattern of a head: a number that no other size of a model is
_FEW_LABELS = 3
_NO_TOKEN = -1  # a padding id by which a head finds that no token is padding
Prepare = Callable[[nn.Module], nn.Module]


class Read(enum.Enum):
    """The vectors of an input that a head reads, one or as many as it has tokens."""

    POOLED = enum.auto()
    FIRST = enum.auto()
    LAST = enum.auto()
    MEAN = enum.auto()
    EACH = enum.auto()

    def of(self, one: InputStates) -> Tensor:
        """[num_vectors, hidden_size]"""
        match self:
            case Read.POOLED:
                assert one.pooled is not None
                return one.pooled[None]
            case Read.FIRST:
                return one.states[:1]
            case Read.LAST:
                return one.states[-1:]
            case Read.MEAN:
                return one.states.mean(0, keepdim=True)
            case Read.EACH:
                return one.states


class _Pattern(NamedTuple):
    """A head without weights of its own, what it reads, and what its model is made without."""

    model: nn.Module
    read: Read
    lacks: frozenset[str]


class TaskHeads:
    """What heads a base may have. A pattern of each is made when it is first asked for."""

    def __init__(
        self,
        config: Any,
        root: str,
        prepare: Prepare,
        tasks: Collection[str] = _CLASSES.keys(),
        given: Mapping[str, Tensor] | None = None,
        pooler: Collection[str] = (),
        device: torch.device | None = None,
    ) -> None:
        """`root` is what a model with a head calls the base; `given` are parameters of heads that the base has.

        `prepare` makes of a linear one that computes the same faster; `pooler` are the paths of those in the base's,
        which lies on `device`.
        """
        self._config = config
        self._root = root
        self._prepare = prepare
        self._tasks = tasks
        self.given = given or {}
        self._pooler = frozenset(pooler)
        self._device = device

    @cached_property
    def shapes(self) -> Mapping[str, HeadShapes]:
        """By PEFT's task type; none of a task that the base has no head for."""
        return {task: self._shapes(pattern) for task, pattern in self._patterns.items()}

    def build(self, task: str, parameters: Mapping[str, Tensor]) -> "TaskHead":
        """A head with these parameters, and the rest as the base has it."""
        pattern = self._patterns[task]
        model, num_labels = copy.deepcopy(pattern.model), 0
        for name, like in pattern.model.named_parameters():
            path, _, leaf = name.rpartition(".")
            whole = parameters[name] if name in parameters else self.given[name]
            if _NUM_LABELS in like.shape:
                num_labels = whole.shape[like.shape.index(_NUM_LABELS)]
            setattr(model.get_submodule(path), leaf, nn.Parameter(whole, requires_grad=False))
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, self._prepare(module))
        return TaskHead(task, model, self._root, pattern.read, num_labels)

    @cached_property
    def own(self) -> "TaskHead | None":
        """The head that the base was saved with, if it is one of these tasks' and whole."""
        saved = tuple(getattr(self._config, "architectures", None) or ())
        for task, ending in _SAVED_AS.items():
            shapes = self.shapes.get(task) if any(name.endswith(ending) for name in saved) else None
            if shapes is not None and shapes.shapes.keys() == shapes.given:
                return self.build(task, {}).to(self._device)
        return None

    @cached_property
    def _patterns(self) -> Mapping[str, _Pattern]:
        made = {task: self._pattern(kind) for task, kind in _CLASSES.items() if task in self._tasks}
        return {task: pattern for task, pattern in made.items() if pattern is not None}

    def _pattern(self, kind: Any) -> _Pattern | None:
        config = copy.deepcopy(self._config)
        config.num_labels = _NUM_LABELS
        config.pad_token_id = None  # which need not be one of the vocabulary
        try:
            with torch.device("meta"):
                model: nn.Module = kind.from_config(config)
        except ValueError:
            return None
        config.get_text_config().pad_token_id = _NO_TOKEN
        has_pooler = getattr(getattr(model, self._root), "pooler", None) is not None
        setattr(model, self._root, _States())
        read = self._read_by(model.eval())
        if read is None:
            return None
        return _Pattern(model, read, frozenset() if has_pooler else self._pooler)

    def _read_by(self, pattern: nn.Module) -> Read | None:
        """What a head of random weights reads of an input; None where it is more than that, or is not there."""
        model, generator = copy.deepcopy(pattern), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in pattern.named_parameters():
                sizes = [_FEW_LABELS if size == _NUM_LABELS else size for size in parameter.shape]
                path, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(path), leaf, nn.Parameter(0.1 * torch.randn(sizes, generator=generator)))
            hidden_size = self._config.get_text_config().hidden_size
            *rows, pooled = torch.randn(6, hidden_size, generator=generator)
            one = InputStates(torch.stack(rows), pooled if self._pooler else None)
            try:
                whole = _logits(model, self._root, one.states[None], one.pooled)
            except (AttributeError, IndexError, TypeError):  # without a pooler, or where it does not stand on the base
                return None
            for read in Read:
                if read is not Read.POOLED or self._pooler:
                    alone = _logits(model, self._root, read.of(one)[:, None], read.of(one))
                    if alone.numel() == whole.numel() and torch.allclose(alone.flatten(), whole.flatten(), atol=1e-5):
                        return read
        return None

    def _shapes(self, pattern: _Pattern) -> HeadShapes:
        shapes = {
            name: tuple(None if size == _NUM_LABELS else size for size in parameter.shape)
            for name, parameter in pattern.model.named_parameters()
        }
        given = {name for name, shape in shapes.items() if name in self.given and _fits(self.given[name], shape)}
        return HeadShapes(shapes, frozenset(given), pattern.lacks)


def _fits(tensor: Tensor, shape: Sequence[int | None]) -> bool:
    return tensor.dim() == len(shape) and all(
        size in (None, own) for size, own in zip(shape, tensor.shape, strict=True)
    )


class TaskHead(nn.Module):
    """An adapter's head or the base's own, a `Reader` of what the base made of inputs. The engine's thread calls it."""

    def __init__(self, task: str, model: nn.Module, root: str, read: Read, num_labels: int) -> None:
        super().__init__()
        self.task = task
        self.num_labels = num_labels
        self.model = model
        self._root = root
        self._read = read
        self._is_guarded = sum(1 for _ in _with_weights(model)) > 1  # one linear has no activation behind it

    @property
    def needs_pooled(self) -> bool:
        """See `Reader`."""
        return self._read is Read.POOLED

    def forward(self, inputs: Sequence[InputStates]) -> Sequence[Tensor]:
        """Of each [num_labels], or of a head of tokens [num_rows, num_labels]."""
        read = [self._read.of(one) for one in inputs]
        vectors = torch.cat(read)
        with BatchInvariantMode() if self._is_guarded and vectors.device.type == "cpu" else nullcontext():
            logits = _logits(self.model, self._root, vectors[:, None], vectors).flatten(0, -2)
        parts = torch.split(logits, [len(own) for own in read])
        return parts if self._read is Read.EACH else [part[0] for part in parts]


def _logits(model: nn.Module, root: str, states: Tensor, pooled: Tensor | None) -> Tensor:
    """states: [num_inputs, num_rows, hidden_size], pooled: [num_inputs, hidden_size]."""
    base: _States = getattr(model, root)
    base.output = Outputs(last_hidden_state=states, pooler_output=pooled)
    ids = torch.zeros(states.shape[:2], dtype=torch.int64, device=states.device)
    logits: Tensor = model(input_ids=ids).logits
    base.output = None
    return logits


def _with_weights(model: nn.Module) -> Iterator[nn.Module]:
    """Its modules that do more than pass on what they are given."""
    idle = (nn.Dropout, nn.Identity, _States)
    return (module for module in model.modules() if not isinstance(module, idle) and not any(module.children()))


class _States(nn.Module):
    """Stands where the base was, and says what it said."""

    output: Outputs | None = None

    def forward(self, *_inputs: Any, **_options: Any) -> Outputs | None:
        return self.output

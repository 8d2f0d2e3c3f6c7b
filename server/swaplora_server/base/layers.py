"""What adapters may know and have of a base's layers: shapes, weights as they are served, and others like them."""

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from swaplora_adapters.config.spec import HEAD_TASKS
from swaplora_adapters.fit.base import EmbeddingShape, HeadShapes, Rebuild
from swaplora_adapters.fit.legacy_names import legacy_names_of
from swaplora_adapters.fit.module_shape import shape_of
from swaplora_adapters.weights.module_copy import with_tensors
from swaplora_server.base.compact_embedding import Bf16Embedding, TiedEmbedding, compact_embedding
from swaplora_server.base.task_heads import TaskHead, TaskHeads
from swaplora_server.engine.lora.modules import LoraEmbedding, LoraLinear, Replaceable, Wrapped
from swaplora_server.kernels.backend import Backend, Memory
from swaplora_server.kernels.cpu.linear import CpuLinear
from swaplora_server.kernels.cpu.quantised_linear import QuantisedLinear
from swaplora_server.kernels.quantised_codes import codes_of, is_quantised


class AdaptableLayers:
    """The `BaseLayers` of a base's wrapped modules. Thread-safe: nothing is written."""

    def __init__(
        self,
        wrapped: Mapping[str, Wrapped],
        addressable: Collection[str],
        tied: Mapping[str, str],
        backend: Backend,
        dtype: torch.dtype,
        model_type: str,
        root: str,
        heads: TaskHeads,
        of_distances: frozenset[str] = frozenset(),
    ) -> None:
        """`addressable` are the paths of those that see one row per token; `dtype` is that of the model's rows.

        `root` is the path of what all but the heads lie in.
        """
        self.root = root
        self._heads = heads
        chosen = {path: module for path, module in wrapped.items() if path in addressable}
        self.linears = {
            path: shape_of(module.base) for path, module in chosen.items() if isinstance(module, LoraLinear)
        }
        self.embeddings = {
            path: EmbeddingShape(module.num_embeddings, module.embedding_dim)
            for path, module in chosen.items()
            if isinstance(module, LoraEmbedding)
        }
        self.others = {path: _shapes(module.base) for path, module in chosen.items() if isinstance(module, Replaceable)}
        self.of_distances = of_distances
        self.tied = tied
        self.transposed = frozenset(path for path, module in chosen.items() if getattr(module, "is_transposed", False))
        self.legacy_names = legacy_names_of(model_type)
        self._wrapped = chosen
        self._backend = backend
        self._dtype = dtype

    @property
    def heads(self) -> Mapping[str, HeadShapes]:
        """See `BaseLayers`."""
        return self._heads.shapes

    @property
    def own_head(self) -> TaskHead | None:
        """The head of a task that the base has itself."""
        return self._heads.own

    def read(self, name: str) -> Tensor:
        """A parameter as a float32 copy on the CPU; a linear's is [out_features, in_features]. Raises KeyError."""
        path, _, parameter = name.rpartition(".")
        wrapped = self._wrapped.get(path)
        if wrapped is None:
            return self._heads.given[name].to("cpu", torch.float32, copy=True)
        is_kept_apart = parameter == "weight" and not isinstance(wrapped, Replaceable)
        value = weight_of(wrapped.base) if is_kept_apart else getattr(wrapped.base, parameter, None)
        if not isinstance(value, Tensor):
            raise KeyError(name)
        return value.detach().to("cpu", torch.float32, copy=True)

    def rebuild(self, path: str, parameters: Mapping[str, Tensor]) -> nn.Module:
        """A module on the host that computes as the base's at `path` does, with these parameters, the rest its own."""
        return self._rebuild(path, parameters, self._backend.memory(0))

    def rebuilder(self) -> Rebuild:
        """A `rebuild` for many modules of one adapter, whose linears share large pages."""
        return partial(self._rebuild, memory=self._backend.memory())

    def _rebuild(self, path: str, parameters: Mapping[str, Tensor], memory: Memory) -> nn.Module:
        if path in HEAD_TASKS:
            return self._heads.build(path, parameters)
        wrapped = self._wrapped[path]
        given = {**dict(self._rest(path, parameters)), **parameters}
        own = {name: nn.Parameter(tensor.to("cpu", self._dtype), requires_grad=False) for name, tensor in given.items()}
        if isinstance(wrapped, LoraLinear):
            return self._backend.linear(_linear(own), memory)
        if isinstance(wrapped.base, Bf16Embedding | TiedEmbedding):
            return compact_embedding(_embedding(own["weight"]), None)
        like = copy.copy(wrapped.base)
        # a shallow copy would share the dictionary, in which a norm without a bias has one that is None
        like._parameters = dict.fromkeys(wrapped.base._parameters) | own  # noqa: SLF001
        return with_tensors(like, Tensor.cpu)

    def _rest(self, path: str, given: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        for name in ("weight", "bias", *dict(self._wrapped[path].base.named_parameters())):
            if name not in given:
                with suppress(KeyError):
                    yield name, self.read(f"{path}.{name}")


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def weight_of(module: nn.Module) -> Tensor:
    """The weight that a linear, embedding or norm computes with; a linear's is [out_features, in_features]."""
    if isinstance(module, CpuLinear | QuantisedLinear | Bf16Embedding | TiedEmbedding):
        return module.dense()
    if is_quantised(module):
        return codes_of(module).dense()
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise TypeError(f"a {type(module).__name__} has no weight that can be read")
    return weight.detach().t() if isinstance(module, Conv1D) else weight.detach()


def _embedding(weight: nn.Parameter) -> nn.Embedding:
    num_embeddings, embedding_dim = weight.shape
    embedding = nn.Embedding(num_embeddings, embedding_dim, device="meta")
    embedding.weight = weight
    return embedding


def _linear(parameters: Mapping[str, nn.Parameter]) -> nn.Linear:
    out_features, in_features = parameters["weight"].shape
    linear = nn.Linear(in_features, out_features, bias="bias" in parameters, device="meta")
    for name, parameter in parameters.items():
        setattr(linear, name, parameter)
    return linear

"""How well texts go with each other: what a head of one label says of each pair, or how alike their embeddings are."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np

from swaplora_server.base.task_heads import TaskHead
from swaplora_server.engine.request import AdapterUse, Vector
from swaplora_server.service.errors import RequestError
from swaplora_server.service.generating.checks import check_ids
from swaplora_server.service.pooling.heads import scorer
from swaplora_server.service.pooling.inputs import Input, Reading, check_length
from swaplora_server.service.pooling.layout import Filled, Layout, Layouts, kept_of_pair, layouts_of
from swaplora_server.service.pooling.pooling import Pooled
from swaplora_server.service.prompts import Truncation, kept
from swaplora_server.service.service import Service

_LEAST = 2  # tokens that must be left of a pair: one of each text
_SIGMOID, _IDENTITY = "Sigmoid", "Identity"  # of torch.nn
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Texts:
    """Token ids of some texts, without special ones, and the request's field of the one of a number."""

    token_ids: Sequence[Sequence[int]]
    param: Callable[[int], str]

    def __len__(self) -> int:
        return len(self.token_ids)


class _Cut(NamedTuple):
    """The texts of one input, and how many tokens are kept of each."""

    texts: Sequence[Sequence[int]]
    lengths: Sequence[int]
    keeps_end: bool

    def filled(self, layout: Layout, *, has_types: bool = False) -> Filled:
        """With special tokens."""
        cuts = [Truncation(length, self.keeps_end) for length in self.lengths]
        own = [kept(text, cut) for text, cut in zip(self.texts, cuts, strict=True)]
        return layout.filled(*own, has_types=has_types)


@dataclass(frozen=True, slots=True)
class ScoredTexts:
    """Documents, each beside its own query, or all beside the one that there is. See `Encoded`."""

    service: Service
    queries: Texts
    documents: Texts
    truncation: Truncation | None

    @property
    def most_tokens(self) -> int:
        """See `Encoded`."""
        single, pair = self._layouts
        pairs = sum(sum(one.lengths) + pair.num_special for one in self._pairs())
        texts = [*self.queries.token_ids, *self.documents.token_ids]
        return max(pairs, sum(map(len, texts)) + single.num_special * len(texts))

    def reading(self, uses: Sequence[AdapterUse]) -> Reading:
        """A head reads pairs; where there is none, embeddings are made of the queries, then of the documents."""
        head = scorer(self.service.base, uses)
        if head is None:
            layout, beside = self._layouts.single, ""
            inputs = [*self._singles(self.queries), *self._singles(self.documents)]
        else:
            layout, beside = self._layouts.pair, " with its query"
            inputs = list(self._paired())
        for one in inputs:
            check_length(self.service, one, beside)
        check_ids(self.service, layout.special_ids, self.documents.param(0))
        for texts in (self.queries, self.documents):
            for number, token_ids in enumerate(texts.token_ids):
                check_ids(self.service, token_ids, texts.param(number))
        return Reading(self.service.base.pooling if head is None else head, inputs)

    @property
    def _layouts(self) -> Layouts:
        return layouts_of(self.service.base.tokenizer.backend_tokenizer)

    def _pairs(self) -> Iterator["_Cut"]:
        """What is kept of each. Raises RequestError for a truncation that leaves a text nothing."""
        num_special, truncation = self._layouts.pair.num_special, self.truncation
        if truncation is not None and truncation.num_tokens < num_special + _LEAST:
            least = f"{num_special + _LEAST}, of which {num_special} are a pair's special tokens"
            message = f"truncate_prompt_tokens must be at least {least}"
            raise RequestError("invalid_request", message, "truncate_prompt_tokens")
        queries = _beside(self.queries.token_ids, len(self.documents))
        for first, second in zip(queries, self.documents.token_ids, strict=True):
            lengths = len(first), len(second)
            if truncation is not None:
                lengths = kept_of_pair(*lengths, truncation.num_tokens - num_special)
            yield _Cut((first, second), lengths, truncation is not None and truncation.keeps_end)

    def _paired(self) -> Iterator[Input]:
        layout, has_types = self._layouts.pair, _has_types(self.service)
        for number, pair in enumerate(self._pairs()):
            filled = partial(pair.filled, layout, has_types=has_types)
            yield Input(sum(pair.lengths) + layout.num_special, self.documents.param(number), filled)

    def _singles(self, texts: Texts) -> Iterator[Input]:
        layout, truncation = self._layouts.single, self.truncation
        for number, token_ids in enumerate(texts.token_ids):
            length, keeps_end = len(token_ids), truncation is not None and truncation.keeps_end
            if truncation is not None:
                length = min(length, max(0, truncation.num_tokens - layout.num_special))
            filled = partial(_Cut((token_ids,), (length,), keeps_end).filled, layout)
            yield Input(length + layout.num_special, texts.param(number), filled)


def scores(service: Service, pooled: Pooled, num_queries: int, *, activates: bool) -> list[float]:
    """Of each document, from what was computed of `ScoredTexts`; by a head its logit, unless it `activates`."""
    if not isinstance(pooled.reader, TaskHead):
        queries, documents = pooled.vectors[:num_queries], pooled.vectors[num_queries:]
        return [_cosine(*pair) for pair in zip(_beside(queries, len(documents)), documents, strict=True)]
    activated = _sigmoid if activates and _has_sigmoid(service) else float
    return [activated(logit) for (logit,) in pooled.vectors]


def _beside(queries: Sequence[T], num_documents: int) -> Sequence[T]:
    """One for each document."""
    return list(queries) * num_documents if len(queries) == 1 else queries


def _has_types(service: Service) -> bool:
    """Whether the base tells a pair's texts apart by segments, and its tokenizer says which: transformers asks it."""
    num_types = getattr(service.base.model.config, "type_vocab_size", 0)
    return num_types > 1 and "token_type_ids" in service.base.tokenizer.model_input_names


def _has_sigmoid(service: Service) -> bool:
    """Whether scores are of 0 to 1, as a CrossEncoder of sentence-transformers has it: unless its files say other.

    Raises RequestError for a function that is not served.
    """
    base, config = service.base, service.base.model.config
    own = getattr(config, "sentence_transformers", None) or {}
    older = getattr(config, "sbert_ce_default_activation_function", None)
    named = base.score_activation or own.get("activation_fn") or older or _SIGMOID
    name = str(named).rpartition(".")[2]
    if name not in (_SIGMOID, _IDENTITY):
        message = (
            f"the base's files have scores go through {name[:64]}, which is not served: use_activation false gives"
        )
        raise RequestError("invalid_request", f"{message} them without", "use_activation")
    return name == _SIGMOID


def _sigmoid(logit: float) -> float:
    return float(np.exp(-np.logaddexp(0.0, -float(logit))))


def _cosine(first: Vector, second: Vector) -> float:
    """0 where one of them is."""
    one, other = first.astype(np.float64), second.astype(np.float64)
    lengths = np.sqrt(one @ one) * np.sqrt(other @ other)
    return float(one @ other / lengths) if lengths else 0.0

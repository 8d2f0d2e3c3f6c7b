"""The bodies of requests for scores, as vLLM defines them, and Cohere and Jina where that is for reranking.

Imports no torch.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import Discriminator, Field, Tag

from swaplora_server.http.pooling.wire import WholeBody
from swaplora_server.http.transport.models import BRANCH, ClosedModel
from swaplora_server.http.wire import MAX_PROMPT_TOKENS, MAX_PROMPTS, Whole
from swaplora_server.service.errors import RequestError

_TEXT, _OBJECT, _LIST = (f"{BRANCH}{name}" for name in ("text", "object", "list"))
_FORMS: Mapping[type, str] = {str: _TEXT, dict: _OBJECT, list: _LIST}
_PAIRS = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))
_FIELDS = tuple(dict.fromkeys(name for pair in _PAIRS for name in pair))


class TextObject(ClosedModel):
    """A text as Cohere and Jina may have it."""

    text: str


def _form(value: object) -> str | None:
    return next((form for kind, form in _FORMS.items() if isinstance(value, kind)), None)


Text = Annotated[
    Annotated[str, Tag(_TEXT)] | Annotated[TextObject, Tag(_OBJECT)],
    Discriminator(_form, "form", "must be a text, or an object with a text"),
]
Texts = Annotated[
    Annotated[str, Tag(_TEXT)]
    | Annotated[TextObject, Tag(_OBJECT)]
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag(_LIST)],
    Discriminator(_form, "form", "must be a text, an object with a text, or a list of such"),
]
# of a text; 0 is no limit, as vLLM has it
Limit = Annotated[Whole, Field(ge=0, le=MAX_PROMPT_TOKENS)]


class GivenTexts(NamedTuple):
    """The texts of one field, as many as there are."""

    field: str
    texts: Sequence[str]
    is_list: bool

    def param(self, number: int) -> str:
        """One of many stands at its place in the list."""
        return f"{self.field}[{number}]" if self.is_list else self.field


class ScoringBody(WholeBody):
    """What requests for scores have in common."""

    use_activation: bool = True
    max_tokens_per_query: Limit = 0
    max_tokens_per_doc: Limit = 0

    @property
    @abstractmethod
    def first(self) -> GivenTexts:
        """As many as the second, or one beside all of them."""

    @property
    @abstractmethod
    def second(self) -> GivenTexts:
        """Each of which has a score."""

    @property
    def num_prompts(self) -> int:
        return len(self.second.texts)


class ScoreBody(ScoringBody):
    """POST /score and /v1/score. Its texts come under any of four pairs of names."""

    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None
    items: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None

    @property
    def first(self) -> GivenTexts:
        """See `ScoringBody`."""
        return given(self, self._fields()[0])

    @property
    def second(self) -> GivenTexts:
        """See `ScoringBody`."""
        return given(self, self._fields()[1])

    def _fields(self) -> tuple[str, str]:
        """Those that the texts are in. Raises RequestError for one without the other, and for more than two."""
        there = {name for name in _FIELDS if getattr(self, name) is not None}
        for pair in _PAIRS:
            if there == {*pair}:
                return pair
        message = f"send two fields with texts, {', or '.join(' and '.join(pair) for pair in _PAIRS)}"
        lacking = [name for pair in _PAIRS if there < {*pair} for name in pair if name not in there]
        raise RequestError("invalid_request", message, (lacking or sorted(there) or [_PAIRS[0][0]])[0])


class RerankBody(ScoringBody):
    """POST /rerank, /v1/rerank and /v2/rerank."""

    query: Text
    documents: Texts
    top_n: Annotated[Whole, Field(ge=0, le=MAX_PROMPT_TOKENS)] = 0  # all of them, as vLLM has it
    return_documents: bool = True

    @property
    def first(self) -> GivenTexts:
        """See `ScoringBody`."""
        return given(self, "query")

    @property
    def second(self) -> GivenTexts:
        """See `ScoringBody`."""
        return given(self, "documents")


def given(body: ScoringBody, field: str) -> GivenTexts:
    """What a field holds."""
    value: Any = getattr(body, field)
    is_list = isinstance(value, list)
    texts = [one if isinstance(one, str) else one.text for one in (value if is_list else [value])]
    return GivenTexts(field, texts, is_list)

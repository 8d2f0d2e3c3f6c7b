"""What a request that generates wants, whichever route it came by."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from swaplora_adapters.weights.router import Trace
from swaplora_server.engine.request import SamplingParams
from swaplora_server.service.adapter_mix import NOBODY, Asker, BoundMixture, MixTerm
from swaplora_server.service.admission import NO_HURRY, Urgency
from swaplora_server.service.grammar.source import GrammarSource

Encode = Callable[[], Awaitable[Sequence[Sequence[int]]]]  # what makes token ids of a request's prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationTask:
    """What one request wants: n continuations of each of its prompts, by the base or by adapters.

    A refusal names the request's fields as the last two say.
    """

    model: str
    encode: Encode
    sampling: SamplingParams  # how, but for the number of tokens and for the ids that end every text
    num_prompts: int = 1
    adapters: tuple[MixTerm, ...] = ()  # added to the base, which is then the model
    max_tokens: int | None = None  # None: as many as fit
    ignore_eos: bool = False
    n: int = 1
    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    shown: frozenset[str] = frozenset()  # special tokens that are shown all the same, so that the text can be read
    has_echo: bool = False  # whether each choice begins with its prompt
    is_streamed: bool = False  # whether each piece is wanted as soon as it is there
    cache_salt: str | None = None
    urgency: Urgency = NO_HURRY
    format: GrammarSource | None = None  # what the text keeps to
    asker: Asker = NOBODY
    operation: str = "text_completion"  # or chat, for traces
    mixture: BoundMixture | None = None  # what the model stands for, where that was looked up before
    trace: Trace | None = None  # shown what the tokens take of a mixture's members
    prompt_param: Callable[[int], str] = lambda _number: "prompt"  # of the prompt of this number
    length_param: str = "max_tokens"

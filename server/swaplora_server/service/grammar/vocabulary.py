"""The base's vocabulary as llguidance reads it: the bytes that each token adds to a text."""

from collections.abc import Collection, Sequence

from llguidance import LLTokenizer
from tokenizers import Tokenizer

from swaplora_server.base.vocabulary import Vocabulary


class _Tokens:
    """What LLTokenizer asks of a tokenizer. A text ends with a token of its own, behind all of the base's."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    as_read: LLTokenizer  # this, as llguidance has read it

    def __init__(self, tokenizer: Tokenizer, vocabulary: Vocabulary, vocab_size: int, ends: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self.tokens = [*map(vocabulary.bytes_of, range(vocab_size)), b"<end>"]
        self.eos_token_id = vocab_size
        self.special_token_ids = sorted({*vocabulary.special, *ends, vocab_size})

    def __call__(self, text: str) -> Sequence[int]:
        """How the base itself writes a text that is the only one possible, unless that adds a space or the like."""
        token_ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        if b"".join(self.tokens[token_id] for token_id in token_ids) == text.encode():
            return token_ids
        return self.as_read.greedy_tokenize(text)


def grammar_tokenizer(
    tokenizer: Tokenizer, vocabulary: Vocabulary, vocab_size: int, ends: Collection[int]
) -> LLTokenizer:
    """Of tokens [0, vocab_size). Token `vocab_size` stands for the end of a text; `ends` are in no text either.

    Takes some tenths of a second for a large vocabulary.
    """
    tokens = _Tokens(tokenizer, vocabulary, vocab_size, ends)
    tokens.as_read = LLTokenizer(tokens)  # type: ignore[arg-type]
    return tokens.as_read

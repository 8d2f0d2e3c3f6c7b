"""Small tokenizers of each kind that models of the field have: what one token adds to a text differs between them."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny

SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["a", "b", "ab", "aab", ".", "é", "€", "😀", "▁", "▁a", "▁ab", "▁▁", "▁b▁a"]


def byte_level() -> Tokenizer:
    """GPT-2's kind, with pieces that hold parts of characters, and a name that was added later."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # in the letters that stand for bytes: "ab", " a", " ab", and halves of "😀", " €" and "aé"
    pieces = [*letters, "ab", "Ġa", "Ġab", "ðŁ", "ĺĢ", "Ġâ", "Ĥ¬", "aÃ"]
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return with_special(tokenizer)


def byte_fallback() -> Tokenizer:
    """Llama-2's and Mistral's kind: no space is shown before the first word, and bytes stand for what is rare."""
    tokenizer = _bpe([*BYTES, *WORDS])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return with_special(tokenizer)


def gemma() -> Tokenizer:
    """The same, but for the first space."""
    tokenizer = _bpe([*BYTES, *WORDS])
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return with_special(tokenizer)


def metaspace() -> Tokenizer:
    """T5's kind."""
    tokenizer = _bpe(WORDS)
    tokenizer.decoder = decoders.Metaspace()
    return with_special(tokenizer)


def word_piece() -> Tokenizer:
    """BERT's kind."""
    words = ["<unk>", "a", "##a", "b", "##b", ".", "é", "##€", "n't", "##ab", "ab"]
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.decoder = decoders.WordPiece()
    return with_special(tokenizer)


def words() -> Tokenizer:
    """Whole words, and no decoder: there is a space between any two."""
    return with_special(Tokenizer(models.WordLevel({"a": 0, "b": 1, "ab": 2, "é": 3, "ba": 4}, unk_token="<unk>")))


def with_special(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(["aé"])  # somebody's own, which a decoder of bytes takes for a broken character
    return tokenizer


def _bpe(pieces: list[str]) -> Tokenizer:
    vocab = {piece: index for index, piece in enumerate([*SPECIAL, *pieces])}
    return Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))


KINDS = {kind.__name__: kind() for kind in (byte_level, byte_fallback, gemma, metaspace, word_piece, words)}


def for_models(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """As a base comes with it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=tiny.CHAT_TEMPLATE,
    )

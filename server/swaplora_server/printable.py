"""Text of others, made safe for a terminal, which would obey some characters instead of showing them."""

_KEPT = "\t\n"
# C0 and C1 controls, what turns the direction of a line around, and halves of characters, which nothing can print
_OBEYED = [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)]
_TABLE = {code: "\ufffd" for code in _OBEYED if chr(code) not in _KEPT}


def printable(text: str) -> str:
    """`text` with U+FFFD for each character that is not for the eye; line feeds and tabs stay."""
    return text.translate(_TABLE)

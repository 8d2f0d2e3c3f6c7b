"""A plugin of pytest: Triton's interpreter puts its own operations into the language once, not at every call.

Otherwise a third of all time goes into that. They stay there: this is for a process that compiles nothing.
"""

from typing import Any

from triton import language
from triton.runtime import interpreter


def of_all() -> Any:
    """What the interpreter takes for a kernel: its globals say which modules are changed."""
    raise NotImplementedError


patch, nothing = interpreter._patch_lang, interpreter._LangPatchScope()  # noqa: SLF001
of_all.__globals__.update(tl=language, core=language.core)
patch(of_all)
interpreter._patch_lang = lambda _function: nothing  # noqa: SLF001

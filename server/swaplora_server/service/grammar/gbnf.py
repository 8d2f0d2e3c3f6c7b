"""Grammars of llama.cpp, read in a process of their own: llguidance does it in Python, for long."""

import re
import subprocess
import sys

from llguidance import gbnf_to_lark

from swaplora_adapters.priority import NICENESS

# as llguidance tells them apart, but in a time that grows with the text's length alone
_LARK = re.compile(r"(?m)^[^\S\n]*(%llguidance\b|start\s*:)")
_PROGRAM = """
import importlib.util, os, sys
os.nice(int(sys.argv[2]))
spec = importlib.util.spec_from_file_location("gbnf_to_lark", sys.argv[1])
module = sys.modules["gbnf_to_lark"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
try:
    lark, status = module.gbnf_to_lark(sys.stdin.buffer.read().decode(errors="replace")), 0
except RecursionError:
    lark, status = "is nested too deeply", 1
except Exception as error:
    lark, status = f"is neither Lark nor GBNF: {error}", 1
sys.stdout.buffer.write(lark.encode(errors="replace"))
sys.exit(status)
"""


def is_lark(text: str) -> bool:
    """Whether a grammar is written in Lark: it has a rule `start`."""
    return _LARK.search(text) is not None


def lark_of(gbnf: str, seconds: float) -> str:
    """The same grammar in Lark. Raises ValueError for what is no GBNF, or takes longer than that to be read."""
    command = [sys.executable, "-I", "-S", "-c", _PROGRAM, gbnf_to_lark.__file__, str(NICENESS)]
    try:
        done = subprocess.run(
            command, input=gbnf.encode(errors="replace"), capture_output=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError("takes too long to be read: make it smaller or simpler") from error
    said = done.stdout.decode()
    if done.returncode:
        raise ValueError(said or "cannot be read")
    return said

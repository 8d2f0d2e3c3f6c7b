"""Inspect every adapter below a folder, and print whatever else the interpreter did meanwhile.

A script of its own, because an audit hook stays for as long as the process lives.
"""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from adapter_files import LAYERS
from swaplora_adapters.errors import AdapterError
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.intake import inspect_files

HARMLESS = frozenset({"object.__getattr__", "sys._getframe"})
WARM_UP_BYTES = 100_000
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def inspect_all(adapters: Iterable[Path]) -> int:
    """How many of the adapters are let in."""
    num_accepted = 0
    for adapter in adapters:
        try:
            inspect_files(adapter / CONFIG_FILE, adapter / WEIGHTS_FILE, LAYERS)
            num_accepted += 1
        except AdapterError:
            pass
    return num_accepted


def main() -> None:
    """Warm up on the small files, so that everything is imported, and listen the second time."""
    folder = Path(sys.argv[1]).resolve()
    adapters = sorted(folder.iterdir())
    events: list[str] = []
    is_listening = False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if is_listening and event not in HARMLESS and not _is_read_below(folder, event, args):
            events.append(f"{event} {args!r}"[:200])

    inspect_all(path for path in adapters if sum(file.stat().st_size for file in path.iterdir()) < WARM_UP_BYTES)
    sys.addaudithook(hook)
    is_listening = True
    num_accepted = inspect_all(adapters)
    is_listening = False
    json.dump({"accepted": num_accepted, "events": events}, sys.stdout)


def _is_read_below(folder: Path, event: str, args: tuple[Any, ...]) -> bool:
    """Whether a file below the folder is opened for reading."""
    if event != "open":
        return False
    path, _, flags = args
    return isinstance(path, int) or (Path(path).is_relative_to(folder) and not flags & WRITING)


if __name__ == "__main__":
    main()

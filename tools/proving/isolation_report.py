"""What a run of the proof of isolation did, and what it found."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from rich.table import Table

from swaplora_adapters.registry import loader
from swaplora_adapters.weights.served import AdapterWeights


@dataclass
class Report:
    """What was done, and everything that was not as it must be."""

    swaps: int = 0
    replaces: int = 0
    loads: int = 0
    freed: int = 0
    kinds: Counter[str] = field(default_factory=Counter)  # of what was asked, → answers compared
    changes: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    ties: int = 0
    closest: float = float("inf")
    refused: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    log: list[MutableMapping[str, Any]] = field(default_factory=list)  # what the server said meanwhile

    @property
    def answers(self) -> int:
        """How many were compared."""
        return self.kinds.total()

    def note_margins(self, margins: Iterable[float], tie: float) -> None:
        """By how much each token of a control was likelier than the next one."""
        for margin in margins:
            self.closest = min(self.closest, margin)
            self.ties += margin <= tie

    def table(self) -> Table:
        table = Table("isolation", "", show_header=False)
        table.add_row("swaps: requests to others, changes, requests after them", str(self.swaps))
        table.add_row("replaces of one name under sixteen streams", str(self.replaces))
        table.add_row("changes", _told(self.changes))
        table.add_row("loads into memory", str(self.loads))
        table.add_row("of them freed again", str(self.freed))
        table.add_row("answers compared", _told(self.kinds))
        table.add_row("tokens compared", str(self.tokens))
        table.add_row("refused for want of memory, and not compared", str(self.refused))
        table.add_row("ties in the controls (second token as likely)", f"{self.ties}, closest {self.closest:.1e}")
        table.add_row("mismatches", str(len(self.problems)))
        table.add_row("seconds", f"{self.seconds:.0f}")
        return table

    def count_loads(self, patch: pytest.MonkeyPatch) -> None:
        """Watch every adapter that comes into memory, and that it goes."""
        load: Callable[..., AdapterWeights] = vars(loader)["load_weights"]

        def counted(*arguments: Any) -> AdapterWeights:
            weights = load(*arguments)
            self.loads += 1
            tensor = next(iter(weights.modules.values())).tensors[0]
            weakref.finalize(tensor, self._count_freed).atexit = False
            return weights

        patch.setattr(loader, "load_weights", counted)

    def _count_freed(self) -> None:
        self.freed += 1


def _told(counts: Counter[str]) -> str:
    """All together, and each."""
    return "\n".join([str(counts.total()), *(f"{count} {kind}" for kind, count in counts.most_common())])

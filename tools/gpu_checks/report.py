"""What a run found: figures by section, rows of one table, and everything that was not as it must be."""

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MAX_TRACEBACK = 6000  # characters


@dataclass(frozen=True)
class Row:
    """A line of the table. `share` is the floor over what was measured, for what has a floor."""

    what: str
    measured: str
    floor: str = ""
    share: float | None = None


@dataclass
class Report:
    """Filled section by section, and written to `out` after each, so that a run that is cut off still tells."""

    out: Path | None
    console: Console
    figures: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def go_on(self) -> None:
        """Begin with what `out` holds. Raises OSError, ValueError or KeyError for what no report wrote."""
        assert self.out is not None
        earlier = json.loads(self.out.read_text())
        self.figures, self.findings, self.problems = (earlier[part] for part in ("figures", "findings", "problems"))
        self.rows = [Row(**row) for row in earlier["rows"]]

    def section(self, name: str, run: Callable[["Report"], dict[str, Any]]) -> None:
        """Run one section. What it raises is a problem, and ends no other section."""
        began = time.monotonic()
        self.say(f"== {name}")
        try:
            figures = run(self)
        except Exception as error:  # noqa: BLE001 - the boundary of a section
            self.problem(f"{name}: {type(error).__name__}: {error}"[:400])
            figures = {"traceback": traceback.format_exc()[-MAX_TRACEBACK:]}
            self.say(figures["traceback"])
        self.figures[name] = figures | {"seconds": round(time.monotonic() - began, 2)}
        self.write()

    def check(self, is_right: bool, otherwise: str) -> None:
        """Note a problem unless `is_right`."""
        if not is_right:
            self.problem(otherwise)

    def problem(self, what: str) -> None:
        self.problems.append(what)
        self.say(f"WRONG: {what}")

    def finding(self, what: str) -> None:
        """Something to know that is neither right nor wrong."""
        self.findings.append(what)
        self.say(what)

    def row(self, what: str, measured: str, floor: str = "", share: float | None = None) -> None:
        self.rows.append(Row(what, measured, floor, share))
        self.say(f"{what}: {measured}" + (f" (floor {floor}, {share:.3f} of it reached)" if share is not None else ""))

    def say(self, line: str) -> None:
        self.console.print(f"[{time.monotonic() - self.began:6.1f}] {line}", markup=False, highlight=False)
        self.console.file.flush()

    def write(self) -> None:
        if self.out is not None:
            self.out.write_text(json.dumps(self.as_json(), indent=1, default=str))

    def as_json(self) -> dict[str, Any]:
        return {
            "figures": self.figures,
            "rows": [asdict(row) for row in self.rows],
            "findings": self.findings,
            "problems": self.problems,
        }

    def show(self) -> None:
        """The table, then what was found, then what is wrong."""
        table = Table("what", "measured", "floor", "share of floor")
        for row in self.rows:
            table.add_row(row.what, row.measured, row.floor, "" if row.share is None else f"{row.share:.3f}")
        self.console.print(table)
        for finding in self.findings:
            self.console.print(f"found: {finding}", markup=False, highlight=False)
        for problem in self.problems:
            self.console.print(f"WRONG: {problem}", markup=False, highlight=False)

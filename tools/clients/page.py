"""The table in docs/clients.md."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from environments import CLIENTS, Client
from judge import FEATURES, Cell
from repository import ROOT

PAGE = ROOT / "docs" / "clients.md"
BEGIN, END = "<!-- clients -->", "<!-- /clients -->"


@dataclass(frozen=True)
class Row:
    """What became of a client."""

    client: Client
    cells: Mapping[str, Cell]

    @property
    def told(self) -> str:
        """For a terminal: with what there is to say of each."""
        words = [f"{name} {cell.word}" for name, cell in self.cells.items()]
        notes = [f"    {name}: {cell.note}" for name, cell in self.cells.items() if cell.note]
        return "\n".join([f"{self.client.name} {self.client.version}: {', '.join(words)}", *notes])


def table(rows: Iterable[Row], before: str = "") -> str:
    """In Markdown, with a line break at the end; clients that were not run now have the row that they had `before`."""
    head = f"| client | version | {' | '.join(FEATURES)} |\n| --- | --- |{' --- |' * len(FEATURES)}\n"
    old = {name: line for line in before.splitlines() for name in map(_name, CLIENTS) if line.startswith(name)}
    lines = old | {_name(row.client): _line(row) for row in rows}
    return head + "".join(f"{lines[name]}\n" for name in map(_name, CLIENTS) if name in lines)


def in_page() -> str:
    """What stands there now."""
    return PAGE.read_text(encoding="utf-8").partition(f"{BEGIN}\n")[2].partition(END)[0]


def write_page(rows: Iterable[Row]) -> None:
    """Put what was found in place of what stands there of the same clients."""
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text.replace(f"{BEGIN}\n{in_page()}", f"{BEGIN}\n{table(rows, in_page())}"), encoding="utf-8")


def _name(client: Client) -> str:
    return f"| {client.name} | {client.version} |"


def _line(row: Row) -> str:
    return f"{_name(row.client)} {' | '.join(row.cells[name].word for name in FEATURES)} |"

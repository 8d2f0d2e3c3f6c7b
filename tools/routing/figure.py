"""Lines over a number of replicas that doubles, as an SVG picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

_WIDTH, _PANEL, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 250, 60, 16, 52, 44
_COLOURS = ("#2563eb", "#d97706", "#059669", "#7c3aed", "#6b7280")
_DASHES = ("", "6 4", "2 3", "10 3 2 3", "1 4")  # so that they are told apart without colours
_NUM_TICKS = 4


@dataclass(frozen=True)
class Panel:
    title: str
    lowest: float
    highest: float
    lines: Mapping[str, Sequence[float]]  # a value for each number of replicas


def figure_svg(title: str, replicas: Sequence[int], panels: Sequence[Panel]) -> str:
    """Panels one below the other, all with the same lines. White behind it, so that it is read on dark pages too."""
    height = _TOP + len(panels) * _PANEL
    parts = [f'<rect width="{_WIDTH}" height="{height}" fill="white"/>']
    for number, name in enumerate(panels[0].lines):
        x = 12 + number * (_WIDTH - 12) / len(panels[0].lines)
        parts += [f'<path d="M{x:.0f} 18h24" {_style(number)}/>', _text(x + 30, 22, name, "start")]
    for number, panel in enumerate(panels):
        parts += _panel(panel, replicas, _TOP + number * _PANEL)
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" font-family="sans-serif" '
        f'font-size="12">\n<title>{escape(title)}</title>\n{body}\n</svg>\n'
    )


def _panel(panel: Panel, replicas: Sequence[int], top: float) -> list[str]:
    bottom = top + _PANEL - _BOTTOM

    def place(column: int, value: float) -> tuple[float, float]:
        x = _LEFT + column / max(1, len(replicas) - 1) * (_WIDTH - _LEFT - _RIGHT)
        share = (min(value, panel.highest) - panel.lowest) / (panel.highest - panel.lowest)
        return x, bottom - share * (_PANEL - _BOTTOM - 24)

    parts = [_text(_LEFT, top, panel.title, "start")]
    for part in range(_NUM_TICKS + 1):
        value = panel.lowest + (panel.highest - panel.lowest) * part / _NUM_TICKS
        _, y = place(0, value)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#e5e7eb"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{value:.3g}", "end"))
    for column, count in enumerate(replicas):
        x, _ = place(column, panel.lowest)
        parts.append(_text(x, bottom + 18, f"{count}", "end" if column == len(replicas) - 1 else "middle"))
    for number, values in enumerate(panel.lines.values()):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*each) for each in enumerate(values)))
        parts.append(f'<polyline points="{points}" {_style(number)}/>')
    return parts


def _style(number: int) -> str:
    dashes = f' stroke-dasharray="{_DASHES[number]}"' if _DASHES[number] else ""
    return f'fill="none" stroke="{_COLOURS[number]}" stroke-width="2"{dashes}'


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#374151">{escape(words)}</text>'

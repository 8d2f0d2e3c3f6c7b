"""Losses over steps as an SVG picture, which a README shows."""

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

from swaplora_adapters.train.run import Point

WIDTH, HEIGHT = 640, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 28, 36
_COLOURS = ("#2563eb", "#d97706")  # told apart without colours by their dashes
_DASHES = ("", ' stroke-dasharray="6 4"')
_NUM_TICKS = 4


def curves_svg(curves: Mapping[str, Sequence[Point]]) -> str:
    """A picture of up to two curves, by what they are called. White behind it, so that it is read on dark pages too."""
    points = [point for curve in curves.values() for point in curve]
    last, most = max(step for step, _ in points) or 1, max(loss for _, loss in points) * 1.05 or 1.0

    def place(step: float, loss: float) -> tuple[float, float]:
        x = _LEFT + step / last * (WIDTH - _LEFT - _RIGHT)
        return x, HEIGHT - _BOTTOM - loss / most * (HEIGHT - _TOP - _BOTTOM)

    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for part in range(_NUM_TICKS + 1):
        step, loss = last * part / _NUM_TICKS, most * part / _NUM_TICKS
        (x, _), (_, y) = place(step, 0), place(0, loss)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}" stroke="#e5e7eb"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{loss:.2f}", "end"))
        parts.append(_text(x, HEIGHT - _BOTTOM + 18, f"{step:.0f}", "middle"))
    for number, (name, curve) in enumerate(curves.items()):
        style = f'fill="none" stroke="{_COLOURS[number]}" stroke-width="2"{_DASHES[number]}'
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in curve))
        x = _LEFT + 180 * number
        parts.append(f'<polyline points="{line}" {style}/>')
        parts.append(f'<path d="M{x} 14h24" {style}/>' + _text(x + 30, 18, name, "start"))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-family="sans-serif" '
        f'font-size="12">\n<title>Loss over steps</title>\n{body}\n</svg>\n'
    )


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#374151">{escape(words)}</text>'

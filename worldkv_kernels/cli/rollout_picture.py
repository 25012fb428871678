"""The picture of worldkv rollout: which chunks each chunk attended to."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from ..models.rollout import RolloutChunk

_SIDE, _LEFT, _TOP = 560, 70, 84  # of the plot, in pixels
_COLOURS = {"sink": "#bcd4ee", "recent": "#d9d9d9", "current": "#d9d9d9", "retrieved": "#c2410c"}
_LEGEND = {"sink": "sink", "recent": "recent and current", "retrieved": "retrieved from the bank"}


def picture(made: Sequence[RolloutChunk], name: str) -> str:
    """An SVG of what each chunk attended to: across the chunk being made, upwards the chunk attended."""
    count = len(made)
    cell = _SIDE / count

    def mark(role: str, x: float, y: float, width: float, height: float) -> str:
        box = f'x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}"'
        return f'<rect class="{role}" {box} fill="{_COLOURS[role]}"/>'

    def text(x: float, y: float, words: str, more: str = 'text-anchor="middle"') -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(words)}</text>'

    bottom = _TOP + _SIDE
    width, height = _LEFT + _SIDE + 30, bottom + 62
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="13" fill="#222">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        text(_LEFT, 30, f"What each chunk attends to: {name}", 'font-size="17"'),
        '<g shape-rendering="crispEdges">',
    ]
    for chunk in made:
        for role, past, _ in chunk.plan.segments:
            inset = 0.08 * cell if role == "retrieved" else 0.0  # the others join into bands
            x, y = _LEFT + chunk.plan.chunk * cell + inset, bottom - (past + 1) * cell + inset
            parts.append(mark(role, x, y, cell - 2 * inset, cell - 2 * inset))
    parts.append(f'</g><rect x="{_LEFT}" y="{_TOP}" width="{_SIDE}" height="{_SIDE}" fill="none" stroke="#222"/>')
    for tick in range(0, count, _tick_step(count)):
        middle = (tick + 0.5) * cell
        parts.append(text(_LEFT + middle, bottom + 18, str(tick)))
        parts.append(text(_LEFT - 8, bottom - middle + 4.5, str(tick), 'text-anchor="end"'))
    parts.append(text(_LEFT + _SIDE / 2, bottom + 44, "chunk being made"))
    middle = _TOP + _SIDE / 2
    parts.append(text(22, middle, "chunk attended", f'text-anchor="middle" transform="rotate(-90 22 {middle})"'))
    x = float(_LEFT)
    for role, words in _LEGEND.items():
        parts += [mark(role, x, 48, 14, 14), text(x + 20, 60, words, "")]
        x += 50 + 7.2 * len(words)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _tick_step(count: int) -> int:
    """1, 2 or 5 times a power of ten, so that there are at most ten ticks or so."""
    step = 1
    while count / step > 10:
        step = step * 5 // 2 if str(step)[0] == "2" else step * 2
    return step

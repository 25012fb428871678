"""The picture of worldkv rollout: which chunks each chunk attended to, and where the camera was."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

import numpy as np

from ..models.rollout import RolloutChunk
from ..poses import mean_pose, rotation_angles
from .rollout_revisits import Revisit

_SIDE, _LEFT, _TOP = 620, 76, 84  # of the plot, in pixels
_CAMERA, _GAP = 96, 14  # height of the camera's plot, and its distance below
_LONGEST_NAME = 92  # characters that fit the width
_COLOURS = {
    "left": "#f4efe6", "sink": "#9dc0e8", "recent": "#cfcfcf", "current": "#8c8c8c", "retrieved": "#f5a623",
    "again": "#b3001e", "turned": "#444", "away": "#1a7f5a",
}  # fmt: skip


def picture(
    made: Sequence[RolloutChunk], banked: Sequence[int], revisits: Sequence[Revisit], poses: np.ndarray, name: str
) -> str:
    """An SVG of what each chunk attended to: across the chunk being made, upwards the chunk attended.

    Where the camera came back, the chunk that shows the view is marked. Below, how far the camera had turned and gone.
    `banked` are the chunks that could be retrieved when each began, `poses` [n, 4, 4] those of the latent frames.
    """
    count = len(made)
    cell = _SIDE / count
    bottom = _TOP + _SIDE
    width, height = _LEFT + _SIDE + 30, bottom + _GAP + _CAMERA + 52
    again = {revisit.chunk: revisit.nearest for revisit in revisits if revisit.sees_again}

    def box(role: str, chunk: int, past: int, inset: float = 0.0) -> str:
        side = cell * (1 - 2 * inset)
        return _box(role, _LEFT + (chunk + inset) * cell, bottom - (past + 1 - inset) * cell, side)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="14" fill="#222">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(_LEFT, 34, "What each chunk attends to, and what comes back from the bank", 'font-size="19"'),
        _text(_LEFT, 60, _shown(name), 'font-size="12" fill="#555"'),
        '<g shape-rendering="crispEdges">',
    ]
    for plan in (chunk.plan for chunk in made):
        attended = {past for _, past, _ in plan.segments}
        parts += [box("left", plan.chunk, past) for past in range(plan.chunk) if past not in attended]
        for role, past, _ in plan.segments:
            # The others join into bands.
            parts.append(box(role, plan.chunk, past, 0.06 if role == "retrieved" else 0.0))
        if plan.chunk in again:
            parts.append(box("again", plan.chunk, again[plan.chunk], 0.06))
    parts.append(f'</g><rect x="{_LEFT}" y="{_TOP}" width="{_SIDE}" height="{_SIDE}" fill="none" stroke="#222"/>')
    for tick in range(0, count, _tick_step(count)):
        middle = (tick + 0.5) * cell
        parts.append(_text(_LEFT + middle, bottom + _GAP + _CAMERA + 18, str(tick), 'text-anchor="middle"'))
        parts.append(_text(_LEFT - 8, bottom - middle + 5, str(tick), 'text-anchor="end"'))
    parts.append(_text(_LEFT + _SIDE / 2, height - 8, "chunk being made", 'text-anchor="middle"'))
    parts.append(_upright("chunk attended to", _TOP + _SIDE / 2))
    chosen, most = max((len(chunk.plan.retrieved), number) for chunk, number in zip(made, banked, strict=True))
    legend = {
        "current": "the chunk itself", "recent": "recent chunks", "sink": "sink: the first chunk, always",
        "retrieved": f"retrieved: at most {chosen} of up to {most} banked",
        "again": f"a view seen again ({len(again)} times)", "left": "not retrieved",
    }  # fmt: skip
    for i, (role, words) in enumerate(legend.items()):
        y = _TOP + 14 + 24 * i
        parts += [_box(role, _LEFT + 14, y, 15, "legend"), _text(_LEFT + 38, y + 13, words)]
    return "\n".join([*parts, *_camera(poses, count, bottom + _GAP), "</svg>"]) + "\n"


def _camera(poses: np.ndarray, count: int, top: float) -> list[str]:
    """How far the camera had turned from its first view and gone from its first place, a point a chunk."""
    frames = len(poses) // count
    means = np.stack([mean_pose(poses[i * frames : (i + 1) * frames]) for i in range(count)])
    turned = np.degrees(rotation_angles(means[:1, :3, :3], means[:, :3, :3])[0])
    away = np.linalg.norm(means[:, :3, 3] - means[0, :3, 3], axis=1)
    parts = [f'<rect x="{_LEFT}" y="{top}" width="{_SIDE}" height="{_CAMERA}" fill="none" stroke="#222"/>']
    lines = {"turned": (turned, "degrees turned", ""), "away": (away, "distance gone", ' stroke-dasharray="5 3"')}
    for i, (role, (values, words, dashes)) in enumerate(lines.items()):
        most = values.max()
        ups = values / most if most > 1e-6 else values * 0
        points = " ".join(
            f"{_LEFT + (chunk + 0.5) * _SIDE / count:.1f},{top + _CAMERA - 6 - up * (_CAMERA - 34):.1f}"
            for chunk, up in enumerate(ups)
        )
        style = f'fill="none" stroke="{_COLOURS[role]}" stroke-width="2"{dashes}'
        parts.append(f'<polyline class="{role}" points="{points}" {style}/>')
        x = _LEFT + 14 + 240 * i
        parts.append(f'<line x1="{x}" y1="{top + 14}" x2="{x + 24}" y2="{top + 14}" {style}/>')
        parts.append(_text(x + 32, top + 19, f"{words}, up to {most:.3g}", f'fill="{_COLOURS[role]}"'))
    return [*parts, _upright("camera", top + _CAMERA / 2)]


def _box(role: str, x: float, y: float, side: float, of: str = "") -> str:
    sizes = f'x="{x:.2f}" y="{y:.2f}" width="{side:.2f}" height="{side:.2f}"'
    return f'<rect class="{of or role}" {sizes} fill="{_COLOURS[role]}"/>'


def _text(x: float, y: float, words: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(words)}</text>'


def _upright(words: str, middle: float) -> str:
    return _text(24, middle, words, f'text-anchor="middle" transform="rotate(-90 24 {middle})"')


def _shown(name: str) -> str:
    """A name as XML can have it and the width holds it."""
    name = "".join(letter if letter.isprintable() else "?" for letter in name)
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 4]} ..."


def _tick_step(count: int) -> int:
    """1, 2 or 5 times a power of ten, so that there are at most ten ticks or so."""
    step = 1
    while count / step > 10:
        step = step * 5 // 2 if str(step)[0] == "2" else step * 2
    return step

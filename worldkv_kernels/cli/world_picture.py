"""The pictures of worldkv world: what each memory drew on the way back, beside the world as it is. By Pillow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .photographs import as_image

_ZOOM, _GAP, _LEFT, _HEADING = 2, 6, 200, 96
_COLUMNS = 10  # of the picture, frames of the way back
_MOVING_ZOOM, _CAPTION = 3, 34
_MILLISECONDS = 120  # a frame of the animation


def picture(path: str, drawn: Mapping[str, torch.Tensor], captions: Mapping[str, str], given: int) -> None:
    """A row for the world and one for each memory: frames of the way back, from the turning point on.

    Args: drawn, frames [frames, 3, height, width] in 0..1 by name, the world first; captions, a memory's figure.
    """
    from PIL import Image, ImageDraw, ImageFont

    frames = len(next(iter(drawn.values())))
    shown = [given + round(i * (frames - 1 - given) / (_COLUMNS - 1)) for i in range(_COLUMNS)]
    height, width = (side * _ZOOM for side in next(iter(drawn.values())).shape[-2:])
    size = (_LEFT + _COLUMNS * (width + _GAP) + _GAP, _HEADING + len(drawn) * (height + _GAP) + _GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)

    def write(left: int, top: int, words: str, points: int, colour: str = "black") -> None:
        draw.text((left, top), words, fill=colour, font=ImageFont.load_default(points))

    write(16, 14, "A camera turns away and comes back: what a world model draws with each memory", 28)
    told = "the way back in one world, from left to right; PSNR of its views seen again"
    write(16, 54, f"frames {shown[0]} to {shown[-1]}: {told}", 19, "#555")
    for row, (name, of_name) in enumerate(drawn.items()):
        top = _HEADING + row * (height + _GAP)
        write(16, top + height // 2 - 26, name, 20)
        write(16, top + height // 2 + 2, captions.get(name, ""), 18, "#555")
        for column, frame in enumerate(shown):
            sheet.paste(_enlarged(of_name[frame], _ZOOM), (_LEFT + column * (width + _GAP), top))
    sheet.save(path)


def animation(path: str, drawn: Mapping[str, torch.Tensor], captions: Mapping[str, str], given: int) -> None:
    """The way back as a moving picture, the world and all memories side by side; in the format of the suffix."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = (side * _MOVING_ZOOM for side in next(iter(drawn.values())).shape[-2:])
    columns = min(3, len(drawn))
    rows = -(-len(drawn) // columns)
    size = (columns * (width + _GAP) + _GAP, rows * (height + _CAPTION) + _GAP)
    blank = Image.new("RGB", size, "white")
    draw, places = ImageDraw.Draw(blank), {}
    for i, name in enumerate(drawn):
        left, top = _GAP + i % columns * (width + _GAP), i // columns * (height + _CAPTION)
        words = f"{name} {captions[name]}" if name in captions else name
        draw.text((left + 2, top + 8), words, fill="black", font=ImageFont.load_default(15))
        places[name] = (left, top + _CAPTION)
    moving = []
    for frame in range(given, len(next(iter(drawn.values())))):
        still = blank.copy()
        for name, place in places.items():
            still.paste(_enlarged(drawn[name][frame], _MOVING_ZOOM), place)
        moving.append(still)
    moving[0].save(path, save_all=True, append_images=moving[1:], duration=_MILLISECONDS, loop=0)


def _enlarged(frame: torch.Tensor, zoom: int) -> Any:
    from PIL import Image

    image = as_image(frame.permute(1, 2, 0).numpy())
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.BICUBIC)

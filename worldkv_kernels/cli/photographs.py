"""What the commands that show pictures share: photographs to start from, and files to write to. By Pillow."""

from __future__ import annotations

import argparse
import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np

PHOTOGRAPHS = {"coffee": "coffee.png", "astronaut": "astronaut.png", "rocket": "rocket.jpg", "cat": "chelsea.png"}
_LEAST_SIDE = 64  # pixels of a photograph


def add_arguments(parser: argparse.ArgumentParser, default: str | None) -> None:
    """`--image` and `--photo`, of which there may be one."""
    scene = parser.add_mutually_exclusive_group()
    scene.add_argument("--image", metavar="FILE", help="a photograph of your own, any format Pillow reads")
    scene.add_argument(
        "--photo", choices=PHOTOGRAPHS, default=default,
        help=f"one that scikit-image's wheel holds{f' (default: {default})' if default else ''}",
    )  # fmt: skip


def load(args: argparse.Namespace) -> tuple[str, np.ndarray]:
    """Name and pixels [height, width, 3] in 0..1 of `--image`, or else of `--photo`.

    Raises ValueError when there is no such picture, it cannot be read, or it is smaller than 64 pixels.
    """
    from PIL import Image, ImageOps

    if args.image is not None:
        argument, path, name = "--image", Path(args.image), Path(args.image).name
    else:
        package = importlib.util.find_spec("skimage")
        assert package is not None and package.origin is not None
        argument, path = "--photo", Path(package.origin).parent / "data" / PHOTOGRAPHS[args.photo]
        name = f"the photograph '{args.photo}'"
    try:
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file)  # cameras store how they were held beside the pixels
            if upright.mode.startswith("I"):  # 16 bits of grey, which "RGB" would clip to 8
                grey = np.asarray(upright.convert("I"), dtype=np.float64) / 65535
                pixels = np.repeat(grey[..., None], 3, axis=2)
            else:
                pixels = np.asarray(upright.convert("RGB"), dtype=np.float64) / 255
    except Exception as error:  # Pillow's decoders raise what they like
        reason = f": {getattr(error, 'strerror', None) or error}"
        raise ValueError(f"{argument} must be a picture that Pillow reads, got {str(path)!r}{reason}") from error
    height, width = pixels.shape[:2]
    if min(height, width) < _LEAST_SIDE:
        raise ValueError(
            f"{argument} must be at least {_LEAST_SIDE} pixels each way, got {width} x {height}: {str(path)!r}"
        )
    return name, pixels


def check_installed(command: str, *packages: str) -> None:
    """Raises ImportError, with the remedy, where Pillow (PIL) or scikit-image (skimage) is missing."""
    if any(importlib.util.find_spec(package) is None for package in packages):
        raise ImportError(f"{command} needs scikit-image and Pillow: pip install 'worldkv-kernels[demo]'")


def formats(path: str) -> list[str]:
    """The suffix of `path` if Pillow can write colours to such a file, else those of common formats."""
    from PIL import Image

    suffix = Path(path).suffix.lower()
    try:
        Image.new("RGB", (16, 16)).save(io.BytesIO(), Image.registered_extensions()[suffix])
        return [suffix]
    except (KeyError, OSError, ValueError):
        return [".png", ".jpg", ".webp"]


def as_image(pixels: np.ndarray) -> Any:
    """A Pillow image of pixels [height, width, 3], clipped to 0..1."""
    from PIL import Image

    return Image.fromarray((np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8))

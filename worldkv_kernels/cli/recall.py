"""worldkv recall: remember a photograph through the real ops and memory, and show what comes back."""

from __future__ import annotations

import argparse
import importlib.util
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..ops.all import check_every_backend
from ..recall import CHUNK_FRAMES, MODES, RecallResult, Scene, pan_and_return, recall, revisited
from .report import Progress, machine, parse_device, size, table, writable, write_json

_LEAST_STEP, _LARGEST_STEP = 0.001, 360.0  # degrees; views are told apart to a millionth
_LEAST_SIDE = 64  # pixels of a photograph

PHOTOGRAPHS = {"coffee": "coffee.png", "astronaut": "astronaut.png", "rocket": "rocket.jpg", "cat": "chelsea.png"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", help="a photograph of your own, any format Pillow reads")
    parser.add_argument(
        "--photo", choices=PHOTOGRAPHS, default="coffee", help="one from scikit-image's wheel (default: coffee)"
    )
    parser.add_argument("--frames", type=int, default=90, help="frames of the pan, out and back (default: 90)")
    parser.add_argument("--step", type=float, default=4.0, help="degrees the camera turns per frame (default: 4)")
    parser.add_argument("--picture", default="recall.png", help="where the picture goes (default: recall.png)")
    parser.add_argument("--json", default="recall.json", help="the figures, - for stdout (default: recall.json)")
    parser.add_argument("--device", help="such as cuda or cpu (default: the GPU where there is one)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="(default: float32 on a CPU, bfloat16 on a GPU)"
    )
    parser.add_argument("--backend", help="of the ops: reference or triton (default: the automatic choice)")
    parser.add_argument("--seed", type=int, default=0, help="of the keys' random features (default: 0)")


def run(args: argparse.Namespace) -> int:
    if args.frames < 1 or args.frames % CHUNK_FRAMES:
        raise ValueError(f"--frames must be a positive multiple of {CHUNK_FRAMES}, got {args.frames}")
    if not _LEAST_STEP <= args.step <= _LARGEST_STEP:
        raise ValueError(f"--step must be from {_LEAST_STEP} to {_LARGEST_STEP:g} degrees, got {args.step}")
    device = parse_device(args.device)
    check_every_backend("--backend", args.backend, device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    name, image = _load_image(args)
    writable("--picture", args.picture, _formats(args.picture))
    yaws = pan_and_return(args.frames, args.step)
    again = revisited(yaws)
    if not len(again):
        raise ValueError(f"--frames must be enough to see a view again after 30 frames, got {args.frames}")
    out = sys.stderr if args.json == "-" else sys.stdout
    print(
        f"A camera turns {np.ptp(yaws):g} degrees inside {name} and back, {args.frames} frames.\n"
        f"{len(again)} views are seen again after 30 frames or more, and recalled from memory alone "
        f"({device}, {str(dtype)[6:]}).\n",
        file=out, flush=True,
    )  # fmt: skip
    scene = Scene(image, device, args.seed)
    progress = Progress("recall", len(MODES) * args.frames // CHUNK_FRAMES)
    results = []
    for mode in MODES:
        label = mode.name
        results.append(
            recall(
                scene, mode, yaws, dtype=dtype, backend=args.backend,
                on_chunk=lambda chunk, label=label: progress.step(label),
            )
        )  # fmt: skip
    print(_table(results), file=out)
    figures = {"image": name, "dtype": str(dtype)[6:], "frames": args.frames, "step_degrees": args.step}
    figures |= {"seed": args.seed, "revisited_frames": again.tolist(), "modes": _figures(results)}
    write_json(args.json, {"command": "recall", "machine": machine(device), **figures})
    _draw(args.picture, scene.view(yaws[again[-1]]).cpu().numpy(), results, int(again[-1]))
    print(f"\nwrote {args.picture}: the view of frame {again[-1]}, as it is and as recalled, and the error", file=out)
    return 0


def _load_image(args: argparse.Namespace) -> tuple[str, np.ndarray]:
    """The photograph's name and its pixels, float64 [height, width, 3] in 0..1."""
    if importlib.util.find_spec("PIL") is None or (not args.image and importlib.util.find_spec("skimage") is None):
        raise ImportError("recall needs scikit-image and Pillow: pip install 'worldkv-kernels[demo]'")
    from PIL import Image

    if args.image:
        path, name = Path(args.image), Path(args.image).name
    else:
        package = importlib.util.find_spec("skimage")
        assert package is not None and package.origin is not None
        path, name = Path(package.origin).parent / "data" / PHOTOGRAPHS[args.photo], f"the photograph '{args.photo}'"
    try:
        with Image.open(path) as file:
            pixels = np.asarray(file.convert("RGB"), dtype=np.float64) / 255
    except OSError as error:
        reason = f": {error.strerror}" if error.strerror else ""
        raise ValueError(f"--image must be a picture that Pillow reads, got {path}{reason}") from error
    height, width = pixels.shape[:2]
    if min(height, width) < _LEAST_SIDE:
        raise ValueError(f"--image must be at least {_LEAST_SIDE} pixels each way, got {width} x {height}: {path}")
    return name, pixels


def _formats(path: str) -> list[str]:
    """The suffix of `path` if Pillow can write colours to such a file, else those of common formats."""
    from PIL import Image

    suffix = Path(path).suffix.lower()
    try:
        Image.new("RGB", (16, 16)).save(io.BytesIO(), Image.registered_extensions()[suffix])
        return [suffix]
    except (KeyError, OSError, ValueError):
        return [".png", ".jpg", ".webp"]


def _table(results: list[RecallResult]) -> str:
    full = results[0]
    rows = []
    for result in results:
        tokens = np.mean(result.tokens)
        rows.append([
            result.name, f"{np.mean(result.psnr):.1f}", f"{np.mean(result.psnr) - np.mean(full.psnr):+.1f}",
            f"{tokens:,.0f}", f"{tokens / np.mean(full.tokens):.0%}", size(result.kept_bytes), f"{result.seconds:.1f}",
        ])  # fmt: skip
    return table(["memory", "PSNR dB", "to full", "tokens attended", "of full", "KV kept", "seconds"], rows)


def _figures(results: list[RecallResult]) -> list[dict[str, Any]]:
    return [
        {
            "name": r.name,
            "psnr_db": float(np.mean(r.psnr)),
            "psnr_db_per_view": r.psnr,
            "tokens_attended": float(np.mean(r.tokens)),
            "kept_bytes": r.kept_bytes,
            "retrieved": r.retrieved,
            "seconds": r.seconds,
        }
        for r in results
    ]


def _draw(path: str, truth: np.ndarray, results: list[RecallResult], frame: int) -> None:
    """One column for the truth and each memory: the view, what it is, and below it four times the error."""
    from PIL import Image, ImageDraw, ImageFont

    zoom, gap, caption = 2, 12, 64
    height, width = truth.shape[0] * zoom, truth.shape[1] * zoom
    columns = [("what the camera sees", f"frame {frame}", truth)]
    for result in results:
        assert result.last_view is not None
        lines = f"{result.psnr[-1]:.1f} dB, {result.tokens[-1]:,} tokens"
        columns.append((result.name, lines, result.last_view))
    total = (len(columns) * (width + gap) + gap, gap + height + caption + height + gap)
    picture = Image.new("RGB", total, "white")
    draw = ImageDraw.Draw(picture)
    large, small = ImageFont.load_default(20), ImageFont.load_default(17)
    for i, (title, line, view) in enumerate(columns):
        left = gap + i * (width + gap)
        picture.paste(_image(view).resize((width, height), Image.Resampling.NEAREST), (left, gap))
        draw.text((left, gap + height + 8), title, fill="black", font=large)
        draw.text((left, gap + height + 34), line, fill=(80, 80, 80), font=small)
        below = gap + height + caption
        if i == 0:
            draw.text((left, below + height // 2 - 10), "error, 4 times enlarged", fill=(80, 80, 80), font=small)
        else:
            error = 1 - np.clip(4 * np.abs(view - truth), 0, 1)
            picture.paste(_image(error).resize((width, height), Image.Resampling.NEAREST), (left, below))
            draw.rectangle((left, below, left + width - 1, below + height - 1), outline=(200, 200, 200))
    picture.save(path)


def _image(pixels: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray((np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8))

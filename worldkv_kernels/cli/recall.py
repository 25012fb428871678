"""worldkv recall: remember a photograph through the real ops and memory, and show what comes back."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
import torch

from ..ops.all import check_every_backend
from ..recall import CHUNK_FRAMES, MODES, RecallResult, Scene, pan_and_return, recall, revisited
from . import photographs, report
from .report import size

_LEAST_STEP, _LARGEST_STEP = 0.001, 360.0  # degrees; views are told apart to a millionth
_FRAMES, _MOST_FRAMES = 90, 100_000
_TAKES = "downloads nothing; 90 frames take about 20 seconds on two cores"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"It {_TAKES}."
    add = parser.add_argument
    photographs.add_arguments(parser, "coffee")
    add("--frames", type=report.integer(1, _MOST_FRAMES), default=_FRAMES,
        help="of the pan, out and back (default: %(default)s)")  # fmt: skip
    add("--step", type=report.number, default=4.0, help="degrees the camera turns per frame (default: 4)")
    add("--picture", metavar="FILE", default="recall.png", help="where the picture goes (default: recall.png)")
    add("--json", metavar="PATH", default="recall.json",
        help="where the figures go, one JSON document; - for stdout (default: recall.json)")  # fmt: skip
    add("--device", help="such as cuda or cpu (default: the GPU where there is one)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="(default: float32 on a CPU, bfloat16 on a GPU)")
    add("--backend", help="of the ops: reference or triton (default: the automatic choice)")
    add("--seed", type=report.seed, default=0, help="of the keys' random features (default: 0)")
    report.add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    with report.threads(1):  # the tensors are too small to share
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    if args.frames % CHUNK_FRAMES:
        raise ValueError(f"--frames must be a multiple of {CHUNK_FRAMES}, got {args.frames}")
    if not _LEAST_STEP <= args.step <= _LARGEST_STEP:
        raise ValueError(f"--step must be from {_LEAST_STEP} to {_LARGEST_STEP:g} degrees, got {args.step}")
    device = report.parse_device(args.device)
    check_every_backend("--backend", args.backend, device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    photographs.check_installed("recall", "PIL", *(["skimage"] if args.image is None else []))
    name, image = photographs.load(args)
    report.writable("--picture", args.picture, photographs.formats(args.picture))
    report.different_files(image=args.image, picture=args.picture, json=args.json)
    yaws = pan_and_return(args.frames, args.step)
    again = revisited(yaws)
    if not len(again):
        raise ValueError(f"--frames must be enough to see a view again after 30 frames, got {args.frames}")
    out = sys.stderr if args.json == "-" else sys.stdout
    print(
        f"A camera turns {np.ptp(yaws):g} degrees inside {name} and back, {args.frames} frames.\n"
        f"{len(again)} views are seen again after 30 frames or more, and recalled from memory alone "
        f"({device}, {str(dtype)[6:]}).\n"
        f"It {_TAKES}.\n",
        file=out, flush=True,
    )  # fmt: skip
    scene = Scene(image, device, args.seed)
    progress = report.Progress("recall", len(MODES) * args.frames // CHUNK_FRAMES)
    results = []
    for mode in MODES:
        label = mode.name
        try:
            result = recall(
                scene, mode, yaws, dtype=dtype, backend=args.backend,
                on_chunk=lambda chunk, label=label: progress.step(label),
            )  # fmt: skip
        except ValueError as error:  # of a memory that has no room
            raise ValueError(f"--frames must be fewer: {error}") from error
        results.append(result)
    print(_table(results), file=out)
    report.write_json(args.json, {
        "command": "recall", "machine": report.machine(device), "image": name, "dtype": str(dtype)[6:],
        "frames": args.frames, "step_degrees": args.step, "seed": args.seed, "revisited_frames": again.tolist(),
        "modes": _figures(results),
    })  # fmt: skip
    last = int(again[-1])
    before = int(np.flatnonzero(np.isclose(yaws, yaws[last]))[-2])
    _draw(args.picture, scene.view(yaws[last]).cpu().numpy(), results, last - before)
    print(f"\nwrote {args.picture}: the view of frame {last}, as it is and as each memory recalls it", file=out)
    return 0


def _table(results: list[RecallResult]) -> str:
    full = results[0]
    rows = []
    for result in results:
        tokens = np.mean(result.tokens_attended)
        rows.append([
            result.mode.name, f"{np.mean(result.psnr):.1f}", f"{np.mean(result.psnr) - np.mean(full.psnr):+.1f}",
            f"{tokens:,.0f}", f"{tokens / np.mean(full.tokens_attended):.0%}", size(result.kept_bytes),
            f"{result.seconds:.1f}",
        ])  # fmt: skip
    return report.table(["memory", "PSNR, dB", "to full", "tokens attended", "of full", "KV kept", "seconds"], rows)


def _figures(results: list[RecallResult]) -> list[dict[str, Any]]:
    return [
        {
            "name": r.mode.name,
            **r.mode.options,
            "psnr_db": float(np.mean(r.psnr)),
            "psnr_db_per_view": r.psnr,
            "tokens_attended_mean": float(np.mean(r.tokens_attended)),
            "kept_bytes": r.kept_bytes,
            "retrieved": r.retrieved,
            "seconds": r.seconds,
        }
        for r in results
    ]


def _draw(path: str, truth: np.ndarray, results: list[RecallResult], frames_ago: int) -> None:
    """The last view as it is and as each memory recalls it, with the figures of the table below each."""
    from PIL import Image, ImageDraw, ImageFont

    zoom, columns, gap, heading, caption = 3, 3, 24, 104, 116
    height, width = truth.shape[0] * zoom, truth.shape[1] * zoom
    panels = [("the view as it is", "", f"last seen {frames_ago} frames ago", truth)]
    for result in results:
        assert result.last_view is not None
        figures = f"{np.mean(result.tokens_attended):,.0f} tokens attended, {size(result.kept_bytes)} of KV kept"
        panels.append((result.mode.name, f"PSNR {np.mean(result.psnr):.1f} dB", figures, result.last_view))
    rows = -(-len(panels) // columns)
    picture = Image.new("RGB", (columns * (width + gap) + gap, heading + rows * (height + caption)), "white")
    draw = ImageDraw.Draw(picture)

    def write(left: int, top: int, words: str, points: int, colour: str) -> None:
        draw.text((left, top), words, fill=colour, font=ImageFont.load_default(points))

    write(gap, 16, "A camera turns away and comes back: what each memory recalls of the view", 34, "black")
    of_views = f"PSNR and tokens: means over the {len(results[0].psnr)} views seen again after 30 frames or more"
    write(gap, 60, of_views, 23, "#555")
    for i, (name, quality, figures, view) in enumerate(panels):
        left, top = gap + i % columns * (width + gap), heading + i // columns * (height + caption)
        picture.paste(photographs.as_image(view).resize((width, height), Image.Resampling.NEAREST), (left, top))
        write(left, top + height + 6, name, 27, "black")
        write(left, top + height + 40, quality or figures, 23, "black" if quality else "#555")
        write(left, top + height + 68, figures if quality else "", 23, "#555")
    picture.save(path)

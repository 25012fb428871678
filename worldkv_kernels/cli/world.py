"""worldkv world: a trained world model looks around, turns away and comes back, with each kind of memory."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..journeys import LEAST_GAP, MODES, STEP, Fidelity, Journey, along, fidelity, travel, truth, turn_and_return
from ..memory.world_memory import WorldMemory
from ..models.small_world import WEIGHTS, SmallWorld
from ..ops.all import check_every_backend
from ..trajectory import latent_poses, load
from ..worlds import draw_worlds, photograph_world
from . import photographs, report
from .world_picture import animation, picture

_TAKES = "downloads nothing; the default takes about a minute on two cores"
_CHUNKS, _WORLDS = 30, 8
_STRIDE = 4  # moves, or video frames of a folder, to a frame
_MOST_FRAMES = 3000  # full KV, which is compared, takes time as the square of them
_LEAST_CHUNKS = 14  # so that some view was last seen long enough ago
_MAKES = "latents of [16, 12, 16], 3 frames a chunk"  # what worlds.py's codec and the journeys are of
# Worlds that no training has drawn: of another seed in the low 32 bits, which are all that a CPU's generator takes.
_UNSEEN = 2**31


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"It {_TAKES}."
    add = parser.add_argument
    photographs.add_arguments(parser, None)
    add("--worlds", type=report.integer(1, 1000), help=f"how many drawn worlds (default: {_WORLDS}; one photograph)")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--chunks", type=report.integer(_LEAST_CHUNKS, _MOST_FRAMES // 3),
                     help=f"of three frames, half of them out and half back; even (default: {_CHUNKS})")  # fmt: skip
    way.add_argument("--trajectory", metavar="FOLDER|MOVES",
                     help="a way of your own, of which the first half is given: a folder with poses.npy and "
                          "intrinsics.npy (the view stays 75 degrees wide), or moves such as right*180,left*180 in "
                          "degrees; every fourth of them is a frame (default: turn by 308 degrees and "
                          "back)")  # fmt: skip
    add("--weights", metavar="FOLDER", help="of another training (default: those of the package)")
    add("--picture", metavar="FILE", default="world.png", help="where the picture goes (default: world.png)")
    add("--animation", metavar="FILE", default="world.webp",
        help="where the way back goes as a moving picture, .webp, .gif or .png (default: world.webp)")  # fmt: skip
    add("--json", metavar="PATH", default="world.json",
        help="where the figures go, one JSON document; - for stdout (default: world.json)")  # fmt: skip
    add("--device", help="such as cuda or cpu (default: the GPU where there is one)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="(default: float32 on a CPU, bfloat16 on a GPU)")
    add("--backend", help="of the ops: reference or triton (default: the automatic choice)")
    add("--seed", type=report.seed, default=0, help="of worlds and noise (default: 0)")
    report.add_quiet(parser)


@dataclass
class Result:
    """Of one memory, on all worlds."""

    name: str
    seen_again: list[Fidelity] = field(default_factory=list)  # of each world
    kept_bytes: int = 0
    chunk_seconds: list[float] = field(default_factory=list)
    first: torch.Tensor | None = None  # what was drawn in the first world, [frames, 3, height, width]

    @property
    def of_worlds(self) -> np.ndarray:
        """Mean PSNR of each world."""
        return np.array([np.mean(of_world.psnr) for of_world in self.seen_again])

    @property
    def ssim(self) -> float:
        return float(np.mean([of_world.ssim for of_world in self.seen_again]))

    @property
    def tokens(self) -> float:
        return float(np.mean([of_world.tokens for of_world in self.seen_again]))

    @property
    def frames_per_second(self) -> float:
        """By the median chunk, so that what is compiled on first use does not count."""
        return 3 / float(np.median(self.chunk_seconds))

    @property
    def standard_error(self) -> float | None:
        """Of the mean over the worlds; None for one world."""
        worlds = self.of_worlds
        return float(worlds.std(ddof=1) / math.sqrt(len(worlds))) if len(worlds) > 1 else None


def run(args: argparse.Namespace) -> int:
    with report.threads(1):  # the tensors are too small to share
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    device = report.parse_device(args.device)
    check_every_backend("--backend", args.backend, device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    photographs.check_installed("world", "PIL", "skimage")
    report.writable("--picture", args.picture, photographs.formats(args.picture))
    moving = [suffix for suffix in (".webp", ".gif", ".png") if photographs.formats(f"x{suffix}") == [suffix]]
    report.writable("--animation", args.animation, moving)
    report.different_files(image=args.image, picture=args.picture, animation=args.animation, json=args.json)
    name, worlds = _worlds(args)
    way, journeys = _journeys(args, len(worlds))
    model = _model(args, device, dtype)
    out = sys.stderr if args.json == "-" else sys.stdout
    seen_again = [list(journey.seen_again()) for journey in journeys]
    first, parameters = journeys[0], sum(of.numel() for of in model.parameters())
    print(
        f"A world model of {parameters / 1e6:.1f} million parameters in {name}: {way}.\n"
        f"The first {first.given} frames are given, the other {len(first.poses) - first.given} it makes; "
        f"{len(seen_again[0])} of these show what was last seen {LEAST_GAP} frames ago or more "
        f"({device}, {str(dtype)[6:]}).\n"
        f"It {_TAKES}.\n",
        file=out, flush=True,
    )  # fmt: skip
    progress = report.Progress("world", len(MODES) * sum(len(journey.poses) for journey in journeys) // 3)
    results = [Result(mode) for mode in MODES]
    for number, (world, journey) in enumerate(zip(worlds, journeys, strict=True)):
        for result in results:
            _go(model, args, world, journey, seen_again[number], number, result, progress)
    print(_table(results), file=out)
    report.write_json(args.json, {
        "command": "world", "machine": report.machine(device), "worlds": name, "way": way, "dtype": str(dtype)[6:],
        "frames": len(first.poses), "given": first.given, "sigmas": list(model.sigmas), "seed": args.seed,
        "seen_again": seen_again, "modes": [_figures(result) for result in results],
    })  # fmt: skip
    seen = truth(worlds[0], first)
    drawn = {"the world": seen, **{result.name: result.first for result in results}}
    captions = {result.name: f"{result.of_worlds[0]:.1f} dB" for result in results}
    picture(args.picture, drawn, captions, first.given)
    report.note(f"wrote {args.picture}")
    animation(args.animation, drawn, captions, first.given)
    report.note(f"wrote {args.animation}")
    return 0


def _worlds(args: argparse.Namespace) -> tuple[str, torch.Tensor]:
    """Their name, and worlds [n, 3, height, width]."""
    if args.image is None and args.photo is None:
        count = _WORLDS if args.worlds is None else args.worlds
        generator = torch.Generator().manual_seed((_UNSEEN + args.seed) % 2**32)
        name = f"{count} drawn worlds" if count > 1 else "a drawn world"
        return name, draw_worlds(count, generator)
    if args.worlds is not None:
        raise ValueError(f"--worlds must be left out with a photograph, got {args.worlds}")
    name, image = photographs.load(args)
    return name, photograph_world(image)[None]


def _model(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> SmallWorld:
    folder = WEIGHTS if args.weights is None else args.weights
    with report.naming("--weights", "checkpoint"):
        model = SmallWorld.from_pretrained(folder, device=device, dtype=dtype)
    found = f"latents of {list(model.latent_shape)}, {model.chunk_frames} frames a chunk"
    if found != _MAKES:
        raise ValueError(f"--weights must be of a model that makes {_MAKES}, got {found}: {args.weights!r}")
    return model


def _journeys(args: argparse.Namespace, count: int) -> tuple[str, list[Journey]]:
    """What the way is called, and that of each world."""
    if args.trajectory is None:
        chunks = _CHUNKS if args.chunks is None else args.chunks
        if chunks % 2:
            raise ValueError(f"--chunks must be even, got {chunks}")
        journeys = [turn_and_return(chunks, number) for number in range(count)]
        return f"the camera turns by {STEP * (journeys[0].given - 1):g} degrees and back", journeys
    with report.naming("--trajectory", "trajectory"):
        trajectory = load(args.trajectory)
    poses, _ = latent_poses(trajectory, _STRIDE)
    if len(poses) > _MOST_FRAMES:
        raise ValueError(f"--trajectory must have at most {_MOST_FRAMES:,} frames, got {len(poses):,}")
    try:
        return trajectory.name, [along(poses)] * count
    except ValueError as error:
        raise ValueError(f"--trajectory{str(error).removeprefix('along: poses')}") from error


def _go(
    model: SmallWorld,
    args: argparse.Namespace,
    world: torch.Tensor,
    journey: Journey,
    seen_again: list[int],
    number: int,
    result: Result,
    progress: report.Progress,
) -> None:
    """One memory in one world."""
    chunks = len(journey.poses) // 3
    config = model.config.memory(**{"bank_chunks": max(chunks, 6), **MODES[result.name]})
    memory = WorldMemory(config, device=model.device, dtype=model.dtype, backend=args.backend)
    trip = travel(model, memory, world, journey, seed=args.seed + number, on_chunk=lambda: progress.step(result.name))
    result.seen_again.append(fidelity(trip, truth(world, journey), seen_again))
    result.kept_bytes = max(result.kept_bytes, trip.stats["kept_bytes"])
    result.chunk_seconds += trip.made_seconds
    if number == 0:
        result.first = trip.frames


def _table(results: list[Result]) -> str:
    rows = []
    for result in results:
        error, tokens = result.standard_error, result.tokens
        rows.append([
            result.name, f"{result.of_worlds.mean():.1f}", "-" if error is None else f"{error:.1f}",
            f"{result.ssim:.2f}", f"{tokens:,.0f}", f"{tokens / results[0].tokens:.0%}", report.size(result.kept_bytes),
            f"{result.frames_per_second:.1f}",
        ])  # fmt: skip
    columns = ["memory", "PSNR, dB", "+-", "SSIM", "tokens attended", "of full", "KV kept", "frames/s"]
    return report.table(columns, rows)


def _figures(result: Result) -> dict[str, Any]:
    return {
        "name": result.name,
        **MODES[result.name],
        "psnr_db": float(result.of_worlds.mean()),
        "psnr_db_standard_error": result.standard_error,
        "psnr_db_per_world": result.of_worlds.tolist(),
        "psnr_db_per_view": [of_world.psnr for of_world in result.seen_again],
        "ssim": result.ssim,
        "tokens_attended_mean": result.tokens,
        "kept_bytes": result.kept_bytes,
        "frames_per_second": result.frames_per_second,
    }

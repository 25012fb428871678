"""worldkv rollout: a reference model over a camera trajectory, with the memory in each of its modes."""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

import numpy as np
import torch

from ..memory.config import MODES, ORDERS, MemoryConfig
from ..memory.poses import mean_pose, rotation_angles
from ..memory.retrieval import FovRetrieval, PoseRetrieval, RetrievalPolicy
from ..memory.world_memory import WorldMemory
from ..models.rollout import RolloutChunk, rollout
from ..models.tiny import TinyConfig, TinyWorldModel
from ..trajectory import Trajectory, latent_poses, load
from . import report

_MODELS = ("tiny",)
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_SHOWN_REVISITS = 5


class Revisit(NamedTuple):
    """A chunk, and of those retrieved for it the one made from the nearest camera pose."""

    chunk: int
    retrieved: tuple[int, ...]
    nearest: int
    degrees: float  # between the mean orientations of chunk and nearest
    distance: float  # between their mean positions, in the trajectory's unit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `worldkv rollout`; their defaults are MemoryConfig's where it has them."""
    add = parser.add_argument
    add("--trajectory", default="right*60,left*60", metavar="FOLDER|MOVES",
        help="a folder with poses.npy and intrinsics.npy, or moves such as right*90,left*90,forward*10 "
             "(default: %(default)s)")  # fmt: skip
    add("--model", default="tiny", help="the model: tiny (random weights) (default: %(default)s)")
    add("--layers", type=_integer(1), default=TinyConfig.num_layers, help="of the tiny model (default: %(default)s)")
    add("--modes", default=",".join(MODES), help="of the memory, joined by commas (default: %(default)s)")
    add("--chunks", type=_integer(1), help="at most so many (default: all that the trajectory has)")
    add("--stride", type=_integer(1), default=4, help="video frames to a latent frame (default: %(default)s)")
    add("--keep-ratio", type=_number, default=0.25, help="tokens of a pruned frame that stay (default: %(default)s)")
    add("--per-frame", action="store_true", help="prune each frame on its own, not a chunk's frames together")
    add("--retrieved-chunks", type=_integer(0), default=6, help="brought back at most (default: %(default)s)")
    add("--sink-frames", type=_integer(0), default=3, help="latent frames kept from the start (default: %(default)s)")
    add("--recent-frames", type=_integer(0), default=6, help="past latent frames kept whole (default: %(default)s)")
    add("--retrieval", default="pose", help="by pose or by fov, the overlap of the views (default: %(default)s)")
    add("--depth-range", type=_number, nargs=2, metavar=("NEAR", "FAR"), help="of the views' overlap (default: 1 50)")
    add("--diversity", type=_number, default=0.0, help="0 to 1: avoid near-copies (default: %(default)s)")
    add("--rebase-time", action="store_true", help="turn retrieved and sink chunks in time next to the recent ones")
    add("--order", default="time", help=f"of retrieved chunks: {', '.join(ORDERS)} (default: %(default)s)")
    add("--bank", default="device", help="where banked chunks lie: device or host (default: %(default)s)")
    add("--bank-chunks", type=_integer(1), help="that the bank holds (default: enough for the rollout)")
    add("--dtype", help=f"{', '.join(_DTYPES)} (default: float32 on a CPU, bfloat16 on a GPU)")
    add("--device", help="such as cpu or cuda:0 (default: the first GPU, else the CPU)")
    add("--threads", type=_integer(1), default=1,
        help="of the CPU; the tiny model's tensors are too small to share well (default: %(default)s)")  # fmt: skip
    add("--backend", help="of the ops: reference, triton (default: the automatic choice)")
    add("--seed", type=_integer(0), default=0, help="of weights and noise (default: %(default)s)")
    add("--json", metavar="PATH", help="also write everything measured, chunk by chunk; - for stdout")
    add("--picture", metavar="FILE.svg", help="draw which chunks worldkv attended to")


def run(args: argparse.Namespace) -> int:
    """Roll out in each mode, print the comparison, and write what was asked for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        return _run(args)
    finally:
        torch.set_num_threads(threads)


def _run(args: argparse.Namespace) -> int:
    device = report.parse_device(args.device)
    modes = _modes(args.modes)
    _one_of("--model", args.model, _MODELS)
    if args.picture and "worldkv" not in modes:
        raise ValueError(f"--picture must go with --modes that include worldkv, got {args.modes!r}")
    dtype = _DTYPES[_one_of("--dtype", args.dtype or ("float32" if device.type == "cpu" else "bfloat16"), _DTYPES)]
    trajectory = load(args.trajectory)
    poses, intrinsics = latent_poses(trajectory, args.stride)
    config = TinyConfig(num_layers=args.layers)
    chunks = _chunk_count(args, len(poses), config)
    memories = {mode: _memory_config(args, config, mode, chunks) for mode in modes}
    say = functools.partial(print, file=sys.stderr if args.json == "-" else sys.stdout, flush=True)
    say(_introduction(args, trajectory, len(poses), chunks, config, device, dtype))

    model = TinyWorldModel(config, seed=args.seed, device=device, dtype=dtype)
    poses, intrinsics = (array[: chunks * config.chunk_frames] for array in (poses, intrinsics))
    results: dict[str, dict[str, Any]] = {}
    yardstick: list[torch.Tensor] = []
    for mode in modes:
        memory = WorldMemory(memories[mode], device=device, dtype=dtype, backend=args.backend)
        made = _made(mode, model, memory, poses, intrinsics, args.seed)
        latents = [chunk.latents.cpu() for chunk in made]
        yardstick = latents if mode == "full" else yardstick
        errors = [_relative_error(*pair) for pair in zip(latents, yardstick, strict=True)] if yardstick else None
        results[mode] = _result(made, errors, memory, config.chunk_frames * args.stride)
        if mode == "worldkv" and args.picture:
            Path(args.picture).write_text(picture(made, trajectory.name))
            print(f"wrote {args.picture}", file=sys.stderr)

    say("\n" + _table(results, compared=bool(yardstick)))
    revisits = find_revisits(results["worldkv"]["chunks"], poses, config.chunk_frames) if "worldkv" in results else []
    if revisits:
        say("\n" + _retrieval_at_work(revisits))
    report.write_json(args.json, {
        "command": "rollout",
        "machine": {**report.machine(device), "threads": args.threads},
        "trajectory": {"name": trajectory.name, "frames": len(trajectory.poses), "stride": args.stride,
                       "latent_frames": len(latent_poses(trajectory, args.stride)[0]), "chunks": chunks},
        "model": {"name": args.model, **asdict(config), "dtype": str(dtype).removeprefix("torch."), "seed": args.seed},
        "memory": {name: getattr(args, name) for name in (
            "keep_ratio", "per_frame", "retrieved_chunks", "sink_frames", "recent_frames", "retrieval", "depth_range",
            "diversity", "rebase_time", "order", "bank", "bank_chunks", "backend")},
        "modes": results,
        "revisits": [revisit._asdict() for revisit in revisits],
    })  # fmt: skip
    return 0


# --- arguments ---


def _integer(least: int) -> Any:
    def convert(text: str) -> int:
        if not text.lstrip("+-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, got {text!r}")
        return int(text)

    return convert


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None


def _one_of(argument: str, got: str, names: Sequence[str] | dict[str, Any]) -> str:
    if got not in names:
        raise ValueError(f"{argument} must be one of {', '.join(names)}, got {got!r}")
    return got


def _modes(text: str) -> list[str]:
    """The modes asked for, once each, with "full" first: its latents are what the others are compared with."""
    modes = [_one_of("--modes", mode.strip(), MODES) for mode in text.split(",")]
    return sorted(dict.fromkeys(modes), key=lambda mode: mode != "full")


def _chunk_count(args: argparse.Namespace, latent_frames: int, config: TinyConfig) -> int:
    frames = config.chunk_frames
    chunks = latent_frames // frames
    if chunks < 1:
        least = (frames - 1) * args.stride + 1
        raise ValueError(
            f"--trajectory must have at least {least} video frames for a chunk of {frames} latent frames, "
            f"got {latent_frames} latent frames"
        )
    chunks = min(chunks, args.chunks or chunks)
    most = config.memory().make_rope().max_position // frames
    if chunks > most:
        raise ValueError(f"--chunks must be at most {most}, which the rotary embedding can number, got {chunks}")
    return chunks


def _memory_config(args: argparse.Namespace, config: TinyConfig, mode: str, chunks: int) -> MemoryConfig:
    enough = chunks if mode == "full" else max(chunks, args.retrieved_chunks)
    policy = _policy(args)
    try:
        return config.memory(
            mode=mode, sink_frames=args.sink_frames, recent_frames=args.recent_frames,
            retrieved_chunks=args.retrieved_chunks, keep_ratio=args.keep_ratio, pooled=not args.per_frame,
            retrieval=policy, rebase_time=args.rebase_time, order=args.order, bank=args.bank,
            bank_chunks=(args.bank_chunks if mode == "worldkv" else None) or enough,
        )  # fmt: skip
    except ValueError as error:  # the fields have the arguments' names
        field, _, rest = str(error).removeprefix("MemoryConfig: ").partition(" ")
        raise ValueError(f"--{field.replace('_', '-')} {rest}") from error


def _policy(args: argparse.Namespace) -> RetrievalPolicy:
    name = _one_of("--retrieval", args.retrieval, ("pose", "fov"))
    if not 0 <= args.diversity <= 1:
        raise ValueError(f"--diversity must be from 0 to 1, got {args.diversity}")
    if name == "pose":
        if args.depth_range:
            raise ValueError(f"--depth-range must go with --retrieval fov, got --retrieval {name}")
        return PoseRetrieval(diversity=args.diversity)
    near, far = args.depth_range or (1.0, 50.0)
    if not 0 < near < far < math.inf:
        raise ValueError(f"--depth-range must be 0 < NEAR < FAR, got {near:g} {far:g}")
    return FovRetrieval(depth_range=(near, far), diversity=args.diversity)


# --- the rollout ---


def _made(
    mode: str,
    model: TinyWorldModel,
    memory: WorldMemory,
    poses: np.ndarray,
    intrinsics: np.ndarray,
    seed: int,
) -> list[RolloutChunk]:
    chunks = len(poses) // model.chunk_frames
    if model.device.type == "cuda":
        # Kernels are compiled and checked on first use: not what is to be timed. Long enough to retrieve.
        warm_up = (memory.config.sink_chunks + memory.config.recent_chunks + 3) * model.chunk_frames
        for _ in rollout(model, memory, poses[:warm_up], intrinsics[:warm_up], seed=seed):
            pass
        memory.reset()
    progress = report.Progress(mode, chunks)
    made = []
    for chunk in rollout(model, memory, poses, intrinsics, seed=seed):
        made.append(chunk)
        progress.step(f"chunks, {chunk.plan.num_tokens} tokens attended, {chunk.seconds:.2f} s")
    return made


def _relative_error(latents: torch.Tensor, yardstick: torch.Tensor) -> float:
    return ((latents - yardstick).norm() / yardstick.norm()).item()


def _result(
    made: list[RolloutChunk], errors: list[float] | None, memory: WorldMemory, chunk_video_frames: int
) -> dict[str, Any]:
    """What was measured in one mode, ready for JSON."""
    seconds = sum(chunk.seconds for chunk in made)
    tokens = [chunk.plan.num_tokens for chunk in made]
    latent_frames = len(made) * memory.config.chunk_frames
    return {
        "seconds": seconds,
        "frames_per_second": len(made) * chunk_video_frames / seconds,
        "latents_per_second": latent_frames / seconds,
        "tokens_mean": sum(tokens) / len(tokens),
        "tokens_last": tokens[-1],
        "relative_error": sum(errors) / len(errors) if errors else None,
        **memory.stats(),
        "chunks": [
            {
                "chunk": chunk.plan.chunk,
                "retrieved": list(chunk.plan.retrieved),
                "num_tokens": chunk.plan.num_tokens,
                "seconds": chunk.seconds,
                "error": errors[i] if errors else None,
            }
            for i, chunk in enumerate(made)
        ],
    }


def find_revisits(records: Sequence[dict[str, Any]], poses: np.ndarray, chunk_frames: int) -> list[Revisit]:
    """For each record {"chunk", "retrieved"} that retrieved anything, the retrieved chunk of the nearest pose.

    `poses` [n, 4, 4] are those of the latent frames. Sorted by how far back that chunk lies, farthest first.
    """
    means = [mean_pose(poses[i : i + chunk_frames]) for i in range(0, len(poses) - chunk_frames + 1, chunk_frames)]
    policy = PoseRetrieval()
    revisits = []
    for record in records:
        if not record["retrieved"]:
            continue
        chunk = record["chunk"]
        candidates = [(past, means[past]) for past in sorted(record["retrieved"])]
        (nearest,) = policy.select(means[chunk], candidates, 1)
        angle = rotation_angles(means[chunk][None, :3, :3], means[nearest][None, :3, :3]).item()
        distance = np.linalg.norm(means[chunk][:3, 3] - means[nearest][:3, 3]).item()
        revisits.append(Revisit(chunk, tuple(record["retrieved"]), nearest, float(np.degrees(angle)), distance))
    return sorted(revisits, key=lambda revisit: (revisit.nearest - revisit.chunk, revisit.chunk))


# --- what is printed ---


def _introduction(
    args: argparse.Namespace,
    trajectory: Trajectory,
    latent_frames: int,
    chunks: int,
    config: TinyConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    frames = config.chunk_frames
    lines = [
        f"trajectory {trajectory.name}: {len(trajectory.poses)} video frames, {latent_frames} latent frames, "
        f"{chunks} chunks of {frames}"
    ]
    left = latent_frames - chunks * frames
    if left:
        reason = "left out by --chunks" if left >= frames else "too few for a chunk"
        lines.append(f"not made: {left} latent frame{'s' if left > 1 else ''} at the end, {reason}")
    rows, columns = config.grid
    lines.append(
        f"model {args.model}: random weights, {config.num_layers} layers, {config.num_heads} heads x "
        f"{config.head_dim}, {rows} x {columns} tokens a frame; {str(dtype).removeprefix('torch.')} on "
        f"{report.machine(device)['device']}"
    )
    return "\n".join(lines)


def _table(results: dict[str, dict[str, Any]], *, compared: bool) -> str:
    columns = ("mode", "frames/s", "latents/s", "KV kept", "tokens/query", "last chunk", "retrieved", "error vs full")
    rows = [
        (
            mode,
            f"{result['frames_per_second']:.1f}",
            f"{result['latents_per_second']:.1f}",
            report.size(result["kept_bytes"]),
            f"{result['tokens_mean']:.0f}",
            str(result["tokens_last"]),
            str(result["chunks_retrieved"]),
            f"{result['relative_error']:.4f}" if compared else "-",
        )
        for mode, result in results.items()
    ]
    return report.table(columns, rows)


def _retrieval_at_work(revisits: Sequence[Revisit]) -> str:
    lines = ["retrieval at work: the chunks whose nearest retrieved view is the oldest"]
    for revisit in revisits[:_SHOWN_REVISITS]:
        retrieved = ", ".join(map(str, revisit.retrieved))
        lines.append(
            f"  chunk {revisit.chunk} got back {retrieved}; the nearest, chunk {revisit.nearest} from "
            f"{revisit.chunk - revisit.nearest} chunks before, is {revisit.degrees:.1f} degrees and "
            f"{revisit.distance:.3g} units away"
        )
    return "\n".join(lines)


# --- the picture ---

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

"""worldkv rollout: a model over a camera trajectory or a player's actions, with the memory in each of its modes."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..memory.config import BANK_BITS, MODES, ORDERS, MemoryConfig
from ..memory.retrieval import ActionRetrieval, ContentRetrieval, FovRetrieval, PoseRetrieval, RetrievalPolicy
from ..memory.room import check_room, least_chunks
from ..memory.world_memory import WorldMemory
from ..models.checkpoint import write_tensors
from ..models.rollout import Rollout, RolloutChunk, WorldModel, rollout
from ..ops.all import check_every_backend
from ..ops.compress_chunk import RULES
from . import report, rollout_models, rollout_saved
from .rollout_models import STRIDE, Config, Motion
from .rollout_picture import picture
from .rollout_revisits import Revisit, find_revisits, retrieval_at_work

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_TAKES = "about 20 seconds"  # the default run
# Of MemoryConfig, which has the defaults.
_FIELDS = (
    "prune_rule", "merge_pruned", "retrieved_chunks", "retrieved_log_weight", "sink_frames", "recent_frames",
    "rebase_time",
)  # fmt: skip
_DEEPEST = 1e9  # in the poses' units
_THREADS_EACH = 4  # of a processor, at most: thousands of them hang or end the process


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `worldkv rollout`; their defaults are MemoryConfig's where it has them."""
    parser.epilog = f"It downloads nothing. The default run takes {_TAKES} on two cores."
    add = parser.add_argument
    rollout_models.add_arguments(parser)
    add("--modes", default=",".join(MODES), help="of the memory, joined by commas (default: %(default)s)")
    add("--chunks", type=report.integer(1), help="at most so many (default: all that there are controls for)")
    add("--keep-ratio", type=report.number, default=0.25,
        help="share of its tokens that every frame but a chunk's first keeps when it is pruned: 0.25 keeps half of a "
             "chunk of three frames, 0.5 two thirds, 1 all (default: %(default)s)")  # fmt: skip
    add("--pooled", action=argparse.BooleanOptionalAction, default=True,
        help="prune a chunk's frames together, or each on its own (default: together)")  # fmt: skip
    add("--prune-rule", help=f"which tokens go: {', '.join(RULES)} (default: {RULES[0]})")
    add("--merge-pruned", action=argparse.BooleanOptionalAction, default=None,
        help="those that stay take up those that go (default: they do)")  # fmt: skip
    add("--retrieved-chunks", type=report.integer(0), help="brought back at most (default: 6, or what the bank holds)")
    add("--retrieved-log-weight", type=report.number,
        help="added to the scores of retrieved tokens: 0.69 lets each count twice (default: 0)")  # fmt: skip
    add("--sink-frames", type=report.integer(0), help="latent frames kept from the start (default: the model's own)")
    add("--recent-frames", type=report.integer(0), help="past latent frames kept whole (default: the model's own)")
    add("--retrieval", help="by pose, by fov, the overlap of the views, by action, the pose that a player's actions lead "
        "to, or by content, for which no camera is known (default: action for matrix_game_2, else pose)")  # fmt: skip
    add("--depth-range", type=report.number, nargs=2, metavar=("NEAR", "FAR"),
        help="of the views' overlap (default: 1 50)")  # fmt: skip
    add("--diversity", type=report.number, default=0.0, help="0 to 1: avoid near-copies (default: %(default)s)")
    add("--rebase-time", action=argparse.BooleanOptionalAction, default=None,
        help="turn retrieved and sink chunks in time next to the recent ones (default: in mode worldkv)")  # fmt: skip
    add("--order", default="time", help=f"of retrieved chunks: {', '.join(ORDERS)} (default: %(default)s)")
    add("--bank", default="device", help="where banked chunks lie: device or host (default: %(default)s)")
    add("--bank-bits", type=report.integer(1), default=16,
        help=f"of what is banked: {', '.join(map(str, BANK_BITS))}; with fewer than 16, every pass restores what is "
        "retrieved (default: %(default)s)")  # fmt: skip
    add("--bank-chunks", type=report.integer(1), help="that the bank holds (default: enough for the rollout)")
    add("--dtype", help=f"{', '.join(_DTYPES)} (default: float32 on a CPU, bfloat16 on a GPU)")
    add("--device", help="such as cpu or cuda:0 (default: the first GPU, else the CPU)")
    add("--threads", type=report.integer(1),
        help="of the CPU (default: torch's own choice; 1 for small_world, whose tensors are too small to "
             "share)")  # fmt: skip
    add("--backend", help="of the ops: reference or triton (default: the automatic choice)")
    add("--graph", action=argparse.BooleanOptionalAction, default=None,
        help="passes as CUDA graphs, or as kernels (default: graphs on a GPU, where a first replay gives the same "
             "bits)")  # fmt: skip
    add("--seed", type=report.seed, default=0, help="of random weights and noise (default: %(default)s)")
    add("--json", metavar="PATH",
        help="also write everything measured, chunk by chunk, as one JSON document; - for stdout")  # fmt: skip
    add("--picture", metavar="FILE.svg", help="draw which chunks worldkv attended to")
    add("--save-latents", metavar="FILE.safetensors",
        help="write the latents, [frames, channels, height, width] in float32 for each mode, by its name")  # fmt: skip
    rollout_saved.add_arguments(parser)
    report.add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    """Roll out in each mode, print the comparison, and write what was asked for."""
    threads = torch.get_num_threads()
    most = _THREADS_EACH * (os.cpu_count() or 1)
    if args.threads is not None and args.threads > most:
        raise ValueError(f"--threads must be at most {most}, {_THREADS_EACH} to a processor, got {args.threads}")
    args.threads = args.threads or (1 if args.model == "small_world" else threads)
    with report.threads(args.threads):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    device = report.parse_device(args.device)
    check_every_backend("--backend", args.backend, device)
    if args.graph and device.type != "cuda":
        raise ValueError(f"--graph must go with a GPU, got --device {device}")
    modes = _modes(args.modes)
    report.writable("--picture", args.picture, [".svg"])
    report.writable("--save-latents", args.save_latents, [".safetensors"])
    report.different_files(picture=args.picture, json=args.json, save_latents=args.save_latents)
    rollout_saved.check(args, modes)
    args.given = rollout_models.read_conditions(args)
    if args.picture is not None and "worldkv" not in modes:
        raise ValueError(f"--picture must go with --modes that include worldkv, got {args.modes!r}")
    default = "float32" if device.type == "cpu" else "bfloat16"
    dtype = _DTYPES[_one_of("--dtype", default if args.dtype is None else args.dtype, _DTYPES)]
    config = rollout_models.model_config(args)
    motion = rollout_models.motion(args)
    chunks = _chunk_count(args, motion, config)
    policy = _policy(args, motion)
    memories = {mode: _memory_config(args, config, policy, mode, chunks) for mode in modes}
    rollout_models.check_weights(args, config, device, dtype)
    for memory_config in memories.values():
        _check_least_room(memory_config, args, device, dtype)
    say = functools.partial(print, file=sys.stderr if args.json == "-" else sys.stdout, flush=True)
    say(_introduction(args, motion, chunks, config, device, dtype))

    model, weights = rollout_models.make_model(args, config, device, dtype)
    say(f"weights: {weights['parameters'] / 1e6:,.1f} million parameters, {report.size(weights['weight_bytes'])}, "
        f"{weights['weights']}, in {weights['seconds_to_load']:.1f} s")  # fmt: skip
    along = motion.until(chunks * config.chunk_frames)
    results: dict[str, dict[str, Any]] = {}
    yardstick: list[torch.Tensor] = []
    kept: dict[str, torch.Tensor] = {}
    revisits: list[Revisit] = []
    stopped: BaseException | None = None
    try:
        for mode in modes:
            rolling = _rolling(mode, model, memories[mode], along, args, say)
            memory = rolling.memory
            made, banked = _made(mode, rolling, chunks, args)
            latents = [chunk.latents.cpu() for chunk in made]
            yardstick = latents if mode == "full" else yardstick
            if args.save_latents is not None:
                kept[mode] = torch.cat(latents)
                write_tensors(args.save_latents, kept)
            errors = [_relative_error(*pair) for pair in zip(latents, yardstick, strict=True)] if yardstick else None
            results[mode] = _result(made, banked, errors, memory, args.stride or STRIDE)
            del memory, rolling  # the next one may need its room
            if mode == "worldkv":
                revisits = find_revisits(results[mode]["chunks"], along.poses, config.chunk_frames)
                if args.picture is not None:
                    drawn = picture(made, banked, revisits, along.poses, motion.name)
                    Path(args.picture).write_text(drawn, encoding="utf-8")
                    report.note(f"wrote {args.picture}")
    except (KeyboardInterrupt, Exception) as error:
        if not results:
            raise
        stopped = error  # raised again when the modes that are complete have been written

    if args.save_latents is not None:
        report.note(f"wrote {args.save_latents}")
    report.write_json(args.json, {
        "command": "rollout",
        "machine": {**report.machine(device), "threads": args.threads},
        motion.kind: {"name": motion.name, "video_frames": motion.video_frames, "stride": args.stride or STRIDE,
                      "latent_frames": motion.latent_frames, "chunks": chunks,
                      **({"scales": asdict(motion.integrator.scales)} if motion.integrator is not None else {})},
        "model": {"name": args.model, "variant": args.variant, **asdict(config),
                  "dtype": str(dtype).removeprefix("torch."), "seed": args.seed, **weights},
        "memory": {
            **{name: getattr(args, name) for name in (
                "keep_ratio", "pooled", "retrieval", "depth_range", "diversity", "order",
                "bank", "bank_bits", "bank_chunks", "backend")},
            **{name: getattr(memories.get("worldkv", memories[modes[0]]), name) for name in _FIELDS},
        },
        "interrupted": stopped is not None,
        "modes": results,
        "revisits": [revisit._asdict() for revisit in revisits],
    })  # fmt: skip
    say("\n" + _table(results, compared=bool(yardstick)))
    if revisits:
        say("\n" + retrieval_at_work(revisits))
    if stopped is not None:
        say(f"\ninterrupted: {', '.join(results)} of {', '.join(modes)} are complete")
        raise stopped
    return 0


# --- arguments ---


def _one_of(argument: str, got: str, names: Sequence[str] | dict[str, Any]) -> str:
    if got not in names:
        raise ValueError(f"{argument} must be one of {', '.join(names)}, got {got!r}")
    return got


def _modes(text: str) -> list[str]:
    """The modes asked for, once each, with "full" first: its latents are what the others are compared with."""
    modes = [_one_of("--modes", mode.strip(), MODES) for mode in text.split(",")]
    return sorted(dict.fromkeys(modes), key=lambda mode: mode != "full")


def _chunk_count(args: argparse.Namespace, motion: Motion, config: Config) -> int:
    frames = config.chunk_frames
    chunks = motion.latent_frames // frames
    if chunks < 1:
        least = (frames - 1) * (args.stride or STRIDE) + 1
        raise ValueError(
            f"--{motion.kind} must have at least {least} video frames for a chunk of {frames} latent frames, "
            f"got {motion.latent_frames} latent frames"
        )
    return min(chunks, args.chunks or chunks)


def _memory_config(
    args: argparse.Namespace, config: Config, policy: RetrievalPolicy, mode: str, chunks: int
) -> MemoryConfig:
    enough = chunks if mode == "full" else max(chunks, args.retrieved_chunks or 1)
    given = {name: getattr(args, name) for name in _FIELDS if getattr(args, name) is not None}
    try:
        return config.memory(
            mode=mode, keep_ratio=args.keep_ratio, pooled=args.pooled,
            retrieval=policy, order=args.order, bank=args.bank, bank_bits=args.bank_bits,
            bank_chunks=(args.bank_chunks if mode == "worldkv" else None) or enough, **given,
        )  # fmt: skip
    except ValueError as error:  # the fields have the arguments' names
        field, _, rest = str(error).removeprefix("MemoryConfig: ").partition(" ")
        raise ValueError(f"--{field.replace('_', '-')} {rest}") from error


def _check_least_room(config: MemoryConfig, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse what cannot fit even without the model, before its weights are loaded and other modes have run."""
    if config.has_bank and not args.bank_chunks:
        config = replace(config, bank_chunks=least_chunks(config))
    try:
        check_room(config, device, dtype, config.bank_chunks or 1)
    except ValueError as error:
        raise _too_large(config, error) from error


def _too_large(config: MemoryConfig, error: ValueError) -> ValueError:
    smaller = "--bank-chunks, --grid or --layers" if config.has_bank else "--grid, --layers or --chunks"
    return ValueError(f"{smaller} must be smaller: {error}")


def _memory(config: MemoryConfig, args: argparse.Namespace, say: Callable[[str], None], **options: Any) -> WorldMemory:
    """With a bank for the whole rollout, or for fewer chunks where that has no room and no number was asked for."""
    try:
        return WorldMemory(config, **options)
    except ValueError as error:
        if args.bank_chunks or not config.has_bank:
            raise _too_large(config, error) from error
    memory = WorldMemory(replace(config, bank_chunks=None), **options)
    say(f"bank: room for {memory.stats()['bank_capacity']} chunks in half of the free memory, not for the rollout's "
        f"{config.bank_chunks}; past that, chunks are dropped")  # fmt: skip
    return memory


def _policy(args: argparse.Namespace, motion: Motion) -> RetrievalPolicy:
    plays = motion.integrator is not None
    if args.retrieval is None:
        args.retrieval = "action" if plays else "pose"
    name = _one_of("--retrieval", args.retrieval, ("pose", "fov", "action", "content"))
    if name == "action" and not plays:
        raise ValueError(f"--retrieval action must go with --model matrix_game_2, got --model {args.model}")
    if not 0 <= args.diversity <= 1:
        raise ValueError(f"--diversity must be from 0 to 1, got {args.diversity}")
    if name != "fov":
        if args.depth_range:
            raise ValueError(f"--depth-range must go with --retrieval fov, got --retrieval {name}")
        if name == "action":
            return ActionRetrieval(motion.integrator, diversity=args.diversity)
        if name == "content":
            return ContentRetrieval(diversity=args.diversity)
        return PoseRetrieval(diversity=args.diversity)
    near, far = args.depth_range or (1.0, 50.0)
    if not 1 / _DEEPEST <= near < far <= _DEEPEST:
        raise ValueError(f"--depth-range must be {1 / _DEEPEST:g} <= NEAR < FAR <= {_DEEPEST:g}, got {near:g} {far:g}")
    return FovRetrieval(depth_range=(near, far), diversity=args.diversity)


# --- the rollout ---


def _rolling(
    mode: str, model: WorldModel, config: MemoryConfig, motion: Motion, args: argparse.Namespace,
    say: Callable[[str], None],
) -> Rollout:  # fmt: skip
    """A rollout along the motion from its start, or from where --resume is."""
    if args.resume is not None:
        derived = [name for name in _FIELDS if getattr(args, name) is None]
        rolling = rollout_saved.resumed(args, model, config, motion, derived=derived)
        say(f"resumed: {rolling.memory.stats()['chunks']} chunks are made")
        return rolling
    memory = _memory(config, args, say, device=model.device, dtype=model.dtype, backend=args.backend)

    def chunks_along(steered: Motion) -> Rollout:
        conditions = rollout_models.conditions(args, motion.poses)
        return rollout(
            model, memory, *steered.controls, actions=steered.actions, conditions=conditions, seed=args.seed,
            graph=args.graph,
        )  # fmt: skip

    if model.device.type == "cuda":
        # Kernels are compiled and checked on first use: not what is to be timed. Long enough to retrieve.
        warm_up = (memory.config.sink_chunks + memory.config.recent_chunks + 3) * model.chunk_frames
        with report.waiting(f"{mode}: compiling and checking kernels"):
            for _ in chunks_along(motion.until(warm_up)):
                pass
        memory.reset()
    return chunks_along(motion)


def _made(mode: str, rolling: Rollout, chunks: int, args: argparse.Namespace) -> tuple[list[RolloutChunk], list[int]]:
    """The chunks, up to so many from the start, and how many were banked when each began."""
    memory, made, banked = rolling.memory, [], []
    first = memory.stats()["chunks"]
    progress = report.Progress(mode, chunks - first)
    try:
        for number in range(first + 1, chunks + 1):
            banked.append(memory.stats()["chunks_banked"])
            with report.waiting(f"{mode}: chunk {number} of {chunks}"):
                chunk = next(rolling)
            made.append(chunk)
            took = f", {chunk.seconds:.2f} s" if memory.device.type == "cpu" else ""  # a GPU is not waited for
            progress.step(f"chunks, {chunk.plan.num_tokens} tokens attended{took}")
    finally:
        if args.save is not None and made:
            with report.waiting(f"writing {args.save}"):
                rolling.save(args.save)
            size = report.size(os.path.getsize(args.save))
            report.note(f"wrote {args.save}: {memory.stats()['chunks']} chunks, {size}")
            if (
                args.save_latents is not None
            ):  # of an interrupted rollout, too: what is resumed does not make them again
                write_tensors(args.save_latents, {mode: torch.cat([chunk.latents.cpu() for chunk in made])})
    return made, banked


def _relative_error(latents: torch.Tensor, yardstick: torch.Tensor) -> float:
    return ((latents - yardstick).norm() / yardstick.norm()).item()


def _result(
    made: list[RolloutChunk], banked: list[int], errors: list[float] | None, memory: WorldMemory, stride: int
) -> dict[str, Any]:
    """What was measured in one mode, ready for JSON; latent frame 0 is one video frame, each other `stride` of them."""
    seconds = sum(chunk.seconds for chunk in made)
    tokens = [chunk.plan.num_tokens for chunk in made]
    latent_frames = len(made) * memory.config.chunk_frames
    video_frames = stride * latent_frames - (stride - 1 if made[0].plan.chunk == 0 else 0)
    return {
        "seconds": seconds,
        "video_frames_per_second": video_frames / seconds,
        "latent_frames_per_second": latent_frames / seconds,
        "tokens_attended_mean": sum(tokens) / len(tokens),
        "tokens_attended_last": tokens[-1],
        "relative_error": sum(errors) / len(errors) if errors else None,
        **memory.stats(),
        "chunks": [
            {
                "chunk": chunk.plan.chunk,
                "retrieved": list(chunk.plan.retrieved),
                "banked": banked[i],
                "tokens_attended": chunk.plan.num_tokens,
                "seconds": chunk.seconds,
                "relative_error": errors[i] if errors else None,
            }
            for i, chunk in enumerate(made)
        ],
    }


# --- what is printed ---


def _introduction(
    args: argparse.Namespace, motion: Motion, chunks: int, config: Config, device: torch.device, dtype: torch.dtype
) -> str:
    frames = config.chunk_frames
    lines = [
        f"{motion.kind} {motion.name}: {motion.video_frames} video frames, {motion.latent_frames} latent frames, "
        f"{chunks} chunks of {frames}"
    ]
    left = motion.latent_frames - chunks * frames
    if left:
        reason = "left out by --chunks" if left >= frames else "too few for a chunk"
        lines.append(f"not made: {left} latent frame{'s' if left > 1 else ''} at the end, {reason}")
    rows, columns = config.grid
    variant = f", {args.variant}" if args.variant != args.model else ""
    lines.append(
        f"model {args.model}{variant}: {rollout_models.weights_name(args)} weights, {config.num_layers} layers, "
        f"{config.num_heads} heads x {config.head_dim}, {rows} x {columns} tokens a frame; "
        f"{str(dtype).removeprefix('torch.')} on {report.machine(device)['device']}"
    )
    lines.append(f"downloads nothing{f'; takes {_TAKES} on two cores' if _is_default(args, device) else ''}")
    return "\n".join(lines)


def _is_default(args: argparse.Namespace, device: torch.device) -> bool:
    """Whether the time that the default run takes says something of this one."""
    asked = (args.trajectory, args.chunks, args.layers, args.grid, args.stride)
    return args.model == "small_world" and device.type == "cpu" and asked == (None,) * len(asked)


def _table(results: dict[str, dict[str, Any]], *, compared: bool) -> str:
    columns = ("mode", "video frames/s", "latent frames/s", "KV kept", "tokens attended", "by the last chunk",
               "chunks retrieved", "relative error")  # fmt: skip
    rows = [
        (
            mode,
            _rate(result["video_frames_per_second"]),
            _rate(result["latent_frames_per_second"]),
            report.size(result["kept_bytes"]),
            f"{result['tokens_attended_mean']:,.0f}",
            f"{result['tokens_attended_last']:,}",
            str(result["chunks_retrieved"]),
            f"{result['relative_error']:.4f}" if compared else "-",
        )
        for mode, result in results.items()
    ]
    return report.table(columns, rows)


def _rate(number: float) -> str:
    return f"{number:.1f}" if number >= 10 else f"{number:.3g}"

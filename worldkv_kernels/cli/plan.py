"""worldkv plan: what a model and its memory take of a GPU, and how much of a world fits; nothing is allocated."""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import re
import sys
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch

from ..checks import byte_size
from ..memory.config import BANK_BITS, MemoryConfig
from ..memory.room import BANK_LIMIT, HOST_SHARE, advice, changes, least_chunks, most_bank_chunks
from ..memory.sizes import MemoryBytes, memory_bytes, place_bytes
from . import report, rollout_models
from .plan_activations import activations
from .rollout_models import STRIDE, Config

GIB = 2**30
BANKS = ("device", "host")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_KEEP_RATIOS = "1,0.5,0.25"
_LIBRARIES = 1.0  # GiB for workspaces of libraries, the ops' scratch, and what the allocator rounds up: an assumption
_MOST_GIB = 2**20
_VIDEO_FPS = {"lingbot_world_fast": 16}  # frames a second at which a model's video plays, where that is published
_OPTIONS = ("retrieved_chunks", "sink_frames", "recent_frames", "device_slots")  # of MemoryConfig, which has defaults
RULE = (
    "A size as it is sold, 80 or 80GB, is counted as 15/16 of so many GiB: ECC, the driver and CUDA's context take some"
    " of a card, and an arena leaves a sixteenth of host memory, sold or free. 79GiB is what is free on a card."
)
_OTHERWISE = "another --variant, a smaller --grid or a larger GPU"
_ESTIMATE = (
    "counted on tensors without storage, a pass twice, as CUDA graphs hold what it takes once more, and 1 GiB for "
    "libraries assumed; an H100 held 4.6 GiB in a pass of LingBot-World-Fast at 480 x 832, where this counts 4.8, and "
    "an H200 4.9 in FP8, which counts as much"
)


class Room(NamedTuple):
    """Memory that may be taken."""

    name: str  # as it was given
    bytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `worldkv plan`; their defaults are the model's and MemoryConfig's where these have them."""
    parser.epilog = f"It allocates nothing and needs no GPU and no weights. {RULE}"
    add = parser.add_argument
    models = rollout_models.MODELS
    add("--model", required=True, help=f"{', '.join(models)}; - for _ will do")
    of_real = [f"{name}: {', '.join(variants)}" for name, variants in models.items() if len(variants) > 1]
    add("--variant", help=f"of the model; {'; '.join(of_real)} (default: the first)")
    add("--gpu", required=True, metavar="SIZE,...", help="of the GPU's memory: 80 as it is sold, 79GiB that are free")
    add(
        "--host",
        metavar="SIZE",
        help="of host memory for a bank there, said as --gpu is (default: as much as it takes)",
    )
    add("--keep-ratio", default=_KEEP_RATIOS, metavar="RATIO,...", help="to compare (default: %(default)s)")
    add("--bank-bits", default="16", metavar="BITS,...",
        help=f"of what is banked, to compare: {', '.join(map(str, BANK_BITS))} (default: %(default)s)")  # fmt: skip
    add("--retrieved-chunks", type=report.integer(0), help="brought back at most (default: 6)")
    add("--sink-frames", type=report.integer(0), help="latent frames kept from the start (default: the model's own)")
    add("--recent-frames", type=report.integer(0), help="past latent frames kept whole (default: the model's own)")
    add("--device-slots", type=report.integer(1),
        help="of a bank in host memory (default: --retrieved-chunks + 2)")  # fmt: skip
    add("--grid", type=rollout_models.grid, metavar="H,W", help="tokens of a latent frame instead of the model's own")
    add("--dtype", default="bfloat16", help=f"{', '.join(_DTYPES)} (default: %(default)s)")
    add("--fp8", action="store_true", help="linear layers in FP8, for compute capability 9.0 and newer")
    add("--other", type=report.number, default=0.0, metavar="GIB",
        help="of the GPU's memory for what else is there, such as the text encoder and the video's autoencoder "
             "(default: %(default)s)")  # fmt: skip
    add("--json", metavar="PATH", help="also write all of it, by part, as one JSON document; - for stdout")
    parser.set_defaults(weights=None, random=True, layers=None)  # for rollout_models: a plan needs none


def run(args: argparse.Namespace) -> int:
    """Print what everything takes and what fits, and write what was asked for."""
    given, args.model = args.model, args.model.replace("-", "_")
    if args.model not in rollout_models.MODELS:
        raise ValueError(f"--model must be one of {', '.join(rollout_models.MODELS)}, got {given!r:.60}")
    gpus = [_room("--gpu", text) for text in args.gpu.split(",")]
    host = _room("--host", args.host) if args.host is not None else None
    if args.dtype not in _DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(_DTYPES)}, got {args.dtype!r:.60}")
    if not 0 <= args.other <= _MOST_GIB:
        raise ValueError(f"--other must be from 0 to {_MOST_GIB} GiB, got {args.other}")
    dtype, config = _DTYPES[args.dtype], rollout_models.model_config(args)
    rollout_models.check_fp8(args.fp8, dtype)
    ratios, of_bits = _ratios(args.keep_ratio), _bits(args.bank_bits)
    memories = [_memory(args, config, *of) for of in itertools.product(ratios, of_bits, BANKS)]

    parameters, loaded = rollout_models.count_weights(args.model, config, dtype)  # FP8 is made of what was loaded
    weights = rollout_models.count_weights(args.model, config, dtype, args.fp8)[1]
    passes = activations(rollout_models.on_meta(args.model, config, dtype))
    fixed = {
        "weights": weights,
        "activations": passes.held + 2 * passes.passing + int(_LIBRARIES * GIB),
        "other": int(args.other * GIB),
    }
    rows = [
        _row(memory, dtype, gpu, host, fixed, loaded, _chunk_seconds(args.model, config))
        for gpu in gpus
        for memory in memories
    ]
    say = functools.partial(print, file=sys.stderr if args.json == "-" else sys.stdout)
    say(_introduction(args, config, parameters))
    say("\n" + _parts(memories, dtype, fixed))
    say("\n" + _table(rows))
    may_be_fp8 = not args.fp8 and dtype == torch.bfloat16
    for note in _notes(rows, gpus, fixed, loaded, may_be_fp8):
        say(note)
    say(f"\n{RULE}\nActivations: {_ESTIMATE}. Banked chunks are those besides sink, recent and current ones.")
    report.write_json(args.json, {
        "command": "plan",
        "model": {"name": args.model, "variant": args.variant, **asdict(config), "dtype": args.dtype, "fp8": args.fp8,
                  "parameters": parameters, "video_frames_of_a_chunk": STRIDE * config.chunk_frames,
                  "video_fps": _VIDEO_FPS.get(args.model)},
        "memory": {name: getattr(memories[0], name) for name in _OPTIONS},
        "fixed_bytes": fixed,
        "activations": {**passes._asdict(), "libraries": int(_LIBRARIES * GIB), "how": _ESTIMATE},
        "rule": RULE,
        "host": host._asdict() if host else None,
        "rows": rows,
    })  # fmt: skip
    return 0


# --- arguments ---


def _room(argument: str, text: str) -> Room:
    """Bytes of a size that is sold, or of one that is free."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(gib|gb)?", text.strip(), flags=re.IGNORECASE)
    number = float(found[1]) if found else 0.0
    if not 0 < number <= _MOST_GIB:
        raise ValueError(f"{argument} must be a size such as 80 (as it is sold, in GB) or 79GiB (free), above 0 and at "
                         f"most {_MOST_GIB}, got {text!r:.60}")  # fmt: skip
    free = (found[2] or "").lower() == "gib"
    whole = free and argument == "--gpu"
    return Room(f"{number:g} {'GiB free' if free else 'GB'}", int(number * GIB * (1 if whole else HOST_SHARE)))


def _ratios(text: str) -> list[float]:
    try:
        ratios = [float(part) for part in text.split(",")]
    except ValueError:
        ratios = [math.nan]
    if not all(0 < ratio <= 1 for ratio in ratios):
        raise ValueError(f"--keep-ratio must be numbers above 0 and at most 1, joined by commas, got {text!r:.60}")
    return list(dict.fromkeys(ratios))


def _bits(text: str) -> list[int]:
    known = {str(bits): bits for bits in BANK_BITS}
    parts = [part.strip() for part in text.split(",")]
    if not set(parts) <= set(known):
        raise ValueError(f"--bank-bits must be of {', '.join(known)}, joined by commas, got {text!r:.60}")
    return [known[part] for part in dict.fromkeys(parts)]


def _memory(args: argparse.Namespace, config: Config, keep_ratio: float, bits: int, bank: str) -> MemoryConfig:
    """With a bank of as few chunks as there may be."""
    given = {name: getattr(args, name) for name in _OPTIONS if getattr(args, name) is not None}
    retrieved = given.get("retrieved_chunks", 0)
    if given.get("device_slots", retrieved) < retrieved:
        raise ValueError(f"--device-slots must be at least --retrieved-chunks {retrieved}, got {given['device_slots']}")
    memory = config.memory(keep_ratio=keep_ratio, bank=bank, bank_bits=bits, **given)
    return replace(memory, bank_chunks=least_chunks(memory))


# --- what fits ---


def _chunk_seconds(model: str, config: Config) -> float | None:
    """Of video; None where nobody has said how fast it plays."""
    return STRIDE * config.chunk_frames / _VIDEO_FPS[model] if model in _VIDEO_FPS else None


def _row(
    memory: MemoryConfig,
    dtype: torch.dtype,
    gpu: Room,
    host: Room | None,
    fixed: dict[str, int],
    loaded: int,
    chunk_seconds: float | None,
) -> dict[str, Any]:
    """One memory on one GPU: the largest bank that fits, or what to change for the smallest one to fit."""
    taken = sum(fixed.values())

    def fits(sizes: MemoryBytes) -> bool:
        return max(loaded, taken + sizes.device) <= gpu.bytes and (host is None or sizes.host <= host.bytes)

    chunks = most_bank_chunks(memory, dtype, fits)
    sizes = memory_bytes(memory, dtype, memory.bank_chunks if chunks is None else chunks)
    found = changes(memory, dtype, fits, device_type="cuda") if chunks is None else []
    return {
        "gpu": gpu.name,
        "gpu_bytes": gpu.bytes,
        "keep_ratio": memory.keep_ratio,
        "bank": memory.bank,
        "bank_bits": memory.bank_bits,
        "fits": chunks is not None,
        "bank_chunks": chunks,
        "is_most": chunks == max(BANK_LIMIT, memory.bank_chunks),  # no more were tried
        "video_frames": chunks and STRIDE * memory.chunk_frames * chunks,
        "seconds": chunks and chunk_seconds and chunks * chunk_seconds,
        "device_bytes": taken + sizes.device,  # with the weights and all; where nothing fits, of the smallest bank
        "host_bytes": sizes.host,
        "memory_bytes": sizes.parts,
        "changes": [{**fields, "device_bytes": taken + of.device, "host_bytes": of.host} for fields, of in found],
        "instead": advice(memory, dtype, fits, device_type="cuda") if chunks is None else None,
    }


# --- what is printed ---


def _introduction(args: argparse.Namespace, config: Config, parameters: int) -> str:
    frames, (height, width) = STRIDE * config.chunk_frames, config.grid
    seconds = _chunk_seconds(args.model, config)
    numbers = f"{args.dtype}, linear layers in FP8" if args.fp8 else args.dtype
    plays = f", {seconds:g} s at {_VIDEO_FPS[args.model]} frames a second" if seconds else ""
    return (
        f"{args.model}, {args.variant}, {numbers}: {parameters / 1e6:,.1f} million parameters; a latent frame is "
        f"{height} x {width} tokens, a chunk {config.chunk_frames} of them, {frames} video frames{plays}"
    )


def _parts(memories: list[MemoryConfig], dtype: torch.dtype, fixed: dict[str, int]) -> str:
    whole = replace(memories[0], bank_bits=16)
    sizes = memory_bytes(whole, dtype, whole.bank_chunks)
    tables = sizes.tables
    rows = [[part, byte_size(size)] for part, size in fixed.items() if size]
    rows += [[f"{part} chunks", byte_size(sizes.parts[part])] for part in ("sink", "recent") if sizes.parts[part]]
    rows += [["current chunk", byte_size(sizes.current)]]
    rows += [["tables, scratch", byte_size(tables + sizes.scratch + sizes.rotations)]]
    for memory in memories:
        where = "host memory" if memory.bank == "host" else "the GPU"
        numbers = f"keep_ratio {memory.keep_ratio:g}, {memory.bank_bits} bits"
        rows.append([f"a banked chunk, {numbers}, in {where}", byte_size(place_bytes(memory, dtype))])
        sizes = memory_bytes(memory, dtype, memory.bank_chunks)
        if memory.packs_bank:
            rows.append(
                ["  and what restores a layer of those retrieved", byte_size(sizes.restored + sizes.tables - tables)]
            )
        if memory.caches_bank:
            slots = f"  and {memory.cache_slots} slots for such chunks on the GPU"
            rows.append([slots, byte_size(sizes.bank + sizes.packed_bank)])
    return report.table(["what", "takes"], rows)


def _table(rows: list[dict[str, Any]]) -> str:
    columns = [
        "GPU", "bank", "keep_ratio", "bits", "banked chunks", "video frames", "seconds", "GPU GiB", "of", "host GiB"
    ]  # fmt: skip
    cells = []
    for row in rows:
        known = row["seconds"] is not None
        found = [f"{row['bank_chunks']}{' or more' if row['is_most'] else ''}", f"{row['video_frames']:,}",
                 f"{row['seconds']:.1f}" if known else "-"] if row["fits"] else ["does not fit", "-", "-"]  # fmt: skip
        cells.append([row["gpu"], row["bank"], f"{row['keep_ratio']:g}", f"{row['bank_bits']}", *found,
                      *(f"{row[name] / GIB:.1f}" for name in ("device_bytes", "gpu_bytes", "host_bytes"))])  # fmt: skip
    return report.table(columns, cells, left=2)


def _notes(
    rows: list[dict[str, Any]], gpus: list[Room], fixed: dict[str, int], loaded: int, may_be_fp8: bool
) -> list[str]:
    """What does not fit, and what to change: once where it is the same for a whole GPU."""
    taken, libraries, told = sum(fixed.values()), int(_LIBRARIES * GIB), []
    for gpu in gpus:
        of_gpu = [row for row in rows if row["gpu"] == gpu.name]
        otherwise = f"--fp8, {_OTHERWISE}" if may_be_fp8 and loaded <= gpu.bytes else _OTHERWISE
        if loaded > gpu.bytes:
            told.append(f"{gpu.name}: {byte_size(loaded)} of weights, as they are loaded, are too much; {otherwise}")
        elif gpu.bytes < libraries:
            alone = f"the {byte_size(libraries)} assumed for libraries are too much alone"
            told.append(f"{gpu.name}: {alone}; a larger GPU")
        elif taken > gpu.bytes:
            before = f"{byte_size(taken)} before any memory, {byte_size(libraries)} of it assumed for libraries"
            told.append(f"{gpu.name}: {before}, are too much; {otherwise}")
        elif not any(row["fits"] or row["changes"] for row in of_gpu):
            least = min(of_gpu, key=lambda row: row["device_bytes"])
            left = f"{byte_size(gpu.bytes - taken)} are left for a memory"
            told.append(f"{gpu.name}: {left}; {least['instead']}; {otherwise}")
        else:
            told += [
                f"{gpu.name}, {row['bank']} bank, keep_ratio {row['keep_ratio']:g}, {row['bank_bits']} bits: "
                f"{row['instead']}"
                for row in of_gpu
                if not row["fits"]
            ]
    return ["", *told] if told else []

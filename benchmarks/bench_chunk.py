"""One denoising pass of a block stack over a full window: our memory, the same in a CUDA graph, and the published path.

    python benchmarks/bench_chunk.py [--small] [--jsonl FILE] [--device DEVICE]

Random weights at the models' real dimensions and a few layers, since all layers are alike. The window holds what the
model itself has made, sink, six retrieved chunks of half a chunk each, two recent ones and the current.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import ERROR_LIMITS, Problem, Variant, bench_main, parse_device, relative_error, run_cases, worst
from model_cases import (
    SMALL_SIZES,
    Memory,
    ModelCase,
    build,
    controls_of,
    full_window,
    make_memory,
    memory_config,
    pass_bytes,
    pass_flops,
    shape,
)
from timing import Run
from torch.nn.functional import scaled_dot_product_attention

from worldkv_kernels import WorldMemory, norm_rope_append
from worldkv_kernels.models.rollout import Controls, WorldModel, noise

OURS = ("worldkv", "official", "sliding_as_long")
LATER = 60  # chunks made before: a memory must be no slower then than when its window is just full
FILL_LEVELS = (1.0, 0.0)  # one denoising pass and the clean one are enough to fill a window
# The histories of two implementations differ by rounding before the pass that is compared.
HISTORY_LIMITS = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float32: 1e-4}


@dataclass(frozen=True)
class ChunkCase:
    """A model of a few layers."""

    of: ModelCase

    def __str__(self) -> str:
        return f"{self.of}, one pass"


CASES = [
    ChunkCase(ModelCase("lingbot_world_fast", 4)),
    ChunkCase(ModelCase("matrix_game_2", 4)),
    ChunkCase(ModelCase("lingbot_world_fast", 4, {"grid": (29, 52)})),
    ChunkCase(ModelCase("lingbot_world_fast", 4, variant="v2-1.3b")),
]
SMALL_CASES = [ChunkCase(ModelCase(model, 2, sizes)) for model, sizes in SMALL_SIZES.items()]


def fill(model: WorldModel, memory: Memory, controls: Sequence[Controls]) -> Any:
    """Make chunks until the window is full, and begin the one after; returns what the model prepares for that one."""
    of_rollout = model.prepare_rollout(None, controls[0].poses[0], FILL_LEVELS)
    for chunk, of_one in enumerate(controls):
        plan = memory.begin_chunk(of_one.poses, intrinsics=of_one.intrinsics)
        of_chunk = model.prepare_chunk(of_rollout, plan.start_frame, of_one)
        if chunk + 1 < len(controls):
            latents = first_noise(model, chunk)
            clean = latents - model.denoise(latents, 0, of_chunk, memory)
            model.denoise(clean, 1, of_chunk, memory)
            memory.end_chunk()
    return of_chunk


def first_noise(model: WorldModel, chunk: int) -> torch.Tensor:
    """What a chunk starts from."""
    return noise(0, chunk, 0, (model.chunk_frames, *model.latent_shape)).to(model.device)


class CheckedMemory:
    """A memory whose every `attend` is compared with PyTorch's attention over a gathered copy of the window."""

    def __init__(self, memory: WorldMemory, *, start_frame: int) -> None:
        self.memory, self.config, self.start_frame, self.errors = memory, memory.config, start_frame, []

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *weights: Any) -> torch.Tensor:
        got = self.memory.attend(layer, q, k, v, *weights)
        config, window = self.config, self.memory.window
        scratch = torch.empty((2, len(q), config.num_heads, config.head_dim), dtype=q.dtype, device=q.device)
        current = window.segments[-1]
        turned = norm_rope_append(
            q, k, v, *scratch, 0, rope=config.make_rope(), grid=(config.chunk_frames, *config.grid),
            start_frame=self.start_frame, q_weight=weights[0], k_weight=weights[1], eps=config.eps,
            round_before_rope=config.round_before_rope, backend="reference",
        )  # fmt: skip
        pools = self.memory.pools(layer)
        for pool, exact in zip(pools, scratch, strict=True):
            self.errors.append(relative_error(pool[current.first_row :][: current.num_rows], exact))
        k_rows, v_rows = ([pool[s.first_row :][: s.num_rows] for s in window.segments] for pool in pools)
        keys = torch.cat([self._later(k, s.time_shift) for k, s in zip(k_rows, window.segments, strict=True)])
        of_heads = [x.transpose(0, 1)[None] for x in (turned, keys, torch.cat(v_rows))]
        want = scaled_dot_product_attention(*of_heads, scale=config.scale)[0].transpose(0, 1)
        self.errors.append(relative_error(got, want))
        return got

    def _later(self, k: torch.Tensor, frames: int) -> torch.Tensor:
        """Keys turned as if they had been made so many frames later."""
        if not frames:
            return k
        pairs = torch.view_as_complex(k.double().unflatten(-1, (-1, 2)))
        turn = torch.view_as_complex(torch.from_numpy(self.config.make_rope().turn(frames)).to(k.device))
        return torch.view_as_real(pairs * turn).flatten(-2).to(k.dtype)


class Filled:
    """A memory with the chunk begun that comes after `chunks` others."""

    def __init__(self, mode: str, model: WorldModel, chunks: int) -> None:
        self.model, self.start_frame = model, chunks * model.chunk_frames
        self.memory = make_memory(mode, model, chunks + 1)
        with torch.no_grad():
            self.of_chunk = fill(model, self.memory, controls_of(model, chunks + 1))
        self.latents = first_noise(model, 0)

    @torch.no_grad()
    def denoise(self, through: Any = None) -> torch.Tensor:
        """One pass, the first, with the memory or what stands in for it."""
        return self.model.denoise(self.latents, 0, self.of_chunk, through or self.memory)

    def run(self, i: int) -> torch.Tensor:
        return self.denoise()

    def check(self, run: Run) -> float:
        """The worst error of an `attend`, and of what `run` gives without the checks."""
        checked = CheckedMemory(self.memory, start_frame=self.start_frame)
        through = self.denoise(checked)
        return worst([*checked.errors, relative_error(run(0), through)])


def variants_of(case: ChunkCase, device: torch.device) -> dict[str, bool]:
    """The names of a case's variants, and whether each is a rival, without making any."""
    graph = ["worldkv graph"] if device.type == "cuda" else []
    return {**dict.fromkeys([*OURS, f"worldkv at chunk {LATER}", *graph], False), "published path": True}


def prepare(case: ChunkCase, device: torch.device) -> Problem:
    """A model, and a full memory for every variant, each with the same chunk begun, and one much later."""
    model = build(case.of, device)
    config = memory_config("official", model, 0)
    chunks = config.sink_chunks + config.recent_chunks + config.gap_chunks + config.retrieved_chunks + 1
    filled = {mode: Filled(mode, model, chunks) for mode in (*OURS, "published")}
    filled[f"worldkv at chunk {LATER}"] = Filled("worldkv", model, LATER)
    window = full_window(memory_config("worldkv", model, chunks))
    controls = controls_of(model, 1)[0]
    counted = {"num_bytes": pass_bytes(model, window), "flops": pass_flops(model, controls, window)}
    limit = ERROR_LIMITS[model.dtype]

    def ours(name: str, base: str | None = None) -> Variant:
        return Variant(name, lambda: filled[name].run, filled[name].check, limit, **counted, base=base)

    def published_error(run: Run) -> float:
        return relative_error(run(0), filled["official"].denoise())

    variants = [*(ours(mode) for mode in OURS), ours(f"worldkv at chunk {LATER}", base="worldkv")]
    if device.type == "cuda":
        worldkv = filled["worldkv"]
        variants.append(Variant(
            "worldkv graph", lambda: captured(worldkv.denoise), lambda run: relative_error(run(0), worldkv.denoise()),
            limit, **counted, base="worldkv",
        ))  # fmt: skip
    variants.append(Variant(
        "published path", lambda: filled["published"].run, published_error, HISTORY_LIMITS[model.dtype], **counted,
        rival=True, yardstick=True,
    ))  # fmt: skip
    return Problem(str(case), variants, shape=shape(model, window))


def captured(function: Any) -> Run:
    """`function` as a CUDA graph; its result lies where it lay at capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()

    def run(i: int) -> torch.Tensor:
        graph.replay()
        return result

    return run


def run(
    *,
    small: bool = False,
    device: torch.device | None = None,
    seconds: float = 1.0,
    jsonl_path: str | None = None,
    cases: Sequence[ChunkCase] | None = None,
    only: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """Measure the cases and return the figures, as `common.run_cases` does."""
    return run_cases(
        "chunk", cases or (SMALL_CASES if small else CASES), prepare, device or parse_device(None),
        small=small, seconds=seconds, jsonl_path=jsonl_path, only=only,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    return bench_main("chunk", argv)


if __name__ == "__main__":
    sys.exit(main())

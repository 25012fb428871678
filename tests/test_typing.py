"""What a caller's type checker makes of the public names (py.typed is shipped)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="mypy is not installed")

ROOT = Path(__file__).parents[1]
# Stands for torch, of which a checker would read a thousand files.
TORCH = """
from typing import Any

class Tensor:
    shape: tuple[int, ...]
    def flatten(self, start_dim: int = 0) -> Tensor: ...
    def view(self, *size: int) -> Tensor: ...

def zeros(*size: int) -> Tensor: ...
def __getattr__(name: str) -> Any: ...
"""
CALLS = """
import torch

from worldkv_kernels import (
    ActionRetrieval, FovRetrieval, MemoryConfig, PoseRetrieval, Rope3D, Segment, Window, WorldMemory, compress_chunk,
    dequantize_chunk, norm_rope_append, parse_actions, participation, quantize_chunk, segment_attention,
)
from worldkv_kernels.integrations import attach, detach, lingbot, matrix_game
from worldkv_kernels.models.matrix_game_2 import MatrixGame2
from worldkv_kernels.models.matrix_game_config import MatrixGameConfig
from worldkv_kernels.models.rollout import rollout


def attention(q: torch.Tensor, wish: bool) -> torch.Tensor:
    w = Window([Segment(0, 5), Segment(5, 2, time_shift=-3)], device="cpu", rope=Rope3D(64))
    out, lse = segment_attention(q, q, q, w, return_lse=True)
    out, mass = segment_attention(q, q, q, w, return_mass=True)
    out, lse, mass = segment_attention(q, q, q, w, return_lse=True, return_mass=True)
    out = participation(q, q, w, lse, scale=0.5, out=mass, backend=None).flatten(1)
    segment_attention(q, q, q, w, return_lse=True).flatten(1)  # type: ignore[attr-defined]
    found = segment_attention(q, q, q, w, return_lse=wish)
    out = found if isinstance(found, torch.Tensor) else found[0]
    return segment_attention(q, q, q, w, scale=0.5, return_mass=False, out=out, backend="reference").flatten(1)


def chunk(q: torch.Tensor) -> torch.Tensor:
    k, v, index, count = compress_chunk(q, q, frames=3, keep_ratio=0.25)
    if count is not None:
        index = count
    count.sum()  # type: ignore[union-attr]
    k, v, *_ = compress_chunk(q, q, frames=3, keep_ratio=0.25, rule="similarity", merge=False, merge_above=1, scale=0.1)
    compress_chunk(q, q, frames=3, keep_ratio=0.25, rule="random")  # type: ignore[arg-type]
    flat = q.flatten(1)
    return norm_rope_append(flat, flat, flat, k, v, 0, rope=Rope3D(64), grid=(3, 1, 2), start_frame=0).flatten(1)


def packed(q: torch.Tensor) -> torch.Tensor:
    bytes_of_both = quantize_chunk(q, q, bits=4)
    k, v = dequantize_chunk(bytes_of_both, bits=4, tokens=6, heads=2, head_dim=64, dtype=torch.float16)
    k, v = dequantize_chunk(quantize_chunk(q, q, bits=8, out=bytes_of_both), bits=8, out_k=k, backend="reference")
    quantize_chunk(q, q, bits=2)  # type: ignore[arg-type]
    return k.flatten(1)


def memory(q: torch.Tensor, poses: torch.Tensor) -> list[int]:
    for retrieval in (PoseRetrieval(diversity=0.5), FovRetrieval(depth_range=(1.0, 10.0)), ActionRetrieval()):
        config = MemoryConfig(num_layers=1, num_heads=2, head_dim=64, grid=(4, 6), retrieval=retrieval)
    config = MemoryConfig(num_layers=1, num_heads=2, head_dim=64, grid=(4, 6), retrieval="fov", sink_frames=4)
    past: int = config.sink_frames + config.recent_frames + config.retrieved_chunks
    MemoryConfig(num_layers=1, num_heads=past, grid=(4, 6), retrieval="nearest")  # type: ignore[arg-type]
    MemoryConfig(num_layers=1, num_heads=2, grid=(4, 6), prune_rule="random")  # type: ignore[arg-type]
    MemoryConfig(num_layers=1, num_heads=2, grid=(4, 6), prune_rule="similarity", merge_pruned=False)
    config = MemoryConfig.official(num_layers=1, num_heads=2, head_dim=64, grid=(4, 6))
    memory = WorldMemory(config, device="cpu", dtype=torch.float32)
    plan = memory.begin_chunk(poses)
    memory.attend(0, q, q, q).view(-1)
    memory.end_chunk()
    memory.reset()
    return list(plan.retrieved) + [plan.num_tokens]


def models(pipe: torch.nn.Module, poses: torch.Tensor) -> None:
    config = MatrixGameConfig.universal(num_layers=2, action_layers=(0,), num_heads=2, grid=(4, 6))
    model = MatrixGame2.random(config, device="cpu", dtype=torch.float32)
    memory = WorldMemory(config.memory(retrieval="action"), device="cpu", dtype=torch.float32)
    for chunk in rollout(model, memory, actions=parse_actions("L*24,J*24")):
        print(chunk.plan.chunk, chunk.plan.retrieved, chunk.latents.shape)
    lingbot.enable(pipe, lingbot.memory_config(pipe, grid=(30, 52)), poses=poses)
    lingbot.disable(pipe)
    matrix_game.enable(pipe)
    matrix_game.disable(pipe)
    chunks: int = attach(pipe, poses=poses, mode="worldkv").stats()["chunks"]
    attach(pipe, grid=chunks)  # type: ignore[arg-type]
    detach(pipe)
"""


def test_a_strict_checker_finds_no_fault_in_calls(tmp_path):
    (tmp_path / "stubs" / "torch").mkdir(parents=True)
    (tmp_path / "stubs" / "torch" / "__init__.pyi").write_text(TORCH)
    (tmp_path / "calls.py").write_text(CALLS)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--no-site-packages"]
    command += ["--cache-dir", os.devnull, "calls.py"]
    env = {**os.environ, "MYPYPATH": f"{tmp_path / 'stubs'}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

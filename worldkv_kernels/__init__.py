"""World memory for autoregressive video diffusion: attention over a paged KV pool, pruning and retrieval."""

import importlib
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from .lazy import submodule

__version__ = "0.1.0"


def _command_starts() -> bool:
    """Whether `worldkv` or `python -m worldkv_kernels` imports this: Python's argv[0] is "-m" until it has."""
    program = os.path.basename((getattr(sys, "argv", None) or [""])[0])
    return program == "worldkv" or (program == "-m" and __name__ in sys.orig_argv)


# The command answers --help and Ctrl-C without waiting for torch. Who else imports this finds all of it, and the ops
# under torch.ops.
if TYPE_CHECKING or "torch" in sys.modules or not _command_starts():
    from .actions import ActionIntegrator, Actions, ActionScales, parse_actions
    from .memory.config import MemoryConfig
    from .memory.retrieval import ActionRetrieval, ContentRetrieval, FovRetrieval, PoseRetrieval, RetrievalPolicy
    from .memory.world_memory import ChunkPlan, WorldMemory
    from .ops import (
        CompressedChunk,
        compress_chunk,
        dequantize_chunk,
        norm_rope_append,
        packed_bytes,
        participation,
        quantize_chunk,
        segment_attention,
    )
    from .rope import Rope3D, RopeTable
    from .window import Segment, Window


def __getattr__(name: str) -> ModuleType:
    """A submodule that is not imported yet, or, in the command, a public name that is not."""
    if name not in __all__:
        return submodule(__name__, name)
    importlib.import_module("torch")
    importlib.reload(sys.modules[__name__])
    return globals()[name]


__all__ = [
    "ActionIntegrator",
    "ActionRetrieval",
    "ActionScales",
    "Actions",
    "ChunkPlan",
    "CompressedChunk",
    "ContentRetrieval",
    "FovRetrieval",
    "MemoryConfig",
    "PoseRetrieval",
    "RetrievalPolicy",
    "Rope3D",
    "RopeTable",
    "Segment",
    "Window",
    "WorldMemory",
    "compress_chunk",
    "dequantize_chunk",
    "norm_rope_append",
    "packed_bytes",
    "parse_actions",
    "participation",
    "quantize_chunk",
    "segment_attention",
]

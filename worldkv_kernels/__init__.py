"""World memory for autoregressive video diffusion: attention over a paged KV pool, pruning and retrieval."""

from .actions import ActionIntegrator, Actions, ActionScales, parse_actions
from .memory.config import MemoryConfig
from .memory.retrieval import ActionRetrieval, FovRetrieval, PoseRetrieval, RetrievalPolicy
from .memory.world_memory import ChunkPlan, WorldMemory
from .ops import CompressedChunk, compress_chunk, norm_rope_append, segment_attention
from .rope import Rope3D
from .window import Segment, Window

__version__ = "0.1.0"

__all__ = [
    "ActionIntegrator",
    "ActionRetrieval",
    "ActionScales",
    "Actions",
    "ChunkPlan",
    "CompressedChunk",
    "FovRetrieval",
    "MemoryConfig",
    "PoseRetrieval",
    "RetrievalPolicy",
    "Rope3D",
    "Segment",
    "Window",
    "WorldMemory",
    "compress_chunk",
    "norm_rope_append",
    "parse_actions",
    "segment_attention",
]

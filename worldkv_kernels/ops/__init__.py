"""The public ops. Each checks its arguments, chooses a backend and is registered as torch.ops.worldkv.<name>."""

from .compress_chunk import CompressedChunk, compress_chunk
from .norm_rope_append import norm_rope_append
from .segment_attention import segment_attention

__all__ = ["CompressedChunk", "compress_chunk", "norm_rope_append", "segment_attention"]

"""The public ops. Each checks its arguments, chooses a backend and is registered as torch.ops.worldkv.<name>."""

from .compress_chunk import CompressedChunk, compress_chunk
from .norm_rope_append import norm_rope_append
from .participation import participation
from .quantize_chunk import dequantize_chunk, packed_bytes, quantize_chunk
from .segment_attention import segment_attention

__all__ = [
    "CompressedChunk",
    "compress_chunk",
    "dequantize_chunk",
    "norm_rope_append",
    "packed_bytes",
    "participation",
    "quantize_chunk",
    "segment_attention",
]

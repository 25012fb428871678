"""For the studies of a bank in fewer bits: other ways to pack it, to compare with, and keys that are harder to pack."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from worldkv_kernels.memory import storage
from worldkv_kernels.models.small_world import SmallWorld
from worldkv_kernels.ops.quantize_chunk import GROUP_TOKENS, packed_bytes
from worldkv_kernels.reference import quantize_chunk as reference

OUTLIER_PAIRS, OUTLIER_FACTOR = 3, 8.0  # of a head's rotary pairs so many, so much larger


@contextmanager
def packing(scheme: str) -> Iterator[None]:
    """While inside, a bank in 4 bits is packed in another way, on a CPU; "" for as it is.

    "keys by token": keys have a scale and a minimum for each token and head; "values by token" likewise. "2 bits": four
    levels for sixteen, in the bytes of 4 bits. "groups of 32": tokens that share a channel's scale, for 64; a memory is
    to be made inside.
    """
    if not scheme:
        yield
        return
    published = storage.quantize_chunk, storage.dequantize_chunk
    of_op = importlib.import_module("worldkv_kernels.ops.quantize_chunk")  # the package's attribute is the function
    storage.quantize_chunk, storage.dequantize_chunk = {
        "keys by token": (partial(_quantize_by_token, 0), partial(_dequantize_by_token, 0)),
        "values by token": (partial(_quantize_by_token, 1), partial(_dequantize_by_token, 1)),
        "2 bits": (_quantize_to_four_levels, published[1]),
        "groups of 32": published,
    }[scheme]
    of_op.GROUP_TOKENS = 32 if scheme == "groups of 32" else GROUP_TOKENS
    try:
        yield
    finally:
        storage.quantize_chunk, storage.dequantize_chunk = published
        of_op.GROUP_TOKENS = GROUP_TOKENS


def _quantize_by_token(
    which: int, k: torch.Tensor, v: torch.Tensor, *, bits: int, out: torch.Tensor, **options: object
) -> torch.Tensor:
    """K or V, 0 or 1: its tokens take the channels' place, so that a group of one token's channels shares a scale."""
    of_one = out.clone()
    turned = (k, v)[which].transpose(1, 3)
    reference.quantize_chunk(turned, turned, of_one, bits=4, group_tokens=k.shape[3])
    reference.quantize_chunk(k, v, out, bits=4, group_tokens=GROUP_TOKENS)
    out[:, which] = of_one[:, which]
    return out


def _dequantize_by_token(
    which: int, packed: torch.Tensor, *, bits: int, chosen: torch.Tensor, out_k: torch.Tensor, out_v: torch.Tensor,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    for (place, tokens), k, v in zip(chosen.tolist(), out_k, out_v, strict=True):
        if tokens:
            _, heads, head_dim = k.shape
            of_place = packed[place, None, :, : packed_bytes(tokens, heads, head_dim, 4, k.dtype)]
            turned = torch.empty(2, 1, head_dim, heads, tokens, dtype=k.dtype, device=k.device)
            reference.dequantize_chunk(of_place, turned[0], turned[1], bits=4, group_tokens=head_dim)
            reference.dequantize_chunk(of_place, k[None, :tokens], v[None, :tokens], bits=4, group_tokens=GROUP_TOKENS)
            (k, v)[which][:tokens] = turned[which, 0].transpose(0, 2)
    return out_k, out_v


def _quantize_to_four_levels(
    k: torch.Tensor, v: torch.Tensor, *, bits: int, out: torch.Tensor, **options: object
) -> torch.Tensor:
    reference.quantize_chunk(_four_levels(k), _four_levels(v), out, bits=4, group_tokens=GROUP_TOKENS)
    return out


def _four_levels(x: torch.Tensor) -> torch.Tensor:
    """x [layers, tokens, heads, head_dim] at the nearest of four levels, every fifth of the sixteen of 4 bits."""
    groups = []
    for group in x.float().split(GROUP_TOKENS, dim=1):
        low = group.amin(dim=1, keepdim=True)
        step = (group.amax(dim=1, keepdim=True) - low) / 3
        groups.append(low + ((group - low) / step.clamp_min(torch.finfo(torch.float32).tiny)).round() * step)
    return torch.cat(groups, dim=1).to(x.dtype)


@torch.no_grad()
def add_outliers(model: SmallWorld) -> None:
    """Some rotary pairs of every head larger in all keys and smaller by as much in queries: what the model does is the
    same to the bit, since the factor is a power of two. The trained one has no such channels; large models may."""
    heads, head_dim = model.config.num_heads, model.config.head_dim
    generator = torch.Generator().manual_seed(0)
    for block in model.blocks:
        factors = torch.ones(heads, head_dim // 2, 2, dtype=torch.float32, device="cpu")
        for of_head in factors:
            order = torch.randperm(head_dim // 2, generator=generator, dtype=torch.int64, device="cpu")
            of_head[order[:OUTLIER_PAIRS]] = OUTLIER_FACTOR
        attention = block.self_attn
        attention.norm_k.weight.mul_(factors.flatten())
        attention.norm_q.weight.div_(factors.flatten())

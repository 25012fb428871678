# SPDX-License-Identifier: Apache-2.0
"""K and V of a chunk in 8 bits, with a scale a token and head, or in 4, with a scale and a minimum a channel and group
of tokens; and back.

In 8 bits a program takes BLOCK_ROWS rows, of which a row is a token and a head; in 4 one head of a group. K and V, and
layers, are dimensions of the grid and share nothing. Everything is read once and written once. Where a table chooses
what is restored, that of layers is one of chunks, whose programs look up their chunk's place and tokens.

Each operation is rounded to fp32 by itself, so launches switch off the fusion of products and sums, and divisions are
exact ones. Then every implementation that does the same gets the same bits.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

MAX_HEADS = 128  # more are tokens, of tensors with heads first
MAX_LAYERS = 65535  # of the dimension of a CUDA grid that counts them, or the chunks of a table
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALIGNMENT = 16  # bytes: of what is packed of K or V


@triton.jit
def _wide(x, INTERPRETED: tl.constexpr):
    """To fp32, which holds all. Triton's interpreter, left alone, gets subnormal bf16 wrong."""
    if INTERPRETED and tl.bfloat16 == x.dtype:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def _rounded(x, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """fp32 to the nearest number of DTYPE. Triton's interpreter, left alone, cuts bf16 off."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def _integer(x):
    """The nearest one to |x| < 2^22, halves to the even one: a number this large has no bits for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _scale(step, low, TOP: tl.constexpr, DTYPE: tl.constexpr, LARGEST: tl.constexpr, INTERPRETED: tl.constexpr):
    """`step` rounded up to DTYPE, or down where code TOP would be restored as more than DTYPE holds; infinite where
    the step is."""
    BITS: tl.constexpr = tl.int32 if tl.float32 == DTYPE else tl.int16
    usable = step < float("inf")
    step = tl.where(usable, step, 0.0)
    scale = _rounded(step, DTYPE, INTERPRETED)
    bits = scale.to(BITS, bitcast=True) + (_wide(scale, INTERPRETED) < step).to(BITS)
    over = _wide(bits.to(DTYPE, bitcast=True), INTERPRETED) * TOP + low > LARGEST
    scale = (bits - over.to(BITS)).to(DTYPE, bitcast=True)
    return tl.where(usable, _wide(scale, INTERPRETED), float("inf"))


@triton.jit
def _codes(x, scale, LEAST: tl.constexpr, MOST: tl.constexpr):
    """x / scale to integers, in fp32; 0 where the scale is zero or infinite."""
    usable = (scale > 0.0) & (scale < float("inf"))
    ratio = tl.where(usable, tl.div_rn(x, tl.where(usable, scale, 1.0)), 0.0)
    return _integer(tl.minimum(tl.maximum(ratio, LEAST), MOST))


@triton.jit
def _is_finite(x, axis: tl.constexpr):
    """Whether all along an axis are, by their bits: a maximum may pass over a NaN."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis) < 0x7F800000


@triton.jit
def _looked_up(chosen_ptr, chunk, places, tokens):
    """The place and the tokens of a chunk; no tokens where the table names what there is not."""
    place = tl.load(chosen_ptr + 2 * chunk)
    chunk_tokens = tl.load(chosen_ptr + 2 * chunk + 1)
    exists = (place >= 0) & (place < places) & (chunk_tokens >= 0) & (chunk_tokens <= tokens)
    return place.to(tl.int64), tl.where(exists, chunk_tokens, 0)


@triton.jit(do_not_specialize=["tokens"])
def quantize_8_kernel(
    k_ptr, v_ptr, packed_ptr, tokens,
    stride_k_layer, stride_v_layer, stride_k_token, stride_v_token, stride_packed_layer, stride_packed_tensor,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, LARGEST: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = k_ptr.dtype.element_ty
    PER_PIECE: tl.constexpr = 128 // DTYPE.primitive_bitwidth  # scales in 16 bytes, up to which zeros follow the last
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    layer = tl.program_id(1).to(tl.int64)
    tensor = tl.program_id(2)
    num_rows = tokens * HEADS
    mask = (rows < num_rows)[:, None]
    dims = tl.arange(0, HEAD_DIM)[None, :]
    token = (rows // HEADS).to(tl.int64)[:, None]
    in_token = (rows % HEADS)[:, None] * HEAD_DIM + dims  # [BLOCK_ROWS, HEAD_DIM]
    if tensor == 0:
        x = tl.load(k_ptr + layer * stride_k_layer + token * stride_k_token + in_token, mask=mask, other=0.0)
    else:
        x = tl.load(v_ptr + layer * stride_v_layer + token * stride_v_token + in_token, mask=mask, other=0.0)
    x = _wide(x, INTERPRETED)

    finite = _is_finite(x, 1)
    step = tl.div_rn(tl.max(tl.abs(x), 1), 127.0)
    scale = _scale(tl.where(finite, step, float("inf")), 0.0, 127, DTYPE, LARGEST, INTERPRETED)
    codes = _codes(x, scale[:, None], -127.0, 127.0).to(tl.int8)

    packed_ptr += layer * stride_packed_layer + tensor * stride_packed_tensor
    offsets = rows.to(tl.int64)[:, None] * HEAD_DIM + dims
    tl.store(packed_ptr + offsets, codes.to(tl.uint8, bitcast=True), mask=mask)
    scale_ptr = (packed_ptr + num_rows.to(tl.int64) * HEAD_DIM).to(tl.pointer_type(DTYPE))
    tl.store(
        scale_ptr + rows, _rounded(scale, DTYPE, INTERPRETED), mask=rows < tl.cdiv(num_rows, PER_PIECE) * PER_PIECE
    )


@triton.jit(do_not_specialize=["tokens", "places"], do_not_specialize_on_alignment=["chosen_ptr"])
def dequantize_8_kernel(
    k_ptr, v_ptr, packed_ptr, tokens,
    stride_k_layer, stride_v_layer, stride_k_token, stride_v_token, stride_packed_layer, stride_packed_tensor,
    chosen_ptr, places,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = k_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    layer = tl.program_id(1).to(tl.int64)
    tensor = tl.program_id(2)
    place = layer
    if chosen_ptr is not None:
        place, tokens = _looked_up(chosen_ptr, layer, places, tokens)
        if tl.program_id(0) * BLOCK_ROWS >= tokens * HEADS:
            return
    num_rows = tokens * HEADS
    mask = (rows < num_rows)[:, None]
    dims = tl.arange(0, HEAD_DIM)[None, :]
    packed_ptr += place * stride_packed_layer + tensor * stride_packed_tensor
    codes = tl.load(packed_ptr + rows.to(tl.int64)[:, None] * HEAD_DIM + dims, mask=mask, other=0)
    scale_ptr = (packed_ptr + num_rows.to(tl.int64) * HEAD_DIM).to(tl.pointer_type(DTYPE))
    scale = _wide(tl.load(scale_ptr + rows, mask=rows < num_rows, other=0.0), INTERPRETED)
    x = codes.to(tl.int8, bitcast=True).to(tl.float32) * scale[:, None]
    x = _rounded(x, DTYPE, INTERPRETED)
    token = (rows // HEADS).to(tl.int64)[:, None]
    in_token = (rows % HEADS)[:, None] * HEAD_DIM + dims
    if tensor == 0:
        tl.store(k_ptr + layer * stride_k_layer + token * stride_k_token + in_token, x, mask=mask)
    else:
        tl.store(v_ptr + layer * stride_v_layer + token * stride_v_token + in_token, x, mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def quantize_4_kernel(
    k_ptr, v_ptr, packed_ptr, tokens,
    stride_k_layer, stride_v_layer, stride_k_token, stride_v_token, stride_packed_layer, stride_packed_tensor,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, GROUP_TOKENS: tl.constexpr, LARGEST: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = k_ptr.dtype.element_ty
    PAIRS: tl.constexpr = HEAD_DIM // 2
    group = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    layer = tl.program_id(1).to(tl.int64)
    tensor = tl.program_id(2)
    token = group * GROUP_TOKENS + tl.arange(0, GROUP_TOKENS)
    mask = (token < tokens)[:, None]
    token = token.to(tl.int64)[:, None]
    dims = tl.arange(0, HEAD_DIM)
    in_token = head * HEAD_DIM + dims[None, :]
    if tensor == 0:
        x = tl.load(k_ptr + layer * stride_k_layer + token * stride_k_token + in_token, mask=mask, other=0.0)
    else:
        x = tl.load(v_ptr + layer * stride_v_layer + token * stride_v_token + in_token, mask=mask, other=0.0)
    x = _wide(x, INTERPRETED)  # [GROUP_TOKENS, HEAD_DIM]

    finite = _is_finite(x, 0)
    # Plus zero, since of zeros of both signs a minimum may be either.
    low = tl.where(finite, tl.min(tl.where(mask, x, float("inf")), 0) + 0.0, 0.0)
    high = tl.where(finite, tl.max(tl.where(mask, x, float("-inf")), 0) + 0.0, float("inf"))
    step = tl.div_rn(high - low, 15.0)
    low = tl.where(step < float("inf"), low, 0.0)
    scale = _scale(step, low, 15, DTYPE, LARGEST, INTERPRETED)
    codes = _codes(x - low[None, :], scale[None, :], 0.0, 15.0).to(tl.uint8)
    even, odd = tl.split(codes.reshape(GROUP_TOKENS, PAIRS, 2))

    packed_ptr += layer * stride_packed_layer + tensor * stride_packed_tensor
    pairs = head * PAIRS + tl.arange(0, PAIRS)[None, :]
    tl.store(packed_ptr + token * (HEADS * PAIRS) + pairs, even | (odd << 4), mask=mask)
    scale_ptr = (packed_ptr + tokens.to(tl.int64) * (HEADS * PAIRS)).to(tl.pointer_type(DTYPE))
    low_ptr = scale_ptr + tl.cdiv(tokens, GROUP_TOKENS).to(tl.int64) * (HEADS * HEAD_DIM)
    channel = group.to(tl.int64) * (HEADS * HEAD_DIM) + head * HEAD_DIM + dims
    tl.store(scale_ptr + channel, _rounded(scale, DTYPE, INTERPRETED))
    tl.store(low_ptr + channel, _rounded(low, DTYPE, INTERPRETED))


@triton.jit(do_not_specialize=["tokens", "places"], do_not_specialize_on_alignment=["chosen_ptr"])
def dequantize_4_kernel(
    k_ptr, v_ptr, packed_ptr, tokens,
    stride_k_layer, stride_v_layer, stride_k_token, stride_v_token, stride_packed_layer, stride_packed_tensor,
    chosen_ptr, places,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, GROUP_TOKENS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = k_ptr.dtype.element_ty
    PAIRS: tl.constexpr = HEAD_DIM // 2
    group = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    layer = tl.program_id(1).to(tl.int64)
    tensor = tl.program_id(2)
    place = layer
    if chosen_ptr is not None:
        place, tokens = _looked_up(chosen_ptr, layer, places, tokens)
        if group * GROUP_TOKENS >= tokens:
            return
    token = group * GROUP_TOKENS + tl.arange(0, GROUP_TOKENS)
    mask = (token < tokens)[:, None]
    token = token.to(tl.int64)[:, None]
    dims = tl.arange(0, HEAD_DIM)
    packed_ptr += place * stride_packed_layer + tensor * stride_packed_tensor
    pairs = head * PAIRS + tl.arange(0, PAIRS)[None, :]
    codes = tl.load(packed_ptr + token * (HEADS * PAIRS) + pairs, mask=mask, other=0)
    codes = tl.join(codes & 15, codes >> 4).reshape(GROUP_TOKENS, HEAD_DIM)
    scale_ptr = (packed_ptr + tokens.to(tl.int64) * (HEADS * PAIRS)).to(tl.pointer_type(DTYPE))
    low_ptr = scale_ptr + tl.cdiv(tokens, GROUP_TOKENS).to(tl.int64) * (HEADS * HEAD_DIM)
    channel = group.to(tl.int64) * (HEADS * HEAD_DIM) + head * HEAD_DIM + dims
    scale = _wide(tl.load(scale_ptr + channel), INTERPRETED)[None, :]
    low = _wide(tl.load(low_ptr + channel), INTERPRETED)[None, :]
    x = _rounded(codes.to(tl.float32) * scale + low, DTYPE, INTERPRETED)
    in_token = head * HEAD_DIM + dims[None, :]
    if tensor == 0:
        tl.store(k_ptr + layer * stride_k_layer + token * stride_k_token + in_token, x, mask=mask)
    else:
        tl.store(v_ptr + layer * stride_v_layer + token * stride_v_token + in_token, x, mask=mask)


def _wrong(op: str, what: str, wanted: str, *got: object) -> str:
    came = [f"{list(x.shape)} {x.dtype}, stride {x.stride()}" if isinstance(x, torch.Tensor) else repr(x) for x in got]
    if len(got) > 1:
        came = [f"{name} {x}" for name, x in zip(what.replace(" and ", ", ").split(", "), came, strict=True)]
    return f"{op}: {what} must be {wanted}, got {'; '.join(came)}"


def _check_tensors(op: str, **tensors: object) -> None:
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(_wrong(op, name, "a tensor", x))


def _check(
    op: str, k: torch.Tensor, v: torch.Tensor, packed: torch.Tensor, bits: int, group_tokens: int,
    chosen: torch.Tensor | None = None,
) -> None:  # fmt: skip
    _check_tensors(op, k=k, v=v, packed=packed)
    for name, value in (("bits", bits), ("group_tokens", group_tokens)):
        if type(value) is not int:
            raise TypeError(_wrong(op, name, "an int", value))
    if k.dim() != 4 or k.shape[3] not in (64, 128) or not 1 <= k.shape[2] <= MAX_HEADS:
        sizes = f"of 1 to {MAX_HEADS} heads and head_dim 64 or 128"
        raise ValueError(_wrong(op, "k", f"[layers, tokens, heads, head_dim], heads not first, {sizes}", k))
    layers, tokens, heads, head_dim = k.shape
    if not 1 <= layers <= MAX_LAYERS or not 1 <= tokens <= 2**30 // heads:
        wanted = f"of 1 to {MAX_LAYERS} layers, at least one token and at most 2**30 tokens times heads"
        raise ValueError(_wrong(op, "k", wanted, k))
    if v.shape != k.shape:
        raise ValueError(_wrong(op, "v", f"{list(k.shape)}", v))
    if k.dtype not in DTYPES:
        raise TypeError(_wrong(op, "k", " or ".join(map(str, DTYPES)), k))
    if v.dtype is not k.dtype:
        raise TypeError(_wrong(op, "k and v", "of one dtype", k.dtype, v.dtype))
    if any(x.stride(3) != 1 or (heads > 1 and x.stride(2) != head_dim) for x in (k, v)):
        raise ValueError(_wrong(op, "k and v", "dense in their last two dimensions", k, v))
    if bits not in (8, 4):
        raise ValueError(_wrong(op, "bits", "8 or 4", bits))
    if not (16 <= group_tokens <= 128 and group_tokens & (group_tokens - 1) == 0):
        raise ValueError(_wrong(op, "group_tokens", "16, 32, 64 or 128", group_tokens))
    numbers = tokens * heads if bits == 8 else 2 * triton.cdiv(tokens, group_tokens) * heads * head_dim
    size = tokens * heads * head_dim * bits // 8 + numbers * k.element_size()
    size = triton.cdiv(size, ALIGNMENT) * ALIGNMENT
    if packed.dtype is not torch.uint8:
        raise TypeError(_wrong(op, "packed", "torch.uint8", packed))
    places = layers
    if chosen is not None:
        if chosen.dtype is not torch.int32:
            raise TypeError(_wrong(op, "chosen", "torch.int32", chosen))
        if chosen.shape != (layers, 2) or not chosen.is_contiguous():
            raise ValueError(_wrong(op, "chosen", f"[{layers}, 2], contiguous", chosen))
        places = max(1, packed.shape[0]) if packed.dim() == 3 else "places"
    if packed.shape != (places, 2, size) or packed.stride(2) != 1:
        raise ValueError(_wrong(op, "packed", f"[{places}, 2, {size}], dense in its last dimension", packed))
    if packed.stride(0) % ALIGNMENT or packed.stride(1) % ALIGNMENT:
        raise ValueError(_wrong(op, "packed", f"with K and V of every layer on multiples of {ALIGNMENT} bytes", packed))


def quantize_chunk(
    k: torch.Tensor, v: torch.Tensor, packed: torch.Tensor, *, bits: int, group_tokens: int
) -> None:  # fmt: skip
    """Pack K and V of all layers of a chunk in 8 or 4 bits a number, in one launch.

    T is the dtype of k; arithmetic in fp32, each operation rounded by itself.
    - 8 bits, of a token and head: s = max |x| / 127 over head_dim, rounded up to T; code = rint(x / s), -127 to 127.
    - 4 bits, of a channel (a head and a place in head_dim) and a group of `group_tokens` consecutive tokens, of which
      the last may be shorter: s = (hi - lo) / 15, rounded up to T; code = rint((x - lo) / s), 0 to 15.
    Rounded up is to the smallest number of T that is not below; to the one before it where the largest code would be
    restored as more than T holds. rint takes halves to even. Where s is 0 codes are 0. Where a number is not finite, or
    hi - lo is not in fp32, s is infinite, and codes and lo are 0: what is restored is NaN.

    Args:
        k, v: [layers, tokens, heads, head_dim], one dtype, bf16, fp16 or fp32; dense in heads and head_dim, layers and
            tokens of any stride. 1 to 65535 layers, at least a token, 1 to 128 heads, head_dim 64 or 128; at most 2**30
            tokens times heads. A layer is k[None].
        packed: uint8 [layers, 2, bytes], K first, dense in its last dimension, with K and V of every layer on multiples
            of 16 bytes. Written whole: of 8 bits, int8 codes [tokens, heads, head_dim], scales T [tokens, heads], and
            zeros up to 16 bytes; of 4, bytes [tokens, heads, head_dim / 2] of which byte j has channel 2 j in its low
            four bits and 2 j + 1 in its high ones, scales T [groups, heads, head_dim], minima T likewise. `bytes` is
            exactly that.
        bits: 8 or 4. group_tokens: 16, 32, 64 or 128; not used in 8 bits.

    Deterministic; allocates nothing and does not synchronise. All tensors are on one GPU, which is the current one. Any
    alignment of k and v will do; rows on multiples of 16 bytes are read in wider pieces. Raises ValueError or
    TypeError, before the launch, on shapes, dtypes and strides other than these. Undefined, since not looked at:
    outputs that overlap each other, themselves or an input, and a start of `packed` that is no multiple of 16 bytes.
    """
    _check("quantize_chunk", k, v, packed, bits, group_tokens)
    _launch(k, v, packed, quantize_8_kernel, quantize_4_kernel, bits, group_tokens, LARGEST=torch.finfo(k.dtype).max)


def dequantize_chunk(
    packed: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, bits: int, group_tokens: int,
    chosen: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Write K and V as `quantize_chunk` has packed them: T(code * s) of 8 bits, T(code * s + lo) of 4, where product
    and sum are rounded each. Arguments, limits and errors are those of `quantize_chunk`; k and v are written.

    With `chosen`, int32 [chunks, 2], contiguous, the first dimension of k and v is chunks, each restored from a place:
    row i is the place in `packed`, [places, 2, bytes] of any number of them, and how many tokens n that chunk has, 0 to
    those of k. k[i, :n] and v[i, :n] are what `quantize_chunk` of n tokens has packed into the first bytes of
    packed[place]; the rows behind them are left as they are. Places may be named in any order and more than once. Of a
    place or a number of tokens that there is not, nothing is written. The table is read on the device, so a captured
    graph restores other chunks when it is rewritten in place.
    """
    _check("dequantize_chunk", k, v, packed, bits, group_tokens, chosen)
    table = dict(chosen_ptr=chosen, places=None if chosen is None else len(packed))
    _launch(k, v, packed, dequantize_8_kernel, dequantize_4_kernel, bits, group_tokens, **table)


def _launch(
    k: torch.Tensor, v: torch.Tensor, packed: torch.Tensor, kernel_8, kernel_4, bits: int, group_tokens: int,
    **arguments: object,
) -> None:  # fmt: skip
    layers, tokens, heads, head_dim = k.shape
    if bits == 8:
        kernel, num_warps, block_rows = kernel_8, 4, 4096 // head_dim
        arguments["BLOCK_ROWS"] = block_rows
        programs = triton.cdiv(tokens * heads, block_rows)
    else:
        kernel, num_warps = kernel_4, max(1, group_tokens * head_dim // 1024)
        arguments["GROUP_TOKENS"] = group_tokens
        programs = triton.cdiv(tokens, group_tokens) * heads
    # 32 numbers a thread: 16 bytes of each load and store, at few registers.
    kernel[(programs, layers, 2)](
        k, v, packed, tokens, k.stride(0), v.stride(0), k.stride(1), v.stride(1), packed.stride(0), packed.stride(1),
        HEADS=heads, HEAD_DIM=head_dim, INTERPRETED=os.environ.get("TRITON_INTERPRET") == "1",
        num_warps=num_warps, enable_fp_fusion=False, **arguments,
    )  # fmt: skip

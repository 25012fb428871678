"""torch.ops.worldkv.quantize_chunk and dequantize_chunk: K and V of a chunk in 8 or 4 bits, of one layer or of all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from ..checks import (
    DTYPES,
    HEAD_DIMS,
    MAX_HEADS,
    as_integer,
    bad_type,
    bad_value,
    check_apart,
    check_backend,
    check_bool,
    check_heads,
    check_layout,
    check_tensor,
    readable,
)
from ..reference import quantize_chunk as reference
from .backends import NAMESPACE, Backend, OpBackends, exact, on_current_device, register, triton_unavailable

_OP, _BACK = "quantize_chunk", "dequantize_chunk"
BITS = (8, 4)
GROUP_TOKENS = 64  # that share a channel's scale and minimum in 4 bits; a power of two
_MAX_LAYERS = 65535  # of the dimension of a CUDA grid that counts them, or the chunks of a table
_ALIGNMENT = 16  # bytes: of what is packed of K or V, and of where it begins


def packed_bytes(tokens: int, heads: int, head_dim: int, bits: int, dtype: torch.dtype) -> int:
    """Bytes of K, or of V, of one layer in `bits` bits, which `quantize_chunk` lists; a multiple of 16.

    Raises ValueError or TypeError on sizes, bits or a dtype that the op does not take.
    """
    tokens, heads, head_dim = _checked_sizes("packed_bytes", tokens, heads, head_dim)
    bits = _checked_bits("packed_bytes", bits)
    _check_dtype("packed_bytes", dtype)
    return _bytes(tokens, heads, head_dim, bits, dtype)


def _bytes(tokens: int, heads: int, head_dim: int, bits: int, dtype: torch.dtype) -> int:
    numbers = tokens * heads if bits == 8 else 2 * -(-tokens // GROUP_TOKENS) * heads * head_dim
    size = tokens * heads * head_dim * bits // 8 + numbers * dtype.itemsize
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def quantize_chunk(
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    bits: Literal[8, 4],
    out: torch.Tensor | None = None,
    check_finite: bool = True,
    backend: str | None = None,
) -> torch.Tensor:
    """Pack K and V of a chunk in 8 or 4 bits a number; `dequantize_chunk` restores them.

    Of one layer, or of all layers of a model, in one launch. Arithmetic in fp32, each operation rounded by itself, so
    that every backend gives the same bits. T is the dtype of k.

    - 8 bits, a scale a token and head: with a = max |x| over head_dim, s is a / 127 in T, rounded up, and a code is
      rint(x / s) from -127 to 127, restored as T(code * s). Packed: int8 codes [tokens, heads, head_dim], T scales
      [tokens, heads], zeros up to 16 bytes.
    - 4 bits, a scale and a minimum a channel, which is a head and a place in head_dim, and group of 64 consecutive
      tokens, the last of which may be shorter: with lo and hi the least and largest of a group, s is (hi - lo) / 15 in
      T, rounded up, and a code is rint((x - lo) / s) from 0 to 15, restored as T(code * s + lo). Packed: bytes
      [tokens, heads, head_dim / 2], whose byte j has channel 2 j in its low four bits and 2 j + 1 in its high ones,
      T scales [groups, heads, head_dim], T minima [groups, heads, head_dim]; a multiple of 16 bytes.

    Rounded up: to the smallest number of T that is not below; to the one before it where the largest code would be
    restored as more than T holds. rint takes halves to even. Codes are 0 where s is.

    Groups of a channel after KIVI, arXiv 2402.02750, which has them for keys. Here they are for values too, since
    neighbouring tokens show neighbouring places.

    Args:
        k, v: [tokens, heads, head_dim] or [layers, tokens, heads, head_dim], bf16, fp16 or fp32, dense in heads and
            head_dim, tokens and layers (up to 65535) of any stride, such as `pool.k[:, rows]`; at least one token, 1 to
            128 heads, head_dim 64 or 128.
        bits: 8 or 4.
        out: where to write, uint8 [2, packed_bytes(...)], of which [0] is K, with layers where k has them. Dense in its
            last dimension; the others have any stride that is a multiple of 16, and it starts on one. Must not overlap
            k or v. Allocated when None.
        check_finite: refuse what is not finite where looking does not synchronise: on a CPU, and with WORLDKV_DEBUG=1
            everywhere.
        backend: "reference", "triton", or None for the automatic choice. There is no CUDA kernel.

    Not finite input, or in 4 bits a group of a channel whose hi - lo overflows fp32: a ValueError where that is looked
    for. Else the token and head, or the group's channel, gets an infinite s, codes 0 and lo 0, and is restored as NaN.

    Limits: a dimension before the tokens is layers, not a batch; V has the heads and head_dim of K; no gradients.

    Returns the packed bytes, all of which are written. A restored number is off by at most s / 2 and its own rounding;
    fp32 smaller than 1e-38 by more. What was restored is not always packed to the same bytes: s may move by a step.
    The same input gives the same bits. Does not synchronise on a GPU, and makes no copy of the chunk; the reference up
    to five of K or V of a layer in fp32.
    Raises ValueError or TypeError on a wrong shape, dtype, device or stride, on an input that wants a gradient, on
    other bits, on an output that overlaps an input or itself, on input that is not finite as above, and on a backend
    that is unknown or unavailable. torch.ops.worldkv.quantize_chunk raises the same.
    """
    if not isinstance(k, torch.Tensor):
        raise bad_type(_OP, "k", "a tensor [tokens, heads, head_dim]", k)
    layers, tokens, heads, head_dim = _sizes(_OP, "k", k)
    check_layout(_OP, "v", v, (*layers, tokens, heads, head_dim), like=k)
    bits = _checked_bits(_OP, bits)
    _check_dtype(_OP, k.dtype, "k")
    check_bool(_OP, "check_finite", check_finite)
    check_backend(_OP, backend)
    shape = (*layers, 2, _bytes(tokens, heads, head_dim, bits, k.dtype))
    if out is None:
        out = torch.empty(shape, dtype=torch.uint8, device=k.device)
    else:
        check_layout(_OP, "out", out, shape, like=k)
    NAMESPACE.quantize_chunk(k, v, out, bits, check_finite, backend or "auto")
    return out


def dequantize_chunk(
    packed: torch.Tensor,
    *,
    bits: Literal[8, 4],
    tokens: int | None = None,
    heads: int | None = None,
    head_dim: int | None = None,
    dtype: torch.dtype | None = None,
    out_k: torch.Tensor | None = None,
    out_v: torch.Tensor | None = None,
    chosen: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Restore K and V of a chunk, or of those that a table on the device chooses, by the formulas of `quantize_chunk`.

    Args:
        packed: uint8 [2, packed_bytes(...)] or [layers, 2, packed_bytes(...)], dense in its last dimension; the others
            have any stride that is a multiple of 16, and it starts on one.
        bits: 8 or 4, as it was packed.
        tokens, heads, head_dim, dtype: of the chunk that was packed. Needed where neither out_k nor out_v is given;
            where one is, they are its own.
        out_k, out_v: where to write, [tokens, heads, head_dim] with layers where `packed` has them; dense in heads and
            head_dim, tokens and layers of any stride, one nested in the other. They must not overlap each other or
            `packed`. Allocated when None.
        chosen: int32 [chunks, 2], contiguous, on the device of `packed`: of each of 1 to 65535 chunks its place and its
            tokens n, as below.
        backend: "reference", "triton", or None for the automatic choice. There is no CUDA kernel.

    With `chosen`, `packed` is [places, 2, packed_bytes(tokens, ...)] of at least one place, such as `bank[:, layer]` of
    a bank of chunks; out_k and out_v have to be given, [chunks, tokens, heads, head_dim]. out_k[i, :n] and out_v[i, :n]
    become what `quantize_chunk` of n tokens has packed into the first packed_bytes(n, ...) of packed[place]; the rows
    behind them, and all of a chunk with n = 0, stay as they are. Places are in any order, and may be named more than
    once. Of a place that `packed` does not have, or an n that is not from 0 to `tokens`, Triton writes nothing, and the
    reference raises ValueError before it writes anything. Triton reads the table on the device: a captured graph
    restores other chunks when it is rewritten in place. The reference reads it on the host, which synchronises a GPU.

    Bytes that `quantize_chunk` has not written give numbers without a meaning, and no error.

    Returns (k, v). In one launch for all layers or chunks; the same bytes give the same bits, on every backend. Does
    not synchronise, but as above; allocates nothing beside the outputs, but the reference up to five of K or V of a
    layer in fp32.
    Raises ValueError or TypeError on a wrong shape, dtype, device or stride, on other bits, on sizes that are missing
    or contradict each other, on outputs that overlap, also with `chosen`, and on a backend that is unknown or
    unavailable.
    torch.ops.worldkv.dequantize_chunk raises the same.
    """
    if not isinstance(packed, torch.Tensor):
        raise bad_type(_BACK, "packed", "a tensor [2, bytes] or [layers, 2, bytes]", packed)
    if packed.dim() not in (2, 3):
        raise bad_value(_BACK, "packed", "[2, bytes] or [layers, 2, bytes]", packed)
    bits = _checked_bits(_BACK, bits)
    layers = packed.shape[:-2]
    of_out: tuple[int | str, ...] = layers
    if chosen is not None:
        for name, out in (("out_k", out_k), ("out_v", out_v)):
            if out is None:
                raise bad_type(_BACK, name, "given, with chosen", out)
        check_layout(_BACK, "chosen", chosen, ("chunks", 2), like=packed)
        of_out = ("chunks",)
    given = dict(tokens=tokens, heads=heads, head_dim=head_dim)
    for name, out in (("out_k", out_k), ("out_v", out_v)):
        if out is not None:
            check_layout(_BACK, name, out, (*of_out, "tokens", "heads", "head_dim"), like=packed)
            if out is out_v and out_k is not None and (out.shape, out.dtype) != (out_k.shape, out_k.dtype):
                raise bad_value(_BACK, name, f"{list(out_k.shape)} of {out_k.dtype}, as out_k", out)
            sizes = dict(zip(given, out.shape[-3:], strict=True), dtype=out.dtype)
            for size, value in (*given.items(), ("dtype", dtype)):
                if value is not None and value != sizes[size]:
                    raise bad_value(_BACK, size, f"{sizes[size]}, as in {name}, or None", value)
            *given_sizes, dtype = sizes.values()
            given = dict(zip(given, given_sizes, strict=True))
    for name, value in (*given.items(), ("dtype", dtype)):
        if value is None:
            raise bad_type(_BACK, name, "given, without out_k and out_v", value)
    shape = (*layers, *_checked_sizes(_BACK, **given))
    _check_dtype(_BACK, dtype)
    check_backend(_BACK, backend)
    wanted = (*layers, 2, _bytes(*shape[-3:], bits, dtype))
    if packed.shape != wanted:  # before so much is allocated
        raise bad_value(_BACK, "packed", str(list(wanted)), packed)
    if out_k is None:
        out_k = torch.empty(shape, dtype=dtype, device=packed.device)
    if out_v is None:
        out_v = torch.empty(shape, dtype=dtype, device=packed.device)
    NAMESPACE.dequantize_chunk(packed, out_k, out_v, chosen, bits, backend or "auto")
    return out_k, out_v


def _sizes(op: str, argument: str, x: torch.Tensor) -> tuple[tuple[int, ...], int, int, int]:
    """Layers, if it has any, tokens, heads and head_dim."""
    if x.dim() not in (3, 4):
        raise bad_value(op, argument, "[tokens, heads, head_dim] or [layers, tokens, heads, head_dim]", x)
    layout = "[tokens, heads, head_dim]" if x.dim() == 3 else "[layers, tokens, heads, head_dim]"
    check_heads(op, argument, x, layout)
    *layers, tokens, heads, head_dim = x.shape
    if tokens < 1 or (layers and not 1 <= layers[0] <= _MAX_LAYERS):
        raise bad_value(op, argument, f"{layout} of 1 to {_MAX_LAYERS} layers and at least one token", x)
    return tuple(layers), tokens, heads, head_dim


def _checked_sizes(op: str, tokens: int, heads: int, head_dim: int) -> tuple[int, int, int]:
    tokens, heads = as_integer(op, "tokens", tokens), as_integer(op, "heads", heads)
    head_dim = as_integer(op, "head_dim", head_dim)
    if tokens < 1:
        raise bad_value(op, "tokens", "at least 1", tokens)
    if not 1 <= heads <= MAX_HEADS:
        raise bad_value(op, "heads", f"from 1 to {MAX_HEADS}", heads)
    if head_dim not in HEAD_DIMS:
        raise bad_value(op, "head_dim", " or ".join(map(str, HEAD_DIMS)), head_dim)
    return tokens, heads, head_dim


def _checked_bits(op: str, bits: object) -> int:
    bits = as_integer(op, "bits", bits)
    if bits not in BITS:
        raise bad_value(op, "bits", " or ".join(map(str, BITS)), bits)
    return bits


def _check_dtype(op: str, dtype: object, argument: str = "dtype") -> None:
    if dtype not in DTYPES:
        raise bad_type(op, argument, " or ".join(map(str, DTYPES)), dtype)


def _check(
    op: str,
    names: tuple[str, str, str],
    k: torch.Tensor,
    v: torch.Tensor,
    packed: torch.Tensor,
    bits: int,
    chosen: torch.Tensor | None = None,
) -> None:
    """What every call needs, also one of torch.ops.worldkv, but for what overlaps."""
    of_k, of_v, of_packed = names
    layers, tokens, heads, head_dim = _sizes(op, of_k, k)
    _checked_bits(op, bits)
    check_tensor(op, of_k, k, k.shape, inner=2)
    check_tensor(op, of_v, v, k.shape, like=k, inner=2)
    if chosen is not None:
        check_tensor(op, "chosen", chosen, (*layers, 2), like=k, dtypes=(torch.int32,), inner=2)
        check_layout(op, of_packed, packed, ("places", 2, "bytes"))
        layers = (max(1, len(packed)),)  # from here on places
    shape = (*layers, 2, _bytes(tokens, heads, head_dim, bits, k.dtype))
    check_tensor(op, of_packed, packed, shape, like=k, dtypes=(torch.uint8,))
    strides = [stride for stride, size in zip(packed.stride()[:-1], shape[:-1], strict=True) if size > 1]
    if packed.data_ptr() % _ALIGNMENT or any(stride % _ALIGNMENT for stride in strides):
        raise bad_value(op, of_packed, f"with K and V of every layer on multiples of {_ALIGNMENT} bytes", packed)


def _check_finite(name: str, x: torch.Tensor, bits: int) -> None:
    """Of a tensor with a dimension of layers."""
    for layer, values in enumerate(x):
        low, high = (y.float() for y in torch.aminmax(values))
        if not (low.isfinite() and high.isfinite()):
            wanted = "finite"
        elif bits == 4 and not (high - low).isfinite() and not _spread(values).isfinite().all():
            wanted = f"of channels with less than {torch.finfo(torch.float32).max:.4g} between {GROUP_TOKENS} tokens"
        else:
            continue
        raise ValueError(f"{_OP}: {name} must be {wanted}, got {low.item():.4g} to {high.item():.4g} in layer {layer}")


def _spread(x: torch.Tensor) -> torch.Tensor:
    """hi - lo of every group and channel."""
    groups = x.split(GROUP_TOKENS)
    return torch.stack([group.amax(dim=0).float() - group.amin(dim=0).float() for group in groups])


def _kind(k: torch.Tensor, v: torch.Tensor, bits: int) -> tuple:
    per_vector = 16 // k.element_size()
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) % per_vector == x.stride(1) % per_vector == 0 for x in (k, v))
    return (k.dtype, k.shape[3], bits, aligned)


def _run(k: torch.Tensor, v: torch.Tensor, packed: torch.Tensor, bits: int, check_finite: bool, backend: str) -> None:
    _check(_OP, ("k", "v", "out"), k, v, packed, bits)
    if k.dim() == 3:
        k, v, packed = (x.unsqueeze(0) for x in (k, v, packed))
    check_apart(_OP, {"out": packed}, {"k": k, "v": v})
    run = BACKENDS.choose(backend, k.device, _kind(k, v, bits))
    if check_finite and readable(k):
        _check_finite("k", k, bits)
        _check_finite("v", v, bits)
    with on_current_device(k.device):
        run(k, v, packed, bits=bits, group_tokens=GROUP_TOKENS)


def _run_back(
    packed: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chosen: torch.Tensor | None, bits: int, backend: str
) -> None:
    if chosen is not None:
        check_layout(_BACK, "out_k", k, ("chunks", "tokens", "heads", "head_dim"))
    _check(_BACK, ("out_k", "out_v", "packed"), k, v, packed, bits, chosen)
    if k.dim() == 3:
        k, v, packed = (x.unsqueeze(0) for x in (k, v, packed))
    inputs = {"packed": packed} if chosen is None else {"packed": packed, "chosen": chosen}
    check_apart(_BACK, {"out_k": k, "out_v": v}, inputs)
    run = DEQUANTIZE.choose(backend, k.device, _kind(k, v, bits))
    with on_current_device(k.device):
        run(packed, k, v, bits=bits, group_tokens=GROUP_TOKENS, chosen=chosen)


def _load_triton() -> Callable[..., None]:
    from ..kernels.quantize_chunk import quantize_chunk as launch

    return launch


def _load_triton_back() -> Callable[..., None]:
    from ..kernels.quantize_chunk import dequantize_chunk as launch

    return launch


def _small_chunk(kind: tuple) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K, V and room for their bytes, on the CPU: two layers of a whole group and a part of one, in all sizes."""
    dtype, head_dim, bits, _ = kind
    generator = torch.Generator().manual_seed(0)
    fp32 = dict(dtype=torch.float32, device="cpu")
    tokens, heads = GROUP_TOKENS + 7, 3
    exponents = torch.randn(2, 2, tokens, heads, 1, generator=generator, **fp32)
    chunk = torch.randn(2, 2, tokens, heads, head_dim, generator=generator, **fp32) * exponents.exp()
    k, v = chunk.to(dtype)
    packed = torch.full((2, 2, _bytes(tokens, heads, head_dim, bits, dtype)), 255, dtype=torch.uint8, device="cpu")
    return k, v, packed


def _small_case(device: torch.device, kind: tuple) -> Callable[[Callable[..., None]], dict[str, torch.Tensor]]:
    k, v, packed = (x.to(device) for x in _small_chunk(kind))

    def call(run: Callable[..., None]) -> dict[str, torch.Tensor]:
        run(k, v, packed, bits=kind[2], group_tokens=GROUP_TOKENS)
        return {"packed": packed}

    return call


def _small_case_back(device: torch.device, kind: tuple) -> Callable[[Callable[..., None]], dict[str, torch.Tensor]]:
    """All layers; and by a table that has the second place, of few tokens, first, and a chunk of none."""
    k, v, packed = _small_chunk(kind)
    options = dict(bits=kind[2], group_tokens=GROUP_TOKENS)
    reference.quantize_chunk(k, v, packed, **options)
    bank, few = packed.clone(), 9
    size = _bytes(few, *k.shape[2:], kind[2], k.dtype)
    reference.quantize_chunk(k[1:, :few], v[1:, :few], bank[1:, :, :size], **options)
    packed, bank = packed.to(device), bank.to(device)
    chosen = torch.tensor([(1, few), (0, k.shape[1]), (1, 0)], dtype=torch.int32, device=device)
    outs = [torch.full_like(x, float("nan"), device=device) for x in (k, v)]
    by_table = [x.new_full((3, *x.shape[1:]), float("nan")) for x in outs]

    def call(run: Callable[..., None]) -> dict[str, torch.Tensor]:
        run(packed, *outs, **options)
        run(bank, *by_table, **options, chosen=chosen)
        return dict(zip(("k", "v", "k by a table", "v by a table"), (*outs, *by_table), strict=True))

    return call


_KINDS = tuple((dtype, head_dim, bits, True) for dtype in DTYPES for head_dim in HEAD_DIMS for bits in BITS)

BACKENDS = OpBackends(
    op=_OP,
    backends={
        "triton": Backend(_load_triton, triton_unavailable),
        "reference": Backend(lambda: exact(reference.quantize_chunk)),
    },
    small_case=_small_case,
    tolerance=lambda kind: 0.0,
    kinds=_KINDS,
)

DEQUANTIZE = OpBackends(
    op=_BACK,
    backends={
        "triton": Backend(_load_triton_back, triton_unavailable),
        "reference": Backend(lambda: exact(reference.dequantize_chunk)),
    },
    small_case=_small_case_back,
    tolerance=lambda kind: 0.0,
    kinds=_KINDS,
)

register("quantize_chunk(Tensor k, Tensor v, Tensor(a!) packed, int bits, bool check_finite, str backend) -> ()", _run)
register(
    "dequantize_chunk(Tensor packed, Tensor(a!) k, Tensor(b!) v, Tensor? chosen, int bits, str backend) -> ()",
    _run_back,
)

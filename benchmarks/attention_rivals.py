"""Other attention over the window of `segment_attention`: libraries', imported when asked for, and one's own.

Each function takes q [q_len, heads, head_dim], the pools [rows, kv_heads, head_dim], where rows outside the window may
hold NaN, and index [num_tokens], the window's rows in order. It makes ready what a library wants beforehand and
returns run(i) -> out [q_len, heads, head_dim]. It raises where the library is absent or cannot serve.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

import torch
from timing import Run

Rival = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Run]

PAGE_ROWS = 128  # a tile, and what slots of the pool are rounded up to
WORKSPACE_BYTES = 128 << 20  # what FlashInfer's documentation recommends


def need_gpu(q: torch.Tensor, name: str) -> None:
    if not q.is_cuda:
        raise RuntimeError(f"{name} is timed on a GPU only")


def flex_inputs(
    q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, index: torch.Tensor, *, q_tile: int = 128
) -> tuple[list[torch.Tensor], torch.nn.attention.flex_attention.BlockMask]:
    """q and the whole pools as [1, heads of each, length, head_dim], zeros for NaN, and a mask that admits the window's
    rows, whose blocks are `q_tile` queries by 128 rows.

    Weights of zero do not cancel a NaN in V, and a slot's unused rows hold zeros in the library, too.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    admitted = torch.zeros(len(k_pool), dtype=torch.bool, device=q.device)
    admitted[index] = True
    mask = create_block_mask(
        lambda batch, head, query, row: admitted[row], None, None, len(q), len(k_pool), device=q.device,
        BLOCK_SIZE=(q_tile, PAGE_ROWS),
    )  # fmt: skip
    pools = (pool.nan_to_num(0.0) for pool in (k_pool, v_pool))
    return [x.transpose(0, 1).unsqueeze(0) for x in (q, *pools)], mask


def flex(q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, index: torch.Tensor) -> Run:
    """FlexAttention over the pool where it lies, with a block mask made beforehand."""
    from torch.nn.attention.flex_attention import flex_attention

    need_gpu(q, "FlexAttention")
    inputs, mask = flex_inputs(q, k_pool, v_pool, index)
    torch.compiler.reset()  # every case is another shape, and torch.compile stops at the eighth
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    grouped = q.shape[1] != k_pool.shape[1]
    return lambda i: compiled(*inputs, block_mask=mask, enable_gqa=grouped).squeeze(0).transpose(0, 1)


def flash_attn4_lists(q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, index: torch.Tensor) -> Run:
    """flash-attn-4 over the pool where it lies, with lists of whole and of cut blocks made beforehand.

    Through FlexAttention, which hands it the lists and compiles the mask of the cut blocks into its kernel.
    """
    import flash_attn.cute  # noqa: F401  FlexAttention would name a lowering, not the package, as missing
    from torch.nn.attention.flex_attention import flex_attention

    need_gpu(q, "flash-attn 4")
    # From sm_100 on the kernel takes two tiles of queries at a time.
    q_tile = 256 if torch.cuda.get_device_capability(q.device)[0] >= 10 else 128
    inputs, mask = flex_inputs(q, k_pool, v_pool, index, q_tile=q_tile)
    # No reset of the compiler here: `flex`, before this one, has done so, and its own kernel is yet to be timed.
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    options = dict(block_mask=mask, enable_gqa=q.shape[1] != k_pool.shape[1], kernel_options={"BACKEND": "FLASH"})
    return lambda i: compiled(*inputs, **options).squeeze(0).transpose(0, 1)


def whole_page(index: torch.Tensor) -> int:
    """Rows of the largest page, a power of two up to 128, of which the window takes none in part."""
    size = PAGE_ROWS
    while size > 1:
        if len(index) % size == 0:
            pages = index.view(-1, size)
            first = pages[:, :1]
            within = torch.arange(size, dtype=torch.int64, device=index.device)
            if bool((first % size == 0).all()) and torch.equal(pages, first + within):
                break
        size //= 2
    return size


def flash_attn4_paged(q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, index: torch.Tensor) -> Run:
    """flash-attn-4 over the pool where it lies, with a page table.

    A page is read in full but at the sequence's end, so pages are as large as the segments' ends allow. The fast path
    wants 128 rows, a tile; smaller pages are looked up row by row.
    """
    from flash_attn.cute import flash_attn_varlen_func

    need_gpu(q, "flash-attn 4")
    size = whole_page(index)
    table = (index[::size] // size).int().unsqueeze(0)  # [1, pages]
    pools = [pool.unflatten(0, (-1, size)) for pool in (k_pool, v_pool)]  # [pages, size, heads, head_dim]
    used = torch.tensor([len(index)], dtype=torch.int32, device=q.device)

    def run(i: int) -> torch.Tensor:
        result = flash_attn_varlen_func(q.unsqueeze(0), *pools, seqused_k=used, page_table=table, causal=False)
        return (result[0] if isinstance(result, tuple) else result).squeeze(0)  # with lse or without, by its version

    return run


def flash_attn2(q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, index: torch.Tensor) -> Run:
    """flash-attn 2, dense, on the gathered window as [1, length, heads, head_dim]."""
    from flash_attn import flash_attn_func

    need_gpu(q, "flash-attn 2")
    inputs = [x.unsqueeze(0) for x in (q, k_pool[index], v_pool[index])]
    return lambda i: flash_attn_func(*inputs, causal=False).squeeze(0)


def flashinfer_paged(q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, index: torch.Tensor) -> Run:
    """FlashInfer's paged prefill over the pool where it lies. Segments end at any row, so a page is one row."""
    import flashinfer

    need_gpu(q, "FlashInfer")
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")

    def numbers(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=q.device)

    q_len, heads, head_dim = q.shape
    wrapper.plan(
        numbers(0, q_len), numbers(0, len(index)), index.int(), numbers(1), heads, k_pool.shape[1], head_dim, 1,
        causal=False, q_data_type=q.dtype,
    )  # fmt: skip
    pools = (k_pool.unsqueeze(1), v_pool.unsqueeze(1))  # [rows, 1, heads, head_dim]
    return lambda i: wrapper.run(q, pools)


def sage(q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, index: torch.Tensor) -> Run:
    """SageAttention, Q and K in 8 bits, on the gathered window as [1, heads, length, head_dim]."""
    from sageattention import sageattn

    need_gpu(q, "SageAttention")
    inputs = [x.transpose(0, 1).contiguous().unsqueeze(0) for x in (q, k_pool[index], v_pool[index])]
    return lambda i: sageattn(*inputs, is_causal=False).squeeze(0).transpose(0, 1)


# Each with the relative error it is allowed, where that is not the dtype's.
RIVALS = {
    "flex attention pool": (flex, None),
    "flash-attn 2": (flash_attn2, None),
    "flash-attn 4 lists": (flash_attn4_lists, None),
    "flash-attn 4 pages": (flash_attn4_paged, None),
    "flashinfer page 1": (flashinfer_paged, None),
    "sage attention 8 bits": (sage, 5e-2),
}


def own_rival(text: str) -> Rival:
    """The function that --rival module:function names; modules are looked for in the current folder, too.

    Raises ValueError where there is none, with what its import raised.
    """
    module, _, function = text.partition(":")
    if not (module and function):
        raise ValueError(f"--rival must be module:function, got {text!r}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function, None)
    except (Exception, SystemExit) as error:  # whatever a module does when it is imported
        raise ValueError(f"--rival {text}: {type(error).__name__}: {error}".splitlines()[0]) from error
    if not callable(found):
        raise ValueError(f"--rival must be module:function, got {text!r}: {module} has no function {function}")
    return found

"""Other libraries' attention over the window of `segment_attention`: imported when asked for, skipped when absent.

Each function takes q [q_len, heads, head_dim], the pools [rows, heads, head_dim], where rows outside the window may
hold NaN, and index [num_tokens], the window's rows in order. It makes ready what a library wants beforehand and
returns run(i) -> out [q_len, heads, head_dim]. It raises where the library is absent or cannot serve.
"""

from __future__ import annotations

import torch
from common import Run

WORKSPACE_BYTES = 128 << 20  # what FlashInfer's documentation recommends


def need_gpu(q: torch.Tensor, name: str) -> None:
    if not q.is_cuda:
        raise RuntimeError(f"{name} is timed on a GPU only")


def flex_inputs(
    q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, index: torch.Tensor
) -> tuple[list[torch.Tensor], torch.nn.attention.flex_attention.BlockMask]:
    """q and the whole pools as [1, heads, length, head_dim], zeros for NaN, and a mask that admits the window's rows.

    Weights of zero do not cancel a NaN in V, and a slot's unused rows hold zeros in the library, too.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    admitted = torch.zeros(len(k_pool), dtype=torch.bool, device=q.device)
    admitted[index] = True
    mask = create_block_mask(
        lambda batch, head, query, row: admitted[row], None, None, len(q), len(k_pool), device=q.device
    )
    pools = (pool.nan_to_num(0.0) for pool in (k_pool, v_pool))
    return [x.transpose(0, 1).unsqueeze(0) for x in (q, *pools)], mask


def flex(q: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, index: torch.Tensor) -> Run:
    """FlexAttention over the pool where it lies, with a block mask made beforehand."""
    from torch.nn.attention.flex_attention import flex_attention

    need_gpu(q, "FlexAttention")
    inputs, mask = flex_inputs(q, k_pool, v_pool, index)
    torch.compiler.reset()  # every case is another shape, and torch.compile stops at the eighth
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    return lambda i: compiled(*inputs, block_mask=mask).squeeze(0).transpose(0, 1)


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
        numbers(0, q_len), numbers(0, len(index)), index.int(), numbers(1), heads, heads, head_dim, 1,
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
    "flex attention, pool": (flex, None),
    "flash-attn 2": (flash_attn2, None),
    "flashinfer, page 1": (flashinfer_paged, None),
    "sage attention, 8 bits": (sage, 5e-2),
}

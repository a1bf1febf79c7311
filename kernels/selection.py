"""The largest logits of each token: a walk over blocks of logits, each of which is reduced to ``k`` a token at once.

    logits [block_t, block_v]  ←  ``logits_kernel``, in the workspace
    top    [block_t, k]        ←  ``keep_top_k_kernel``: the k largest of those kept so far and of the block

The k largest are those above a threshold, the k-th largest, and as many of those at it as there is room for, smaller
rows first. The threshold is found bit by bit: fp32 numbers order as the unsigned integers that `_ordered` makes of
them. ``T`` tokens, ``V`` rows of the block, ``H`` hidden size.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vocab_parallel_fused.kernels.configs import tile_config
from vocab_parallel_fused.kernels.plan import ceil_div, even_block, slices
from vocab_parallel_fused.kernels.tiles import current_arch, logits_tile, operand_kwargs, tile_position
from vocab_parallel_fused.transform import Operands

_LARGEST_BLOCK = 4096  # logits of one token that a program holds in registers
_KEEP_LAUNCH: dict[str, Any] = {"num_warps": 4}


@triton.jit
def logits_kernel(
    hidden,  # [T, H] descriptor or pointer
    weight,  # [V, H] descriptor or pointer
    bias_ptr,  # [V] or None
    logits_ptr,  # [T, V] fp32 out
    T,
    V,
    H,
    stride_hidden_t,
    stride_hidden_h,
    stride_weight_v,
    stride_weight_h,
    stride_logits_t,
    inner,
    outer,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP_T: tl.constexpr,
    TRANSFORM: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid_t, pid_v = tile_position(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.cdiv(V, BLOCK_V), GROUP_T)  # pyright: ignore[reportGeneralTypeIssues]
    off_t = pid_t * BLOCK_T
    off_v = pid_v * BLOCK_V
    z = logits_tile(
        hidden,
        weight,
        bias_ptr,
        off_t,
        off_v,
        T,
        V,
        H,
        stride_hidden_t,
        stride_hidden_h,
        stride_weight_v,
        stride_weight_h,
        inner,
        outer,
        BLOCK_T,
        BLOCK_V,
        BLOCK_H,
        TRANSFORM,
        USE_DESCRIPTORS,
        PRECISION,
    )
    offs_t = off_t + tl.arange(0, BLOCK_T)
    offs_v = off_v + tl.arange(0, BLOCK_V)
    tl.store(
        logits_ptr + offs_t.to(tl.int64)[:, None] * stride_logits_t + offs_v[None, :],
        z,
        mask=(offs_t < T)[:, None] & (offs_v < V)[None, :],
    )


@triton.jit
def keep_top_k_kernel(
    logits_ptr,  # [T, V] fp32
    top_logit_ptr,  # [T, K] in, out
    top_row_ptr,  # [T, K] int64 in, out; −1: no logit yet
    V,
    K,
    first_row,  # number of the block's first row in the shard
    stride_logits_t,
    BLOCK_V: tl.constexpr,  # at least V
    BLOCK_K: tl.constexpr,  # at least K
):
    pid_t = tl.program_id(0)
    offs_v = tl.arange(0, BLOCK_V)
    offs_k = tl.arange(0, BLOCK_K)
    mask_v = offs_v < V
    mask_k = offs_k < K
    logit = tl.load(logits_ptr + pid_t.to(tl.int64) * stride_logits_t + offs_v, mask=mask_v, other=0.0)
    top = pid_t.to(tl.int64) * K
    top_logit = tl.load(top_logit_ptr + top + offs_k, mask=mask_k, other=0.0)
    top_row = tl.load(top_row_ptr + top + offs_k, mask=mask_k, other=-1)
    # 0 is below every number, −inf among them.
    order = tl.where(mask_v, _ordered(logit), 0)
    top_order = tl.where(top_row >= 0, _ordered(top_logit), 0)

    # The largest threshold that K numbers reach; 0 where there are fewer numbers.
    threshold = tl.zeros((1,), dtype=tl.uint32)
    for i in tl.static_range(32):
        higher = threshold | tl.full((1,), 1 << (31 - i), dtype=tl.uint32)
        reached = tl.sum((order >= higher).to(tl.int32)) + tl.sum((top_order >= higher).to(tl.int32))
        threshold = tl.where(reached >= K, higher, threshold)

    # Those kept so far come from smaller rows, and either list is in the order of rows.
    above, at = order > threshold, (order == threshold) & mask_v & (threshold > 0)
    top_above, top_at = top_order > threshold, (top_order == threshold) & (threshold > 0)
    room = K - tl.sum(above.to(tl.int32)) - tl.sum(top_above.to(tl.int32))
    top_keep = top_above | (top_at & (tl.cumsum(top_at.to(tl.int32)) <= room))
    room -= tl.sum((top_keep & top_at).to(tl.int32))
    keep = above | (at & (tl.cumsum(at.to(tl.int32)) <= room))
    top_place = tl.cumsum(top_keep.to(tl.int32)) - 1
    place = tl.sum(top_keep.to(tl.int32)) + tl.cumsum(keep.to(tl.int32)) - 1
    # Every thread has read its numbers before any is overwritten.
    tl.debug_barrier()
    tl.store(top_logit_ptr + top + top_place, top_logit, mask=top_keep)
    tl.store(top_row_ptr + top + top_place, top_row, mask=top_keep)
    tl.store(top_logit_ptr + top + place, logit, mask=keep)
    tl.store(top_row_ptr + top + place, (first_row + offs_v).to(tl.int64), mask=keep)


@triton.jit
def _ordered(x):
    """An unsigned integer above 0 for each fp32 number, NaN included, in the order of the numbers."""
    bits = (x + 0.0).to(tl.uint32, bitcast=True)  # −0 becomes 0
    return bits ^ tl.where(bits >= 0x80000000, 0xFFFFFFFF, 0x80000000).to(tl.uint32)


def local_top_k(head: Operands, k: int, workspace_bytes: int) -> tuple[Tensor, Tensor]:
    """As ``eager.local_top_k``."""
    hidden, weight, *_ = head
    T, V = hidden.shape[0], weight.shape[0]
    top_logit = hidden.new_full((T, k), -torch.inf, dtype=torch.float32)
    top_row = hidden.new_full((T, k), -1, dtype=torch.int64)
    if T == 0 or V == 0:
        return top_logit, top_row
    arch = current_arch()
    tile = tile_config(arch, hidden.dtype, T)
    block_t = even_block(T, workspace_bytes // (4 * tile.block_v), tile.block_t)
    block_v = even_block(V, min(_LARGEST_BLOCK, workspace_bytes // (4 * block_t)), tile.block_v)
    workspace = hidden.new_empty(block_t, block_v, dtype=torch.float32)
    for rows in slices(V, block_v):
        for tokens in slices(T, block_t):
            logits = workspace[: tokens.stop - tokens.start, : rows.stop - rows.start]
            num_tiles = ceil_div(logits.shape[0], tile.block_t) * ceil_div(logits.shape[1], tile.block_v)
            logits_kernel[(num_tiles,)](
                logits_ptr=logits,
                stride_logits_t=logits.stride(0),
                **operand_kwargs(head.block(tokens, rows), arch, tile),
            )
            keep_top_k_kernel[(logits.shape[0],)](
                logits,
                top_logit[tokens],
                top_row[tokens],
                logits.shape[1],
                k,
                rows.start,
                logits.stride(0),
                **{
                    "BLOCK_V": triton.next_power_of_2(block_v),
                    "BLOCK_K": triton.next_power_of_2(k),
                    **_KEEP_LAUNCH,
                },
            )
    return top_logit, top_row

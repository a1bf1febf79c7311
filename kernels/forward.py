"""Local statistics: a GEMM whose epilogue reduces each tile of logits, and a merge of what the tiles leave.

    lse_t = log Σ_j exp(x_t · w_j + b_j),    target_logit_t = x_t · w_y + b_y

``partial_lse_kernel`` computes one tile a program and writes one partial lse per token and tile;
``merge_partials_kernel`` merges them. Rows are walked in chunks whose partials fit a fixed buffer, so memory does not
grow with the vocabulary.
``target_logit_kernel`` computes the targets' logits once more, from their rows alone: to look for them in every tile
costs several times as much.
``T`` tokens, ``V`` rows of the shard, ``H`` hidden size.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vocab_parallel_fused.kernels.configs import tile_config
from vocab_parallel_fused.kernels.tiles import (
    LN2,
    LOG2E,
    at_least,
    current_arch,
    logits_tile,
    operand_kwargs,
    product_precision,
    rows_product,
    tile_position,
)
from vocab_parallel_fused.stats import TokenStats

_PARTIAL_BYTES = 8 * 2**20  # 16384 tiles a launch: its last, unfilled wave of processors costs little
# Small blocks of tokens, so that few tokens still occupy many processors; 64 are one of Hopper's matrix instructions.
_TARGET_LAUNCH: dict[str, Any] = {"BLOCK_T": 64, "num_stages": 4}
_MERGE_LAUNCH: dict[str, Any] = {"BLOCK_T": 64, "BLOCK_P": 16}


@triton.jit
def partial_lse_kernel(
    hidden,  # [T, H] descriptor or pointer
    weight,  # [V, H] descriptor or pointer
    bias_ptr,  # [V]
    partial_lse_ptr,  # [num_tiles, T] out
    T,
    V,
    H,
    stride_hidden_t,
    stride_hidden_h,
    stride_weight_v,
    stride_weight_h,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP_T: tl.constexpr,
    HAS_BIAS: tl.constexpr,
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
        BLOCK_T,
        BLOCK_V,
        BLOCK_H,
        HAS_BIAS,
        USE_DESCRIPTORS,
        PRECISION,
    )
    offs_t = off_t + tl.arange(0, BLOCK_T)
    offs_v = tl.arange(0, BLOCK_V)
    mask_t = offs_t < T
    if off_v + BLOCK_V > V:
        z = tl.where((off_v + offs_v < V)[None, :], z, -float("inf"))

    # exp(z − max) as one fused multiply-add and one exp2. Its reference is the rounded `max · log2(e)` itself, not the
    # maximum, so that this rounding cancels when the reference is added back. A bias may be −inf for a whole tile.
    maximum = tl.max(z, axis=1)
    reference = tl.where(maximum == -float("inf"), 0.0, maximum) * LOG2E
    sum_exp = tl.sum(tl.exp2(z * LOG2E - reference[:, None]), axis=1)
    lse = at_least(reference * LN2 + tl.log(sum_exp), maximum)
    tl.store(partial_lse_ptr + pid_v.to(tl.int64) * T + offs_t, lse, mask=mask_t)


@triton.jit
def merge_partials_kernel(
    partial_lse_ptr,  # [num_partials, T]
    lse_ptr,  # [T] in unless FIRST, out
    num_partials,
    T,
    FIRST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_p = tl.arange(0, BLOCK_P)
    mask_t = offs_t < T
    running_max = tl.full((BLOCK_T,), -float("inf"), dtype=tl.float32)
    if not FIRST:
        running_max = tl.load(lse_ptr + offs_t, mask=mask_t, other=0.0)
    sum_exp = tl.where(running_max == -float("inf"), 0.0, 1.0)
    for first in range(0, num_partials, BLOCK_P):
        partials = first + offs_p
        lse = tl.load(
            partial_lse_ptr + partials.to(tl.int64)[:, None] * T + offs_t[None, :],
            mask=(partials < num_partials)[:, None] & mask_t[None, :],
            other=-float("inf"),
        )
        new_max = tl.maximum(running_max, tl.max(lse, axis=0))
        finite = tl.where(new_max == -float("inf"), 0.0, new_max)
        sum_exp = sum_exp * tl.exp(running_max - finite) + tl.sum(tl.exp(lse - finite[None, :]), axis=0)
        running_max = new_max
    tl.store(lse_ptr + offs_t, at_least(running_max + tl.log(sum_exp), running_max), mask=mask_t)


@triton.jit
def target_logit_kernel(
    hidden_ptr,  # [T, H]
    weight_ptr,  # [V, H]
    bias_ptr,  # [V]
    target_row_ptr,  # [T] int64, −1: not in this shard
    lse_ptr,  # [T] in, out
    target_logit_ptr,  # [T] out, 0 where the target is not in this shard
    owners_ptr,  # [T] out, 1 or 0
    T,
    H,
    stride_hidden_t,
    stride_hidden_h,
    stride_weight_v,
    stride_weight_h,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The diagonal of a tile whose columns are the targets of its tokens, so that every sum over H runs in the order it
    has in `partial_lse_kernel`: what rounding does to lse and to a confident target's logit then cancels in their
    difference."""
    offs = tl.arange(0, BLOCK_T)
    offs_t = tl.program_id(0) * BLOCK_T + offs
    mask_t = offs_t < T
    target_row = tl.load(target_row_ptr + offs_t, mask=mask_t, other=-1)
    owned = target_row >= 0
    rows_v = tl.where(owned, target_row, 0)
    z = rows_product(
        hidden_ptr,
        weight_ptr,
        tl.minimum(offs_t, T - 1),
        rows_v,
        H,
        stride_hidden_t,
        stride_hidden_h,
        stride_weight_v,
        stride_weight_h,
        BLOCK_T,
        BLOCK_T,
        BLOCK_H,
        PRECISION,
    )
    target_logit = tl.sum(tl.where(offs[:, None] == offs[None, :], z, 0.0), axis=1)
    if HAS_BIAS:
        target_logit += tl.load(bias_ptr + rows_v, mask=owned, other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + offs_t, mask=owned, other=0.0)
    tl.store(lse_ptr + offs_t, at_least(lse, target_logit), mask=owned)
    tl.store(target_logit_ptr + offs_t, tl.where(owned, target_logit, 0.0), mask=mask_t)
    tl.store(owners_ptr + offs_t, owned.to(tl.float32), mask=mask_t)


def local_stats(hidden: Tensor, weight: Tensor, bias: Tensor | None, target_row: Tensor) -> TokenStats:
    """As ``eager.local_stats``."""
    T, V = hidden.shape[0], weight.shape[0]
    stats = TokenStats(*hidden.new_empty(3, T, dtype=torch.float32).unbind())
    if T == 0 or V == 0:
        return TokenStats(stats.lse.fill_(-torch.inf), stats.target_logit.zero_(), stats.owners.zero_())
    arch = current_arch()
    tile = tile_config(arch, hidden.dtype)
    num_tiles = -(-V // tile.block_v)
    chunk_tiles = min(num_tiles, max(1, _PARTIAL_BYTES // (4 * T)))
    partial_lse = stats.lse.new_empty(chunk_tiles, T)
    for first_tile in range(0, num_tiles, chunk_tiles):
        chunk = min(chunk_tiles, num_tiles - first_tile)
        rows = slice(first_tile * tile.block_v, (first_tile + chunk) * tile.block_v)
        partial_lse_kernel[(-(-T // tile.block_t) * chunk,)](
            partial_lse_ptr=partial_lse,
            **operand_kwargs(hidden, weight[rows], None if bias is None else bias[rows], arch, tile),
        )
        merge_partials_kernel[(triton.cdiv(T, _MERGE_LAUNCH["BLOCK_T"]),)](
            partial_lse, stats.lse, chunk, T, **{"FIRST": first_tile == 0, **_MERGE_LAUNCH}
        )
    constants: dict[str, Any] = {
        "BLOCK_H": 2 * tile.block_h,
        "HAS_BIAS": bias is not None,
        "PRECISION": product_precision(hidden.dtype),
    }
    target_logit_kernel[(triton.cdiv(T, _TARGET_LAUNCH["BLOCK_T"]),)](
        hidden,
        weight,
        bias,
        target_row,
        *stats,
        T,
        hidden.shape[1],
        hidden.stride(0),
        hidden.stride(1),
        weight.stride(0),
        weight.stride(1),
        **constants,
        **_TARGET_LAUNCH,
    )
    return stats

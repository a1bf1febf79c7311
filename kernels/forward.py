"""Local statistics in one pass over the shard: a GEMM whose epilogue keeps a running maximum and sum.

    lse_t = log Σ_j exp(x_t · w_j + b_j),    target_logit_t = x_t · w_y + b_y

One program computes the logits of BLOCK_T tokens and a strip of row blocks, one tile at a time, and writes one partial
lse per token; ``torch.logsumexp`` over the strips finishes. ``T`` tokens, ``V`` rows of the shard, ``H`` hidden size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vocab_parallel_fused.kernels.configs import strip_tiles, tile_config
from vocab_parallel_fused.kernels.tiles import (
    INTERPRETED,
    current_arch,
    logits_tile,
    num_processors,
    operand_kwargs,
    tile_position,
)
from vocab_parallel_fused.stats import TokenStats

__all__ = ["INTERPRETED", "local_stats"]


@triton.jit
def local_stats_kernel(
    hidden,  # [T, H] descriptor or pointer
    weight,  # [V, H] descriptor or pointer
    bias_ptr,  # [V]
    target_row_ptr,  # [T] int64, −1: not in this shard
    partial_lse_ptr,  # [num_strips, T] out
    target_logit_ptr,  # [T] out, written where the target is in this shard
    T,
    V,
    H,
    strip,  # tiles of a program
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
    num_tiles = tl.cdiv(V, BLOCK_V)
    pid_t, pid_strip = tile_position(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.cdiv(num_tiles, strip), GROUP_T)
    off_t = pid_t * BLOCK_T
    offs_t = off_t + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    target_row = tl.load(target_row_ptr + offs_t, mask=mask_t, other=-1).to(tl.int32)

    running_max = tl.full((BLOCK_T,), -float("inf"), dtype=tl.float32)
    sum_exp = tl.zeros((BLOCK_T,), dtype=tl.float32)
    target_logit = tl.zeros((BLOCK_T,), dtype=tl.float32)
    first_tile = pid_strip * strip
    last_tile = tl.minimum(first_tile + strip, num_tiles)
    for tile in range(first_tile, last_tile):
        off_v = tile * BLOCK_V
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
        is_target = (target_row - off_v)[:, None] == tl.arange(0, BLOCK_V)[None, :]
        target_logit += tl.sum(tl.where(is_target, z, 0.0), axis=1)
        tile_max = tl.maximum(running_max, tl.max(z, axis=1))
        # A bias may be −inf for a whole tile; −inf − −inf would make a NaN of its empty sum.
        reference = tl.where(tile_max == -float("inf"), 0.0, tile_max)
        sum_exp = sum_exp * tl.exp(running_max - reference) + tl.sum(tl.exp(z - reference[:, None]), axis=1)
        running_max = tile_max

    reference = tl.where(running_max == -float("inf"), 0.0, running_max)
    tl.store(partial_lse_ptr + pid_strip.to(tl.int64) * T + offs_t, reference + tl.log(sum_exp), mask=mask_t)
    owned = (target_row >= first_tile * BLOCK_V) & (target_row < last_tile * BLOCK_V)
    tl.store(target_logit_ptr + offs_t, target_logit, mask=mask_t & owned)


def local_stats(hidden: Tensor, weight: Tensor, bias: Tensor | None, target_row: Tensor) -> TokenStats:
    """As ``eager.local_stats``."""
    T, V = hidden.shape[0], weight.shape[0]
    owners = (target_row >= 0).to(torch.float32)
    target_logit = torch.zeros_like(owners)
    if T == 0 or V == 0:
        return TokenStats(torch.full_like(owners, -torch.inf), target_logit, owners)
    arch = current_arch()
    tile = tile_config(arch, hidden.dtype)
    num_t_tiles, num_v_tiles = triton.cdiv(T, tile.block_t), triton.cdiv(V, tile.block_v)
    strip = strip_tiles(num_t_tiles, num_v_tiles, num_processors(hidden.device))
    num_strips = triton.cdiv(num_v_tiles, strip)
    partial_lse = owners.new_empty(num_strips, T)
    local_stats_kernel[(num_t_tiles * num_strips,)](
        target_row_ptr=target_row,
        partial_lse_ptr=partial_lse,
        target_logit_ptr=target_logit,
        strip=strip,
        **operand_kwargs(hidden, weight, bias, arch, tile),
    )
    return TokenStats(partial_lse[0] if num_strips == 1 else torch.logsumexp(partial_lse, dim=0), target_logit, owners)

"""How far two heads over the same rows are apart: kernels that compute a tile of both heads' logits at once.

    u_tj = z_tj − m_t of either head,    s_t = Σ_j exp(u_tj),    Σ_j exp(u_atj) (u_atj − u_btj)
    Σ_j p_tj log(p_tj / m_tj) of either head, m their mean
    dz_tj of the student, from both heads' log-probabilities

``joint_stats_kernel`` and ``js_sums_kernel`` compute one tile a program and write numbers per token and tile, which
torch merges; ``divergence_dlogits_kernel`` writes a block of the student's logit gradients for ``sweep.py``.
``T`` tokens, ``V`` rows of the shard, ``H`` hidden size of either head.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vocab_parallel_fused.divergence import dlogits_bound
from vocab_parallel_fused.kernels.configs import TileConfig, tile_config
from vocab_parallel_fused.kernels.hopper_matmul import matmul_beside
from vocab_parallel_fused.kernels.plan import ceil_div, slices
from vocab_parallel_fused.kernels.sweep import GradBuffers, scale_into_fp16, sweep_grads
from vocab_parallel_fused.kernels.tiles import (
    LN2,
    current_arch,
    logits_tile,
    num_processors,
    operand_kwargs,
    tile_position,
    times_derivative,
)
from vocab_parallel_fused.stats import PartStats, empty_joint_stats, merge_stats
from vocab_parallel_fused.transform import Operands

_PARTIAL_BYTES = 8 * 2**20
_LARGEST_BLOCK_V = 128


@triton.jit
def joint_stats_kernel(
    a_hidden,  # [T, H] descriptor or pointer
    a_weight,  # [V, H] descriptor or pointer
    a_bias_ptr,  # [V] or None
    b_hidden,
    b_weight,
    b_bias_ptr,
    partial_max_ptr,  # [num_tiles, 2, T] out
    partial_sum_exp_ptr,  # [num_tiles, 2, T] out
    partial_cross_ptr,  # [num_tiles, T] out, or None
    T,
    V,
    a_H,
    a_stride_hidden_t,
    a_stride_hidden_h,
    a_stride_weight_v,
    a_stride_weight_h,
    a_inner,
    a_outer,
    b_H,
    b_stride_hidden_t,
    b_stride_hidden_h,
    b_stride_weight_v,
    b_stride_weight_h,
    b_inner,
    b_outer,
    a_TRANSFORM: tl.constexpr,
    a_USE_DESCRIPTORS: tl.constexpr,
    b_TRANSFORM: tl.constexpr,
    b_USE_DESCRIPTORS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid_t, pid_v = tile_position(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.cdiv(V, BLOCK_V), GROUP_T)  # pyright: ignore[reportGeneralTypeIssues]
    off_t = pid_t * BLOCK_T
    off_v = pid_v * BLOCK_V
    z_a = logits_tile(
        a_hidden,
        a_weight,
        a_bias_ptr,
        off_t,
        off_v,
        T,
        V,
        a_H,
        a_stride_hidden_t,
        a_stride_hidden_h,
        a_stride_weight_v,
        a_stride_weight_h,
        a_inner,
        a_outer,
        BLOCK_T,
        BLOCK_V,
        BLOCK_H,
        a_TRANSFORM,
        a_USE_DESCRIPTORS,
        PRECISION,
    )
    z_b = logits_tile(
        b_hidden,
        b_weight,
        b_bias_ptr,
        off_t,
        off_v,
        T,
        V,
        b_H,
        b_stride_hidden_t,
        b_stride_hidden_h,
        b_stride_weight_v,
        b_stride_weight_h,
        b_inner,
        b_outer,
        BLOCK_T,
        BLOCK_V,
        BLOCK_H,
        b_TRANSFORM,
        b_USE_DESCRIPTORS,
        PRECISION,
    )
    offs_t = off_t + tl.arange(0, BLOCK_T)
    offs_v = off_v + tl.arange(0, BLOCK_V)
    mask_t = offs_t < T
    if off_v + BLOCK_V > V:
        z_a = tl.where((offs_v < V)[None, :], z_a, -float("inf"))
        z_b = tl.where((offs_v < V)[None, :], z_b, -float("inf"))
    max_a = tl.max(z_a, axis=1)
    max_b = tl.max(z_b, axis=1)
    # A bias may be −inf for a whole tile.
    u_a = z_a - tl.where(max_a == -float("inf"), 0.0, max_a)[:, None]
    u_b = z_b - tl.where(max_b == -float("inf"), 0.0, max_b)[:, None]
    exp_a = tl.exp(u_a)
    of_a = pid_v.to(tl.int64) * 2 * T + offs_t
    tl.store(partial_max_ptr + of_a, max_a, mask=mask_t)
    tl.store(partial_max_ptr + of_a + T, max_b, mask=mask_t)
    tl.store(partial_sum_exp_ptr + of_a, tl.sum(exp_a, axis=1), mask=mask_t)
    tl.store(partial_sum_exp_ptr + of_a + T, tl.sum(tl.exp(u_b), axis=1), mask=mask_t)
    if partial_cross_ptr is not None:
        # What has no probability under a contributes nothing, whatever it has under b.
        cross = tl.sum(tl.where(exp_a > 0, exp_a * (u_a - u_b), 0.0), axis=1)
        tl.store(partial_cross_ptr + pid_v.to(tl.int64) * T + offs_t, cross, mask=mask_t)


@triton.jit
def js_sums_kernel(
    a_hidden,  # [T, H] descriptor or pointer
    a_weight,  # [V, H] descriptor or pointer
    a_bias_ptr,  # [V] or None
    b_hidden,
    b_weight,
    b_bias_ptr,
    max_ptr,  # [2, T]
    log_sum_exp_ptr,  # [2, T]
    partial_sums_ptr,  # [num_tiles, 2, T] out
    T,
    V,
    a_H,
    a_stride_hidden_t,
    a_stride_hidden_h,
    a_stride_weight_v,
    a_stride_weight_h,
    a_inner,
    a_outer,
    b_H,
    b_stride_hidden_t,
    b_stride_hidden_h,
    b_stride_weight_v,
    b_stride_weight_h,
    b_inner,
    b_outer,
    a_TRANSFORM: tl.constexpr,
    a_USE_DESCRIPTORS: tl.constexpr,
    b_TRANSFORM: tl.constexpr,
    b_USE_DESCRIPTORS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid_t, pid_v = tile_position(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.cdiv(V, BLOCK_V), GROUP_T)  # pyright: ignore[reportGeneralTypeIssues]
    off_t = pid_t * BLOCK_T
    off_v = pid_v * BLOCK_V
    z_a = logits_tile(
        a_hidden,
        a_weight,
        a_bias_ptr,
        off_t,
        off_v,
        T,
        V,
        a_H,
        a_stride_hidden_t,
        a_stride_hidden_h,
        a_stride_weight_v,
        a_stride_weight_h,
        a_inner,
        a_outer,
        BLOCK_T,
        BLOCK_V,
        BLOCK_H,
        a_TRANSFORM,
        a_USE_DESCRIPTORS,
        PRECISION,
    )
    z_b = logits_tile(
        b_hidden,
        b_weight,
        b_bias_ptr,
        off_t,
        off_v,
        T,
        V,
        b_H,
        b_stride_hidden_t,
        b_stride_hidden_h,
        b_stride_weight_v,
        b_stride_weight_h,
        b_inner,
        b_outer,
        BLOCK_T,
        BLOCK_V,
        BLOCK_H,
        b_TRANSFORM,
        b_USE_DESCRIPTORS,
        PRECISION,
    )
    offs_t = off_t + tl.arange(0, BLOCK_T)
    offs_v = off_v + tl.arange(0, BLOCK_V)
    mask_t = offs_t < T
    log_p_a, log_p_b = _log_probs(z_a, z_b, max_ptr, log_sum_exp_ptr, offs_t, T, T)
    valid = (offs_v < V)[None, :]
    of_a = pid_v.to(tl.int64) * 2 * T + offs_t
    terms = tl.where(valid, _js_term(log_p_a, log_p_b, 0.0), 0.0)
    tl.store(partial_sums_ptr + of_a, tl.sum(terms, axis=1), mask=mask_t)
    terms = tl.where(valid, _js_term(log_p_b, log_p_a, 0.0), 0.0)
    tl.store(partial_sums_ptr + of_a + T, tl.sum(terms, axis=1), mask=mask_t)


@triton.jit
def divergence_dlogits_kernel(
    a_hidden,  # [T, H] descriptor or pointer
    a_weight,  # [V, H] descriptor or pointer
    a_bias_ptr,  # [V] or None
    b_hidden,
    b_weight,
    b_bias_ptr,
    max_ptr,  # [2, T]
    log_sum_exp_ptr,  # [2, T]
    center_ptr,  # [T]
    grad_ptr,  # [T]
    dlogits_ptr,  # [T, V] out
    T,
    V,
    a_H,
    a_stride_hidden_t,
    a_stride_hidden_h,
    a_stride_weight_v,
    a_stride_weight_h,
    a_inner,
    a_outer,
    b_H,
    b_stride_hidden_t,
    b_stride_hidden_h,
    b_stride_weight_v,
    b_stride_weight_h,
    b_inner,
    b_outer,
    stride_stats,  # between the two rows of max and log_sum_exp
    stride_dlogits_t,
    DIVERGENCE: tl.constexpr,
    a_TRANSFORM: tl.constexpr,
    a_USE_DESCRIPTORS: tl.constexpr,
    b_TRANSFORM: tl.constexpr,
    b_USE_DESCRIPTORS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The student is a, the teacher b."""
    pid_t, pid_v = tile_position(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.cdiv(V, BLOCK_V), GROUP_T)  # pyright: ignore[reportGeneralTypeIssues]
    off_t = pid_t * BLOCK_T
    off_v = pid_v * BLOCK_V
    z_a = logits_tile(
        a_hidden,
        a_weight,
        a_bias_ptr,
        off_t,
        off_v,
        T,
        V,
        a_H,
        a_stride_hidden_t,
        a_stride_hidden_h,
        a_stride_weight_v,
        a_stride_weight_h,
        a_inner,
        a_outer,
        BLOCK_T,
        BLOCK_V,
        BLOCK_H,
        a_TRANSFORM,
        a_USE_DESCRIPTORS,
        PRECISION,
    )
    z_b = logits_tile(
        b_hidden,
        b_weight,
        b_bias_ptr,
        off_t,
        off_v,
        T,
        V,
        b_H,
        b_stride_hidden_t,
        b_stride_hidden_h,
        b_stride_weight_v,
        b_stride_weight_h,
        b_inner,
        b_outer,
        BLOCK_T,
        BLOCK_V,
        BLOCK_H,
        b_TRANSFORM,
        b_USE_DESCRIPTORS,
        PRECISION,
    )
    offs_t = off_t + tl.arange(0, BLOCK_T)
    offs_v = off_v + tl.arange(0, BLOCK_V)
    mask_t = offs_t < T
    log_p, log_q = _log_probs(z_a, z_b, max_ptr, log_sum_exp_ptr, offs_t, T, stride_stats)
    grad = tl.load(grad_ptr + offs_t, mask=mask_t, other=0.0)[:, None]
    center = tl.load(center_ptr + offs_t, mask=mask_t, other=0.0)[:, None]
    if DIVERGENCE == "forward_kl":
        dlogits = grad * (tl.exp(log_p) - tl.exp(log_q))
    elif DIVERGENCE == "reverse_kl":
        p = tl.exp(log_p)
        dlogits = grad * tl.where(p == 0, 0.0, p * (log_p - log_q - center))
    else:
        dlogits = 0.5 * grad * _js_term(log_p, log_q, center)
    dlogits = times_derivative(dlogits, z_a, a_inner, a_outer, a_TRANSFORM)
    dlogits = tl.where(grad == 0, 0.0, dlogits)  # also where a divergence is infinite
    tl.store(
        dlogits_ptr + offs_t.to(tl.int64)[:, None] * stride_dlogits_t + offs_v[None, :],
        dlogits.to(dlogits_ptr.dtype.element_ty),
        mask=mask_t[:, None] & (offs_v < V)[None, :],
    )


@triton.jit
def _log_probs(z_a, z_b, max_ptr, log_sum_exp_ptr, offs_t, T, stride_stats):
    """Log-probabilities over the whole vocabulary. The maximum goes first: what is left is small where it matters."""
    mask_t = offs_t < T
    max_a = tl.load(max_ptr + offs_t, mask=mask_t, other=0.0)
    max_b = tl.load(max_ptr + stride_stats + offs_t, mask=mask_t, other=0.0)
    log_sum_exp_a = tl.load(log_sum_exp_ptr + offs_t, mask=mask_t, other=0.0)
    log_sum_exp_b = tl.load(log_sum_exp_ptr + stride_stats + offs_t, mask=mask_t, other=0.0)
    return (z_a - max_a[:, None]) - log_sum_exp_a[:, None], (z_b - max_b[:, None]) - log_sum_exp_b[:, None]


@triton.jit
def _js_term(log_p, log_q, center):
    """p (log(p / m) − center) with m = (p + q) / 2: log(p / m) = log 2 − log(1 + q / p)."""
    p = tl.exp(log_p)
    difference = log_q - log_p
    log_ratio = LN2 - tl.maximum(difference, 0.0) - tl.log(1 + tl.exp(-tl.abs(difference)))
    return tl.where(p == 0, 0.0, p * (log_ratio - center))  # a NaN stays


def local_joint_stats(a: Operands, b: Operands, *, cross: bool) -> PartStats:
    """As ``eager.local_joint_stats``."""
    T, V = a.hidden.shape[0], a.weight.shape[0]
    device = a.hidden.device
    merged = empty_joint_stats(T, torch.float32, device, cross=cross)
    if T == 0 or V == 0:
        return merged
    arch = current_arch()
    tile = narrowed(tile_config(arch, a.hidden.dtype, a.hidden.shape[0]))
    for rows, num_tiles in _chunks(T, V, tile, numbers_per_token=5):
        max_logit, sum_exp = torch.empty(2, num_tiles + 1, 2, T, dtype=torch.float32, device=device)
        sum_cross = torch.empty(num_tiles + 1, T, dtype=torch.float32, device=device) if cross else None
        joint_stats_kernel[(ceil_div(T, tile.block_t) * num_tiles,)](
            partial_max_ptr=max_logit,
            partial_sum_exp_ptr=sum_exp,
            partial_cross_ptr=sum_cross,
            **_joint_kwargs(a.block(slice(None), rows), b.block(slice(None), rows), arch, tile),
        )
        # What was merged before is one more part.
        max_logit[-1], sum_exp[-1] = merged.max_logit, merged.sum_exp
        if sum_cross is not None and merged.cross is not None:
            sum_cross[-1] = merged.cross
        no_target = merged.target_logit[None]
        merged = merge_stats(PartStats(max_logit, sum_exp, no_target, no_target, cross=sum_cross))
    return merged


def local_js_sums(a: Operands, b: Operands, max_logit: Tensor, log_sum_exp: Tensor) -> Tensor:
    """As ``eager.local_js_sums``."""
    T, V = a.hidden.shape[0], a.weight.shape[0]
    sums = torch.zeros_like(log_sum_exp)
    if T == 0 or V == 0:
        return sums
    arch = current_arch()
    tile = narrowed(tile_config(arch, a.hidden.dtype, a.hidden.shape[0]))
    for rows, num_tiles in _chunks(T, V, tile, numbers_per_token=2):
        partial_sums = sums.new_empty(num_tiles, 2, T)
        js_sums_kernel[(ceil_div(T, tile.block_t) * num_tiles,)](
            max_ptr=max_logit,
            log_sum_exp_ptr=log_sum_exp,
            partial_sums_ptr=partial_sums,
            **_joint_kwargs(a.block(slice(None), rows), b.block(slice(None), rows), arch, tile),
        )
        sums += partial_sums.sum(dim=0)
    return sums


def local_divergence_grads(
    student: Operands,
    teacher: Operands,
    max_logit: Tensor,
    log_sum_exp: Tensor,
    center: Tensor,
    grad: Tensor,
    buffers: GradBuffers,
    divergence: str,
    workspace_bytes: int,
) -> None:
    """As ``eager.local_divergence_grads``."""
    arch = current_arch()
    tile = narrowed(tile_config(arch, student.hidden.dtype, student.hidden.shape[0]))
    unscale = None
    if student.hidden.dtype == torch.float16 and grad.numel() > 0:
        bound = dlogits_bound(divergence, center, grad)
        scale, unscale = scale_into_fp16(bound * abs(student.transform.inner * student.transform.outer))
        grad = grad * scale
    grad = grad.contiguous()

    def write_dlogits(tokens: slice, rows: slice, out: Tensor) -> None:
        num_tiles = ceil_div(out.shape[0], tile.block_t) * ceil_div(out.shape[1], tile.block_v)
        divergence_dlogits_kernel[(num_tiles,)](
            max_ptr=max_logit[:, tokens],
            log_sum_exp_ptr=log_sum_exp[:, tokens],
            center_ptr=center[tokens],
            grad_ptr=grad[tokens],
            dlogits_ptr=out,
            stride_stats=max_logit.stride(0),
            stride_dlogits_t=out.stride(0),
            **{
                "DIVERGENCE": divergence,
                **_joint_kwargs(student.block(tokens, rows), teacher.block(tokens, rows), arch, tile),
            },
        )

    sweep_grads(
        write_dlogits,
        student,
        buffers,
        dlogits_dtype=student.hidden.dtype,
        unscale=unscale,
        bytes_per_logit=student.hidden.element_size(),
        workspace_bytes=workspace_bytes,
        tile=(tile.block_t, tile.block_v),
        largest=(student.hidden.shape[0], student.weight.shape[0]),
        processors=num_processors(student.hidden.device),
        matmul_beside=functools.partial(matmul_beside, message_bytes=buffers.message_bytes),
    )


def narrowed(tile: TileConfig) -> TileConfig:
    """A tile of which two accumulators fit where one of the widest does, with the memory this leaves put to use."""
    if tile.block_v <= _LARGEST_BLOCK_V:
        return tile
    return dataclasses.replace(tile, block_v=_LARGEST_BLOCK_V, num_stages=tile.num_stages + 1)


def _chunks(T: int, V: int, tile: TileConfig, *, numbers_per_token: int) -> Iterator[tuple[slice, int]]:
    """Slices of rows whose partials fit the fixed buffer, and their numbers of tiles."""
    chunk_tiles = max(1, _PARTIAL_BYTES // (4 * T * numbers_per_token))
    for rows in slices(V, chunk_tiles * tile.block_v):
        yield rows, ceil_div(rows.stop - rows.start, tile.block_v)


def _joint_kwargs(a: Operands, b: Operands, arch: str, tile: TileConfig) -> dict[str, Any]:
    """The arguments of both heads' `logits_tile`: those that are a head's own with its prefix."""
    of_a, of_b = operand_kwargs(a, arch, tile), operand_kwargs(b, arch, tile)
    shared = {"T", "V", "PRECISION", *tile.launch_kwargs()}
    own = {
        f"{prefix}_{name}": value
        for prefix, kwargs in (("a", of_a), ("b", of_b))
        for name, value in kwargs.items()
        if name not in shared
    }
    return own | {name: of_a[name] for name in shared}

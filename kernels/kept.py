"""From exponentials that the forward kept to gradients of the logits, without knowing how large the logits are.

    E_tj = exp(z_tj − r_t) · ∂z/∂a,   scale_t = level_t · exp(r_t − m_t),   dlogits_tj = scale_t · E_tj off the targets

``scale_t`` commutes with both products of the backward, so nothing passes over ``E`` again; only the targets' entries
are overwritten, with their dlogits over ``scale_t``. This is exact wherever ``E_tj`` and ``scale_t`` are in range.
Tokens that are not, because a logit lies far above the sample that gave ``r_t``, a target far below all others, or
because the loss has no term in ``lse``, are found on the device and their rows computed anew, with scale 1. That takes
their hidden states. If these are on their way, the product for dhidden goes first, and its rows that are marked are
computed anew as well.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vocab_parallel_fused.exp_cache import ExpCache
from vocab_parallel_fused.kernels import hopper_matmul
from vocab_parallel_fused.kernels.configs import TileConfig
from vocab_parallel_fused.kernels.plan import ceil_div
from vocab_parallel_fused.kernels.sweep import matmul_into
from vocab_parallel_fused.kernels.tiles import (
    current_arch,
    log2_from,
    logits_tile,
    operand_kwargs,
    product_precision,
    rows_product,
    times_derivative,
    transform_kwargs,
)
from vocab_parallel_fused.stats import DlogitsCoefficients
from vocab_parallel_fused.transform import LogitTransform, Operands

# Exponentials up to e⁴⁰ leave sums of millions of them in range.
_LARGEST_RISE = tl.constexpr(40.0)
# Below, the product of a scale and a hidden state might leave the range of normal numbers, as might the quotient of a
# target's dlogit and a scale that is smaller by as much.
_LEAST_SCALE = tl.constexpr(1e-30)
_LEAST_NORMAL = tl.constexpr(2.0**-126)  # of fp32 and bf16

_SCALE_LAUNCH: dict[str, Any] = {"BLOCK_T": 128}
_ROWS_LAUNCH: dict[str, Any] = {"BLOCK_N": 4, "BLOCK_H": 512}
# Many programs that mostly leave at once: small, so that several fit a processor.
_REWRITE_TILE = TileConfig(block_t=64, block_v=128, block_h=32, group_t=1, num_warps=4, num_stages=2)
_REWRITE_TILE_INTERPRETER = TileConfig(block_t=16, block_v=32, block_h=16, group_t=1, num_warps=4, num_stages=1)
_PROGRAMS_PER_TOKENS = 8
_PRODUCT_LAUNCH: dict[str, Any] = {"BLOCK_T": 64, "BLOCK_H": 128, "BLOCK_V": 32, "num_warps": 4, "num_stages": 2}
_PRODUCT_LAUNCH_INTERPRETER: dict[str, Any] = {"BLOCK_T": 16, "BLOCK_H": 32, "BLOCK_V": 16}


@triton.jit
def kept_scale_kernel(
    max_ptr,  # [T] of the whole vocabulary
    shard_max_ptr,  # [T] of this shard
    level_ptr,  # [T]
    target_row_ptr,  # [T, K] int64
    target_logit_ptr,  # [T, K]
    grad_target_logit_ptr,  # [T, K]
    reference_ptr,  # [T] in and out: +inf where the row must be computed anew
    scale_ptr,  # [T] out
    exps_ptr,  # [T, V], of which only the dtype counts
    T,
    V,
    K,
    inner,
    outer,
    BLOCK_T: tl.constexpr,
    TRANSFORM: tl.constexpr,
):
    """Scales, nudged by less than a rounding of the exponentials so that each token's first target, which mostly is the
    largest entry of its row by far, is exact in their dtype."""
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    maximum = tl.load(max_ptr + offs_t, mask=mask_t, other=0.0)
    shard_max = tl.load(shard_max_ptr + offs_t, mask=mask_t, other=0.0)
    level = tl.load(level_ptr + offs_t, mask=mask_t, other=0.0)
    reference = tl.load(reference_ptr + offs_t, mask=mask_t, other=0.0)
    scale = level * tl.exp(reference - maximum)
    nudged = scale
    largest_grad = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for k in range(K):
        offs = offs_t.to(tl.int64) * K + k
        row = tl.load(target_row_ptr + offs, mask=mask_t, other=-1)
        owned = (row >= 0) & (row < V)
        grad = tl.load(grad_target_logit_ptr + offs, mask=mask_t, other=0.0)
        largest_grad = tl.maximum(largest_grad, tl.where(owned, tl.abs(grad), 0.0))
        if k == 0:
            z = tl.load(target_logit_ptr + offs, mask=owned, other=0.0)
            dlogit = times_derivative(tl.exp(tl.minimum(z - maximum, 0.0)) * level + grad, z, inner, outer, TRANSFORM)
            rounded = (dlogit / scale).to(exps_ptr.dtype.element_ty).to(tl.float32)
            # Below the normal numbers a rounding may be as large as what it rounds.
            nudged = tl.where(owned & (tl.abs(rounded) >= _LEAST_NORMAL), dlogit / rounded, scale)
    size = tl.abs(scale)
    # What a scale too small for its range leaves out is next to nothing if it is small because its shard is.
    matters = (largest_grad > 0) | ((level != 0) & (reference - maximum > -_LARGEST_RISE))
    # A row that an earlier backward computed anew, whose reference is +inf, stays so.
    in_range = tl.abs(shard_max - reference) <= _LARGEST_RISE
    in_range = in_range & ((size >= tl.maximum(largest_grad, 1.0) * _LEAST_SCALE) | ~matters)
    tl.store(reference_ptr + offs_t, tl.where(in_range, reference, float("inf")), mask=mask_t)
    tl.store(scale_ptr + offs_t, tl.where(in_range, nudged, 1.0), mask=mask_t)


@triton.jit
def rewrite_rows_kernel(
    hidden,  # [T, H] descriptor or pointer
    weight,  # [V, H] descriptor or pointer
    bias_ptr,  # [V] or None
    max_ptr,  # [T]
    level_ptr,  # [T]
    reference_ptr,  # [T] +inf: to be computed anew
    dlogits_ptr,  # [T, V] out
    T,
    V,
    H,
    stride_hidden_t,
    stride_hidden_h,
    stride_weight_v,
    stride_weight_h,
    stride_dlogits_t,
    inner,
    outer,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP_T: tl.constexpr,  # noqa: ARG001 (of every tile's launch)
    TRANSFORM: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As `backward.dlogits_kernel`, for rows of dlogits that are marked; where a block of tokens has none, nothing."""
    off_t = tl.program_id(0) * BLOCK_T
    offs_t = off_t + tl.arange(0, BLOCK_T)
    marked = tl.load(reference_ptr + offs_t, mask=offs_t < T, other=0.0) == float("inf")
    if tl.max(marked.to(tl.int32), axis=0) > 0:
        maximum = tl.load(max_ptr + offs_t, mask=marked, other=0.0)
        level = tl.load(level_ptr + offs_t, mask=marked, other=0.0)
        for off_v in range(tl.program_id(1) * BLOCK_V, V, tl.num_programs(1) * BLOCK_V):
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
            shifted, rounding = log2_from(z, maximum)
            dlogits = tl.exp2(shifted) * (level / tl.exp2(rounding))[:, None]
            dlogits = times_derivative(dlogits, z, inner, outer, TRANSFORM)
            offs_v = off_v + tl.arange(0, BLOCK_V)
            tl.store(
                dlogits_ptr + offs_t.to(tl.int64)[:, None] * stride_dlogits_t + offs_v[None, :],
                dlogits.to(dlogits_ptr.dtype.element_ty),
                mask=marked[:, None] & (offs_v < V)[None, :],
            )


@triton.jit
def rewritten_product_kernel(
    dlogits_ptr,  # [T, V]
    weight_ptr,  # [V, H]
    reference_ptr,  # [T] +inf: rewritten
    out_ptr,  # [T, H] out
    T,
    V,
    H,
    stride_dlogits_t,
    stride_weight_v,
    stride_weight_h,
    stride_out_t,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dlogits @ weight, for rows of dlogits that `rewrite_rows_kernel` has rewritten."""
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    marked = tl.load(reference_ptr + offs_t, mask=offs_t < T, other=0.0) == float("inf")
    if tl.max(marked.to(tl.int32), axis=0) > 0:
        for off_h in range(tl.program_id(1) * BLOCK_H, H, tl.num_programs(1) * BLOCK_H):
            offs_h = off_h + tl.arange(0, BLOCK_H)
            product = rows_product(
                dlogits_ptr,
                weight_ptr,
                tl.minimum(offs_t, T - 1),
                tl.minimum(offs_h, H - 1),
                V,
                stride_dlogits_t,
                1,
                stride_weight_h,
                stride_weight_v,
                BLOCK_T,
                BLOCK_H,
                BLOCK_V,
                PRECISION,
                1,
            )
            tl.store(
                out_ptr + offs_t.to(tl.int64)[:, None] * stride_out_t + offs_h[None, :],
                product.to(out_ptr.dtype.element_ty),
                mask=marked[:, None] & (offs_h < H)[None, :],
            )


@triton.jit
def scale_rows_kernel(
    matrix_ptr,  # [N, H]
    scale_ptr,  # [N]
    out_ptr,  # [N, H] out, may be the matrix
    N,
    H,
    stride_matrix_n,
    stride_matrix_h,
    stride_out_n,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_n = offs_n < N
    mask = mask_n[:, None] & (offs_h < H)[None, :]
    rows, columns = offs_n.to(tl.int64)[:, None], offs_h.to(tl.int64)[None, :]
    matrix = tl.load(matrix_ptr + rows * stride_matrix_n + columns * stride_matrix_h, mask=mask, other=0.0)
    scale = tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0)
    scaled = matrix.to(tl.float32) * scale[:, None]
    tl.store(out_ptr + rows * stride_out_n + columns, scaled.to(out_ptr.dtype.element_ty), mask=mask)


def kept_dlogits(
    target_row: Tensor,
    target_logit: Tensor,
    max_logit: Tensor,
    coefficients: DlogitsCoefficients,
    cache: ExpCache,
    transform: LogitTransform,
) -> tuple[Tensor, Tensor]:
    """The cache's exponentials ``[T, V]``, and factors ``[T]`` that make gradients of the logits of them, but for the
    targets' entries and the rows whose exponentials are out of range. These are marked in the cache's reference.

    Args:
        target_row, target_logit, max_logit: of the tokens.
        coefficients: of the tokens; level and grad_target_logit are all the terms there are.
        cache: of the tokens.
        transform: of the raw logits.
    """
    num_tokens, rows = cache.exps.shape
    scale = torch.empty_like(cache.reference)
    kept_scale_kernel[(ceil_div(num_tokens, _SCALE_LAUNCH["BLOCK_T"]),)](
        max_logit,
        cache.max_logit,
        coefficients.level,
        target_row,
        target_logit,
        coefficients.grad_target_logit,
        cache.reference,
        scale,
        cache.exps,
        num_tokens,
        rows,
        target_row.shape[1],
        **transform_kwargs(transform),
        **_SCALE_LAUNCH,
    )
    return cache.exps, scale


def rewrite_rows(head: Operands, max_logit: Tensor, level: Tensor, cache: ExpCache) -> None:
    """Compute the rows that are marked, but for the targets' entries, from ``head``: all tokens, and the kept rows."""
    arch, num_tokens = current_arch(), cache.exps.shape[0]
    tile = _REWRITE_TILE_INTERPRETER if arch == "interpreter" else _REWRITE_TILE
    rewrite_rows_kernel[(ceil_div(num_tokens, tile.block_t), _PROGRAMS_PER_TOKENS)](
        max_ptr=max_logit,
        level_ptr=level,
        reference_ptr=cache.reference,
        dlogits_ptr=cache.exps,
        stride_dlogits_t=cache.exps.stride(0),
        **operand_kwargs(head, arch, tile),
    )


def rewrite_product(dhidden: Tensor, weight: Tensor, cache: ExpCache) -> None:
    """Compute the rows of ``dhidden`` whose dlogits are marked, from these and the kept rows of the weight."""
    (T, V), H = cache.exps.shape, weight.shape[1]
    arch = current_arch()
    launch = _PRODUCT_LAUNCH_INTERPRETER if arch == "interpreter" else _PRODUCT_LAUNCH
    rewritten_product_kernel[(ceil_div(T, launch["BLOCK_T"]), _PROGRAMS_PER_TOKENS)](
        cache.exps,
        weight,
        cache.reference,
        dhidden,
        T,
        V,
        H,
        cache.exps.stride(0),
        weight.stride(0),
        weight.stride(1),
        dhidden.stride(0),
        **{"PRECISION": product_precision(weight.dtype, arch), **launch},
    )


def scale_rows(matrix: Tensor, scale: Tensor, out: Tensor) -> None:
    """``out = scale[:, None] · matrix``."""
    N, H = matrix.shape
    grid = (ceil_div(N, _ROWS_LAUNCH["BLOCK_N"]), ceil_div(H, _ROWS_LAUNCH["BLOCK_H"]))
    strides = (matrix.stride(0), matrix.stride(1), out.stride(0))
    scale_rows_kernel[grid](matrix, scale, out, N, H, *strides, **_ROWS_LAUNCH)


def scaled_matmul(out: Tensor, values: Tensor, matrix: Tensor, scale: Tensor, *, message_bytes: int = 0) -> None:
    """``out = scale[:, None] · (values @ matrix)``, beside a message of so many bytes."""
    if hopper_matmul.takes(out, values, matrix, beside=message_bytes > 0):
        hopper_matmul.matmul(out, values, matrix, scale, message_bytes)
    else:
        matmul_into(out, values, matrix)
        scale_rows(out, scale, out)

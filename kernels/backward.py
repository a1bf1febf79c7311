"""Local gradients: recompute a block of logits, turn it into logit gradients, and let two GEMMs of torch take it on.

    dz_tj = exp(z_tj − lse_t) · g_lse_t + [j = y_t] · g_target_t

``dlogits_kernel`` writes the first term for one block of rows into the fixed workspace, in the inputs' dtype;
``target_dlogits_kernel`` overwrites the targets' entries with both terms, which are added in fp32 before that rounding.
``sweep.py`` walks the blocks. ``T`` tokens, ``V`` rows of the block, ``H`` hidden size.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from vocab_parallel_fused.kernels.configs import tile_config
from vocab_parallel_fused.kernels.sweep import DlogitsCoefficients, sweep_grads
from vocab_parallel_fused.kernels.tiles import LOG2E, current_arch, logits_tile, operand_kwargs, tile_position

_TARGET_LAUNCH: dict[str, Any] = {"BLOCK_T": 128}


@triton.jit
def dlogits_kernel(
    hidden,  # [T, H] descriptor or pointer
    weight,  # [V, H] descriptor or pointer
    bias_ptr,  # [V]
    lse_ptr,  # [T]
    grad_lse_ptr,  # [T]
    dlogits_ptr,  # [T, V] out
    T,
    V,
    H,
    stride_hidden_t,
    stride_hidden_h,
    stride_weight_v,
    stride_weight_h,
    stride_dlogits_t,
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
    offs_v = off_v + tl.arange(0, BLOCK_V)
    mask_t = offs_t < T
    lse = tl.load(lse_ptr + offs_t, mask=mask_t, other=0.0)
    grad_lse = tl.load(grad_lse_ptr + offs_t, mask=mask_t, other=0.0)

    # exp(z − lse) as one fused multiply-add and one exp2. What rounding takes from lse · log2(e) goes into the factor.
    reference = lse * LOG2E
    factor = grad_lse * tl.exp2(-tl.fma(lse, tl.full((BLOCK_T,), LOG2E, tl.float32), -reference))
    dlogits = tl.exp2(z * LOG2E - reference[:, None]) * factor[:, None]
    tl.store(
        dlogits_ptr + offs_t.to(tl.int64)[:, None] * stride_dlogits_t + offs_v[None, :],
        dlogits.to(dlogits_ptr.dtype.element_ty),
        mask=mask_t[:, None] & (offs_v < V)[None, :],
    )


@triton.jit
def target_dlogits_kernel(
    target_row_ptr,  # [T] int64, −1: not in this shard
    target_logit_ptr,  # [T]
    lse_ptr,  # [T]
    grad_lse_ptr,  # [T]
    grad_target_logit_ptr,  # [T]
    dlogits_ptr,  # [T, V] out, written at the targets
    T,
    V,
    first_row,  # number of the block's first row in the shard, as target_row counts
    stride_dlogits_t,
    BLOCK_T: tl.constexpr,
):
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    column = tl.load(target_row_ptr + offs_t, mask=mask_t, other=-1) - first_row
    # −1, for a target elsewhere, is before the first row of any block.
    owned = (column >= 0) & (column < V)
    target_logit = tl.load(target_logit_ptr + offs_t, mask=owned, other=0.0)
    lse = tl.load(lse_ptr + offs_t, mask=owned, other=0.0)
    grad_lse = tl.load(grad_lse_ptr + offs_t, mask=owned, other=0.0)
    grad_target_logit = tl.load(grad_target_logit_ptr + offs_t, mask=owned, other=0.0)
    dlogit = tl.exp(target_logit - lse) * grad_lse + grad_target_logit
    tl.store(
        dlogits_ptr + offs_t.to(tl.int64) * stride_dlogits_t + column,
        dlogit.to(dlogits_ptr.dtype.element_ty),
        mask=owned,
    )


def local_grads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_row: Tensor,
    target_logit: Tensor,
    lse: Tensor,
    grad_lse: Tensor,
    grad_target_logit: Tensor,
    *,
    dhidden: Tensor | None,
    dweight: Tensor | None,
    accumulate_dweight: bool,
    dbias: Tensor | None,
    workspace_bytes: int,
) -> None:
    """As ``eager.local_grads``."""
    arch = current_arch()
    tile = tile_config(arch, hidden.dtype)

    def write_dlogits(tokens: slice, rows: slice, coefficients: DlogitsCoefficients, out: Tensor) -> None:
        num_tiles = triton.cdiv(out.shape[0], tile.block_t) * triton.cdiv(out.shape[1], tile.block_v)
        dlogits_kernel[(num_tiles,)](
            lse_ptr=lse[tokens],
            grad_lse_ptr=coefficients.grad_lse[tokens],
            dlogits_ptr=out,
            stride_dlogits_t=out.stride(0),
            **operand_kwargs(hidden[tokens], weight[rows], None if bias is None else bias[rows], arch, tile),
        )
        target_dlogits_kernel[(triton.cdiv(out.shape[0], _TARGET_LAUNCH["BLOCK_T"]),)](
            target_row[tokens],
            target_logit[tokens],
            lse[tokens],
            coefficients.grad_lse[tokens],
            coefficients.grad_target_logit[tokens],
            out,
            out.shape[0],
            out.shape[1],
            rows.start,
            out.stride(0),
            **_TARGET_LAUNCH,
        )

    sweep_grads(
        write_dlogits,
        hidden,
        weight,
        DlogitsCoefficients(grad_lse.contiguous(), grad_target_logit.contiguous()),
        dlogits_dtype=hidden.dtype,
        bytes_per_logit=hidden.element_size(),
        workspace_bytes=workspace_bytes,
        tile=(tile.block_t, tile.block_v),
        largest=(hidden.shape[0], weight.shape[0]),
        dhidden=dhidden,
        dweight=dweight,
        accumulate_dweight=accumulate_dweight,
        dbias=dbias,
    )

"""The plain cross-entropy on ``[T]`` numbers, in one launch each way: as operations of torch it takes twenty.

    loss_t = log s_t − min(z_t(y_t) − m_t, 0)  if y_t is not ignored, else 0;    their sum or mean
    level_t = g_t / s_t,    grad_target_t = −g_t      what the backward needs to know of it, 0 if y_t is ignored

Any other loss is made of torch's own operations, see ``cross_entropy.py``.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vocab_parallel_fused.stats import DlogitsCoefficients, PartStats, TokenLoss

# One program adds up all tokens, so that the sum has one order.
_LOSS_LAUNCH: dict[str, Any] = {"BLOCK_T": 4096, "num_warps": 16}
_GRADS_LAUNCH: dict[str, Any] = {"BLOCK_T": 512}


@triton.jit
def token_loss_kernel(
    max_ptr,  # [T]
    sum_exp_ptr,  # [T]
    target_logit_ptr,  # [T]
    owners_ptr,  # [T]
    target_ptr,  # [T] int64
    loss_ptr,  # [T] out, or None: reduce
    total_ptr,  # [] out, or None if the loss is there
    num_valid_ptr,  # [] out
    owned_once_ptr,  # [] int32 out: 1 if every valid target has one owner
    T,
    ignore_index,
    MEAN: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    total = tl.zeros((BLOCK_T,), dtype=tl.float32)
    num_valid = tl.zeros((BLOCK_T,), dtype=tl.int32)
    num_bad = tl.zeros((BLOCK_T,), dtype=tl.int32)
    for first in range(0, T, BLOCK_T):
        offs_t = first + tl.arange(0, BLOCK_T)
        mask_t = offs_t < T
        valid = mask_t & (tl.load(target_ptr + offs_t, mask=mask_t, other=0) != ignore_index)
        maximum = tl.load(max_ptr + offs_t, mask=mask_t, other=0.0)
        sum_exp = tl.load(sum_exp_ptr + offs_t, mask=mask_t, other=1.0)
        difference = tl.load(target_logit_ptr + offs_t, mask=mask_t, other=0.0) - maximum
        # Another order of products may have rounded the target above the largest logit.
        difference = tl.minimum(difference, 0.0, propagate_nan=tl.PropagateNan.ALL)
        loss = tl.where(valid, tl.log(sum_exp) - difference, 0.0)
        if loss_ptr is not None:
            tl.store(loss_ptr + offs_t, loss, mask=mask_t)
        total += loss
        num_valid += valid.to(tl.int32)
        owners = tl.load(owners_ptr + offs_t, mask=mask_t, other=1.0)
        num_bad += (valid & (owners != 1.0)).to(tl.int32)
    count = tl.maximum(tl.sum(num_valid), 1).to(tl.float32)
    if total_ptr is not None:
        tl.store(total_ptr, tl.div_rn(tl.sum(total), count) if MEAN else tl.sum(total))
    tl.store(num_valid_ptr, count)
    tl.store(owned_once_ptr, (tl.sum(num_bad) == 0).to(tl.int32))


@triton.jit
def token_loss_grads_kernel(
    grad_ptr,  # [T], or [] with stride 0
    sum_exp_ptr,  # [T]
    target_ptr,  # [T] int64
    num_valid_ptr,  # [] or None: 1
    level_ptr,  # [T] out
    grad_target_logit_ptr,  # [T] out
    T,
    ignore_index,
    stride_grad_t,
    BLOCK_T: tl.constexpr,
):
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    valid = mask_t & (tl.load(target_ptr + offs_t, mask=mask_t, other=0) != ignore_index)
    grad = tl.load(grad_ptr + offs_t * stride_grad_t, mask=valid, other=0.0)
    if num_valid_ptr is not None:
        grad = tl.div_rn(grad, tl.load(num_valid_ptr))
    sum_exp = tl.load(sum_exp_ptr + offs_t, mask=valid, other=1.0)
    tl.store(level_ptr + offs_t, tl.div_rn(grad, sum_exp), mask=mask_t)
    tl.store(grad_target_logit_ptr + offs_t, -grad, mask=mask_t)


def token_loss(whole: PartStats, target: Tensor, ignore_index: int, reduction: str) -> TokenLoss:
    """As ``eager.token_loss``."""
    T = target.shape[0]
    loss = whole.max_logit.new_empty(T if reduction == "none" else ())
    num_valid, owned_once = loss.new_empty(()), loss.new_empty((), dtype=torch.int32)
    token_loss_kernel[(1,)](
        whole.max_logit,
        whole.sum_exp,
        whole.target_logit,
        whole.owners,
        target,
        loss if reduction == "none" else None,
        None if reduction == "none" else loss,
        num_valid,
        owned_once,
        T,
        ignore_index,
        **{"MEAN": reduction == "mean", **_LOSS_LAUNCH},
    )
    return TokenLoss(loss, num_valid, owned_once)


def token_loss_grads(
    grad: Tensor, sum_exp: Tensor, target: Tensor, num_valid: Tensor | None, ignore_index: int
) -> DlogitsCoefficients:
    """As ``eager.token_loss_grads``."""
    T = target.shape[0]
    level, grad_target_logit = torch.empty_like(sum_exp), torch.empty_like(target, dtype=sum_exp.dtype)
    token_loss_grads_kernel[(triton.cdiv(T, _GRADS_LAUNCH["BLOCK_T"]),)](
        grad,
        sum_exp,
        target,
        num_valid,
        level,
        grad_target_logit,
        T,
        ignore_index,
        grad.stride(0) if grad.ndim > 0 else 0,
        **_GRADS_LAUNCH,
    )
    return DlogitsCoefficients(level, None, None, grad_target_logit)

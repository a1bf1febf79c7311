"""The cross-entropy from the statistics of the tokens: PyTorch on [T] that knows no kernel and no group."""

import functools

import torch
from torch import Tensor

from vocab_parallel_fused.stats import TokenStats


def cross_entropy(
    stats: TokenStats,
    target: Tensor,
    valid: Tensor,
    vocab_size: int,
    *,
    class_weight: Tensor | None,
    token_weight: Tensor | None,
    label_smoothing: float,
    z_loss_weight: float,
    reduction: str,
) -> Tensor:
    """``token_weight_t · ((1 − ε) c_y (lse − z_y) + ε/V · Σ_j c_j (lse − z_j) + z_loss_weight · lse²)``, reduced.

    As :func:`torch.nn.functional.cross_entropy`, except that the mean over tokens of no weight is 0 and not NaN.

    Args:
        stats: of ``T`` tokens, with ``logit_sum`` if ``label_smoothing`` is not 0.
        target: ``[T]`` class ids.
        valid: ``[T]``, False where the loss and its gradient are exactly 0.
        vocab_size: the number of classes ``V``.
        class_weight: ``[V]``, the ``c_j``; None: all 1.
        token_weight: ``[T]``; None: all 1.
        label_smoothing: ``ε``.
        z_loss_weight: of the squared log-partition function.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``; see :func:`~vocab_parallel_fused.linear_cross_entropy`.
    """
    loss = torch.where(valid, stats.lse - stats.target_logit[:, 0], 0.0)
    target_weight = None
    if class_weight is not None:
        target_weight = torch.where(valid, class_weight[target.where(valid, 0)], 0.0)
        loss = loss * target_weight
    if label_smoothing:
        assert stats.logit_sum is not None
        lse = stats.lse if class_weight is None else stats.lse * class_weight.mean()
        of_classes = torch.sub(lse, stats.logit_sum, alpha=1 / vocab_size)
        # Not torch.lerp, which makes a NaN of infinite losses.
        loss = (1 - label_smoothing) * loss + label_smoothing * torch.where(valid, of_classes, 0.0)
    loss = reduce_tokens(loss, target_weight, token_weight, valid, reduction)
    if z_loss_weight:
        # Masked before it is squared: the derivative of an infinite square, times 0, is no zero.
        lse = torch.where(valid, stats.lse + stats.max_logit, 0.0)
        loss = loss + reduce_tokens(z_loss_weight * lse.square(), None, token_weight, valid, reduction)
    return loss


def reduce_tokens(
    loss: Tensor, target_weight: Tensor | None, token_weight: Tensor | None, valid: Tensor, reduction: str
) -> Tensor:
    """Weight the tokens of one term ``[T]`` and reduce it; the mean divides by what its tokens weigh."""
    if token_weight is not None:
        # A token that is left out may have any weight.
        token_weight = torch.where(valid, token_weight, 0.0)
        loss = loss * token_weight
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    weights = [weight for weight in (target_weight, token_weight) if weight is not None]
    if not weights:
        return loss.sum() / valid.sum().clamp(min=1)
    total = functools.reduce(torch.mul, weights).sum()
    return loss.sum() / total.masked_fill(total == 0, torch.inf)

"""Per-token statistics: how those of parts of the vocabulary merge, and the losses they give: PyTorch on [T].

The statistics of a part of the vocabulary and those of the whole have one form, so a tile, a shard and the full
vocabulary are all described by a :class:`TokenStats`, and merging is associative.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class TokenStats(NamedTuple):
    """What the loss needs to know of a part of the vocabulary for each of ``T`` tokens, in fp32 (fp64 for fp64)."""

    lse: Tensor
    """[T] ``log Σ_j exp(z_j)`` over the part; −inf where the part is empty."""

    target_logit: Tensor
    """[T] ``z_y`` where the part holds the target row ``y``, else 0."""

    owners: Tensor
    """[T] how many shards of the part hold the target row: 0 or 1 on a rank, 1 overall if they tile the vocabulary."""


def merge_stats(parts: Tensor) -> TokenStats:
    """Merge packed statistics ``[R, 3, T]`` of disjoint parts, in order.

    ``lse = logsumexp_r(lse_r)``; the other two are sums. A part with ``lse = −inf`` contributes nothing, and all parts
    −inf give −inf.
    """
    lse, target_logit, owners = parts.unbind(dim=1)
    return TokenStats(torch.logsumexp(lse, dim=0), target_logit.sum(dim=0), owners.sum(dim=0))


def cross_entropy(stats: TokenStats, valid: Tensor) -> Tensor:
    """[T] ``−log p_y = lse − z_y``, and exactly 0 (also its gradient) where ``valid`` is False."""
    return torch.where(valid, stats.lse - stats.target_logit, 0.0)


def reduce_loss(loss: Tensor, valid: Tensor, reduction: str) -> Tensor:
    """Reduce ``[T]`` losses as torch does, except that the mean over no valid token is 0 and not NaN."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    num_valid_tokens = valid.sum().clamp(min=1)
    return loss.sum() / num_valid_tokens

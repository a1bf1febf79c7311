"""Per-token statistics of logits: those of parts of the vocabulary, how parts merge, and those of the whole.

The statistics of a tile, a shard and the full vocabulary are one kind of thing, :class:`PartStats`, and any two merge.
Logits enter them as differences from the part's largest one. So no sum of exponentials overflows, and a confident
token's loss has the error of a sum near 1, however large its logits are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Larger than any id, also when the start of a shard is added to it.
NO_CLASS = 2**62
# fp32 counts to 2²⁴, so numbers of classes travel as two digits in this base.
DIGIT = 2**12


class Wanted(NamedTuple):
    """Which statistics to compute beside the softmax's own, which are always there."""

    logit_sum: bool = False
    expected_logit: bool = False
    argmax: bool = False


class PartStats(NamedTuple):
    """Statistics of a part of the vocabulary for each of ``T`` tokens, in fp32 (fp64 for fp64); None: not wanted."""

    max_logit: Tensor
    """[T] ``m = max_j z_j`` over the part; −inf where the part is empty."""

    sum_exp: Tensor
    """[T] ``Σ_j exp(z_j − m)``; 0 where the part is empty."""

    target_logit: Tensor
    """[T, K] ``z_y`` where the part holds the target row ``y``, else 0. ``K`` targets per token, 0 or more."""

    owners: Tensor
    """[T, K] how many shards of the part hold the target row: 0 or 1 on a rank, 1 overall if they tile the
    vocabulary."""

    class_sum: Tensor | None = None
    """[T] ``Σ_j c_j``, with class weights ``c`` or 1; there if ``logit_sum`` is."""

    logit_sum: Tensor | None = None
    """[T] ``Σ_j c_j (z_j − m)``."""

    sum_exp_logit: Tensor | None = None
    """[T] ``Σ_j exp(z_j − m) (z_j − m)``, at most 0."""

    cross: Tensor | None = None
    """[T] of two heads ``a``, ``b``, whose ``max_logit`` and ``sum_exp`` are then stacked ``[2, T]``:
    ``Σ_j exp(u_aj) (u_aj − u_bj)`` with ``u_j = z_j − m``."""

    argmax: Tensor | None = None
    """[T] int64, int32 of a shard's several parts, the class of the largest logit, the smallest of several."""


class TokenStats(NamedTuple):
    """Statistics of the whole vocabulary for each of ``T`` tokens: differentiable but for ``max_logit``, ``argmax``.

    ``lse``, ``target_logit`` and ``expected_logit`` are measured from ``max_logit``. Their differences, which are what
    losses are made of, need no more; to have one of them in full, add it: since a constant added to all logits changes
    no difference, treating ``max_logit`` as a constant leaves every gradient exact.
    """

    max_logit: Tensor
    """[T] ``max_j z_j``, no gradient."""

    lse: Tensor
    """[T] ``log Σ_j exp(z_j − max_logit)``, at least 0."""

    target_logit: Tensor
    """[T, K] ``z_y − max_logit`` of each target."""

    logit_sum: Tensor | None
    """[T] ``Σ_j c_j (z_j − max_logit)``."""

    expected_logit: Tensor | None
    """[T] ``Σ_j p_j (z_j − max_logit)``."""

    argmax: Tensor | None
    """[T] int64, no gradient; −1 where the logits hold a NaN or +∞."""


class MergedStats(NamedTuple):
    """What parts that make up the whole vocabulary say."""

    whole: PartStats
    """``class_sum`` and ``argmax``, of which nobody needs more than is in ``stats``, may be None."""

    stats: TokenStats

    covered: Tensor
    """One number: whether each valid target has exactly one owner, and the parts hold the classes that all expect."""

    num_classes: Tensor | None
    """[] what :func:`count_classes` finds; None: nothing was said."""


class TokenLoss(NamedTuple):
    """The plain cross-entropy, and what else is read off the parts that make up the whole vocabulary."""

    loss: Tensor
    """[T], or [] reduced; 0 for tokens that are ignored."""

    max_logit: Tensor
    sum_exp: Tensor
    target_logit: Tensor
    owners: Tensor
    """As in :class:`PartStats`, of the whole."""

    num_valid: Tensor
    """[] how many tokens are not ignored, in the dtype of the loss; 1 if none is, so that it can divide."""

    covered: Tensor
    num_classes: Tensor | None
    """As in :class:`MergedStats`."""


class DlogitsCoefficients(NamedTuple):
    """All that a loss needs to say about the gradient of its logits: a few numbers per token.

    ``dz_j = exp(u_j) · (level + slope · u_j) + grad_logit_sum · c_j + Σ_k [j = y_k] grad_target_logit_k``,
    ``u_j = z_j − max_logit``; None stands for zero.
    """

    level: Tensor  # [T]
    slope: Tensor | None  # [T]
    grad_logit_sum: Tensor | None  # [T]
    grad_target_logit: Tensor  # [T, K]

    def times(self, factor: Tensor) -> DlogitsCoefficients:
        """The coefficients of ``factor`` times the gradient."""
        return self._make(None if field is None else field * factor for field in self)

    def of(self, tokens: slice) -> DlogitsCoefficients:
        """Those of some tokens."""
        return self._make(None if field is None else field[tokens] for field in self)

    def bound(self, class_weight: Tensor | None) -> Tensor:
        """[T] a bound of every ``|dz_j|``, since ``exp(u) <= 1`` and ``exp(u) |u| < 1`` for ``u <= 0``."""
        bound = self.level.abs() + self.grad_target_logit.abs().sum(dim=1)
        if self.slope is not None:
            bound = bound + self.slope.abs()
        if self.grad_logit_sum is not None:
            largest = 1.0 if class_weight is None else class_weight.abs().amax()
            bound = bound + self.grad_logit_sum.abs() * largest
        return bound


def empty_stats(target_row: Tensor, dtype: torch.dtype, wanted: Wanted) -> PartStats:
    """Statistics of no class at all, which any part merges into; ``target_row`` is ``[T, K]``."""
    zero = torch.zeros(target_row.shape[0], dtype=dtype, device=target_row.device)
    return PartStats(
        max_logit=torch.full_like(zero, -torch.inf),
        sum_exp=zero,
        target_logit=torch.zeros_like(target_row, dtype=dtype),
        owners=torch.zeros_like(target_row, dtype=dtype),
        class_sum=zero.clone() if wanted.logit_sum else None,
        logit_sum=zero.clone() if wanted.logit_sum else None,
        sum_exp_logit=zero.clone() if wanted.expected_logit else None,
        argmax=torch.full_like(zero, NO_CLASS, dtype=torch.int64) if wanted.argmax else None,
    )


def empty_joint_stats(num_tokens: int, dtype: torch.dtype, device: torch.device, *, cross: bool) -> PartStats:
    """Statistics of two heads over no class at all."""
    of_both = torch.zeros(2, num_tokens, dtype=dtype, device=device)
    no_target = of_both.new_empty(num_tokens, 0)
    sum_cross = torch.zeros_like(of_both[0]) if cross else None
    return PartStats(torch.full_like(of_both, -torch.inf), of_both, no_target, no_target, cross=sum_cross)


def measured_from(part: PartStats, max_logit: Tensor) -> PartStats:
    """The same part with its exponentials measured from another maximum, and no argmax where that is larger.

    Parts measured from their common maximum merge by adding all but the argmax, of which the smallest counts.
    """
    # Where every class is −inf the reference must be finite, or −inf − −inf would make a NaN.
    reference = max_logit.masked_fill(max_logit == -torch.inf, 0.0)
    shift = part.max_logit - reference
    scale = torch.exp(shift)
    sum_exp = part.sum_exp * scale
    logit_sum, sum_exp_logit = part.logit_sum, part.sum_exp_logit
    if logit_sum is not None and part.class_sum is not None:
        logit_sum = logit_sum + part.class_sum * _finite(shift)
    if sum_exp_logit is not None:
        sum_exp_logit = sum_exp_logit * scale + sum_exp * _finite(shift)
    cross = part.cross
    if cross is not None:
        (scale_a, _), (sum_exp_a, _), (shift_a, shift_b) = (pair.unbind(-2) for pair in (scale, part.sum_exp, shift))
        # A part in which a has no probability contributes nothing, whatever b holds there.
        cross = torch.where(scale_a * sum_exp_a > 0, scale_a * (cross + sum_exp_a * (shift_a - shift_b)), 0.0)
    argmax = part.argmax
    if argmax is not None:
        argmax = torch.where(part.max_logit == max_logit, argmax, NO_CLASS)
    return part._replace(
        max_logit=max_logit,
        sum_exp=sum_exp,
        logit_sum=logit_sum,
        sum_exp_logit=sum_exp_logit,
        cross=cross,
        argmax=argmax,
    )


def _finite(shift: Tensor) -> Tensor:
    """In an empty part, or one of −inf alone, nothing is left to shift."""
    return shift.masked_fill(shift == -torch.inf, 0.0)


def stacked(part: PartStats) -> PartStats:
    """One part as :func:`merge_stats` takes several."""
    return PartStats._make(None if field is None else field[None] for field in part)


def merge_stats(parts: PartStats) -> PartStats:
    """Merge disjoint parts, stacked along a first dimension of every field."""
    if len(parts.max_logit) == 1:
        return PartStats._make(None if field is None else field[0] for field in parts)
    max_logit = parts.max_logit.amax(dim=0)
    aligned = measured_from(parts, max_logit)
    sums = [None if field is None else field.sum(dim=0) for field in aligned[1:-1]]
    argmax = None if aligned.argmax is None else aligned.argmax.amin(dim=0)
    return PartStats._make([max_logit, *sums, argmax])


def count_classes(sizes: Tensor) -> Tensor:
    """How many classes parts hold, int64 ``[]``; if they do not expect the same number in all, its complement, < 0.

    Args:
        sizes: ``[N, 4]`` two digits of how many classes a part holds, and two of how many it expects all to hold.
    """
    held, expected = sizes.split(2, dim=1)
    high, low = held.sum(dim=0).to(torch.int64).unbind()
    total = torch.add(low, high, alpha=DIGIT)
    return torch.where((expected == expected[0]).all(), total, ~total)


def whole_stats(whole: PartStats) -> TokenStats:
    """What the statistics of the whole vocabulary say of each token."""
    sum_exp_logit, argmax = whole.sum_exp_logit, whole.argmax
    return TokenStats(
        whole.max_logit,
        whole.sum_exp.log(),
        # Another order of products may round a target above the largest logit, but no log-probability is positive.
        (whole.target_logit - whole.max_logit[:, None]).clamp_(max=0),
        whole.logit_sum,
        None if sum_exp_logit is None else sum_exp_logit / whole.sum_exp,
        None if argmax is None else argmax.masked_fill(whole.sum_exp.isnan(), -1),
    )


def dlogits_coefficients(
    sum_exp: Tensor,
    sum_exp_logit: Tensor | None,
    grad_lse: Tensor | None,
    grad_target_logit: Tensor,
    grad_logit_sum: Tensor | None,
    grad_expected_logit: Tensor | None,
) -> DlogitsCoefficients:
    """Coefficients from the sums ``[T]`` of the whole vocabulary and upstream gradients; None stands for zero.

    With ``p_j = exp(u_j) / sum_exp``: ``∂lse/∂z_j = p_j``, ``∂expected_logit/∂z_j = p_j (1 + u_j − expected_logit)``.
    """
    level = torch.zeros_like(sum_exp) if grad_lse is None else grad_lse
    slope = None
    if grad_expected_logit is not None:
        assert sum_exp_logit is not None
        slope = grad_expected_logit / sum_exp
        # In this order: the two gradients of an entropy are opposite and cancel exactly.
        level = (level + grad_expected_logit) - slope * sum_exp_logit
    return DlogitsCoefficients(level / sum_exp, slope, grad_logit_sum, grad_target_logit)


def top_k_order(logit: Tensor, index: Tensor, k: int) -> Tensor:
    """Where the ``k`` largest of ``[T, N]`` logits are, ``[T, k]``: descending, of equal ones smaller classes first.

    A class below 0 stands for no class, and comes last.
    """
    # Two stable sorts: by the class, then by what matters more.
    by_class = index.masked_fill(index < 0, NO_CLASS).argsort(dim=1, stable=True)
    by_logit = logit.gather(1, by_class).argsort(dim=1, descending=True, stable=True)
    return by_class.gather(1, by_logit[:, :k])

"""Losses of post-training, made of per-token numbers: a few lines of PyTorch each.

Every function takes plain tensors, such as the log-probabilities and entropies of each token, and gives plain tensors.
None knows a group or communicates: the ranks of a tensor-parallel group hold the same numbers and get the same loss.
Computation is in fp32, or fp64 where an argument is fp64.

Losses of tokens have one number per token, so that they can be added; :func:`aggregate_loss` makes them the one that is
minimised. GRPO with a penalty on the KL divergence and an entropy bonus is::

    loss = ppo_clip_loss(log_prob, old_log_prob, advantage, mask=mask) + 0.04 * k3_kl(log_prob, ref_log_prob, mask=mask)
    loss = aggregate_loss(loss - 0.001 * entropy, mask=mask, reduction="sequence_mean")

``mask`` is True for the tokens that count. What the others hold, NaN and infinities included, reaches neither the loss
nor a gradient; their losses and gradients are 0.
"""

import functools
import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

LossReduction = Literal["token_mean", "sequence_mean", "sum"]
SequenceReduction = Literal["sum", "mean"]


def ppo_clip_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    *,
    mask: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    r"""Clipped surrogate loss of PPO and GRPO for each token.

    .. math:: -\min(\rho A, \operatorname{clip}(\rho, 1 - \epsilon_{low}, 1 + \epsilon_{high}) A), \qquad
        \rho = \exp(\text{log\_prob} - \text{old\_log\_prob})

    Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv:1707.06347, equation 7; inside the sums of
    equation 3 of Shao et al. 2024, DeepSeekMath, arXiv:2402.03300; two bounds as in Yu et al. 2025, DAPO,
    arXiv:2503.14476, section 3.1. With the mean log-probabilities of whole sequences, :func:`sequence_log_prob`, in
    place of tokens, it is GSPO (Zheng et al. 2025, arXiv:2507.18071).

    A ratio beyond the clip has gradient 0 however large it is. A negative advantage has no upper clip: its loss grows
    like the ratio, to infinity where the ratio leaves fp32 (a difference of log-probabilities above 88).

    Args:
        log_prob: ``(*, L)`` log-probabilities of the sampled tokens.
        old_log_prob: ``(*, L)`` those of the policy that sampled them; a constant. ``log_prob`` itself gives the plain
            policy gradient.
        advantage: ``(*, L)`` for each token, or ``(*)`` or ``(*, 1)`` for each sequence; a constant.
        mask: ``(*, L)`` bool, True for tokens that count. Default: all.
        clip_low: with a negative advantage, a ratio below ``1 − clip_low`` has no gradient; in [0, 1).
        clip_high: with a positive advantage, a ratio above ``1 + clip_high`` has no gradient; at least 0.

    Returns:
        ``(*, L)`` losses, 0 at masked tokens.

    Raises:
        TypeError: an argument is no floating-point tensor, or ``mask`` no bool tensor.
        ValueError: shapes do not fit together, or a bound is out of its range.
    """
    if not 0 <= clip_low < 1:
        raise ValueError(f"clip_low must be in [0, 1), got {clip_low!r}")
    if not clip_high >= 0:
        raise ValueError(f"clip_high must be at least 0, got {clip_high!r}")
    log_prob, old_log_prob = _tensors_of_one_shape(mask, log_prob=log_prob, old_log_prob=old_log_prob)
    advantage = _floating_point("advantage", advantage)
    shape = tuple(log_prob.shape)
    if tuple(advantage.shape) not in (shape, shape[:-1], (*shape[:-1], 1)):
        raise ValueError(
            f"advantage must have log_prob's shape {shape}, or {shape[:-1]} or {(*shape[:-1], 1)} for one per "
            f"sequence, got {tuple(advantage.shape)}"
        )
    if advantage.ndim < log_prob.ndim:
        advantage = advantage.unsqueeze(-1)
    advantage = _zero_where_masked(advantage.detach(), mask)
    # Clipped before exp: autograd multiplies the 0 of a clipped ratio with the ratio, which may be infinite.
    log_ratio = log_prob - old_log_prob.detach()
    at_most = log_ratio.clamp(max=math.log1p(clip_high))
    at_least = log_ratio.clamp(min=math.log1p(-clip_low))
    return -advantage * torch.where(advantage >= 0, at_most, at_least).exp()


def k3_kl(log_prob: Tensor, ref_log_prob: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""Estimate of the KL divergence from a reference policy, for each token.

    .. math:: \exp(r) - 1 - r, \qquad r = \text{ref\_log\_prob} - \text{log\_prob}

    Estimator k3 of Schulman 2020, Approximating KL Divergence, http://joschu.net/blog/kl-approx.html; equation 4 of
    Shao et al. 2024, arXiv:2402.03300. It is never negative, and its mean over tokens sampled from the policy is
    KL(policy ‖ reference).

    Its gradient on such tokens is, in the mean, that of KL(reference ‖ policy), the other direction (see
    ``docs/losses.md``). Both vanish where the policies agree. Infinite where ``r`` is above 88 in fp32.

    Args:
        log_prob: ``(*)`` log-probabilities of the sampled tokens.
        ref_log_prob: ``(*)`` those of the reference policy; a constant.
        mask: ``(*)`` bool, True for tokens that count. Default: all.

    Returns:
        ``(*)`` estimates, 0 at masked tokens.

    Raises:
        TypeError: an argument is no floating-point tensor, or ``mask`` no bool tensor.
        ValueError: shapes differ.
    """
    log_prob, ref_log_prob = _tensors_of_one_shape(mask, log_prob=log_prob, ref_log_prob=ref_log_prob)
    log_ratio = ref_log_prob.detach() - log_prob
    # exp(r) − 1 loses all digits of r²/2, which is what remains, for small r. And ∞ − ∞ is none.
    return torch.expm1(log_ratio) - log_ratio.clamp(max=torch.finfo(log_ratio.dtype).max)


def aggregate_loss(loss: Tensor, *, mask: Tensor | None = None, reduction: LossReduction = "token_mean") -> Tensor:
    """One number of the losses of all tokens.

    - ``"token_mean"``: the mean over all tokens that count (Yu et al. 2025, DAPO, arXiv:2503.14476, section 3.3).
    - ``"sequence_mean"``: the mean over the tokens of each sequence, then over the sequences that have any (Shao et al.
      2024, DeepSeekMath, arXiv:2402.03300, equation 3).
    - ``"sum"``: for a divisor of the caller's own: the number of tokens of all micro-batches and data-parallel ranks,
      or a constant as in Dr. GRPO (Liu et al. 2025, arXiv:2503.20783).

    Args:
        loss: ``(*, L)`` losses of tokens; the last dimension is a sequence. Losses of whole sequences, ``(B,)``, are
            averaged by ``"token_mean"``.
        mask: ``(*, L)`` bool, True for tokens that count. Default: all.
        reduction: see above.

    Returns:
        A scalar; 0 with zero gradients if no token counts.

    Raises:
        TypeError: ``loss`` is no floating-point tensor, or ``mask`` no bool tensor.
        ValueError: shapes differ, or ``reduction`` is none of the three.
    """
    if reduction not in get_args(LossReduction):
        raise ValueError(f"reduction must be one of {get_args(LossReduction)}, got {reduction!r}")
    (loss,) = _tensors_of_one_shape(mask, loss=loss)
    if reduction == "sum":
        return loss.sum()
    mask = torch.ones_like(loss, dtype=torch.bool) if mask is None else mask
    if reduction == "sequence_mean":
        loss, mask = _mean(loss, mask, -1), mask.any(dim=-1)
    return _mean(loss, mask, None)


def group_advantage(reward: Tensor, *, normalize: bool = True, eps: float = 1e-6) -> Tensor:
    """Advantages of GRPO: how much better each answer is than the mean of the answers to the same question.

    ``(reward − mean) / (std + eps)`` within each group; Shao et al. 2024, DeepSeekMath, arXiv:2402.03300, section
    4.1.2. The standard deviation has ``G − 1`` in its divisor. Equal rewards give exactly 0.

    Args:
        reward: ``(*, G)`` rewards of the ``G >= 2`` answers to each question.
        normalize: divide by the standard deviation. Dr. GRPO (Liu et al. 2025, arXiv:2503.20783) does not.
        eps: added to the standard deviation; in units of the reward, at least 0.

    Returns:
        ``(*, G)`` advantages, one for each answer.

    Raises:
        TypeError: ``reward`` is no floating-point tensor.
        ValueError: a group has fewer than two answers, or ``eps`` is negative.
    """
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps!r}")
    reward = _floating_point("reward", reward)
    if reward.ndim < 1 or reward.shape[-1] < 2:
        raise ValueError(f"reward must have shape (*, G) with G >= 2, got {tuple(reward.shape)}")
    # The mean of equal rewards may differ from them by rounding, and dividing by eps would make that an advantage.
    reward = reward - reward[..., :1]
    centered = reward - reward.mean(dim=-1, keepdim=True)
    return centered / (reward.std(dim=-1, keepdim=True) + eps) if normalize else centered


def sequence_log_prob(log_prob: Tensor, *, mask: Tensor | None = None, reduction: SequenceReduction = "sum") -> Tensor:
    """Log-probability of each sequence: the sum over its tokens, or their mean.

    Args:
        log_prob: ``(*, L)`` log-probabilities of tokens; the last dimension is a sequence.
        mask: ``(*, L)`` bool, True for tokens that count, as those of the answer and not of the prompt. Default: all.
        reduction: ``"sum"``, as DPO takes it; ``"mean"``: divided by the number of tokens that count, as GSPO takes it.

    Returns:
        ``(*)`` log-probabilities; 0 for a sequence without tokens that count.

    Raises:
        TypeError: ``log_prob`` is no floating-point tensor, or ``mask`` no bool tensor.
        ValueError: shapes differ, or ``reduction`` is none of the two.
    """
    if reduction not in get_args(SequenceReduction):
        raise ValueError(f"reduction must be one of {get_args(SequenceReduction)}, got {reduction!r}")
    (log_prob,) = _tensors_of_one_shape(mask, log_prob=log_prob)
    if reduction == "sum":
        return log_prob.sum(dim=-1)
    mask = torch.ones_like(log_prob, dtype=torch.bool) if mask is None else mask
    return _mean(log_prob, mask, -1)


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Direct Preference Optimization: the loss of each pair of answers.

    .. math:: -(1 - \epsilon) \log \sigma(\Delta) - \epsilon \log \sigma(-\Delta), \qquad \Delta = \beta\,
        [(\text{policy\_chosen} - \text{ref\_chosen}) - (\text{policy\_rejected} - \text{ref\_rejected})]

    Rafailov et al. 2023, Direct Preference Optimization, arXiv:2305.18290, equation 7. With
    :math:`\epsilon` = ``label_smoothing``, the probability that a label is wrong, it is the conservative DPO of
    Mitchell 2023, A note on DPO with noisy preferences & relationship to IPO.

    Args:
        policy_chosen: ``(*)`` log-probability of each preferred answer, :func:`sequence_log_prob`.
        policy_rejected: ``(*)`` that of the other answer.
        ref_chosen: ``(*)`` log-probability of the preferred answer under the reference policy; a constant.
        ref_rejected: ``(*)`` that of the other answer; a constant.
        beta: how strongly the policy is held to the reference, above 0.
        label_smoothing: probability that a pair is in the wrong order, in [0, 0.5).

    Returns:
        ``(*)`` losses of the pairs.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: shapes differ, or a number is out of its range.
    """
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta!r}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing!r}")
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = _tensors_of_one_shape(
        None,
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
    )
    margin = beta * ((policy_chosen - ref_chosen.detach()) - (policy_rejected - ref_rejected.detach()))
    loss = -(1 - label_smoothing) * F.logsigmoid(margin)
    # Not 0 times a logarithm that may be infinite.
    return loss - label_smoothing * F.logsigmoid(-margin) if label_smoothing > 0 else loss


def top_k_distillation_loss(log_prob: Tensor, teacher_log_prob: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""Forward KL divergence from a teacher of whom ``K`` classes per token are stored, for each token.

    .. math:: \sum_k q_k (\log q_k - \log p_k) + q_{tail} (\log q_{tail} - \log p_{tail}), \qquad
        q_{tail} = 1 - \sum_k q_k, \quad p_{tail} = 1 - \sum_k p_k

    with the teacher's probabilities :math:`q` and the student's :math:`p`. All other classes are one bucket, so the
    student learns how much probability they have together, and nothing is renormalised. It is the divergence of two
    coarser distributions, hence a lower bound of the full one (log sum inequality: Cover and Thomas, Elements of
    Information Theory, second edition, theorem 2.7.1), equal to it where the ``K`` classes are all, or where ``q / p``
    is the same for all classes of the tail.

    Where the ``K`` classes hold all of the probability up to rounding, the logarithm of the tail is continued by a
    straight line (see ``docs/losses.md``): loss and gradient stay finite, and the pull on a tail that the student has
    lost fades with what is left of it.

    Args:
        log_prob: ``(*, K)`` the student's log-probabilities of the stored classes, over the full vocabulary.
        teacher_log_prob: ``(*, K)`` the teacher's, over the full vocabulary and at the same temperature; a constant.
            The classes of a token are distinct. An entry of −inf is unused: its class belongs to the tail, whatever
            ``log_prob`` holds there.
        mask: ``(*)`` bool, True for tokens that count. Default: all.

    Returns:
        ``(*)`` losses, 0 at masked tokens.

    Raises:
        TypeError: an argument is no floating-point tensor, or ``mask`` no bool tensor.
        ValueError: shapes do not fit together.
    """
    log_p, log_q = _tensors_of_one_shape(None, log_prob=log_prob, teacher_log_prob=teacher_log_prob)
    if log_p.ndim < 1:
        raise ValueError("log_prob must have shape (*, K), got ()")
    used = log_q != -math.inf
    if mask is not None:
        _check_mask(mask, log_p.shape[:-1])
        used = used & mask.unsqueeze(-1)  # all of a masked token is tail: the divergence of 1 from 1
    log_p, log_q = _zero_where_masked(log_p, used), _zero_where_masked(log_q.detach(), used)
    p, q = log_p.exp() * used, log_q.exp() * used
    # Where q underflows, its term is 0 even if the student's logarithm is infinite.
    head = (q * torch.where(q == 0, 0.0, log_q - log_p)).sum(dim=-1)
    mass, teacher_mass = p.sum(dim=-1), q.sum(dim=-1)
    teacher_tail = (1 - teacher_mass).clamp(min=0)
    # A log-probability is the difference of a logit and the logsumexp. Below 128, each is rounded by up to 2⁵ eps, so
    # 1 − mass is uncertain by 2⁶ eps, of the less precise side. Where it is less than twice that, its reciprocal, which
    # scales the gradients, would be noise.
    eps = max(torch.finfo(_at_least_fp32(tensor.dtype)).eps for tensor in (log_prob, teacher_log_prob))
    return head + teacher_tail * (_log_complement(teacher_mass, 2**7 * eps) - _log_complement(mass, 2**7 * eps))


def _log_complement(mass: Tensor, floor: float) -> Tensor:
    """``log(1 − mass)``; where less than ``floor`` remains, the tangent of log at ``floor``, also if ``mass > 1``."""
    limit = 1 - floor
    return torch.log1p(-mass.clamp(max=limit)) - F.relu(mass - limit) / floor


def megatron_label_smoothing(label_smoothing: float, vocab_size: int) -> float:
    """The ``label_smoothing`` that gives Megatron-Core's loss for its own setting of that name.

    Megatron spreads the probability over the other ``V − 1`` classes and leaves ``1 − label_smoothing`` to the target.
    In torch's definition, where the target gets a share as well, that is ``label_smoothing · V / (V − 1)``
    (``megatron/core/tensor_parallel/cross_entropy.py``).

    Raises:
        ValueError: if ``vocab_size`` is not above 1, or ``label_smoothing`` is not in [0, (V − 1) / V].
    """
    if vocab_size <= 1:
        raise ValueError(f"vocab_size must be above 1, got {vocab_size}")
    if not 0 <= label_smoothing <= (vocab_size - 1) / vocab_size:
        raise ValueError(f"label_smoothing must be in [0, (V - 1) / V], got {label_smoothing}")
    return label_smoothing * vocab_size / (vocab_size - 1)


def _mean(values: Tensor, mask: Tensor, dim: int | None) -> Tensor:
    """Mean along ``dim`` (None: of all) of values that are 0 where the mask is False; 0 where nothing counts."""
    return values.sum(dim=dim) / mask.sum(dim=dim).clamp(min=1)


def _zero_where_masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else torch.where(mask, values, 0.0)


def _tensors_of_one_shape(mask: Tensor | None, **tensors: Tensor) -> list[Tensor]:
    """Check that all are floating-point tensors like the first; in the widest of their dtypes, fp32 at least, and 0
    where the mask is False."""
    (first, like), *_ = tensors.items()
    values = [_floating_point(name, tensor) for name, tensor in tensors.items()]
    for name, tensor in tensors.items():
        if tensor.shape != like.shape:
            raise ValueError(f"{name} must have {first}'s shape {tuple(like.shape)}, got {tuple(tensor.shape)}")
    if mask is not None:
        _check_mask(mask, like.shape)
    dtype = functools.reduce(torch.promote_types, (value.dtype for value in values))
    return [_zero_where_masked(value.to(dtype), mask) for value in values]


def _floating_point(name: str, tensor: Tensor) -> Tensor:
    """The tensor in fp32, or fp64 if it is."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
    return tensor.to(_at_least_fp32(tensor.dtype))


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check_mask(mask: Tensor, shape: torch.Size) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.shape != shape:
        raise ValueError(f"mask must have the tokens' shape {tuple(shape)}, got {tuple(mask.shape)}")

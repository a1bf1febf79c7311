"""The public functions: resolve the arguments, apply the autograd function, make the outputs."""

import math
from collections.abc import Collection
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from typing_extensions import Unpack

from vocab_parallel_fused.arguments import (
    Head,
    LinearArguments,
    check_cover,
    check_shards,
    resolve_class_weight,
    resolve_head,
    resolve_number,
    resolve_target,
    resolve_teacher,
    resolve_token_weight,
)
from vocab_parallel_fused.autograd import (
    cross_entropy_without_options,
    token_divergences,
    token_stats,
    top_k_classes,
)
from vocab_parallel_fused.collectives import Group
from vocab_parallel_fused.cross_entropy import cross_entropy, reduce_tokens
from vocab_parallel_fused.divergence import Divergence
from vocab_parallel_fused.options import ComputeOptions
from vocab_parallel_fused.sharding import VocabShard
from vocab_parallel_fused.stats import TokenStats, Wanted, top_k_order

Reduction = Literal["none", "mean", "sum"]

_LARGEST_K = 128


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    temperature: float = 1.0,
    group: Group = None,
    shard: VocabShard | None = None,
    sequence_parallel: bool = False,
    options: ComputeOptions | None = None,
) -> Tensor:
    r"""Cross-entropy of a linear layer whose classes are sharded over a group, without ever storing its logits.

    :func:`torch.nn.functional.linear_cross_entropy` for a sharded vocabulary. With
    :math:`a_{tj} = x_t \cdot w_j + b_j` over the rows of *all* ranks and logits

    .. math:: z_{tj} = \mathit{softcap} \cdot \tanh(\mathit{scale} \cdot a_{tj} / \mathit{softcap}) /
        \mathit{temperature}

    (without a soft cap, :math:`z = \mathit{scale} \cdot a / \mathit{temperature}`), the loss of token :math:`t` is
    :math:`\mathit{lse}_t - z_{t y_t}`, :math:`\mathit{lse}_t = \log \sum_j \exp z_{tj}`, and what the keywords below
    make of it.

    Every rank of ``group`` calls this with its own rows and gets the same loss, to the bit. Gradients are exact:
    ``linear_weight``'s and ``linear_bias``'s belong to the local rows and need no communication, ``input``'s is
    already summed over the group (so the caller must not reduce it again).

    Communication: one all-gather of a few numbers per token in the forward and one all-reduce of ``input``'s
    gradient in the backward. Under sequence parallelism also one all-gather of the hidden states in each (with
    ``options.keep_gathered_hidden`` in the forward only), and the all-reduce is a reduce-scatter. Extra memory:
    ``O(T)`` and a fixed tile or buffer of a few MiB in the forward; in the backward ``options.workspace_bytes``
    plus, for 16-bit inputs, an fp32 sum of ``input``'s gradient, or of ``linear_weight``'s if that is smaller (neither
    with an fp32 ``main_grad``; in float16 always the first). To this add the gathered hidden states under sequence
    parallelism, a copy of the weight where autocast changes its dtype, ``options.exp_cache_bytes``, and with Triton's
    kernels, where the rows of ``input`` or ``linear_weight`` do not start at multiples of 32 bytes, a copy of ``input``
    or of 32 MiB of rows.

    Args:
        input: ``(*, H)`` hidden states, the same on every rank; with ``sequence_parallel`` this rank's part of dim 0.
        linear_weight: ``(V_local, H)``, this rank's rows, in ``input``'s dtype. Under ``torch.autocast`` both are cast
            as :func:`torch.nn.functional.linear` would.
        target: ``(*)`` int64 global class ids of all tokens, the same on every rank.
        linear_bias: ``(V_local,)`` bias of the local rows, in ``input``'s dtype or in fp32; autocast leaves it alone.
        weight: ``(V,)`` weights of the classes, all of them on every rank, as in torch: the loss of a token is times
            the weight of its target, the smoothing's terms times those of their classes. No gradient.
        token_weight: weights of the tokens, shaped like ``target``: the loss of each is times its weight.
            Differentiable.
        reduction: ``"none"``: one loss per token, shaped like ``target``; ``"sum"``; ``"mean"``: divided by the number
            of tokens that are not ignored, or the sum of their weights: of ``token_weight`` times the targets'
            ``weight`` for the cross-entropy, of ``token_weight`` for the z-loss.
        ignore_index: tokens with this target have loss 0 and no gradient.
        label_smoothing: in [0, 1], torch's definition over all real classes: the target's probability is
            ``1 - label_smoothing`` and each class, the target among them, gets ``label_smoothing / V``. For Megatron's
            see :func:`vocab_parallel_fused.losses.megatron_label_smoothing`.
        z_loss_weight: adds ``z_loss_weight · lse²`` (Chowdhery et al. 2022, PaLM, arXiv:2204.02311, section 5).
        logit_scale: factor of the logits before the soft cap.
        logit_softcap: bound of the logits (Gemma Team 2024, Gemma 2, arXiv:2408.00118, section 2).
        temperature: divides the logits, after the soft cap.
        group: process group or one-dimensional device mesh over which the vocabulary is sharded. None: one rank that
            holds all rows.
        shard: which rows this rank holds. Default: equal shards in rank order, no padding.
        sequence_parallel: dim 0 of ``input`` is sharded over the group, in rank order: as many tokens on every rank,
            which is not checked where no target says how many there are.
        options: how to compute. Default: :class:`~vocab_parallel_fused.ComputeOptions`\ ``()``.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs), whatever the inputs' dtype. Unlike torch's, the mean over zero valid
        tokens is 0 with zero gradients. With more than one rank the loss requires a gradient even if every input is
        frozen on this rank, because the others wait for it in the backward.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or shards do not fit together, or (on the CPU) a target is no class id. On CUDA such
            a target is an asynchronous device assertion, as in torch, since reading it would stall the device.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}")
    label_smoothing = resolve_number("label_smoothing", label_smoothing, largest=1.0)
    z_loss_weight = resolve_number("z_loss_weight", z_loss_weight)
    head = resolve_head(
        input,
        linear_weight,
        linear_bias=linear_bias,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        temperature=temperature,
        group=group,
        shard=shard,
        sequence_parallel=sequence_parallel,
        options=options,
    )
    labels = resolve_target(target, ignore_index, head)
    class_weight = resolve_class_weight(weight, head)
    weight_of_tokens = resolve_token_weight(token_weight, head)
    if weight is None and token_weight is None and label_smoothing == z_loss_weight == 0:
        loss = _loss_without_options(head, labels, ignore_index, reduction)
        return loss.view(target.shape) if reduction == "none" else loss
    stats = _token_stats(head, labels, ignore_index, Wanted(logit_sum=label_smoothing > 0), class_weight)
    loss = cross_entropy(
        stats,
        labels[:, 0],
        labels[:, 0] != ignore_index,
        head.plan.shard.vocab_size,
        class_weight=class_weight,
        token_weight=weight_of_tokens,
        label_smoothing=label_smoothing,
        z_loss_weight=z_loss_weight,
        reduction=reduction,
    )
    return loss.view(target.shape) if reduction == "none" else loss


class LinearTokenStats(NamedTuple):
    """Numbers per token, fp32 (fp64 for fp64 inputs); None: not asked for."""

    log_prob: Tensor | None
    """Log-probability of the target, 0 if it is ignored. Shaped like ``target``."""

    entropy: Tensor | None
    """``−Σ_j p_j log p_j`` in nats."""

    lse: Tensor | None
    """``log Σ_j exp z_j``."""

    target_logit: Tensor | None
    """``z_y``, 0 if the target is ignored. Shaped like ``target``."""

    argmax: Tensor | None
    """Int64 id of the most probable class, the smallest of several; −1 where the logits hold a NaN or +∞. No
    gradient."""

    argmax_logit: Tensor | None
    """The largest logit. No gradient."""

    target_is_argmax: Tensor | None
    """Bool, whether the target is that class; False if it is ignored. Shaped like ``target``."""


_OF_TARGET = ("log_prob", "target_logit", "target_is_argmax")


def linear_token_stats(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None = None,
    *,
    outputs: Collection[str] | None = None,
    ignore_index: int = -100,
    **arguments: Unpack[LinearArguments],
) -> LinearTokenStats:
    r"""Log-probabilities, entropies and more of a linear layer whose classes are sharded over a group.

    What training after pre-training is made of: each output is one number per token, exact over the whole vocabulary
    and the same on every rank, and every real-valued one but ``argmax_logit`` is differentiable, alone or with others.
    No logits are stored. Memory, communication and cost are nearly those of :func:`linear_cross_entropy`: an entropy
    adds one number per token to what is sent, an argmax a second message, and each further target of a token two
    numbers. With an entropy ``options.exp_cache_bytes`` is not used, so ask for what is needed only.

    Args:
        input, linear_weight: as in :func:`linear_cross_entropy`.
        target: ``(*)`` int64 global class ids of all tokens, or ``(*, K)``: ``K`` classes of each token, of which
            the outputs that concern the target then have one each. None: such outputs are not available.
        outputs: names of the fields of :class:`LinearTokenStats` to compute. Default: all that are available.
        ignore_index: targets to leave out.
        **arguments: ``linear_bias``, ``logit_scale``, ``logit_softcap``, ``temperature``, ``group``, ``shard``,
            ``sequence_parallel`` and ``options`` as in :func:`linear_cross_entropy`.

    Raises:
        TypeError, ValueError: as in :func:`linear_cross_entropy`; or ``outputs`` holds an unknown name, or one that
            needs a target without one.
    """
    names = _resolve_outputs(outputs, has_target=target is not None)
    head = resolve_head(input, linear_weight, **arguments)
    if target is None:
        labels = head.hidden.new_empty(math.prod(head.token_shape), 0, dtype=torch.int64)
        labels_shape = head.token_shape
    else:
        labels = resolve_target(target, ignore_index, head, several=True)
        labels_shape = target.shape
    wanted = Wanted(expected_logit="entropy" in names, argmax=not names.isdisjoint({"argmax", "target_is_argmax"}))
    values: dict[str, Tensor | None] = dict.fromkeys(LinearTokenStats._fields)
    if names == {"log_prob"} and labels.shape[1] == 1:
        # From 0, which leaves 0 where the target is ignored.
        values["log_prob"] = (0 - _loss_without_options(head, labels, ignore_index, "none")).view(labels_shape)
        return LinearTokenStats(**values)
    # A target's logit takes a product with its row; to compare its id takes nothing.
    num_logits = 0 if names.isdisjoint({"log_prob", "target_logit"}) else labels.shape[1]
    stats = _token_stats(head, labels[:, :num_logits], ignore_index, wanted)
    valid = labels != ignore_index
    if "log_prob" in names:
        values["log_prob"] = torch.where(valid, stats.target_logit - stats.lse[:, None], 0.0).view(labels_shape)
    if "target_logit" in names:
        target_logit = torch.where(valid, stats.target_logit + stats.max_logit[:, None], 0.0)
        values["target_logit"] = target_logit.view(labels_shape)
    if "lse" in names:
        values["lse"] = (stats.lse + stats.max_logit).view(head.token_shape)
    if "argmax_logit" in names:
        values["argmax_logit"] = stats.max_logit.view(head.token_shape).clone()  # the backward needs its own
    if stats.expected_logit is not None:
        values["entropy"] = (stats.lse - stats.expected_logit).view(head.token_shape)
    if stats.argmax is not None and "argmax" in names:
        values["argmax"] = stats.argmax.view(head.token_shape)
    if stats.argmax is not None and "target_is_argmax" in names:
        values["target_is_argmax"] = (valid & (labels == stats.argmax[:, None])).view(labels_shape)
    return LinearTokenStats(**values)


class LinearTopK(NamedTuple):
    """The most probable classes of each token, in descending order."""

    log_prob: Tensor
    """``(*, k)`` their log-probabilities over all classes, fp32 (fp64 for fp64 inputs). Differentiable."""

    class_id: Tensor
    """``(*, k)`` int64 global ids."""


def linear_top_k(input: Tensor, linear_weight: Tensor, k: int, **arguments: Unpack[LinearArguments]) -> LinearTopK:
    r"""The ``k`` most probable classes of a linear layer whose classes are sharded over a group.

    What distillation stores of a teacher. Two passes over the classes: one selects, block by block of logits in
    ``options.workspace_bytes``; the other is :func:`linear_token_stats` of what it selected. Every rank gets the same
    classes, of several equal logits those of smaller ids. Communication: the ``k`` largest logits of each shard and
    their ids, then as :func:`linear_token_stats`.

    Args:
        input, linear_weight: as in :func:`linear_cross_entropy`.
        k: how many, at most 128 and at most the number of classes.
        **arguments: as in :func:`linear_token_stats`.

    Raises:
        TypeError, ValueError: as in :func:`linear_cross_entropy`, or ``k`` is out of its range.
    """
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k must be an int, got {k!r}")
    head = resolve_head(input, linear_weight, **arguments)
    largest = min(_LARGEST_K, head.plan.shard.vocab_size)
    if not 1 <= k <= largest:
        raise ValueError(f"k must be in [1, {largest}], got {k}")
    index = top_k_classes(head.hidden, head.weight, head.bias, k, head.plan)  # pyright: ignore[reportCallIssue]
    stats = _token_stats(head, index, -1, Wanted())
    # Selected from one product and computed by another, neighbours may have changed places by rounding.
    order = top_k_order(stats.target_logit.detach(), index, k)
    log_prob = (stats.target_logit - stats.lse[:, None]).gather(1, order)
    shape = (*head.token_shape, k)
    return LinearTopK(log_prob.view(shape), index.gather(1, order).view(shape))


def linear_distillation(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    *,
    divergence: Divergence = "forward_kl",
    teacher_bias: Tensor | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_logit_softcap: float | None = None,
    token_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    **arguments: Unpack[LinearArguments],
) -> Tensor:
    r"""Divergence of a student's distribution from a teacher's over the full vocabulary, without either's logits.

    With :math:`p` the student's probabilities and :math:`q` the teacher's, the loss of a token is

    - ``"forward_kl"``: :math:`\mathrm{KL}(q \| p) = \sum_j q_j \log (q_j / p_j)` (Hinton et al. 2015,
      arXiv:1503.02531, up to the teacher's entropy, a constant);
    - ``"reverse_kl"``: :math:`\mathrm{KL}(p \| q)` (Gu et al. 2023, MiniLLM, arXiv:2306.08543);
    - ``"jensen_shannon"``: :math:`(\mathrm{KL}(p \| m) + \mathrm{KL}(q \| m)) / 2`, :math:`m = (p + q) / 2` (Lin 1991,
      Divergence measures based on the Shannon entropy, equation 4.1; at most :math:`\log 2`).

    Both heads are sharded over the group in the same way. A KL divergence takes one pass that reads both shards, the
    Jensen–Shannon divergence, which needs normalised probabilities, a second one. The teacher is a constant: its
    tensors get no gradient, also if they require one. Communication, memory and the student's gradients are as in
    :func:`linear_cross_entropy`; under sequence parallelism the teacher's hidden states are gathered as well.

    Args:
        input, linear_weight: the student's, as in :func:`linear_cross_entropy`.
        teacher_input: ``(*, H_teacher)`` the teacher's hidden states of the same tokens, sharded as ``input`` is.
        teacher_weight: ``(V_local, H_teacher)`` the teacher's rows for the same classes, in the same dtype.
        divergence: see above.
        teacher_bias: ``(V_local,)``.
        teacher_logit_scale, teacher_logit_softcap: as the student's; both have one ``temperature``.
        token_weight: weights of all tokens, shaped as ``input`` without its last dimension (with
            ``sequence_parallel``, dim 0 of all ranks together); 0 leaves a token out of the loss, whatever it holds,
            and has no gradient.
        reduction: ``"none"``, ``"sum"``, or ``"mean"``: divided by the sum of the weights.
        **arguments: as in :func:`linear_token_stats`, of the student or of both.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs). For the gradient to keep its size at any temperature, multiply by its
        square (Hinton et al. 2015, section 2).

    Raises:
        TypeError, ValueError: as in :func:`linear_cross_entropy`.
    """
    for name, value, choices in (("reduction", reduction, Reduction), ("divergence", divergence, Divergence)):
        if value not in get_args(choices):
            raise ValueError(f"{name} must be one of {get_args(choices)}, got {value!r}")
    head = resolve_head(input, linear_weight, **arguments)
    teacher = resolve_teacher(
        teacher_input, teacher_weight, teacher_bias, teacher_logit_scale, teacher_logit_softcap, head
    )
    token_weight = resolve_token_weight(token_weight, head)
    inputs = (head.hidden, head.weight, head.bias, teacher, divergence)
    loss, num_classes = token_divergences(*inputs, head.plan)  # pyright: ignore[reportCallIssue]
    check_shards(num_classes, head.plan.shard)
    valid = torch.ones_like(loss, dtype=torch.bool)
    if token_weight is not None:
        valid = token_weight != 0
        loss = torch.where(valid, loss, 0.0)
    loss = reduce_tokens(loss, None, token_weight, valid, reduction)
    return loss.view(head.token_shape) if reduction == "none" else loss


def _resolve_outputs(outputs: Collection[str] | None, *, has_target: bool) -> set[str]:
    available = [name for name in LinearTokenStats._fields if has_target or name not in _OF_TARGET]
    if outputs is None:
        return set(available)
    if isinstance(outputs, str) or not isinstance(outputs, Collection):
        raise TypeError(f"outputs must be a collection of names, got {outputs!r}")
    for name in outputs:
        if name not in LinearTokenStats._fields:
            raise ValueError(f"outputs must be among {LinearTokenStats._fields}, got {name!r}")
        if name not in available:
            raise ValueError(f"target must be given for the output {name!r}, got None")
    return set(outputs)


def _loss_without_options(head: Head, labels: Tensor, ignore_index: int, reduction: Reduction) -> Tensor:
    """The cross-entropy ``[T]`` or ``[]`` for labels ``[T, 1]``."""
    layer = (head.hidden, head.weight, head.bias)
    loss, owners, covered, num_classes = cross_entropy_without_options(
        *layer, labels, ignore_index, reduction, head.plan
    )  # pyright: ignore[reportCallIssue]
    check_cover(covered, owners, num_classes, labels, ignore_index, head.plan.shard)
    return loss


def _token_stats(
    head: Head, labels: Tensor, ignore_index: int, wanted: Wanted, class_weight: Tensor | None = None
) -> TokenStats:
    """Statistics of all tokens for labels ``[T, K]``; class weights ``[V]`` are those of the wanted ``logit_sum``."""
    shard = head.plan.shard
    if class_weight is not None:
        class_weight = class_weight[shard.start : shard.start + shard.num_valid_rows] if wanted.logit_sum else None
    inputs = (head.hidden, head.weight, head.bias, labels, class_weight, wanted, ignore_index)
    stats, owners, covered, num_classes = token_stats(*inputs, head.plan)  # pyright: ignore[reportCallIssue]
    check_cover(covered, owners, num_classes, labels, ignore_index, shard)
    return stats

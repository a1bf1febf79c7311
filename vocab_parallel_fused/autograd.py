"""The autograd functions: the order of the steps and what is saved. They compute nothing themselves.

    forward     [gather_hidden]  →  local_stats  →  gather_stats             →  parts, merged: TokenStats, or the loss
    backward    [gather_hidden]  →  local_grads  →  reduce_hidden_grad       →  dhidden, dweight, dbias

Steps in brackets run under sequence parallelism only, beside what the next step does with this rank's own tokens; with
``keep_gathered_hidden`` the backward leaves its own out. The last step runs beside the end of the one before. On a
rank, with ``T`` tokens, ``K`` targets a token, ``R`` ranks:

    ============  ==================================================================================
    hidden        [T, H] replicated, or this rank's [T / R, H] under sequence parallelism; saved as it
                  came, or gathered
    weight, bias  [V_local, H], [V_local]; saved
    target        [T, K] global ids, replicated
    statistics    [T] or [T, K] each, replicated; saved, with the shard's own target_logit
    dhidden       as hidden: all-reduced once, or reduce-scattered once under sequence parallelism
    dweight       [V_local, H], complete on its rank, never communicated
    ============  ==================================================================================

Any loss is ordinary PyTorch on the statistics; what comes back is one upstream gradient per token and statistic.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.distributed import ProcessGroup

from vocab_parallel_fused.arrival import Arrival
from vocab_parallel_fused.collectives import (
    gather_hidden,
    gather_hidden_beside,
    gather_stats,
    gather_top_k,
    rank_and_size,
    reduce_hidden_grad,
    reduce_sums,
    reduction_bytes,
)
from vocab_parallel_fused.dispatch import Kernels
from vocab_parallel_fused.divergence import Divergence, kl_divergence
from vocab_parallel_fused.exp_cache import ExpCache
from vocab_parallel_fused.kernels.sweep import GradBuffers
from vocab_parallel_fused.sharding import VocabShard
from vocab_parallel_fused.stats import (
    DlogitsCoefficients,
    PartStats,
    TokenStats,
    Wanted,
    count_classes,
    dlogits_coefficients,
    merge_stats,
    stacked,
)
from vocab_parallel_fused.transform import LogitTransform, Operands, part_of

LocalGrads = Callable[[Operands, GradBuffers, Arrival | None], None]
"""The step of the backward that computes a shard's gradients of all tokens."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What every step needs beside the tensors of the linear layer, checked and resolved."""

    shard: VocabShard
    group: ProcessGroup | None
    sequence_parallel: bool
    keep_gathered_hidden: bool
    transform: LogitTransform
    kernels: Kernels
    workspace_bytes: int
    exp_cache_bytes: int
    combine: str
    main_grad: Tensor | None  # [V_local, H] fp32, takes dweight instead of the weight's grad

    @contextmanager
    def gathering(self, hidden: Tensor, *, again: bool = False) -> Iterator[tuple[Tensor, Arrival | None]]:
        """All tokens' hidden states, as :func:`gather_hidden_beside` returns them. In the end all have arrived.

        Args:
            hidden: this rank's, or what :meth:`to_save` saved of them.
            again: in the backward.
        """
        gathered, arrival = gather_hidden_beside(hidden, self.group) if self._gathers(again) else (hidden, None)
        try:
            yield gathered, arrival
        finally:  # after an error too: until then the memory is being written
            if arrival is not None:
                arrival.wait()

    def gather_hidden(self, hidden: Tensor, *, again: bool = False) -> Tensor:
        """As :meth:`gathering`, and waits."""
        return gather_hidden(hidden, self.group) if self._gathers(again) else hidden

    def _gathers(self, again: bool) -> bool:
        return self.sequence_parallel and not (again and self.keep_gathered_hidden)

    def to_save(self, hidden: Tensor, gathered: Tensor) -> Tensor:
        """What the backward starts from."""
        return gathered if self.keep_gathered_hidden else hidden

    def operands(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Operands:
        """All tokens' hidden states, and the shard's rows without padding."""
        rows = slice(0, self.shard.num_valid_rows)
        return Operands(hidden, part_of(weight, rows), None if bias is None else part_of(bias, rows), self.transform)


class _GatheredStats(NamedTuple):
    """What the forward finds, and the backward starts from."""

    hidden: Tensor  # to save
    parts: PartStats
    sizes: Tensor | None  # as `gather_stats` returns them
    target_row: Tensor  # [T, K] rows of this shard, or numbers that are none
    target_logit: Tensor | None  # [T, K] of this shard; None: it holds all classes, in several parts
    cache: ExpCache | None


def _gathered_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    wanted: Wanted,
    exp_cache_bytes: int,
    plan: Plan,
) -> _GatheredStats:
    """The statistics of all ranks, one part of each; a single one's may be several."""
    shard, several_ranks = plan.shard, rank_and_size(plan.group)[1] > 1
    target_row = shard.local_rows(target)
    with plan.gathering(hidden) as (full_hidden, arrival):
        head = plan.operands(full_hidden, weight, bias)
        local, cache = plan.kernels.local_stats(
            head, target_row, class_weight, wanted, exp_cache_bytes, arrival, one_part=several_ranks
        )
    if local.argmax is not None and shard.start > 0:
        local = local._replace(argmax=local.argmax + shard.start)
    target_logit = local.target_logit[0] if len(local.target_logit) == 1 else None
    parts, sizes = gather_stats(local, shard.num_valid_rows, shard.vocab_size, plan.group, plan.combine)
    return _GatheredStats(plan.to_save(hidden, full_hidden), parts, sizes, target_row, target_logit, cache)


class _TokenStatsFunction(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        class_weight: Tensor | None,
        wanted: Wanted,
        ignore_index: int,
        exp_cache_bytes: int,
        plan: Plan,
        anchor: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        del anchor  # see token_stats
        with _local_steps(hidden):
            hidden, parts, sizes, target_row, target_logit, cache = _gathered_stats(
                hidden, weight, bias, target, class_weight, wanted, exp_cache_bytes, plan
            )
            merged = plan.kernels.token_stats(parts, sizes, target, plan.shard.vocab_size, ignore_index)
        whole, stats, covered, num_classes = merged
        if target_logit is None:
            target_logit = whole.target_logit
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        of_whole = (whole.max_logit, whole.sum_exp, whole.sum_exp_logit)
        # The target for its version alone: where the shard starts at 0 it is `target_row` itself, and a change of it in
        # place would be an error there and leave the other ranks waiting.
        of_tokens = (target, target_row, target_logit)
        ctx.save_for_backward(hidden, weight, bias, *of_tokens, class_weight, *of_whole, *(cache or ()))
        ctx.mark_non_differentiable(
            *(t for t in (stats.max_logit, stats.argmax, whole.owners, covered, num_classes) if t is not None)
        )
        return *stats, whole.owners, covered, num_classes

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        _grad_max_logit: None,
        grad_lse: Tensor | None,
        grad_target_logit: Tensor | None,
        grad_logit_sum: Tensor | None,
        grad_expected_logit: Tensor | None,
        *_grads: None,
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, _, target_row, target_logit, class_weight, *of_whole = ctx.saved_tensors
        max_logit, sum_exp, sum_exp_logit, *kept = of_whole
        if grad_target_logit is None:
            grad_target_logit = torch.zeros_like(target_logit)
        coefficients = dlogits_coefficients(
            sum_exp, sum_exp_logit, grad_lse, grad_target_logit, grad_logit_sum, grad_expected_logit
        )
        local_grads = _local_grads(ctx.plan, target_row, target_logit, class_weight, max_logit, coefficients, kept)
        return *_head_grads(ctx.needs_input_grad, hidden, weight, bias, ctx.plan, local_grads), *[None] * 7


class _CrossEntropyFunction(Function):
    """The loss without options, whose own steps on ``[T]`` are part of the implementation too."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        ignore_index: int,
        reduction: str,
        exp_cache_bytes: int,
        plan: Plan,
        anchor: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        del anchor  # see token_stats
        with _local_steps(hidden):
            hidden, parts, sizes, target_row, target_logit, cache = _gathered_stats(
                hidden, weight, bias, target, None, Wanted(), exp_cache_bytes, plan
            )
            vocab_size = plan.shard.vocab_size
            of_tokens = plan.kernels.token_loss(parts, sizes, target, vocab_size, ignore_index, reduction)
        loss, max_logit, sum_exp, whole_target_logit, owners, num_valid, covered, num_classes = of_tokens
        if target_logit is None:
            target_logit = whole_target_logit
        ctx.plan, ctx.ignore_index = plan, ignore_index
        ctx.set_materialize_grads(False)
        divisor = num_valid if reduction == "mean" else None
        ctx.save_for_backward(
            hidden, weight, bias, target_row, target_logit, max_logit, sum_exp, target, divisor, *(cache or ())
        )
        ctx.mark_non_differentiable(*(t for t in (owners, covered, num_classes) if t is not None))
        return loss, owners, covered, num_classes

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor | None, *_grads: None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target_row, target_logit, max_logit, sum_exp, target, divisor, *kept = ctx.saved_tensors
        if grad is None:
            grad = sum_exp.new_zeros(())
        with _local_steps(hidden):
            coefficients = ctx.plan.kernels.token_loss_grads(grad, sum_exp, target, divisor, ctx.ignore_index)
        local_grads = _local_grads(ctx.plan, target_row, target_logit, None, max_logit, coefficients, kept)
        return *_head_grads(ctx.needs_input_grad, hidden, weight, bias, ctx.plan, local_grads), *[None] * 6


def _local_grads(
    plan: Plan,
    target_row: Tensor,
    target_logit: Tensor,
    class_weight: Tensor | None,
    max_logit: Tensor,
    coefficients: DlogitsCoefficients,
    kept: Sequence[Tensor],
) -> LocalGrads:
    """The step of the backward that computes, of all that it needs but the operands and the buffers."""
    cache = ExpCache(*kept) if kept else None

    def local_grads(head: Operands, buffers: GradBuffers, arrival: Arrival | None) -> None:
        of_tokens = (target_row, target_logit, class_weight, max_logit, coefficients, cache)
        plan.kernels.local_grads(head, *of_tokens, buffers, plan.workspace_bytes, arrival)

    return local_grads


class _DivergenceFunction(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: Operands,
        divergence: Divergence,
        plan: Plan,
        anchor: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        del anchor  # see token_stats
        with _local_steps(hidden):
            student_head = plan.operands(plan.gather_hidden(hidden), weight, bias)
            teacher_head = _teacher_operands(teacher, plan)
            saved = (plan.to_save(hidden, student_head.hidden), weight, bias)
            saved_teacher = (plan.to_save(teacher.hidden, teacher_head.hidden), teacher.weight, teacher.bias)
            # KL(a ‖ b) is the divergence of b from a.
            forward_kl = divergence == "forward_kl"
            heads = (teacher_head, student_head) if forward_kl else (student_head, teacher_head)
            symmetric = divergence == "jensen_shannon"
            local = stacked(plan.kernels.local_joint_stats(*heads, cross=not symmetric))
            shard = plan.shard
            parts, sizes = gather_stats(local, shard.num_valid_rows, shard.vocab_size, plan.group, plan.combine)
            whole, num_classes = merge_stats(parts), None if sizes is None else count_classes(sizes)
            max_logit, log_sum_exp = whole.max_logit, whole.sum_exp.log()
            if symmetric:
                sums = plan.kernels.local_js_sums(*heads, max_logit, log_sum_exp)
                sums = reduce_sums(sums, plan.group)
                loss, center = sums.mean(dim=0), sums[0]
            else:
                loss = kl_divergence(whole)
                center = loss.clone()  # the caller may change what is returned
        if forward_kl:
            max_logit, log_sum_exp = max_logit.flip(0), log_sum_exp.flip(0)
        ctx.plan, ctx.divergence, ctx.teacher_transform = plan, divergence, teacher.transform
        ctx.save_for_backward(*saved, *saved_teacher, max_logit, log_sum_exp, center)
        if num_classes is not None:
            ctx.mark_non_differentiable(num_classes)
        return loss, num_classes

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor, _grad_num_classes: None
    ) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        hidden, weight, bias, *teacher, max_logit, log_sum_exp, center = ctx.saved_tensors

        def local_grads(head: Operands, buffers: GradBuffers, arrival: Arrival | None) -> None:
            if arrival is not None:
                arrival.wait()
            teacher_head = _teacher_operands(Operands._make([*teacher, ctx.teacher_transform]), plan, again=True)
            plan.kernels.local_divergence_grads(
                head, teacher_head, max_logit, log_sum_exp, center, grad, buffers, ctx.divergence, plan.workspace_bytes
            )

        return *_head_grads(ctx.needs_input_grad, hidden, weight, bias, plan, local_grads), *[None] * 4


def _teacher_operands(teacher: Operands, plan: Plan, *, again: bool = False) -> Operands:
    """All tokens' hidden states of the teacher, and its rows of the student's shard without padding."""
    hidden = plan.gather_hidden(teacher.hidden, again=again)
    return plan.operands(hidden, teacher.weight, teacher.bias)._replace(transform=teacher.transform)


def _head_grads(
    needs_input_grad: Sequence[bool],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: Plan,
    local_grads: LocalGrads,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a head's first three inputs, from the step that computes this shard's from all tokens.

    Args:
        hidden: as :meth:`Plan.to_save` saved them.
    """
    if torch.is_grad_enabled():
        # `once_differentiable` would return gradients that look constant, so a gradient penalty would vanish.
        raise RuntimeError("a fused loss has no second derivative: call its backward without create_graph")
    needs_hidden, needs_weight, needs_bias, *_ = needs_input_grad
    several_ranks = rank_and_size(plan.group)[1] > 1
    # Other ranks wait for this rank's share even if the hidden states are frozen here.
    needs_dhidden = needs_hidden or several_ranks
    rows = plan.shard.num_valid_rows
    dweight = None
    if needs_weight:
        dweight = _empty_grad(weight, rows) if plan.main_grad is None else plan.main_grad
    dbias = _empty_grad(bias, rows) if needs_bias and bias is not None else None
    reductions = []
    with _local_steps(hidden), plan.gathering(hidden, again=True) as (full_hidden, arrival):
        dhidden = torch.empty_like(full_hidden, memory_format=torch.contiguous_format) if needs_dhidden else None

        def reduce_dhidden() -> None:
            assert dhidden is not None
            reductions.append(reduce_hidden_grad(dhidden, plan.group, sequence_parallel=plan.sequence_parallel))

        buffers = GradBuffers(
            dhidden,
            None if dweight is None else dweight[:rows],
            None if dbias is None else dbias[:rows],
            accumulate_dweight=plan.main_grad is not None,
            dhidden_ready=reduce_dhidden if several_ranks else None,
            message_bytes=reduction_bytes(full_hidden, plan.group, sequence_parallel=plan.sequence_parallel),
        )
        try:
            local_grads(plan.operands(full_hidden, weight, bias), buffers, arrival)
        finally:  # after an error too: until then dhidden's memory is being read
            for finish in reductions:
                dhidden = finish()
    return dhidden if needs_hidden else None, dweight if plan.main_grad is None else None, dbias


def _local_steps(hidden: Tensor) -> AbstractContextManager[Any]:
    """Kernels run on their tensors' device, whichever is current, and in the dtypes they are given."""
    on_device = torch.cuda.device_of(hidden)
    return _without_autocast(on_device, hidden) if torch.is_autocast_enabled(hidden.device.type) else on_device


@contextmanager
def _without_autocast(context: AbstractContextManager[Any], hidden: Tensor) -> Iterator[None]:
    with context, torch.autocast(hidden.device.type, enabled=False):
        yield


def _empty_grad(parameter: Tensor, rows: int) -> Tensor:
    """Memory for a gradient of which ``rows`` rows will be written; the padding after them has gradient zero."""
    grad = torch.empty_like(parameter, memory_format=torch.contiguous_format)
    grad[rows:].zero_()
    return grad


@torch.compiler.disable
def token_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    wanted: Wanted,
    ignore_index: int,
    plan: Plan,
) -> tuple[TokenStats, Tensor, Tensor, Tensor | None]:
    """Differentiable statistics of the whole vocabulary for every token; how many ranks hold each target ``[T, K]``,
    whether they cover all classes once, and how many they hold.

    With more than one rank, the result requires a gradient whenever gradients are enabled, even if nothing here does:
    a rank with frozen inputs must still take part in the backward's collectives, which the other ranks enter.
    """
    exp_cache_bytes = plan.exp_cache_bytes if torch.is_grad_enabled() else 0
    of_tokens = (target, class_weight, wanted, ignore_index)
    inputs = (hidden, weight, bias, *of_tokens, exp_cache_bytes, plan, _anchor(hidden, plan))
    *stats, owners, covered, num_classes = _apply(_TokenStatsFunction, *inputs)
    return TokenStats(*stats), owners, covered, num_classes


@torch.compiler.disable
def cross_entropy_without_options(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    reduction: str,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The cross-entropy ``[T]`` or ``[]`` of targets ``[T, 1]``, and what :func:`token_stats` returns with its own. The
    loss requires a gradient as those do."""
    exp_cache_bytes = plan.exp_cache_bytes if torch.is_grad_enabled() else 0
    inputs = (hidden, weight, bias, target, ignore_index, reduction, exp_cache_bytes, plan, _anchor(hidden, plan))
    return _apply(_CrossEntropyFunction, *inputs)


@torch.compiler.disable
def token_divergences(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: Operands, divergence: Divergence, plan: Plan
) -> tuple[Tensor, Tensor | None]:
    """Divergences ``[T]`` of the heads' distributions, differentiable in the student's inputs, and how many classes the
    ranks hold together. The result requires a gradient as that of :func:`token_stats` does.

    Steps: [gather_hidden]  →  local_joint_stats  →  gather_stats, for Jensen–Shannon  →  local_js_sums  →  reduce_sums.
    """
    inputs = (hidden, weight, bias, teacher, divergence, plan, _anchor(hidden, plan))
    return _apply(_DivergenceFunction, *inputs)


@torch.compiler.disable
@torch.no_grad()
def top_k_classes(hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int, plan: Plan) -> Tensor:
    """Ids ``[T, k]`` of the most probable classes of each token, the same on all ranks.

    Steps: [gather_hidden]  →  local_top_k  →  gather_top_k.
    """
    with _local_steps(hidden):
        head = plan.operands(plan.gather_hidden(hidden), weight, bias)
        logit, row = plan.kernels.local_top_k(head, k, plan.workspace_bytes)
    _, index = gather_top_k(logit, torch.where(row >= 0, row + plan.shard.start, -1), plan.group)
    return index


class _NoGraph:
    """The context of a forward that no backward follows: it keeps nothing."""

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


def _apply(function: type[Function], *inputs: Any) -> Any:
    """``function.apply``, which takes the host longer than a launch and is left out where there is no graph."""
    # A tangent of forward-mode differentiation is an error in `apply`, not to be lost.
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:  # pyright: ignore[reportPrivateUsage]
        return function.apply(*inputs)
    return function.forward(_NoGraph(), *inputs)


def _anchor(hidden: Tensor, plan: Plan) -> Tensor | None:
    """An input that requires a gradient, if there are other ranks."""
    several_ranks = rank_and_size(plan.group)[1] > 1
    return hidden.new_empty(0).requires_grad_() if several_ranks and torch.is_grad_enabled() else None

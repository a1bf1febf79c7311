"""The one autograd function: the order of the steps and what is saved. It computes nothing itself.

    forward     [gather_hidden]  →  local_stats  →  gather_stats             →  TokenStats of the whole vocabulary
    backward    [gather_hidden]  →  local_grads  →  reduce_hidden_grad       →  dhidden, dweight, dbias

Steps in brackets run under sequence parallelism only. Shapes on a rank, ``T`` tokens, ``R`` ranks:

    ============  ==================================================================================
    hidden        [T, H] replicated, or this rank's [T / R, H] under sequence parallelism; saved as it came
    weight, bias  [V_local, H], [V_local]; saved
    target        [T] global ids, replicated
    statistics    [T] each, replicated; lse and the shard's own target_logit are saved
    dhidden       as hidden: all-reduced once, or reduce-scattered once under sequence parallelism
    dweight       [V_local, H], complete on its rank, never communicated
    ============  ==================================================================================

Any loss is ordinary PyTorch on the statistics; what comes back is one upstream gradient per token and statistic.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

from vocab_parallel_fused.collectives import gather_hidden, gather_stats, rank_and_size, reduce_hidden_grad
from vocab_parallel_fused.dispatch import Kernels
from vocab_parallel_fused.sharding import VocabShard
from vocab_parallel_fused.stats import TokenStats


@dataclass(frozen=True, slots=True)
class Plan:
    """What every step needs beside tensors, checked and resolved."""

    shard: VocabShard
    group: ProcessGroup | None
    sequence_parallel: bool
    kernels: Kernels
    workspace_bytes: int
    combine: str
    main_grad: Tensor | None  # [V_local, H] fp32, takes dweight instead of the weight's grad

    def gather_hidden(self, hidden: Tensor) -> Tensor:
        return gather_hidden(hidden, self.group) if self.sequence_parallel else hidden


class _TokenStatsFunction(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, plan: Plan, anchor: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        del anchor  # see token_stats
        rows = plan.shard.num_valid_rows
        target_row = plan.shard.local_rows(target)
        with _local_steps(hidden):
            local = plan.kernels.local_stats(
                plan.gather_hidden(hidden), weight[:rows], None if bias is None else bias[:rows], target_row
            )
        stats, num_classes = gather_stats(local, rows, plan.group, plan.combine)
        ctx.plan = plan
        ctx.save_for_backward(hidden, weight, bias, target_row, local.target_logit, stats.lse)
        ctx.mark_non_differentiable(*(t for t in (stats.owners, num_classes) if t is not None))
        return *stats, num_classes

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_lse: Tensor, grad_target_logit: Tensor, *_grads: None
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # `once_differentiable` would return gradients that look constant, so a gradient penalty would vanish.
            raise RuntimeError("linear_cross_entropy has no second derivative: call its backward without create_graph")
        plan: Plan = ctx.plan
        hidden, weight, bias, target_row, target_logit, lse = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        # Other ranks wait for this rank's share even if the hidden states are frozen here.
        needs_hidden = needs_hidden or rank_and_size(plan.group)[1] > 1
        rows = plan.shard.num_valid_rows
        full_hidden = plan.gather_hidden(hidden)
        dhidden = torch.empty_like(full_hidden, memory_format=torch.contiguous_format) if needs_hidden else None
        dweight = None
        if needs_weight:
            dweight = _empty_grad(weight, rows) if plan.main_grad is None else plan.main_grad
        dbias = _empty_grad(bias, rows) if needs_bias else None
        with _local_steps(hidden):
            plan.kernels.local_grads(
                full_hidden,
                weight[:rows],
                None if bias is None else bias[:rows],
                target_row,
                target_logit,
                lse,
                grad_lse,
                grad_target_logit,
                dhidden=dhidden,
                dweight=None if dweight is None else dweight[:rows],
                accumulate_dweight=plan.main_grad is not None,
                dbias=None if dbias is None else dbias[:rows],
                workspace_bytes=plan.workspace_bytes,
            )
        if dhidden is not None:
            dhidden = reduce_hidden_grad(dhidden, plan.group, sequence_parallel=plan.sequence_parallel)
        if not ctx.needs_input_grad[0]:
            dhidden = None
        if plan.main_grad is not None:
            dweight = None
        return dhidden, dweight, dbias, None, None, None


@contextmanager
def _local_steps(hidden: Tensor) -> Iterator[None]:
    """Kernels run on their tensors' device, whichever is current, and in the dtypes they are given."""
    with torch.cuda.device_of(hidden), torch.autocast(hidden.device.type, enabled=False):
        yield


def _empty_grad(parameter: Tensor, rows: int) -> Tensor:
    """Memory for a gradient of which ``rows`` rows will be written; the padding after them has gradient zero."""
    grad = torch.empty_like(parameter, memory_format=torch.contiguous_format)
    grad[rows:].zero_()
    return grad


@torch.compiler.disable
def token_stats(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, plan: Plan
) -> tuple[TokenStats, Tensor | None]:
    """Differentiable statistics of the whole vocabulary for every token, and how many classes the ranks hold together.

    With more than one rank, the result requires a gradient whenever gradients are enabled, even if nothing here does:
    a rank with frozen inputs must still take part in the backward's collectives, which the other ranks enter.
    """
    several_ranks = rank_and_size(plan.group)[1] > 1
    anchor = hidden.new_empty(0).requires_grad_() if several_ranks and torch.is_grad_enabled() else None
    *stats, num_classes = _TokenStatsFunction.apply(hidden, weight, bias, target, plan, anchor)
    return TokenStats(*stats), num_classes

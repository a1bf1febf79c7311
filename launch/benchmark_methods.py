"""What ``benchmark.py`` can time: the modes of this package, and other implementations of the same loss.

Each entry of ``METHODS`` prepares one of them for a problem and returns its mean loss as a function of hidden states
and weight. It imports what it needs itself, so that a package that is missing costs a row of the table and not the run.
What an implementation leaves to its caller on several ranks, its entry does: gather the tokens of all ranks, or sum the
gradient of the hidden states. So all of them compute the same loss and gradients, from the same inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

import vocab_parallel_fused as vpf
from vocab_parallel_fused.collectives import gather_hidden, reduce_hidden_grad

OURS = "vocab-parallel-fused"


@dataclass(frozen=True)
class Problem:
    """One rank's part of a linear layer and its targets."""

    hidden: Tensor
    """``[T, H]``, the same on every rank; this rank's ``[T / R, H]`` under sequence parallelism."""
    weight: Tensor
    """``[V_local, H]``."""
    target: Tensor
    """``[T]`` global class ids, the same on every rank."""
    shard: vpf.VocabShard
    group: ProcessGroup | None = None
    sequence_parallel: bool = False
    keep_gathered_hidden: bool = False
    """The option of this package's methods."""

    @property
    def exp_bytes(self) -> int:
        """What the exp cache of the whole shard takes."""
        return self.weight.element_size() * self.target.numel() * self.shard.num_rows

    def require_equal_shards(self) -> None:
        """Stop an implementation that computes each rank's first class from its own number of rows.

        Raises:
            ValueError: the ranks hold different numbers of rows.
        """
        ranks = 1 if self.group is None else self.group.size()
        if self.shard.vocab_size % ranks:
            raise ValueError(f"needs equal shards, got {self.shard.vocab_size} classes on {ranks} ranks")


Loss = Callable[[Tensor, Tensor], Tensor]
"""From hidden states and weight, as in :class:`Problem`, to the mean loss."""


@dataclass(frozen=True)
class Method:
    """One way to compute the loss."""

    prepare: Callable[[Problem], Loss]
    """Raises anything if the method cannot do this problem."""
    package: str = OURS
    """The distribution that it comes from."""
    one_rank: bool = True
    """Works without a group."""
    several_ranks: bool = False
    """Works with one."""
    cache_fraction: float | None = None
    """How much of ``exp(z − r)`` it keeps, for modes of this package that differ in nothing else."""
    captures: bool = False
    """Its forward never waits for the device, and so can be replayed as a CUDA graph."""


def _with_options(problem: Problem, options: vpf.ComputeOptions) -> Loss:
    options = replace(options, keep_gathered_hidden=problem.keep_gathered_hidden)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return vpf.linear_cross_entropy(
            hidden,
            weight,
            problem.target,
            group=problem.group,
            shard=problem.shard,
            sequence_parallel=problem.sequence_parallel,
            options=options,
        )

    return loss


def _recompute(problem: Problem) -> Loss:
    return _with_options(problem, vpf.ComputeOptions())


def cache(fraction: float) -> Method:
    """This package, with memory for a fraction of the shard's exponentials."""

    def prepare(problem: Problem) -> Loss:
        return _with_options(problem, vpf.ComputeOptions(exp_cache_bytes=int(fraction * problem.exp_bytes)))

    return Method(prepare, several_ranks=True, cache_fraction=fraction)


def cache_name(fraction: float) -> str:
    """What the method with this fraction of the cache is called."""
    return {0.0: "recompute", 0.5: "cache-half", 1.0: "cache"}.get(fraction, f"cache-{fraction:g}")


def _main_grad(problem: Problem) -> Loss:
    main_grad = torch.zeros_like(problem.weight, dtype=torch.float32, requires_grad=False)
    loss = _with_options(problem, vpf.ComputeOptions(accumulate_main_grad=True))

    def accumulating(hidden: Tensor, weight: Any) -> Tensor:
        weight.main_grad = main_grad
        return loss(hidden, weight)

    return accumulating


def _loss_of_logits(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    # fp32, as the models of Hugging Face and Megatron do; 16 bits would lose the loss's third digit.
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def _eager(problem: Problem) -> Loss:
    return lambda hidden, weight: _loss_of_logits(hidden, weight, problem.target)


def _compile(problem: Problem) -> Loss:
    compiled = torch.compile(_loss_of_logits, dynamic=False)
    return lambda hidden, weight: compiled(hidden, weight, problem.target)


def _torch(problem: Problem) -> Loss:
    loss = F.linear_cross_entropy  # torch 2.13 and later
    return lambda hidden, weight: loss(hidden, weight, problem.target)


def _torch_chunked(problem: Problem) -> Loss:
    loss, options = F.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight: loss(hidden, weight, problem.target, options=options)


def _liger(problem: Problem) -> Loss:
    function = import_module("liger_kernel.ops").LigerFusedLinearCrossEntropyFunction
    return lambda hidden, weight: function.apply(hidden, weight, problem.target)[0]


def _liger_sm90(problem: Problem) -> Loss:
    module = import_module("liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90")
    function = module.LigerFusedLinearCrossEntropySM90Function
    return lambda hidden, weight: function.apply(hidden, weight, problem.target)


def _liger_scaled(problem: Problem) -> Loss:
    function = import_module("liger_kernel.ops").LigerFusedLinearScaledCrossEntropyFunction
    return lambda hidden, weight: function.apply(hidden, weight, problem.target).mean()


def _liger_tp(problem: Problem) -> Loss:
    problem.require_equal_shards()
    function = import_module("liger_kernel.ops").LigerFusedLinearScaledCrossEntropyTPFunction

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        hidden = _all_tokens(hidden, problem, summed=True)
        return function.apply(hidden, weight, problem.target, problem.group).mean()

    return loss


def _quack(problem: Problem) -> Loss:
    loss = import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return lambda hidden, weight: loss(hidden, weight, problem.target)


def _quack_whole(problem: Problem) -> Loss:
    loss = import_module("quack.linear_cross_entropy").linear_cross_entropy_func
    return lambda hidden, weight: loss(hidden, weight, None, problem.target)


def _cce(problem: Problem, **choices: Any) -> Loss:
    package = import_module("cut_cross_entropy")
    if problem.group is not None:
        # Its main branch has them, the releases on PyPI up to 25.1.1 do not.
        choices["vocab_parallel_options"] = package.VocabParallelOptions(
            problem.shard.start, problem.shard.stop, problem.group
        )

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        hidden = _all_tokens(hidden, problem, summed=True)
        return package.linear_cross_entropy(hidden, weight, problem.target, **choices)

    return loss


def _cce_exact(problem: Problem) -> Loss:
    implementations = import_module("cut_cross_entropy").LinearCrossEntropyImpl.__members__
    # The main branch names its exact mode, which also sums in fp32; the releases can only be told to skip nothing.
    return _cce(problem, **({"impl": "cce_exact"} if "CCE_EXACT" in implementations else {"filter_eps": None}))


def _verl(problem: Problem) -> Loss:
    problem.require_equal_shards()
    log_prob_and_entropy = import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        hidden = _all_tokens(hidden, problem, summed=False)
        temperature, reduction = 1.0, "none"
        return -log_prob_and_entropy(hidden, weight, problem.target, temperature, reduction, problem.group)[0].mean()

    return loss


def _megatron(problem: Problem) -> Loss:
    problem.require_equal_shards()
    assert problem.group is not None
    linear = import_module("megatron.core.tensor_parallel.layers").linear_with_grad_accumulation_and_async_allreduce
    cross_entropy = import_module("megatron.core.fusions.fused_cross_entropy").fused_vocab_parallel_cross_entropy
    parallel_state = import_module("megatron.core.parallel_state")
    if not parallel_state.model_parallel_is_initialized():  # the gather of tokens needs a buffer that this makes
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=problem.group.size())

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = linear(
            hidden[:, None],  # [sequence, batch, H]
            weight,
            bias=None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=not problem.sequence_parallel,
            sequence_parallel=problem.sequence_parallel,
            tp_group=problem.group,
        )
        return cross_entropy(logits, problem.target[:, None], problem.group).mean()

    return loss


class _AllTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, problem: Problem, summed: bool) -> Tensor:
        ctx.problem, ctx.summed = problem, summed
        return gather_hidden(hidden, problem.group) if problem.sequence_parallel else hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        problem, (dhidden,) = ctx.problem, grads
        if not ctx.summed:
            finish = reduce_hidden_grad(
                dhidden.contiguous(), problem.group, sequence_parallel=problem.sequence_parallel
            )
            dhidden = finish()
        elif problem.sequence_parallel:
            dhidden = dhidden.chunk(problem.group.size())[problem.group.rank()]
        return dhidden, None, None


def _all_tokens(hidden: Tensor, problem: Problem, *, summed: bool) -> Tensor:
    """Hidden states ``[T, H]`` for an implementation that knows no sequence parallelism.

    Args:
        summed: the implementation itself sums the gradient over the ranks.
    """
    return hidden if problem.group is None else _AllTokens.apply(hidden, problem, summed)  # pyright: ignore[reportReturnType]


METHODS = {
    "recompute": Method(_recompute, several_ranks=True, cache_fraction=0.0, captures=True),
    **{cache_name(fraction): cache(fraction) for fraction in (0.5, 1.0)},
    "main-grad": Method(_main_grad, several_ranks=True),
    "eager": Method(_eager, "torch", captures=True),
    "compile": Method(_compile, "torch"),
    "torch": Method(_torch, "torch"),
    "torch-chunked": Method(_torch_chunked, "torch"),
    "liger": Method(_liger, "liger-kernel"),
    "liger-sm90": Method(_liger_sm90, "liger-kernel"),
    "liger-scaled": Method(_liger_scaled, "liger-kernel"),
    "liger-tp": Method(_liger_tp, "liger-kernel", one_rank=False, several_ranks=True),
    "quack": Method(_quack, "quack-kernels"),
    "quack-whole": Method(_quack_whole, "quack-kernels"),
    "cce": Method(_cce, "cut-cross-entropy", several_ranks=True),
    "cce-exact": Method(_cce_exact, "cut-cross-entropy", several_ranks=True),
    "verl": Method(_verl, "verl", several_ranks=True),
    "megatron": Method(_megatron, "megatron-core", one_rank=False, several_ranks=True),
}
"""By their names on the command line, those of this package first."""

"""How ``benchmark.py`` measures one shape: inputs, what they give in fp32, memory, errors and times."""

import gc
import random
import statistics
import sys
import traceback
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from benchmark_methods import Loss, Method, Problem
from benchmark_report import Measurement, ShapeResult
from bootstrap import Context
from torch import Tensor
from torch.distributed import ProcessGroup

from vocab_parallel_fused import VocabShard
from vocab_parallel_fused.testing import local_tokens

# Unscaled, most gradients of a mean over thousands of tokens would be 0 in fp16. It holds no larger power of two.
_LOSS_SCALE = {torch.float16: 2.0**15}
# Beyond so many tokens a forward outlasts its launches by far, and a graph has nothing to save.
_GRAPH_TOKENS = 2048
_REFERENCE_LOGITS_BYTES = 2**30
_REASON_LENGTH = 200

Call = Callable[[], Any]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Workload:
    """A linear layer and its tokens, over all ranks of the run."""

    name: str
    T: int
    H: int
    V: int


class Gradients(NamedTuple):
    """Of a rank's part of a problem."""

    loss: Tensor  # []
    dhidden: Tensor  # as the problem's hidden states
    dweight: Tensor  # [V_local, H]


class _Trial(NamedTuple):
    """A method that has proved to work."""

    calls: dict[str, Call]  # what to time
    extra_bytes: list[int]  # of the forward, of forward and backward
    errors: list[float]  # as in Gradients


def measure(
    workload: Workload,
    methods: dict[str, Method],
    context: Context,
    *,
    dtype: torch.dtype,
    rounds: int,
    sequence_parallel: bool,
    keep_gathered_hidden: bool,
    progress: Callable[[str], None],
) -> ShapeResult:
    """Try each method once, for its memory, its errors or the reason why it fails; then time all that work, in turns.

    Args:
        progress: is told what comes next.
    """
    torch.set_float32_matmul_precision("highest")  # a package that was imported may have changed it
    problem, hidden = make_problem(workload, context, dtype, sequence_parallel=sequence_parallel)
    problem = replace(problem, keep_gathered_hidden=keep_gathered_hidden)
    products = _products(hidden.detach(), problem.weight.detach())
    scale = _LOSS_SCALE.get(dtype, 1.0)
    progress("fp32 reference")
    reference = fp32_gradients(problem, hidden, scale)
    trials: dict[str, _Trial] = {}
    failures: dict[str, str] = {}
    for name, method in methods.items():
        progress(name)
        trial = reason = None
        try:
            trial = _try(method, problem, hidden, reference, scale)
        except Exception as error:  # whatever a package raises
            reason = _in_one_line(error)
            if context.world_size > 1:  # now: the others may be in a message that this rank does not answer
                print(f"rank {context.rank}: {name}: {reason}", file=sys.stderr, flush=True)
        reason = _first_reason(reason, problem.group)
        if trial is None or reason is not None:
            failures[name] = str(reason)
        else:
            trials[name] = trial
        del trial
        problem.hidden.grad = problem.weight.grad = hidden.grad = None
        vars(problem.weight).pop("main_grad", None)
        gc.collect()
        torch.cuda.empty_cache()
    del reference
    progress("timing")
    calls = {(name, what): call for name, trial in trials.items() for what, call in trial.calls.items()}
    times = interleaved_ms({("cuBLAS", what): call for what, call in products.items()} | calls, rounds, problem.group)
    return ShapeResult(
        name=workload.name,
        T=workload.T,
        H=workload.H,
        V_local=problem.shard.num_rows,
        logits_bytes=workload.T * problem.shard.num_rows * dtype.itemsize,
        **{f"{what}_ms": times["cuBLAS", what] for what in products},
        measurements=[
            Measurement(
                name,
                methods[name].package,
                methods[name].cache_fraction,
                times[name, "forward"],
                times[name, "step"],
                *trial.extra_bytes,
                *trial.errors,
                graph_ms=times.get((name, "graph")),
                alone_ms=times.get((name, "alone")),
            )
            for name, trial in trials.items()
        ],
        failures=failures,
    )


def make_problem(
    workload: Workload, context: Context, dtype: torch.dtype, *, sequence_parallel: bool
) -> tuple[Problem, Tensor]:
    """This rank's part of a random problem whose logits have variance 1, and hidden states ``[T, H]`` of all tokens."""
    T, H = workload.T, workload.H
    shard = VocabShard.even(workload.V, context.group)
    shared = torch.Generator(context.device).manual_seed(0)
    hidden = torch.randn(T, H, device=context.device, dtype=dtype, generator=shared)
    target = torch.randint(workload.V, (T,), device=context.device, generator=shared)
    own = torch.Generator(context.device).manual_seed(1 + context.rank)
    weight = torch.randn(shard.num_rows, H, device=context.device, generator=own).div_(H**0.5).to(dtype)
    hidden = hidden.requires_grad_()
    local = hidden
    if sequence_parallel:
        local = local_tokens(hidden.detach(), context.group, sequence_parallel=True).clone().requires_grad_()
    return Problem(local, weight.requires_grad_(), target, shard, context.group, sequence_parallel), hidden


@torch.no_grad()
def fp32_gradients(problem: Problem, hidden: Tensor, scale: float) -> Gradients:
    """What every method should find, from logits in fp32, some tokens at a time.

    Args:
        hidden: ``[T, H]`` of all tokens.
        scale: of the loss whose gradients are taken; the returned loss is not scaled.
    """
    T, group = len(hidden), problem.group
    weight, rows = problem.weight.float(), problem.shard.local_rows(problem.target)
    losses, dhidden, dweight = [], torch.empty_like(hidden, dtype=torch.float32), torch.zeros_like(weight)
    size = max(1, _REFERENCE_LOGITS_BYTES // (4 * len(weight)))
    for x, row_or_none, dx in zip(hidden.split(size), rows.split(size), dhidden.split(size), strict=True):
        logits = x.float() @ weight.t()
        largest = _reduce(logits.amax(dim=1), group, dist.ReduceOp.MAX)
        lse = largest + _reduce((logits - largest[:, None]).exp_().sum(dim=1), group).log()
        token = ((row_or_none >= 0) & (row_or_none < len(weight))).nonzero()[:, 0]
        row = row_or_none[token]
        target_logit = torch.zeros_like(lse)
        target_logit[token] = logits[token, row]
        losses.append(lse - _reduce(target_logit, group))
        dlogits = logits.sub_(lse[:, None]).exp_()
        dlogits[token, row] -= 1
        dlogits *= scale / T
        torch.mm(dlogits, weight, out=dx)
        dweight += dlogits.t() @ x.float()
    dhidden = _reduce(dhidden, group)
    local = local_tokens(dhidden, group, sequence_parallel=problem.sequence_parallel)
    return Gradients(torch.cat(losses).mean(), local, dweight)


def relative_errors(actual: Gradients, reference: Gradients, group: ProcessGroup | None) -> list[float]:
    """``‖x − ref‖ / ‖ref‖`` of each, over all ranks."""
    squares = torch.stack(
        [
            torch.linalg.vector_norm(part.float()).square()
            for x, ref in zip(actual, reference, strict=True)
            for part in (x.float() - ref, ref)
        ]
    )
    difference, size = _reduce(squares, group).view(-1, 2).sqrt().unbind(dim=1)
    return (difference / size).tolist()


def _try(method: Method, problem: Problem, hidden: Tensor, reference: Gradients, scale: float) -> _Trial:
    one_rank = problem.group is None
    if not (method.one_rank if one_rank else method.several_ranks):
        raise ValueError("needs several ranks" if one_rank else "works on one rank only")
    forward, step = _calls(method.prepare(problem), problem, scale)
    loss = step()
    dhidden, dweight = problem.hidden.grad, problem.weight.grad
    if dweight is None:
        dweight = getattr(problem.weight, "main_grad", None)
    if dhidden is None or dweight is None:
        raise RuntimeError("left a gradient out")
    errors = relative_errors(Gradients(loss, dhidden, dweight), reference, problem.group)
    del dhidden, dweight
    extra = [extra_bytes(forward), extra_bytes(step, (problem.hidden, problem.weight))]
    calls = {"forward": forward, "step": step}
    if one_rank and method.captures and len(problem.target) <= _GRAPH_TOKENS:
        calls["graph"] = replayed(forward)
    if not one_rank and method.one_rank:
        # This rank's shard as a whole vocabulary: what a group adds to its time is the difference.
        rows = problem.shard.num_rows
        alone = Problem(hidden, problem.weight, problem.target % rows, VocabShard(0, rows, rows))
        calls["alone"] = _calls(method.prepare(alone), alone, scale)[1]
        calls["alone"]()
    return _Trial(calls, [int(x) for x in _largest(extra, problem.group)], errors)


def _calls(loss: Loss, problem: Problem, scale: float) -> tuple[Call, Call]:
    """The forward without gradients, and forward + backward, which returns the loss."""

    def forward() -> None:
        with torch.no_grad():
            loss(problem.hidden.detach(), problem.weight.detach())

    def step() -> Tensor:
        problem.hidden.grad = problem.weight.grad = None
        value = loss(problem.hidden, problem.weight)
        value.backward(torch.full_like(value, scale))
        return value.detach()

    return forward, step


def _products(hidden: Tensor, weight: Tensor) -> dict[str, Call]:
    """The matrix products of a method that stores logits."""
    logits = hidden.new_empty(len(hidden), len(weight))
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)
    return {
        "logits": lambda: torch.mm(hidden, weight.t(), out=logits),
        "dhidden": lambda: torch.mm(logits, weight, out=dhidden),
        "dweight": lambda: torch.mm(logits.t(), hidden, out=dweight),
    }


def extra_bytes(call: Call, parameters: Sequence[Tensor] = ()) -> int:
    """Peak of allocated memory during a call, above what is alive before it and the gradients that it leaves.

    Args:
        parameters: whose gradients.
    """
    call()
    outputs = sum(p.grad.nbytes for p in parameters if p.grad is not None)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() - outputs  # those of the first call
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - outputs


def replayed(call: Call) -> Call:
    """The same work as one launch."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def interleaved_ms(
    calls: dict[Key, Call], rounds: int, group: ProcessGroup | None = None, warmup: int = 3
) -> dict[Key, float]:
    """Median time of each call over rounds in which all take their turn, in a random order; of the slowest rank."""
    order = random.Random(0)  # the same on every rank
    turns = [order.sample(list(calls), len(calls)) for _ in range(warmup + rounds)]
    signal = None if group is None else torch.zeros(1, device="cuda")
    marks = []
    for turn in turns:
        for key in turn:
            if signal is not None:
                dist.all_reduce(signal, group=group)  # the devices start together; the hosts need not
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            calls[key]()
            end.record()
            marks.append((key, start, end))
    torch.cuda.synchronize()
    times = {key: [] for key in calls}
    for key, start, end in marks[warmup * len(calls) :]:
        times[key].append(start.elapsed_time(end))
    medians = [statistics.median(of_call) for of_call in times.values()]
    return dict(zip(times, _largest(medians, group), strict=True))


def _largest(numbers: Sequence[float], group: ProcessGroup | None) -> list[float]:
    """Of each number, that of the rank where it is largest."""
    if group is None:
        return list(numbers)
    of_ranks: list[Any] = [None] * group.size()
    dist.all_gather_object(of_ranks, list(numbers), group=group)
    return [max(of_number) for of_number in zip(*of_ranks, strict=True)]


def _in_one_line(error: Exception) -> str:
    # An assertion without a message says most by itself.
    text = str(error).strip() or str(traceback.extract_tb(error.__traceback__)[-1].line)
    return f"{type(error).__name__}: {text.splitlines()[0]}"[:_REASON_LENGTH]


def _first_reason(reason: str | None, group: ProcessGroup | None) -> str | None:
    """Why a method failed on the first rank where it did, so that all ranks leave it out."""
    if group is None:
        return reason
    reasons: list[Any] = [None] * group.size()
    dist.all_gather_object(reasons, reason, group=group)
    return next((r for r in reasons if r is not None), None)


def _reduce(tensor: Tensor, group: ProcessGroup | None, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Reduce over the ranks, in place."""
    if group is not None:
        dist.all_reduce(tensor, op, group=group)
    return tensor

"""The op over gloo ranks: the same bits on every rank, and what full logits give in float64."""

import time
from itertools import product
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import loss_parallel
from torch.utils._python_dispatch import TorchDispatchMode

from vocab_parallel_fused import ComputeOptions, VocabShard, linear_cross_entropy, linear_token_stats
from vocab_parallel_fused import autograd as vpf_autograd
from vocab_parallel_fused import collectives as vpf_collectives
from vocab_parallel_fused.options import Combine, Impl
from vocab_parallel_fused.stats import PartStats, count_classes, merge_stats, stacked
from vocab_parallel_fused.testing import (
    Results,
    assert_within_error_budget,
    full_logits_results,
    local_part,
    make_problem,
    run_on_ranks,
    sharded_results,
)

H, V = 24, 101
INTERPRETER = not torch.cuda.is_available()  # these ranks compute on the CPU, where Triton needs its interpreter

# How V = 101 classes may be cut over ranks: bounds of the rows, of which those from 101 on are padding.
CUTS = {
    "even": {1: (0, 101), 2: (0, 51, 101), 3: (0, 34, 68, 101), 4: (0, 26, 52, 78, 101)},
    "uneven": {1: (0, 101), 2: (0, 1, 101), 3: (0, 70, 71, 101), 4: (0, 33, 34, 98, 101)},
    "empty": {2: (0, 101, 101), 3: (0, 0, 64, 101), 4: (0, 50, 50, 101, 101)},
    "padded": {1: (0, 128), 2: (0, 64, 128), 3: (0, 64, 128, 192), 4: (0, 32, 64, 96, 128)},
}


def shard_of(cut: str, group: ProcessGroup) -> VocabShard:
    bounds = CUTS[cut][group.size()]
    return VocabShard(bounds[group.rank()], bounds[group.rank() + 1], V)


def matrix_on_rank(group: ProcessGroup, dtype: torch.dtype) -> list[tuple[tuple, Results]]:
    """Every combination on this rank, checked; returns the losses so that ranks can be compared."""
    world_size = group.size()
    problem = make_problem(12 * world_size, H, V, dtype=dtype)
    # Targets at both ends of every shard, on every rank.
    edges = torch.tensor([b for bounds in CUTS.values() for b in bounds.get(world_size, ())])
    edges = torch.cat((edges, edges - 1)).clamp(0, V - 1).unique()
    problem.target[4 : 4 + len(edges)] = edges[: problem.target.numel() - 6]
    reference, same_dtype = full_logits_results(problem.to(torch.float64)), full_logits_results(problem)
    answers = []
    cuts = [cut for cut in CUTS if world_size in CUTS[cut]]
    # How statistics are combined does not depend on which kernels made them; the interpreter is slow.
    ways: list[tuple[Impl, Combine]] = [("eager", "all_gather"), ("eager", "all_reduce")]
    if INTERPRETER:
        ways.append(("triton", "all_gather"))
    for cut, (impl, combine), sequence_parallel in product(cuts, ways, [False, True]):
        shard = shard_of(cut, group)
        # Nor on whether gathered hidden states are kept.
        keep = combine == "all_reduce"
        options = ComputeOptions(impl=impl, combine=combine, workspace_bytes=5000, keep_gathered_hidden=keep)
        actual, again = (
            sharded_results(problem, group, shard, sequence_parallel=sequence_parallel, options=options)
            for _ in range(2)
        )
        case = (cut, impl, combine, sequence_parallel)
        try:
            assert_within_error_budget(
                actual,
                local_part(same_dtype, group, shard, sequence_parallel=sequence_parallel),
                local_part(reference, group, shard, sequence_parallel=sequence_parallel),
                ranks=world_size,
            )
            for first, second in zip(actual, again, strict=True):
                assert first is None or (second is not None and torch.equal(first, second)), "two runs differ"
        except AssertionError as error:
            raise AssertionError(f"{case} on rank {group.rank()}: {error}") from error
        answers.append((case, actual))
    return answers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_combination(world_size: int, dtype: torch.dtype) -> None:
    by_rank = run_on_ranks(matrix_on_rank, world_size, dtype)
    for answers in zip(*by_rank, strict=True):
        (case, first), *others = answers
        for _, other in others:
            assert torch.equal(first.loss, other.loss), f"{case}: ranks differ"
            if not case[-1]:  # without sequence parallelism every rank has all of dhidden
                assert torch.equal(first.dhidden, other.dhidden), f"{case}: ranks differ"


def against_loss_parallel(group: ProcessGroup) -> None:
    mesh = DeviceMesh("cpu", list(range(group.size())))
    problem = make_problem(20, H, V, bias=False)
    upstream = 0.37
    hidden = DTensor.from_local(problem.hidden, mesh, [Replicate()])
    weight = DTensor.from_local(problem.weight.detach(), mesh, [Replicate()]).redistribute(mesh, [Shard(0)])
    weight.requires_grad_()
    with loss_parallel():
        expected = F.cross_entropy(F.linear(hidden, weight), problem.target)
        (expected * upstream).backward()
    expected_dhidden, problem.hidden.grad = problem.hidden.grad, None

    # DTensor's Shard(0) is the split of VocabShard.even.
    shard = VocabShard.even(V, mesh)
    local = problem.weight.detach()[shard.start : shard.stop].requires_grad_()
    assert local.shape == weight.to_local().shape
    loss = linear_cross_entropy(problem.hidden, local, problem.target, group=mesh, shard=shard)
    (loss * upstream).backward()
    torch.testing.assert_close(loss, expected.full_tensor())  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close(problem.hidden.grad, expected_dhidden, rtol=1e-4, atol=1e-7)
    assert weight.grad is not None
    expected_dweight: Any = weight.grad
    torch.testing.assert_close(local.grad, expected_dweight.to_local(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("world_size", [2, 3])
def test_agrees_with_loss_parallel(world_size: int) -> None:
    run_on_ranks(against_loss_parallel, world_size)


def merge_of_nothing(group: ProcessGroup, combine: Combine) -> None:
    """Tokens whose logits are −inf in some shards, and in all of them: the sum of no exponentials is 0, not NaN."""
    rank = group.rank()
    max_logit = torch.tensor([2.0, -torch.inf if rank else 1.0, -torch.inf])
    sum_exp = torch.tensor([1.5, 1.0 - rank, 0.0])
    nothing = torch.zeros(3, 1)
    local = PartStats(
        max_logit, sum_exp, nothing, nothing, sum_exp_logit=-sum_exp, argmax=torch.tensor([4, 5, 6]) + 9 * rank
    )
    parts, sizes = vpf_collectives.gather_stats(stacked(local), 2**25 + rank, 2**26 + 1, group, combine)
    assert sizes is not None
    assert count_classes(sizes) == 2**26 + 1
    whole = merge_stats(parts)
    torch.testing.assert_close(whole.max_logit, torch.tensor([2.0, 1.0, -torch.inf]))
    torch.testing.assert_close(whole.sum_exp, torch.tensor([3.0, 1.0, 0.0]))
    torch.testing.assert_close(whole.sum_exp_logit, torch.tensor([-3.0, -1.0, 0.0]))
    assert whole.argmax is not None
    assert whole.argmax.tolist() == [4, 5, 6]


@pytest.mark.parametrize("combine", ["all_gather", "all_reduce"])
def test_merging_empty_parts(combine: Combine) -> None:
    run_on_ranks(merge_of_nothing, 2, combine)


def reductions_on_rank(group: ProcessGroup) -> None:
    problem = make_problem(24, H, V, ignore_index=7)
    shard = shard_of("uneven", group)
    assert problem.bias is not None
    for reduction in ("mean", "sum", "none"):
        for target in (problem.target, torch.full_like(problem.target, 7)):
            loss = linear_cross_entropy(
                problem.hidden.view(4, 6, H),
                problem.weight[shard.start : shard.stop],
                target.view(4, 6),
                linear_bias=problem.bias[shard.start : shard.stop],
                reduction=reduction,
                ignore_index=7,
                group=group,
                shard=shard,
            )
            logits = F.linear(problem.hidden, problem.weight, problem.bias)
            expected = F.cross_entropy(logits, target, reduction=reduction, ignore_index=7)
            all_ignored_mean = reduction == "mean" and target is not problem.target
            torch.testing.assert_close(loss.flatten(), torch.zeros(1) if all_ignored_mean else expected.view(-1))


def test_reductions() -> None:
    run_on_ranks(reductions_on_rank, 2)


def smooth_labels(group: ProcessGroup, cut: str) -> torch.Tensor:
    """A mean over the local rows, or divided by their number, would differ from rank to rank."""
    problem = make_problem(24, H, V)
    shard = shard_of(cut, group)
    assert problem.bias is not None
    rows = [F.pad(p, [0, 0] * (p.ndim - 1) + [0, shard.stop]) for p in (problem.weight, problem.bias)]
    weight, bias = (p[shard.start : shard.stop] for p in rows)
    class_weight = torch.rand(V, generator=torch.Generator().manual_seed(0))
    keywords: Any = {"weight": class_weight, "label_smoothing": 0.3}
    loss = linear_cross_entropy(
        problem.hidden, weight, problem.target, linear_bias=bias, group=group, shard=shard, **keywords
    )
    logits = F.linear(problem.hidden, problem.weight, problem.bias)
    torch.testing.assert_close(loss, F.cross_entropy(logits, problem.target, **keywords))
    return loss.detach()


@pytest.mark.parametrize("cut", ["uneven", "empty", "padded"])
def test_label_smoothing_over_uneven_shards(cut: str) -> None:
    first, *others = run_on_ranks(smooth_labels, 3, cut)
    assert all(torch.equal(first, other) for other in others)


def ties_between_shards(group: ProcessGroup) -> None:
    """The smallest id wins, whichever rank has it and however statistics are combined."""
    for cut, combine in product(("uneven", "empty", "padded"), get_args(Combine)):
        shard = shard_of(cut, group)
        ids = torch.tensor(sorted({edge for bound in CUTS[cut][group.size()] for edge in (bound - 1, bound)}))
        ids = ids[(ids >= 0) & (ids < V)]
        for first in ids:
            logits = -torch.ones(4, V)
            logits[:, ids[ids >= first]] = 3.0
            identity = F.pad(torch.eye(V), (0, 0, 0, shard.stop))[shard.start : shard.stop]
            stats = linear_token_stats(
                logits, identity, ids.expand(4, -1), group=group, shard=shard, options=ComputeOptions(combine=combine)
            )
            assert stats.argmax is not None
            assert stats.target_is_argmax is not None
            assert (stats.argmax == first).all(), (cut, combine, first)
            assert torch.equal(stats.target_is_argmax, (ids == first).expand(4, -1))


def test_ties_between_shards() -> None:
    run_on_ranks(ties_between_shards, 3)


def twice_on_transposed_tokens(group: ProcessGroup) -> None:
    """As models with several heads on one weight do: [s, b, H] through a transpose, two losses in one graph."""
    world_size, b = group.size(), 3
    problem = make_problem(4 * world_size * b, H, V, bias=False)
    shard = VocabShard.even(V, group)
    whole = problem.hidden.detach().view(b, -1, H).transpose(0, 1)  # [s, b, H], not contiguous
    targets = [target.view(b, -1).t() for target in (problem.target, problem.target.roll(1))]
    hidden = whole.chunk(world_size)[group.rank()].requires_grad_()
    weight = problem.weight.detach()[shard.start : shard.stop].requires_grad_()
    arguments: Any = {"group": group, "shard": shard, "sequence_parallel": True}
    first, second = (linear_cross_entropy(hidden, weight, target, **arguments) for target in targets)
    (first + second).backward()

    full_hidden, full_weight = whole.clone().requires_grad_(), problem.weight.detach().requires_grad_()
    logits = (full_hidden @ full_weight.t()).flatten(0, 1)
    (F.cross_entropy(logits, targets[0].flatten()) + F.cross_entropy(logits, targets[1].flatten())).backward()
    assert full_hidden.grad is not None
    assert full_weight.grad is not None
    expected = full_hidden.grad.chunk(world_size)[group.rank()]
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(weight.grad, full_weight.grad[shard.start : shard.stop], rtol=1e-4, atol=1e-7)


def test_twice_on_transposed_tokens() -> None:
    run_on_ranks(twice_on_transposed_tokens, 3)


def own_part_of_a_gather(group: ProcessGroup) -> None:
    """Read before the others are here, by kernels that ask of the gathered states alone how they lie in memory."""
    hidden = torch.randn(H, 4).add(group.rank()).t()
    gathered, arrival = vpf_collectives.gather_hidden_beside(hidden, group)
    assert arrival is not None
    assert torch.equal(arrival.hidden, hidden)
    assert arrival.hidden.stride() == gathered.stride()
    arrival.wait()
    assert torch.equal(gathered[arrival.own], hidden)


def test_own_part_of_a_gather() -> None:
    run_on_ranks(own_part_of_a_gather, 3)


@pytest.mark.parametrize(("world_size", "scattered", "reduced"), [(1, 0, 0), (2, 32, 64), (8, 56, 112)])
def test_bytes_of_a_reduction(world_size: int, scattered: int, reduced: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 bytes in a ring."""
    monkeypatch.setattr(vpf_collectives, "rank_and_size", lambda _: (0, world_size))
    hidden = torch.empty(8, 4, dtype=torch.bfloat16)
    assert vpf_collectives.reduction_bytes(hidden, None, sequence_parallel=True) == scattered
    assert vpf_collectives.reduction_bytes(hidden, None, sequence_parallel=False) == reduced


def count_collectives(
    group: ProcessGroup, sequence_parallel: bool, combine: Combine, keep: bool = False
) -> tuple[list[str], list[str]]:
    calls: list[str] = []

    def record(name: str, communicate: Any) -> Any:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return communicate(*args, **kwargs)

        return recorded

    for module, attribute, name in (
        (vpf_collectives, "_all_gather", "all_gather"),
        (vpf_collectives, "_reduce_scatter", "reduce_scatter"),
        (dist, "all_reduce", "all_reduce"),
    ):
        setattr(module, attribute, record(name, getattr(module, attribute)))
    problem = make_problem(16, H, V)
    shard = VocabShard.even(V, group)
    hidden = problem.hidden.detach().chunk(group.size())[group.rank()] if sequence_parallel else problem.hidden.detach()
    loss = linear_cross_entropy(
        hidden.requires_grad_(),
        problem.weight[shard.start : shard.stop],
        problem.target,
        group=group,
        shard=shard,
        sequence_parallel=sequence_parallel,
        options=ComputeOptions(combine=combine, keep_gathered_hidden=keep),
    )
    forward = calls.copy()
    calls.clear()
    loss.backward()
    return forward, calls


def test_messages_are_few() -> None:
    """One packed gather of statistics, dX reduced once; the hidden states gathered once in each direction, or kept."""
    gather = ["all_gather"]
    assert run_on_ranks(count_collectives, 2, False, "all_gather") == [(gather, ["all_reduce"])] * 2
    assert (
        run_on_ranks(count_collectives, 2, True, "all_gather") == [(gather * 2, ["all_gather", "reduce_scatter"])] * 2
    )
    assert run_on_ranks(count_collectives, 2, True, "all_gather", True) == [(gather * 2, ["reduce_scatter"])] * 2
    assert run_on_ranks(count_collectives, 2, False, "all_gather", True) == [(gather, ["all_reduce"])] * 2
    assert run_on_ranks(count_collectives, 2, False, "all_reduce") == [(["all_reduce"] * 2, ["all_reduce"])] * 2
    assert run_on_ranks(count_collectives, 1, True, "all_gather") == [([], [])]


class Operations(TorchDispatchMode):
    """Names of all operations of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def operations_of_a_gather(group: ProcessGroup, combine: Combine) -> set[str]:
    local = PartStats(*torch.rand(2, 6), *torch.rand(2, 6, 1))
    with Operations() as operations:
        vpf_collectives.gather_stats(stacked(local), 7, 14, group, combine)
    return operations.names


@pytest.mark.parametrize("combine", get_args(Combine))
def test_statistics_meet_without_the_host(combine: Combine) -> None:
    """No number comes from the host, as by `tensor[i] = number`, or goes to it: on CUDA either waits for the device,
    and the time of every launch after it shows."""
    for names in run_on_ranks(operations_of_a_gather, 2, combine):
        assert names
        assert names.isdisjoint({"aten.lift_fresh.default", "aten._local_scalar_dense.default"})


def frozen_on_some_ranks(group: ProcessGroup, sequence_parallel: bool) -> None:
    """Each rank freezes something else; all must still meet in the backward's collectives."""
    problem = make_problem(16, H, V, bias=False)
    exact = full_logits_results(problem.to(torch.float64))
    shard = VocabShard.even(V, group)
    expected = local_part(exact, group, shard, sequence_parallel=sequence_parallel)
    for shift in range(4):
        hidden_wanted, weight_wanted = [(True, True), (False, True), (True, False), (False, False)][
            (group.rank() + shift) % 4
        ]
        hidden = problem.hidden.detach()
        hidden = hidden.chunk(group.size())[group.rank()] if sequence_parallel else hidden
        hidden.requires_grad_(hidden_wanted)
        weight = problem.weight.detach()[shard.start : shard.stop].clone().requires_grad_(weight_wanted)
        loss = linear_cross_entropy(
            hidden,
            weight,
            problem.target,
            reduction="none",
            group=group,
            shard=shard,
            sequence_parallel=sequence_parallel,
        )
        loss.backward(problem.upstream)
        for tensor, wanted, exact_grad in (
            (hidden, hidden_wanted, expected.dhidden),
            (weight, weight_wanted, expected.dweight),
        ):
            assert (tensor.grad is not None) == wanted
            if tensor.grad is not None:
                torch.testing.assert_close(tensor.grad.double(), exact_grad, rtol=1e-4, atol=1e-6)
            tensor.grad = None


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_inputs_frozen_on_some_ranks(sequence_parallel: bool) -> None:
    run_on_ranks(frozen_on_some_ranks, 4, sequence_parallel)


def evaluate(group: ProcessGroup) -> None:
    problem = make_problem(16, H, V, bias=False)
    shard = VocabShard.even(V, group)
    with torch.no_grad():
        loss = linear_cross_entropy(
            problem.hidden, problem.weight[shard.start : shard.stop], problem.target, group=group, shard=shard
        )
    assert not loss.requires_grad
    torch.testing.assert_close(loss, F.cross_entropy(problem.hidden @ problem.weight.t(), problem.target))


def test_evaluation() -> None:
    run_on_ranks(evaluate, 2)


def no_tokens(group: ProcessGroup, sequence_parallel: bool) -> None:
    hidden = torch.zeros(0, H, requires_grad=True)
    weight = torch.randn(7, H, requires_grad=True)
    target = torch.zeros(0, dtype=torch.int64)
    loss = linear_cross_entropy(hidden, weight, target, group=group, sequence_parallel=sequence_parallel)
    loss.backward()
    assert loss == 0
    assert weight.grad is not None
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_no_tokens(sequence_parallel: bool) -> None:
    run_on_ranks(no_tokens, 2, sequence_parallel)


def default_shard_and_gathered_shard(group: ProcessGroup) -> None:
    """Without `shard` the vocabulary is the ranks' equal rows; `gathered` finds uneven ones."""
    problem = make_problem(20, H, 4 * group.size(), bias=False)
    expected = F.cross_entropy(problem.hidden @ problem.weight.t(), problem.target)
    equal = problem.weight.chunk(group.size())[group.rank()]
    torch.testing.assert_close(linear_cross_entropy(problem.hidden, equal, problem.target, group=group), expected)

    bounds = [0, 1, *[4 * group.size()] * (group.size() - 1)] if group.size() > 1 else [0, 4]
    uneven = problem.weight[bounds[group.rank()] : bounds[group.rank() + 1]]
    shard = VocabShard.gathered(uneven, group)
    assert shard == VocabShard(bounds[group.rank()], bounds[group.rank() + 1], 4 * group.size())
    loss = linear_cross_entropy(problem.hidden, uneven, problem.target, group=group, shard=shard)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_default_and_gathered_shards(world_size: int) -> None:
    run_on_ranks(default_shard_and_gathered_shard, world_size)


def uneven_rows_without_a_shard(group: ProcessGroup, rows: list[int], combine: Combine) -> None:
    """Each rank would see another vocabulary, and the loss would be wrong without another sign. That it is right for
    one of them must not let that one go on alone."""
    own, options = rows[group.rank()], ComputeOptions(combine=combine)
    message = (
        rf"VocabShard\(.*vocab_size={len(rows) * own}\) where all ranks together hold {sum(rows)} classes and "
        "expect different vocab_sizes"
    )
    # The last class of all is none that the smallest shard would expect.
    for target in (torch.tensor([0, 1, 2]), torch.tensor([0, 1, sum(rows) - 1])):
        inputs = (torch.randn(3, H), torch.randn(own, H), target)
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*inputs, group=group, options=options)
        with pytest.raises(ValueError, match=message):
            linear_token_stats(*inputs, group=group, options=options)


@pytest.mark.parametrize("combine", get_args(Combine))
@pytest.mark.parametrize("rows", [[5, 4], [5, 4, 6]], ids=str)
def test_uneven_rows_without_a_shard(rows: list[int], combine: Combine) -> None:
    run_on_ranks(uneven_rows_without_a_shard, len(rows), rows, combine)


def no_class_id_without_a_shard(group: ProcessGroup) -> None:
    target = torch.tensor([0, 10, 2])
    with pytest.raises(ValueError, match=r"target must be in \[0, 10\) or ignore_index, got 10 at position 1"):
        linear_cross_entropy(torch.randn(3, H), torch.randn(5, H), target, group=group)


def test_a_target_that_is_no_class_id_without_a_shard() -> None:
    run_on_ranks(no_class_id_without_a_shard, 2)


def target_changed_in_place(group: ProcessGroup, arguments: dict[str, Any]) -> None:
    """An error of torch's on every rank: one that did not see the change would wait for the others' gradients."""
    hidden, target = torch.randn(3, H, requires_grad=True), torch.tensor([0, 7, 2])
    loss = linear_cross_entropy(hidden, torch.randn(5, H), target, group=group, **arguments)
    target.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("arguments", [{}, {"label_smoothing": 0.1}], ids=str)
def test_a_target_that_is_changed_in_place(arguments: dict[str, Any]) -> None:
    run_on_ranks(target_changed_in_place, 2, arguments)


def default_device_elsewhere(group: ProcessGroup, combine: Combine) -> None:
    problem = make_problem(8, H, 2 * H, bias=False)
    shard = VocabShard.even(2 * H, group)
    inputs = (problem.hidden, problem.weight[shard.start : shard.stop], problem.target)
    options = ComputeOptions(combine=combine)
    expected = linear_cross_entropy(*inputs, group=group, options=options)
    with torch.device("meta"):
        assert torch.equal(linear_cross_entropy(*inputs, group=group, options=options), expected)


@pytest.mark.parametrize("combine", get_args(Combine))
def test_the_default_device_has_no_say(combine: Combine) -> None:
    run_on_ranks(default_device_elsewhere, 2, combine)


def bad_shards(group: ProcessGroup, bounds: list[tuple[int, int]], message: str) -> None:
    """All ranks raise, and none is left waiting."""
    start, stop = bounds[group.rank()]
    shard = VocabShard(start, stop, 10)
    target = torch.tensor([-100, *range(1, 10)])
    inputs = (torch.randn(10, H), torch.randn(shard.num_rows, H), target)
    for function in (linear_cross_entropy, linear_token_stats):
        with pytest.raises(ValueError, match=message):
            function(*inputs, group=group, shard=shard)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([(0, 4), (5, 10)], "all ranks together hold 9 classes"),
        ([(0, 6), (5, 10)], "all ranks together hold 11 classes"),
        ([(0, 5), (4, 9)], r"shard must cover \[0, vocab_size\) exactly once .* 2 ranks hold target 4"),
    ],
    ids=["gap", "overlap", "both"],
)
def test_shards_that_do_not_tile_the_vocabulary(bounds: list[tuple[int, int]], message: str) -> None:
    run_on_ranks(bad_shards, 2, bounds, message)


def bad_arguments(group: ProcessGroup) -> None:
    hidden, weight = torch.randn(8, H), torch.randn(5, H)
    target = torch.zeros(8, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"target must be in \[0, 10\) or ignore_index, got 10 at position 3"):
        linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 2, 10, 4, 5, 6, 7]), group=group)
    with pytest.raises(
        ValueError, match=r"target must have shape \(16,\) .*\(2 ranks with sequence_parallel\), got \(8,\)"
    ):
        linear_cross_entropy(hidden, weight, target, group=group, sequence_parallel=True)
    with pytest.raises(ValueError, match="input must have a token dimension"):
        linear_cross_entropy(hidden[0], weight, target[0], group=group, sequence_parallel=True)
    mesh = DeviceMesh("cpu", [[0, 1]], mesh_dim_names=("dp", "tp"))
    with pytest.raises(ValueError, match=r"group must be a one-dimensional DeviceMesh, got one with .*'dp', 'tp'"):
        linear_cross_entropy(hidden, weight, target, group=mesh)
    linear_cross_entropy(hidden, weight, target, group=mesh["tp"])
    alone: Any = dist.new_group([0])
    if group.rank() == 1:
        with pytest.raises(ValueError, match="group does not contain this rank"):
            linear_cross_entropy(hidden, weight, target, group=alone)


def test_bad_arguments() -> None:
    run_on_ranks(bad_arguments, 2)


def bad_arguments_on_rank_one(group: ProcessGroup) -> None:
    """Rank 1 raises before it sends anything. Had it sent its statistics, rank 0 would wait for it in the backward."""
    problem = make_problem(8, H, 2 * H, bias=False)
    shard = VocabShard.even(2 * H, group)
    bad: dict[str, Any] = {
        "weight": torch.ones(3),
        "target": torch.full((8,), 2 * H),
        "token_weight": torch.ones(3),
        "label_smoothing": 2.0,
        "z_loss_weight": -1.0,
        "logit_softcap": 0.0,
        "reduction": "avg",
    }
    if group.rank() == 1:
        sent: Any = []
        vpf_autograd.gather_stats = sent.append
        for name, value in bad.items():
            arguments = {"target": problem.target, "group": group, "shard": shard, name: value}
            with pytest.raises(ValueError, match=f"^{name} must"):
                linear_cross_entropy(problem.hidden, problem.weight[shard.start : shard.stop], **arguments)
        assert not sent


def test_bad_arguments_are_refused_before_communication() -> None:
    run_on_ranks(bad_arguments_on_rank_one, 2)


def raise_on_rank_one(group: ProcessGroup) -> None:
    if group.rank() == 1:
        raise ZeroDivisionError("on purpose")
    dist.barrier(group)


def test_a_failing_rank_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 raised:\n(.|\n)*ZeroDivisionError: on purpose"):
        run_on_ranks(raise_on_rank_one, 2)


def hang_on_rank_one(group: ProcessGroup) -> None:
    if group.rank() == 1:
        time.sleep(60)


def test_a_hanging_rank_is_named() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2 gave no answer within 3\.0 s"):
        run_on_ranks(hang_on_rank_one, 2, timeout=3.0)

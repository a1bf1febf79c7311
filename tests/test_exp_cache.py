"""Exponentials kept from the forward: the same gradients as without, for logits of any size."""

import gc
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vocab_parallel_fused import ComputeOptions, VocabShard, linear_cross_entropy, linear_token_stats
from vocab_parallel_fused.exp_cache import ExpCache
from vocab_parallel_fused.testing import (
    PeakBytes,
    Problem,
    assert_within_error_budget,
    full_logits_results,
    gradients,
    local_part,
    make_problem,
    max_error,
    run_on_ranks,
    sharded_results,
)

# Tokens for a tile of Hopper's kernel, rows for a whole tile of any and a tail.
T, H, V = 70, 24, 603
EVERYTHING = 2**30
DTYPES = [torch.float32, torch.bfloat16]


def options(exp_cache_bytes: int, **others: Any) -> ComputeOptions:
    return ComputeOptions(impl="triton", exp_cache_bytes=exp_cache_bytes, **others)


def bytes_of(rows: int, dtype: torch.dtype, tokens: int = T) -> int:
    return tokens * rows * dtype.itemsize


def loss_of(problem: Problem, options: ComputeOptions, **keywords: Any) -> Tensor:
    return linear_cross_entropy(
        problem.hidden,
        problem.weight,
        problem.target,
        linear_bias=problem.bias,
        reduction="none",
        options=options,
        **keywords,
    )


def assert_exact(problem: Problem, options: ComputeOptions) -> None:
    actual = gradients(loss_of(problem, options), problem)
    same, exact = full_logits_results(problem), full_logits_results(problem.to(torch.float64))
    assert_within_error_budget(actual, same, exact, kept=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [256, 520, V])
@pytest.mark.parametrize("workspace_bytes", [1, 2**22])
def test_loss_and_gradients(dtype: torch.dtype, rows: int, workspace_bytes: int, device: torch.device) -> None:
    """Some rows kept and some recomputed, which add up in one dhidden."""
    problem = make_problem(T, H, V, dtype=dtype, device=device)
    assert_exact(problem, options(bytes_of(rows, dtype), workspace_bytes=workspace_bytes))


def test_a_number_of_rows_that_products_like(device: torch.device) -> None:
    """All rows are kept, and none of them in a block of its own: dhidden is one product."""
    assert_exact(make_problem(T, H, 600, dtype=torch.bfloat16, device=device), options(EVERYTHING))


@pytest.mark.parametrize("shape", [(1, 8, 1), (3, 16, 200), (130, 8, 7), (70, 40, 257)])
def test_tails(shape: tuple[int, int, int], device: torch.device) -> None:
    assert_exact(make_problem(*shape, dtype=torch.bfloat16, bias=False, device=device), options(EVERYTHING))


@pytest.mark.parametrize("keywords", [{"logit_scale": 0.5, "temperature": 0.7}, {"logit_softcap": 5.0}], ids=str)
def test_transforms(keywords: dict[str, Any], device: torch.device) -> None:
    """What is kept has the transform's derivative in it."""
    problem = make_problem(40, H, V, device=device)
    results = [gradients(loss_of(problem, options(size), **keywords), problem) for size in (0, EVERYTHING)]
    for plain, kept in zip(*results, strict=True):
        assert plain is not None
        assert kept is not None
        assert max_error(kept, plain) < 1e-5


def a_class_of_no_target(problem: Problem) -> int:
    """A row that is kept and in no sample: no neighbour's target, nor one of the shard's first rows."""
    return next(c for c in range(V - 8, 100, -1) if c not in problem.target)


def outlier(problem: Problem) -> None:
    """One class towers above the sample that the reference comes from, by more than exponentials can express."""
    problem.weight[a_class_of_no_target(problem)] = problem.hidden[3] * 60


def far_targets(problem: Problem) -> None:
    """Targets 200 nats and more below the largest logit."""
    problem.hidden[5] *= 40
    problem.target[5] = (problem.weight @ problem.hidden[5]).argmin()
    problem.weight[7] = problem.hidden[8] * -30
    problem.target[8] = 7


def shifted_up(problem: Problem) -> None:
    assert problem.bias is not None
    problem.bias.add_(1e4)


def shifted_down(problem: Problem) -> None:
    assert problem.bias is not None
    problem.bias.sub_(1e4)


def impossible_classes(problem: Problem) -> None:
    """Whole tiles without probability, the sample's among them."""
    assert problem.bias is not None
    problem.bias[:100] = -torch.inf
    problem.target.clamp_(min=100)


def impossible_classes_beside_low_logits(problem: Problem) -> None:
    """A whole tile without probability, whose maximum of −∞ is no 0: exp(0 − r) would overflow."""
    assert problem.bias is not None
    problem.bias[:300] = -torch.inf
    problem.bias[300:] -= 100
    problem.target.clamp_(min=300)


@pytest.mark.parametrize(
    "spoil",
    [outlier, far_targets, shifted_up, shifted_down, impossible_classes, impossible_classes_beside_low_logits],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_out_of_range(spoil: Callable[[Problem], None], dtype: torch.dtype, device: torch.device) -> None:
    """Rows whose exponentials are of no use are recomputed, and no other row is touched by them."""
    problem = make_problem(T, H, V, dtype=dtype, device=device)
    with torch.no_grad():
        spoil(problem)
    results = [gradients(loss_of(problem, options(size)), problem) for size in (0, EVERYTHING)]
    exact = full_logits_results(problem.to(torch.float64))
    for plain, kept, reference in zip(*results, exact, strict=True):
        assert plain is not None
        assert kept is not None
        assert reference is not None
        # As far from the exact result as without a cache, but for the roundings that it adds.
        allowed = 2 * max_error(plain, reference) + 3 * torch.finfo(dtype).eps
        assert max_error(kept, reference) <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_target_of_next_to_no_probability(dtype: torch.dtype, device: torch.device) -> None:
    """Whose entry, with no gradient of its own, is no normal number: rows must not be scaled by how that rounds."""
    problem = make_problem(40, H, V, dtype=dtype, device=device)
    assert problem.bias is not None
    with torch.no_grad():
        problem.bias[5] -= 92
    target = torch.full_like(problem.target, 5)
    grads = []
    for size in (0, EVERYTHING):
        stats = linear_token_stats(
            problem.hidden,
            problem.weight,
            target,
            outputs=["lse", "log_prob"],
            linear_bias=problem.bias,
            options=options(size),
        )
        assert stats.lse is not None
        grads.append(torch.autograd.grad(stats.lse, (problem.hidden, problem.weight), problem.upstream))
    for plain, kept in zip(*grads, strict=True):
        assert max_error(kept, plain) < 3 * torch.finfo(dtype).eps + 1e-5


def test_a_sample_without_a_finite_logit(device: torch.device) -> None:
    """Then the reference is no number, and the token must be recomputed."""
    problem = make_problem(40, H, V, device=device)
    assert problem.bias is not None
    with torch.no_grad():
        problem.bias[:100] = -torch.inf
        problem.bias[100:] -= 100
    grads = []
    for size in (0, EVERYTHING):
        stats = linear_token_stats(
            problem.hidden, problem.weight, outputs=["lse"], linear_bias=problem.bias, options=options(size)
        )
        assert stats.lse is not None
        grads.append(torch.autograd.grad(stats.lse, (problem.hidden, problem.weight), problem.upstream))
    for plain, kept in zip(*grads, strict=True):
        assert max_error(kept, plain) < 1e-5


def test_tiny_gradients(device: torch.device) -> None:
    """35 nats above the reference a scale is smaller than the gradient by as much: too small to be precise."""
    problem = make_problem(40, H, V, device=device)
    with torch.no_grad():
        row, x = a_class_of_no_target(problem), problem.hidden[3]
        problem.weight[row] = x * 35 / x.dot(x)
    grads = []
    for size in (0, EVERYTHING):
        stats = linear_token_stats(problem.hidden, problem.weight, outputs=["lse"], options=options(size))
        assert stats.lse is not None
        grads.append(torch.autograd.grad(stats.lse, (problem.hidden, problem.weight), problem.upstream * 1e-36))
    for plain, kept, values in zip(*grads, (3, row), strict=True):
        assert max_error(kept[values], plain[values]) < 1e-5


def test_targets_are_rounded_once(device: torch.device) -> None:
    """The entry of a target is exact in bf16, by the choice of its token's scale: with one-hot classes dhidden shows
    it, rounded as a result is and not once more."""
    problem = make_problem(T, 64, 64, dtype=torch.bfloat16, bias=False, device=device)
    with torch.no_grad():
        problem.weight.copy_(torch.eye(64, device=device))
    tokens = (problem.target >= 0).nonzero()[:, 0]
    exact = full_logits_results(problem.to(torch.float64)).dhidden

    def error(exp_cache_bytes: int) -> float:
        dhidden = gradients(loss_of(problem, options(exp_cache_bytes)), problem).dhidden
        return float((dhidden.double() / exact - 1)[tokens, problem.target[tokens]].square().mean().sqrt())

    assert error(EVERYTHING) < 1.25 * error(0)  # 1.6 with another rounding


def test_losses_that_are_no_multiple_of_probabilities(device: torch.device) -> None:
    """The gradient of a logit alone has no term that exponentials could carry; of several targets, one may repeat."""
    problem = make_problem(40, H, V, device=device)
    target = torch.randint(V, (40, 3), device=device)
    target[:, 2] = target[:, 0]
    upstream = torch.randn(2, 40, 3, device=device)
    upstream[:, :5] = 0
    results = []
    for size in (0, EVERYTHING):
        stats = linear_token_stats(
            problem.hidden, problem.weight, target, outputs=["log_prob", "target_logit"], options=options(size)
        )
        assert stats.log_prob is not None
        assert stats.target_logit is not None
        for loss in (
            (stats.target_logit * upstream[0]).sum(),
            (stats.log_prob * upstream[1]).sum() + (stats.target_logit * upstream[0]).sum(),
        ):
            results.append(torch.autograd.grad(loss, (problem.hidden, problem.weight), retain_graph=True))
    half = len(results) // 2
    for plain, kept in zip(results[:half], results[half:], strict=True):
        for a, b in zip(plain, kept, strict=True):
            assert max_error(b, a) < 2e-5


def test_rows_of_dhidden_computed_anew(device: torch.device) -> None:
    """Those that are marked, and of these all columns: more than programs take at a time."""
    kept = pytest.importorskip("vocab_parallel_fused.kernels.kept")
    launch = kept._PRODUCT_LAUNCH if device.type == "cuda" else kept._PRODUCT_LAUNCH_INTERPRETER
    columns = launch["BLOCK_H"] * (kept._PROGRAMS_PER_TOKENS + 1) + 5
    dlogits, weight = (torch.randn(rows, size, device=device) for rows, size in ((T, V), (V, columns)))
    reference = torch.zeros(T, device=device)
    reference[[3, 66]] = torch.inf
    dhidden = torch.full((T, columns), 7.0, device=device)
    kept.rewrite_product(dhidden, weight, ExpCache(dlogits, reference, reference))
    expected = torch.full((T, columns), 7.0, dtype=torch.float64, device=device)
    expected[[3, 66]] = (dlogits.double() @ weight.double())[[3, 66]]
    torch.testing.assert_close(dhidden.double(), expected, rtol=1e-4, atol=1e-3)


def test_a_second_backward(device: torch.device) -> None:
    """The first overwrites entries of what is kept: the second must overwrite them again, with its own gradients."""
    problem = make_problem(40, H, V, device=device)
    with torch.no_grad():
        outlier(problem)
    loss = loss_of(problem, options(EVERYTHING))
    for upstream in (problem.upstream, problem.upstream.flip(0) * 3):
        again = problem._replace(upstream=upstream)
        problem.hidden.grad = problem.weight.grad = None
        loss.backward(upstream, retain_graph=True)
        expected = gradients(loss_of(again, options(0)), again)
        for name in ("hidden", "weight"):
            grad = getattr(problem, name).grad
            reference = getattr(expected, "d" + name)
            assert max_error(grad, reference) < 1e-5


def test_frozen_inputs(device: torch.device) -> None:
    problem = make_problem(40, H, V, device=device)
    expected = gradients(loss_of(problem, options(0)), problem)
    for trained in ("hidden", "weight", "bias"):
        leaves = [
            getattr(problem, name).detach().requires_grad_(name == trained) for name in ("hidden", "weight", "bias")
        ]
        alone = problem._replace(hidden=leaves[0], weight=leaves[1], bias=leaves[2])
        loss_of(alone, options(EVERYTHING)).backward(problem.upstream)
        assert max_error(getattr(alone, trained).grad, getattr(expected, "d" + trained)) < 1e-5


@pytest.mark.parametrize("rows", [256, V])
def test_main_grad(rows: int, device: torch.device) -> None:
    problem = make_problem(T, H, V, dtype=torch.bfloat16, device=device)
    weight: Any = problem.weight
    weight.main_grad = torch.ones(V, H, device=device)
    budget = bytes_of(rows, torch.bfloat16)
    loss_of(problem, options(budget, accumulate_main_grad=True)).backward(problem.upstream)
    exact = full_logits_results(problem.to(torch.float64)).dweight
    assert max_error(weight.main_grad - 1, exact) < 2 * 2**-8


def kept_bytes(problem: Problem, options: ComputeOptions, **keywords: Any) -> int:
    """What is alive between forward and backward."""
    with PeakBytes() as peak:
        loss = loss_of(problem, options, **keywords)
        gc.collect()  # the interpreter leaves cycles that hold its arguments
        alive = peak.alive
    del loss
    return alive


def test_memory(device: torch.device) -> None:
    """The budget is a bound. What cannot use it takes nothing."""
    if device.type == "cuda":
        pytest.skip("tiles are too large there for half of these rows")
    problem = make_problem(T, 32, V, dtype=torch.bfloat16, bias=False, device=device)  # in no need of copies
    nothing = kept_bytes(problem, options(0))
    assert kept_bytes(problem, options(bytes_of(31, torch.bfloat16))) == nothing
    every_row = bytes_of(V - V % 8, torch.bfloat16)
    per_token = 8 * T  # a reference and a maximum
    assert every_row <= kept_bytes(problem, options(EVERYTHING)) - nothing <= every_row + per_token
    half = kept_bytes(problem, options(every_row // 2)) - nothing
    assert 0.4 * every_row < half <= every_row // 2 + per_token
    with PeakBytes() as peak, torch.no_grad():
        loss_of(problem, options(EVERYTHING))
    assert peak.bytes < every_row
    fp16 = make_problem(T, H, V, dtype=torch.float16, bias=False, device=device)
    assert kept_bytes(fp16, options(EVERYTHING)) == kept_bytes(fp16, options(0))
    smoothed = {"label_smoothing": 0.1}
    assert kept_bytes(problem, options(EVERYTHING), **smoothed) == kept_bytes(problem, options(0), **smoothed)


def on_a_rank(group: ProcessGroup, problem: Problem, exp_cache_bytes: list[int]) -> None:
    vocab_shard = VocabShard.even(len(problem.weight), group)
    of_rank = options(exp_cache_bytes[group.rank()])
    same, exact = full_logits_results(problem), full_logits_results(problem.to(torch.float64))
    for sequence_parallel in (False, True):
        actual = sharded_results(problem, group, vocab_shard, sequence_parallel=sequence_parallel, options=of_rank)
        parts = [local_part(full, group, vocab_shard, sequence_parallel=sequence_parallel) for full in (same, exact)]
        assert_within_error_budget(actual, *parts, ranks=group.size(), kept=True)


def far_from_the_maximum_on_a_rank(group: ProcessGroup, problem: Problem) -> list[float]:
    vocab_shard = VocabShard.even(V, group)
    plain, kept = (sharded_results(problem, group, vocab_shard, options=options(size)) for size in (0, EVERYTHING))
    return [max_error(kept.dhidden[:1], plain.dhidden[:1]), max_error(kept.dweight, plain.dweight)]


@pytest.mark.parametrize(("distance", "size"), [(89.0, 1e9), (300.0, 1.0)])
def test_a_target_far_below_the_maximum_of_another_rank(distance: float, size: float) -> None:
    """Its rank's exponentials are in range, and their scale may even be, but not the target's entry over that."""
    if "TRITON_INTERPRET" not in os.environ:
        pytest.skip("ranks of these tests have no GPU, and the kernels no interpreter")
    problem = make_problem(6, H, V, bias=False)
    with torch.no_grad():
        problem.target[0], problem.upstream[0] = 0, 1.0
        # Token 0 has logits of 0, but for one on the last rank.
        problem.hidden[0], problem.hidden[0, -1] = 0.0, 10.0
        problem.weight[:, -1], problem.weight[V - 2, -1] = 0.0, distance / 10
    problem = problem._replace(upstream=problem.upstream * size)
    for errors in run_on_ranks(far_from_the_maximum_on_a_rank, 3, problem):
        assert max(errors) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ranks_with_budgets_of_their_own(dtype: torch.dtype) -> None:
    """Only the probabilities' scale depends on the other ranks, so what a rank keeps is its own affair."""
    if "TRITON_INTERPRET" not in os.environ:
        pytest.skip("ranks of these tests have no GPU, and the kernels no interpreter")
    problem = make_problem(42, H, 600, dtype=dtype)  # 200 rows a rank, which are all kept
    run_on_ranks(on_a_rank, 3, problem, [EVERYTHING, 0, bytes_of(100, dtype, 42)])


@pytest.mark.gpu
def test_graph_replay_with_new_data() -> None:
    """Rows that leave the range only in the replay are found there."""
    problem = make_problem(300, 64, 1000, dtype=torch.bfloat16, device="cuda", bias=False)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        gradients(loss_of(problem, options(EVERYTHING)), problem)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = gradients(loss_of(problem, options(EVERYTHING)), problem)
    with torch.no_grad():
        outlier(problem)
    graph.replay()
    expected = gradients(loss_of(problem, options(EVERYTHING)), problem)
    for replayed, eager in zip(captured, expected, strict=True):
        if replayed is not None and eager is not None:
            assert torch.equal(replayed, eager)
    assert_exact(problem, options(EVERYTHING))


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    problem = make_problem(300, 64, 1000, dtype=torch.bfloat16, device="cuda")
    gradients(loss_of(problem, options(EVERYTHING)), problem)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(loss_of(problem, options(EVERYTHING)), problem)
    finally:
        torch.cuda.set_sync_debug_mode("default")

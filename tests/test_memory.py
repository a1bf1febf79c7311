"""Memory does not grow with tokens × vocabulary."""

import pytest
import torch
import torch.nn.functional as F

from vocab_parallel_fused import ComputeOptions, linear_cross_entropy, linear_token_stats
from vocab_parallel_fused.testing import PeakBytes, make_problem

WORKSPACE_BYTES = 2**20


def peak_bytes(T: int, H: int, V: int, *, grad: bool = True, stats: bool = False) -> int:
    """Above the inputs and their gradients, of the loss or of all statistics."""
    problem = make_problem(T, H, V, bias=False)
    with PeakBytes() as peak, torch.set_grad_enabled(grad):
        options = ComputeOptions(impl="eager", workspace_bytes=WORKSPACE_BYTES)
        if stats:
            every = linear_token_stats(problem.hidden, problem.weight, problem.target, options=options)
            loss = torch.stack([stat for stat in every if stat is not None and stat.is_floating_point()]).sum()
        else:
            loss = linear_cross_entropy(problem.hidden, problem.weight, problem.target, options=options)
        if grad:
            loss.backward()
    return peak.bytes - grad * (problem.hidden.nbytes + problem.weight.nbytes)


@pytest.mark.parametrize("stats", [False, True], ids=["loss", "statistics"])
def test_peak_does_not_grow_with_tokens_times_vocabulary(stats: bool) -> None:
    small, large = peak_bytes(1024, 16, 2048, stats=stats), peak_bytes(4096, 16, 16384, stats=stats)
    logits_bytes = 4096 * 16384 * 4
    # Targets, statistics and their gradients: 16 numbers each, and twice as many for all statistics.
    per_token = 4096 * 16 * 8 * (1 + stats)
    assert large < small + per_token
    assert large < logits_bytes / 8


def test_the_workspace_bounds_the_backward() -> None:
    """Tiles of the forward are bounded too, so evaluation and training differ by at most the workspace."""
    forward, both = peak_bytes(2048, 16, 16384, grad=False), peak_bytes(2048, 16, 16384)
    assert both <= max(forward, 2 * WORKSPACE_BYTES)


def test_evaluation_keeps_nothing_for_a_backward() -> None:
    problem = make_problem(512, 16, 2048, bias=False)
    with PeakBytes() as peak, torch.no_grad():
        loss = linear_cross_entropy(problem.hidden, problem.weight, problem.target, reduction="none")
        alive = peak.alive
    assert loss.grad_fn is None
    assert alive == loss.nbytes


def test_the_measure_in_inference_mode() -> None:
    """There torch does not take operations apart before the measure sees them: the softmax's result would be missed."""
    T, H, V = 256, 16, 1024
    problem = make_problem(T, H, V, bias=False)
    peaks = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), PeakBytes() as peak:
            F.cross_entropy(problem.hidden @ problem.weight.t(), problem.target)
        peaks.append(peak.bytes)
    assert peaks[0] == peaks[1] >= 2 * T * V * 4


def test_the_measure_itself() -> None:
    """Full logits: the logits and what the softmax keeps of them, and a gradient of either."""
    T, H, V = 256, 16, 1024
    problem = make_problem(T, H, V, bias=False)
    with PeakBytes() as peak:
        F.cross_entropy(problem.hidden @ problem.weight.t(), problem.target).backward()
    logits_bytes = T * V * 4
    assert 3 * logits_bytes <= peak.bytes < 4 * logits_bytes
    with PeakBytes() as peak:
        for _ in range(3):
            torch.empty(1000).add(1)
    assert peak.bytes == 8000


@pytest.mark.gpu
@pytest.mark.parametrize("main_grad", [False, True])
def test_peak_on_a_gpu(main_grad: bool) -> None:
    """Workspace and fp32 accumulator, which with an fp32 main_grad is in the workspace; the allocator's own count."""
    T, H, V = 8192, 1024, 65536
    problem = make_problem(T, H, V, dtype=torch.bfloat16, device="cuda", bias=False)
    if main_grad:
        vars(problem.weight)["main_grad"] = torch.zeros(V, H, device="cuda")
    options = ComputeOptions(workspace_bytes=32 * 2**20, accumulate_main_grad=main_grad)
    extra = 0
    for _ in range(2):  # the first call compiles, and makes gradients in whose place those of the second come
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        problem.hidden.grad = problem.weight.grad = None
        linear_cross_entropy(problem.hidden, problem.weight, problem.target, options=options).backward()
        extra = torch.cuda.max_memory_allocated() - before
    assert extra < 32 * 2**20 + (not main_grad) * 4 * T * H + 8 * 2**20

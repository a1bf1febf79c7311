"""What only a GPU can show. Run with the whole suite on a machine that has one; real shapes are in launch/check.py."""

import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch

from vocab_parallel_fused import (
    ComputeOptions,
    collectives,
    linear_cross_entropy,
    linear_distillation,
    linear_token_stats,
    linear_top_k,
)
from vocab_parallel_fused.divergence import Divergence
from vocab_parallel_fused.kernels import sweep
from vocab_parallel_fused.testing import (
    Problem,
    assert_within_error_budget,
    full_logits_results,
    gradients,
    make_problem,
    max_error,
)

pytestmark = pytest.mark.gpu


def per_token(problem: Problem, **options: Any) -> torch.Tensor:
    return linear_cross_entropy(
        problem.hidden,
        problem.weight,
        problem.target,
        linear_bias=problem.bias,
        reduction="none",
        options=ComputeOptions(impl="triton", **options),
    )


# The last rows lie past 2³¹ elements; an H that is no multiple of 8 takes plain pointers, the others descriptors.
@pytest.mark.parametrize("shape", [(64, 4096, 530_000), (64, 4090, 530_000), (530_000, 4096, 64), (530_000, 4090, 64)])
def test_offsets_past_32_bits(shape: tuple[int, int, int]) -> None:
    T, H, V = shape
    problem = make_problem(T, H, V, dtype=torch.bfloat16, device="cuda", bias=False)
    last = slice(-64, None)
    if T > V:
        # Only the last tokens matter, so the oracle needs only these.
        upstream = torch.zeros_like(problem.upstream)
        upstream[last] = problem.upstream[last]
        problem = problem._replace(upstream=upstream)
        small = Problem(problem.hidden[last], problem.weight, None, problem.target[last], upstream[last])
    else:
        small = problem
    exact = full_logits_results(small.to(torch.float64))
    same = full_logits_results(small.to(torch.bfloat16))
    actual = gradients(per_token(problem), problem)
    actual = actual._replace(loss=actual.loss[last], dhidden=actual.dhidden[last])
    # Matrix units truncate as they add 16 products at a time; cuBLAS leaves them at H = 4090, so it is no measure.
    assert max_error(actual.loss, exact.loss) < (16 + H / 32) * 2**-23
    assert_within_error_budget(actual._replace(loss=exact.loss), same, exact)


def cross_entropy_with_all_terms(problem: Problem, **options: Any) -> torch.Tensor:
    class_weight = torch.ones(problem.weight.shape[0], device="cuda")
    return linear_cross_entropy(
        problem.hidden,
        problem.weight,
        problem.target,
        linear_bias=problem.bias,
        weight=class_weight,
        token_weight=problem.upstream.abs(),
        label_smoothing=0.1,
        z_loss_weight=1e-3,
        logit_softcap=30.0,
        options=ComputeOptions(**options),
    )


def token_statistics(problem: Problem, **options: Any) -> torch.Tensor:
    several = problem.target[:, None].expand(-1, 3)
    stats = linear_token_stats(problem.hidden, problem.weight, several, options=ComputeOptions(**options))
    assert stats.log_prob is not None
    assert stats.entropy is not None
    return stats.log_prob.sum() + stats.entropy.sum()


def top_k(problem: Problem, **options: Any) -> torch.Tensor:
    return linear_top_k(problem.hidden, problem.weight, 5, options=ComputeOptions(**options)).log_prob.sum()


def distillation(divergence: Divergence, problem: Problem, **options: Any) -> torch.Tensor:
    teacher = (problem.hidden.detach().flip(0), problem.weight.detach().flip(0))
    arguments: Any = {"divergence": divergence, "options": ComputeOptions(**options)}
    return linear_distillation(problem.hidden, problem.weight, *teacher, **arguments)


CALLS: dict[str, Callable[..., torch.Tensor]] = {
    "cross-entropy": lambda problem, **options: per_token(problem, **options).sum(),
    "all terms": cross_entropy_with_all_terms,
    "token statistics": token_statistics,
    "top k": top_k,
    **{name: functools.partial(distillation, name) for name in get_args(Divergence)},
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_nothing_waits_for_the_device(call: Callable[..., torch.Tensor], dtype: torch.dtype) -> None:
    problem = make_problem(300, 64, 1000, dtype=dtype, device="cuda")

    def run() -> None:
        for exp_cache_bytes in (0, 2**20):
            call(problem, exp_cache_bytes=exp_cache_bytes).backward()

    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [300, 600])  # on one stream, on several
def test_graph_replay_with_new_data(dtype: torch.dtype, tokens: int) -> None:
    problem = make_problem(tokens, 64, 1000, dtype=dtype, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        gradients(per_token(problem), problem)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = gradients(per_token(problem), problem)
    other = make_problem(tokens, 64, 1000, dtype=dtype, device="cuda", seed=1)
    with torch.no_grad():
        for static, new in zip(problem, other, strict=True):
            assert static is not None
            assert new is not None
            static.copy_(new)
    graph.replay()
    expected = gradients(per_token(other), other)
    for replayed, eager in zip(captured, expected, strict=True):
        assert replayed is not None
        assert eager is not None
        assert torch.equal(replayed, eager)


def test_without_mixed_precision_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices whose torch cannot add 16-bit products into an fp32 matrix upcast the operands."""
    problem = make_problem(300, 64, 1000, dtype=torch.bfloat16, device="cuda")
    monkeypatch.setattr(sweep, "_has_mixed_gemm", lambda *_: False)
    actual = gradients(per_token(problem, workspace_bytes=200_000), problem)
    assert_within_error_budget(actual, full_logits_results(problem), full_logits_results(problem.to(torch.float64)))


def test_messages_come_after_what_they_send_and_before_what_needs_them() -> None:
    """On a stream of their own. Each step is late, so that one which does not wait for it finds something else."""
    device, sleep = torch.device("cuda"), 20_000_000  # cycles, some 10 ms
    sent, received = torch.zeros(2, 1000, device=device)
    torch.cuda._sleep(sleep)
    sent.fill_(1.0)
    with collectives._beside(device) as (join, side):
        assert torch.cuda.current_stream() == side
        torch.cuda._sleep(sleep)
        received.copy_(sent)
    join()
    received += 1
    assert (received == 2).all()


def test_float32_follows_the_precision_of_torch(set_fp32_precision: Callable[[str], None]) -> None:
    problem = make_problem(300, 64, 1000, device="cuda")
    exact = full_logits_results(problem.to(torch.float64))
    errors = []
    for setting in ("tf32", "ieee"):
        set_fp32_precision(setting)
        errors.append(max_error(per_token(problem), exact.loss))
    fast, precise = errors
    assert precise < 2e-6
    assert 1e-5 < fast < 1e-2


@pytest.mark.parametrize("target", [-1, 1000])
def test_a_target_that_is_no_class_is_a_device_assertion(target: int) -> None:
    program = (
        "import torch, vocab_parallel_fused as vpf\n"
        "x, w = torch.randn(4, 64, device='cuda'), torch.randn(1000, 64, device='cuda')\n"
        f"vpf.linear_cross_entropy(x, w, torch.full((4,), {target}, device='cuda'))\n"
        "torch.cuda.synchronize()\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "device-side assert" in run.stderr
    assert "a target is not in [0, vocab_size)" in run.stderr

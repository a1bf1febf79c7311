"""The most probable classes of each token, against a stable sort of full logits."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributed import ProcessGroup

from vocab_parallel_fused import ComputeOptions, VocabShard, linear_top_k
from vocab_parallel_fused.options import Impl
from vocab_parallel_fused.testing import make_problem, run_on_ranks


def full_top_k(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and classes in descending order, of equal logits the smaller class first."""
    log_probs = torch.log_softmax(logits, dim=-1)
    index = logits.argsort(dim=-1, descending=True, stable=True)[..., :k]
    return log_probs.gather(-1, index), index


# Small numbers, so that products are exact in any order and ties are ties: also across blocks, tiles and shards.
def tied_problem(T: int, V: int, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randint(-1, 2, (T, 8), generator=generator, device=device).float()
    weight = torch.randint(-1, 2, (V, 8), generator=generator, device=device).float()
    return hidden, weight


@pytest.mark.parametrize("k", [1, 5, 64])
@pytest.mark.parametrize("workspace_bytes", [1, 10_000, None])
def test_matches_a_stable_sort(impl: Impl, k: int, workspace_bytes: int | None, device: torch.device) -> None:
    hidden, weight = tied_problem(19, 101, device)
    actual = linear_top_k(hidden, weight, k, options=ComputeOptions(impl=impl, workspace_bytes=workspace_bytes))
    log_prob, index = full_top_k(hidden @ weight.t(), k)
    assert torch.equal(actual.class_id, index)
    torch.testing.assert_close(actual.log_prob, log_prob)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients(impl: Impl, dtype: torch.dtype, device: torch.device) -> None:
    """Values of random logits with bias, soft cap and temperature; leading dimensions; a random upstream gradient."""
    problem = make_problem(24, 16, 150, dtype=dtype, device=device)
    assert problem.bias is not None
    upstream = torch.randn(4, 6, 7, device=device)
    actual = linear_top_k(
        problem.hidden.view(4, 6, 16),
        problem.weight,
        7,
        linear_bias=problem.bias,
        logit_softcap=6.0,
        temperature=0.5,
        options=ComputeOptions(impl=impl, workspace_bytes=5000),
    )
    exact = problem.to(torch.float64)
    logits = 6 * torch.tanh(F.linear(exact.hidden, exact.weight, exact.bias) / 6) / 0.5
    log_prob, _ = full_top_k(logits.view(4, 6, 150), 7)
    torch.testing.assert_close(actual.log_prob.double(), log_prob, rtol=0, atol=2e-5)
    grads, expected = (
        torch.autograd.grad(value, [t for t in (p.hidden, p.weight, p.bias) if t is not None], upstream.to(value.dtype))
        for value, p in ((actual.log_prob, problem), (log_prob, exact))
    )
    for grad, reference in zip(grads, expected, strict=True):
        error = (grad.double() - reference).abs().max() / reference.abs().max()
        # The logits' gradients and the result are each rounded once.
        assert error <= 2 * torch.finfo(dtype).eps + 1e-5


def test_fewer_finite_logits_than_asked_for(impl: Impl, device: torch.device) -> None:
    """Classes of bias −inf come last, the smaller ones first, and never twice."""
    hidden, weight = tied_problem(5, 70, device)
    bias = torch.full((70,), -torch.inf, device=device)
    bias[[3, 40, 69]] = 0
    actual = linear_top_k(hidden, weight, 6, linear_bias=bias, options=ComputeOptions(impl=impl, workspace_bytes=1))
    assert torch.equal(actual.class_id[:, 3:], torch.tensor([[0, 1, 2]], device=device).expand(5, 3))
    assert torch.equal(actual.class_id, full_top_k(hidden @ weight.t() + bias, 6)[1])
    assert (actual.log_prob[:, 3:] == -torch.inf).all()


def test_zeros_of_either_sign_are_equal(impl: Impl, device: torch.device) -> None:
    """Logits that underflow to −0 and to 0: the bits of fp32 numbers order them, the numbers do not."""
    weight = torch.full((40, 8), 1e-30, device=device)
    weight[::2] *= -1
    hidden = torch.ones(3, 8, device=device)
    actual = linear_top_k(hidden, weight, 5, logit_scale=1e-20, options=ComputeOptions(impl=impl))
    assert torch.equal(actual.class_id, torch.arange(5, device=device).expand(3, 5))


def test_all_classes(impl: Impl, device: torch.device) -> None:
    """k = V: every class once, and probabilities that sum to 1."""
    problem = make_problem(9, 16, 67, device=device)
    actual = linear_top_k(problem.hidden, problem.weight, 67, options=ComputeOptions(impl=impl))
    assert torch.equal(actual.class_id.sort(dim=1).values, torch.arange(67, device=device).expand(9, 67))
    assert (actual.log_prob.diff(dim=1) <= 0).all()
    torch.testing.assert_close(actual.log_prob.exp().sum(dim=1), torch.ones(9, device=device))


@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (0, ValueError, r"k must be in \[1, 30\], got 0"),
        (31, ValueError, r"k must be in \[1, 30\], got 31"),
        (2.0, TypeError, "k must be an int, got 2.0"),
    ],
)
def test_errors(k: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_top_k(torch.ones(3, 4), torch.ones(30, 4), k)


def over_ranks(group: ProcessGroup, impl: Impl, sequence_parallel: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Uneven, empty and padded shards, ties across all of them; shards smaller than k."""
    world_size = group.size()
    hidden, weight = tied_problem(6 * world_size, 101)
    local = hidden.chunk(world_size)[group.rank()] if sequence_parallel else hidden
    results = []
    for bounds in ([0, 34, 68, 102], [0, 3, 3, 110]):
        shard = VocabShard(bounds[group.rank()], bounds[group.rank() + 1], 101)
        padding = torch.full((shard.num_rows - shard.num_valid_rows, 8), 1e3)
        rows = torch.cat((weight[shard.start : shard.start + shard.num_valid_rows], padding)).requires_grad_()
        top = linear_top_k(
            local,
            rows,
            20,
            group=group,
            shard=shard,
            sequence_parallel=sequence_parallel,
            options=ComputeOptions(impl=impl),
        )
        full = weight.clone().requires_grad_()
        log_prob, index = full_top_k(hidden @ full.t(), 20)
        assert torch.equal(top.class_id, index)
        torch.testing.assert_close(top.log_prob, log_prob)
        upstream = torch.randn(log_prob.shape, generator=torch.Generator().manual_seed(1))
        top.log_prob.backward(upstream)
        log_prob.backward(upstream)
        assert rows.grad is not None
        assert full.grad is not None
        torch.testing.assert_close(
            rows.grad[: shard.num_valid_rows], full.grad[shard.start :][: shard.num_valid_rows], rtol=1e-4, atol=1e-5
        )
        results.append((top.log_prob.detach(), top.class_id))
    return results


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_over_ranks(impl: Impl, sequence_parallel: bool) -> None:
    if impl == "triton" and torch.cuda.is_available():
        pytest.skip("these ranks compute on the CPU")
    first, *others = run_on_ranks(over_ranks, 3, impl, sequence_parallel)
    for other in others:
        for (log_prob, index), (other_log_prob, other_index) in zip(first, other, strict=True):
            assert torch.equal(log_prob, other_log_prob)
            assert torch.equal(index, other_index)

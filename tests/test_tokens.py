"""The loss without options on [T] numbers: both implementations, on numbers that the op itself may never show them."""

import pytest
import torch

from vocab_parallel_fused.functional import Reduction
from vocab_parallel_fused.kernels import eager
from vocab_parallel_fused.stats import PartStats

T = 5000  # more than the kernel adds up at a time


def numbers(device: torch.device) -> tuple[PartStats, torch.Tensor]:
    """Statistics and targets, some ignored, some whose logit rounding has put above the largest."""
    generator = torch.Generator().manual_seed(0)
    max_logit = 10 * torch.randn(T, generator=generator)
    below = torch.rand(T, 1, generator=generator)
    below[::7] = -1e-6
    whole = PartStats(max_logit, 1 + torch.rand(T, generator=generator), max_logit[:, None] - below, torch.ones(T, 1))
    target = torch.randint(100, (T, 1), generator=generator)
    target[::11] = -100
    whole = PartStats._make(None if field is None else field.to(device) for field in whole)
    return whole, target.to(device)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_implementations_agree(reduction: Reduction, device: torch.device) -> None:
    tokens = pytest.importorskip("vocab_parallel_fused.kernels.tokens")
    whole, target = numbers(device)
    expected = eager.token_loss(whole, target, -100, reduction)
    actual = tokens.token_loss(whole, target, -100, reduction)
    assert (expected.loss >= 0).all()
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=2e-6, atol=1e-6)
    grad = torch.randn(expected.loss.shape, generator=torch.Generator().manual_seed(1)).to(device)
    divisor = expected.num_valid if reduction == "mean" else None
    arguments = (grad, whole.sum_exp, target, divisor, -100)
    for mine, theirs in zip(tokens.token_loss_grads(*arguments), eager.token_loss_grads(*arguments), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("owners", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("token", [0, 1, T - 1])
def test_targets_without_one_owner(owners: float, token: int, device: torch.device) -> None:
    """One is enough, wherever it is; token 0 is ignored."""
    tokens = pytest.importorskip("vocab_parallel_fused.kernels.tokens")
    whole, target = numbers(device)
    whole.owners[token] = owners
    for implementation in (eager, tokens):
        owned_once = implementation.token_loss(whole, target, -100, "mean").owned_once
        assert bool(owned_once) == (owners == 1 or token == 0)

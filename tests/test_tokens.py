"""What is computed of [T] numbers: both implementations, on numbers that the op itself may never show them."""

import pytest
import torch

from vocab_parallel_fused.functional import Reduction
from vocab_parallel_fused.kernels import eager
from vocab_parallel_fused.stats import DIGIT, PartStats

T = 5000  # more than the kernel adds up at a time


def numbers(device: torch.device, num_parts: int = 1) -> tuple[PartStats, torch.Tensor, torch.Tensor]:
    """Parts as they come from a group, in one message each, their digits, and targets.

    Some targets are ignored, of some rounding has put the logit above the largest; some parts are empty, all of one
    token's, and another token holds a NaN.
    """
    generator = torch.Generator().manual_seed(0)
    messages = torch.zeros(num_parts, 4 * T + 4)
    max_logit, sum_exp, target_logit, owners, sizes = messages.split([T, T, T, T, 4], dim=1)
    max_logit += 10 * torch.randn(num_parts, T, generator=generator)
    sum_exp += 1 + torch.rand(num_parts, T, generator=generator)
    below = torch.rand(T, generator=generator)
    below[::7] = -1e-6
    owner = torch.arange(T) % num_parts
    target_logit[owner, torch.arange(T)] = max_logit.amax(dim=0) - below
    owners[owner, torch.arange(T)] = 1
    for part in range(1, num_parts):
        max_logit[part, part::5], sum_exp[part, part::5] = -torch.inf, 0
    max_logit[:, 2], sum_exp[:, 2] = -torch.inf, 0
    max_logit[-1, 3] = sum_exp[-1, 3] = torch.nan
    sizes += torch.tensor([2**13, 5.0, num_parts * 2**13, num_parts * 5.0])
    target = torch.randint(100, (T, 1), generator=generator)
    target[::11] = -100
    target[2:4] = -100
    messages = messages.to(device)
    max_logit, sum_exp, target_logit, owners, sizes = messages.split([T, T, T, T, 4], dim=1)
    return PartStats(max_logit, sum_exp, target_logit[..., None], owners[..., None]), sizes, target.to(device)


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_implementations_agree(reduction: Reduction, num_parts: int, device: torch.device) -> None:
    tokens = pytest.importorskip("vocab_parallel_fused.kernels.tokens")
    parts, sizes, target = numbers(device, num_parts)
    vocab_size = num_parts * (2**13 * DIGIT + 5)
    expected = eager.token_loss(parts, sizes, target, vocab_size, -100, reduction)
    actual = tokens.token_loss(parts, sizes, target, vocab_size, -100, reduction)
    assert (expected.loss >= 0).all()
    assert expected.num_classes == actual.num_classes == vocab_size
    assert expected.covered
    for mine, theirs in zip(actual[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=2e-6, atol=1e-6, equal_nan=True)
    grad = torch.randn(expected.loss.shape, generator=torch.Generator().manual_seed(1)).to(device)
    divisor = expected.num_valid if reduction == "mean" else None
    arguments = (grad, expected.sum_exp.nan_to_num(1.0).clamp_(min=1), target, divisor, -100)
    for mine, theirs in zip(tokens.token_loss_grads(*arguments), eager.token_loss_grads(*arguments), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("num_tokens", "num_targets", "num_parts"),
    [(0, 1, 3), (7, 0, 1), (7, 1, 1), (7, 1, 40), (7, 3, 40), (1500, 0, 3), (1500, 1, 3), (1500, 3, 1), (1500, 3, 3)],
)
def test_statistics_agree(num_tokens: int, num_targets: int, num_parts: int, device: torch.device) -> None:
    """Of parts as a group's messages bring them. Some are empty, all of one token's, and another token holds a NaN."""
    tokens = pytest.importorskip("vocab_parallel_fused.kernels.tokens")
    generator = torch.Generator().manual_seed(num_tokens + num_targets + num_parts)
    sizes = [num_tokens, num_tokens, num_tokens * num_targets, num_tokens * num_targets, *[num_tokens] * 3, 4]
    messages = torch.randn(num_parts, sum(sizes), generator=generator)
    max_logit, sum_exp, target_logit, owners, class_sum, logit_sum, sum_exp_logit, digits = messages.split(sizes, 1)
    max_logit *= 10
    sum_exp.exp_()
    owner = torch.randint(num_parts, owners.shape[1:], generator=generator)
    owners.zero_()[owner, torch.arange(owners.shape[1])] = 1
    target_logit *= owners
    argmax = torch.randint(2**40, (num_parts, num_tokens), generator=generator)
    for part in range(1, num_parts):
        max_logit[part, part::5] = -torch.inf
    max_logit[1:, 4:5] = max_logit[:1, 4:5]  # the smallest of equal ones
    max_logit[:, 2:3] = -torch.inf
    for field in (sum_exp, class_sum, logit_sum, sum_exp_logit):
        field[max_logit == -torch.inf] = 0
    for field in (max_logit, sum_exp, logit_sum, sum_exp_logit):
        field[-1, 3:4] = torch.nan
    digits.copy_(torch.tensor([2**13, 5.0, num_parts * 2**13, num_parts * 5.0]))
    target = torch.randint(100, (num_tokens, num_targets), generator=generator).to(device)
    target[::11] = -100
    messages = messages.to(device)
    *fields, digits = messages.split(sizes, 1)
    fields[2:4] = (field.unflatten(1, target.shape) for field in fields[2:4])
    vocab_size = num_parts * (2**13 * DIGIT + 5)
    for parts in (
        PartStats(*fields, argmax=argmax.to(device)),
        PartStats(*fields[:4], class_sum=None, logit_sum=None, sum_exp_logit=fields[6]),
        PartStats(*fields[:4]),
    ):
        expected = eager.token_stats(parts, digits, target, vocab_size, -100)
        actual = tokens.token_stats(parts, digits, target, vocab_size, -100)
        assert actual.covered
        assert expected.covered
        assert actual.num_classes == expected.num_classes == vocab_size
        found = {name: value for name, value in actual.whole._asdict().items() if value is not None}
        wanted = {name: expected.whole._asdict()[name] for name in found} | expected.stats._asdict()
        found |= actual.stats._asdict()
        for name, theirs in wanted.items():
            torch.testing.assert_close(
                found[name],
                theirs,
                rtol=1e-5,
                atol=1e-4 if name == "logit_sum" else 1e-5,
                equal_nan=True,
                msg=lambda text, name=name: f"{name}: {text}",
            )
    if num_tokens > 1 and num_targets > 0:
        parts.owners[0, -1, -1] += 1
        for implementation in (eager, tokens):
            assert not implementation.token_stats(parts, digits, target, vocab_size, -100).covered
        target[-1, -1] = -100
        assert tokens.token_stats(parts, digits, target, vocab_size, -100).covered
    for implementation in (eager, tokens):
        assert not implementation.token_stats(parts, digits, target, vocab_size + 1, -100).covered


def test_sums_of_many_programs(device: torch.device) -> None:
    """Whichever of them comes last: more than are added up at a time, and the same bits in every run."""
    tokens = pytest.importorskip("vocab_parallel_fused.kernels.tokens")
    num_tokens = tokens._LAUNCH["BLOCK_T"] * (tokens._BLOCK_SUMS.value + 2) - 3
    generator = torch.Generator().manual_seed(0)
    max_logit, sum_exp = torch.randn(num_tokens, generator=generator), torch.ones(num_tokens)
    target_logit = max_logit - torch.rand(num_tokens, generator=generator)
    fields = [field.to(device) for field in (max_logit, sum_exp, target_logit, sum_exp)]
    parts = PartStats(fields[0][None], fields[1][None], fields[2][None, :, None], fields[3][None, :, None])
    target = torch.zeros(num_tokens, 1, dtype=torch.int64, device=device)
    target[:7] = -100
    expected = (max_logit - target_logit)[7:].double().sum()
    losses = [tokens.token_loss(parts, None, target, 100, -100, "sum") for _ in range(3)]
    torch.testing.assert_close(losses[0].loss.double().cpu(), expected, rtol=1e-6, atol=0)
    assert losses[0].num_valid == num_tokens - 7
    assert losses[0].covered
    assert all(torch.equal(loss.loss, losses[0].loss) for loss in losses)


@pytest.mark.parametrize("owners", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("token", [0, 1, T - 1])
def test_targets_without_one_owner(owners: float, token: int, device: torch.device) -> None:
    """One is enough, wherever it is; token 0 is ignored."""
    tokens = pytest.importorskip("vocab_parallel_fused.kernels.tokens")
    parts, _, target = numbers(device)
    parts.owners[0, token] = owners
    for implementation in (eager, tokens):
        covered = implementation.token_loss(parts, None, target, 100, -100, "mean").covered
        assert bool(covered) == (owners == 1 or token == 0)


@pytest.mark.parametrize("part", [0, 2])
@pytest.mark.parametrize("digit", [2, 3])
def test_parts_that_expect_different_numbers(part: int, digit: int, device: torch.device) -> None:
    """Whatever this rank expects, as another may expect what they hold."""
    tokens = pytest.importorskip("vocab_parallel_fused.kernels.tokens")
    parts, sizes, target = numbers(device, 3)
    assert sizes is not None
    sizes[part, digit] += 1
    vocab_size = 3 * (2**13 * DIGIT + 5)
    for implementation in (eager, tokens):
        loss = implementation.token_loss(parts, sizes, target, vocab_size, -100, "mean")
        assert loss.num_classes == ~vocab_size
        assert not loss.covered


@pytest.mark.parametrize("missing", [-1, 1])
def test_parts_that_are_not_the_whole(missing: int, device: torch.device) -> None:
    tokens = pytest.importorskip("vocab_parallel_fused.kernels.tokens")
    parts, sizes, target = numbers(device, 3)
    vocab_size = 3 * (2**13 * DIGIT + 5) + missing
    for implementation in (eager, tokens):
        assert not implementation.token_loss(parts, sizes, target, vocab_size, -100, "mean").covered

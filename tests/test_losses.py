"""The losses and their gradients with respect to logits, against the papers' formulas over full logits in float64.

Where a tolerance is `rounding(dtype)`: log-probabilities near 8 are rounded by 8 eps, exp turns that into a relative
error, and a few further operations and sums add theirs.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vocab_parallel_fused.losses import (
    LossReduction,
    aggregate_loss,
    dpo_loss,
    group_advantage,
    k3_kl,
    megatron_label_smoothing,
    ppo_clip_loss,
    sequence_log_prob,
    top_k_distillation_loss,
)

B, L, V = 6, 12, 13
CLIP_LOW, CLIP_HIGH = 0.2, 0.3
DTYPES = [torch.float64, torch.float32]
# The same examples in every run: a failure seen once is seen again.
for_examples = settings(max_examples=50, derandomize=True, database=None, deadline=None)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def rounding(dtype: torch.dtype) -> float:
    return 64 * torch.finfo(dtype).eps


def assert_equal_up_to_rounding(actual: Tensor, exact: Tensor, dtype: torch.dtype, scale: float = 0.0) -> None:
    """`scale`: the size of the terms of a sum that may cancel."""
    assert actual.dtype == dtype
    assert (actual.double() - exact).abs().max() <= rounding(dtype) * max(scale, exact.abs().max().item())


class Batch(NamedTuple):
    """Sampled answers, in float64, with junk where the mask is False."""

    logits: Tensor  # [B, L, V]
    tokens: Tensor  # [B, L]
    old_log_prob: Tensor  # [B, L]
    ref_log_prob: Tensor  # [B, L]
    advantage: Tensor  # [B, L]
    mask: Tensor  # [B, L], nothing in the second row, everything in the third

    def log_prob(self, logits: Tensor) -> Tensor:
        """[B, L] as an op would give them."""
        return torch.log_softmax(logits, dim=-1).gather(-1, self.tokens[..., None])[..., 0]


def make_batch(device: torch.device) -> Batch:
    logits = 2 * torch.randn(B, L, V, dtype=torch.float64)
    tokens = torch.randint(V, (B, L))
    mask = torch.rand(B, L) < 0.7
    mask[1], mask[2] = False, True
    old_difference, ref_difference, advantage = torch.randn(3, B, L, dtype=torch.float64)
    log_prob = torch.log_softmax(logits, dim=-1).gather(-1, tokens[..., None])[..., 0]
    junk = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=torch.float64).repeat(B, L // 3)
    old_log_prob = torch.where(mask, log_prob + 0.6 * old_difference, junk)
    ref_log_prob = torch.where(mask, log_prob + 0.7 * ref_difference, junk)
    advantage = torch.where(mask, advantage, junk)
    return Batch(*(t.to(device) for t in (logits, tokens, old_log_prob, ref_log_prob, advantage, mask)))


def grpo_by_the_formula(batch: Batch, logits: Tensor, advantage: Tensor, reduction: LossReduction) -> Tensor:
    """Equations 3 and 4 of arXiv:2402.03300 with two clips and an entropy bonus, token by token."""
    sequences = []
    for b in range(B):
        losses = []
        for t in range(L):
            if batch.mask[b, t]:
                prob = torch.softmax(logits[b, t], dim=-1)
                p, A = prob[batch.tokens[b, t]], advantage[b, t]
                ratio = p / batch.old_log_prob[b, t].exp()
                surrogate = torch.minimum(ratio * A, torch.clip(ratio, 1 - CLIP_LOW, 1 + CLIP_HIGH) * A)
                ref_ratio = batch.ref_log_prob[b, t].exp() / p
                kl = ref_ratio - ref_ratio.log() - 1
                entropy = -(prob * prob.log()).sum()
                losses.append(-(surrogate - 0.04 * kl + 0.01 * entropy))
        if losses:
            sequences.append(torch.stack(losses))
    if reduction == "sequence_mean":
        return torch.stack([losses.mean() for losses in sequences]).mean()
    losses = torch.cat(sequences)
    return losses.mean() if reduction == "token_mean" else losses.sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sum"])
@pytest.mark.parametrize("per", ["token", "sequence", "sequence, kept dimension"])
def test_grpo(dtype: torch.dtype, reduction: LossReduction, per: str, device: torch.device) -> None:
    """The loss of the module's docstring is GRPO's, as are its gradients; NaNs and infinities under the mask are not
    seen."""
    batch = make_batch(device)
    advantage = batch.advantage
    if per != "token":
        # Sequence 1 is masked: its advantage may be anything.
        of_sequences = torch.tensor([1.5, torch.nan, -0.5, -2.0, 0.3, 0.0], dtype=torch.float64, device=device)
        advantage = of_sequences[:, None].expand(B, L)
    exact_logits, logits = (batch.logits.clone().to(d).requires_grad_() for d in (torch.float64, dtype))
    exact = grpo_by_the_formula(batch, exact_logits, advantage, reduction)

    log_prob = batch.log_prob(logits)
    distribution = torch.log_softmax(logits, dim=-1)
    entropy = -(distribution.exp() * distribution).sum(dim=-1)
    shapes = {"token": advantage, "sequence": advantage[:, 0], "sequence, kept dimension": advantage[:, :1]}
    loss = ppo_clip_loss(
        log_prob,
        batch.old_log_prob.to(dtype),
        shapes[per].to(dtype),
        mask=batch.mask,
        clip_low=CLIP_LOW,
        clip_high=CLIP_HIGH,
    )
    loss = loss + 0.04 * k3_kl(log_prob, batch.ref_log_prob.to(dtype), mask=batch.mask) - 0.01 * entropy
    loss = aggregate_loss(loss, mask=batch.mask, reduction=reduction)

    assert_equal_up_to_rounding(loss, exact, dtype, scale=1.0)
    # An upstream gradient that is not 1, as a scaled loss has.
    (grad,) = torch.autograd.grad(1.7 * loss, logits)
    assert_equal_up_to_rounding(grad, torch.autograd.grad(1.7 * exact, exact_logits)[0], dtype)
    assert (grad[~batch.mask] == 0).all()
    if per == "token":
        ratio = (batch.log_prob(batch.logits) - batch.old_log_prob).exp()
        side = (ratio > 1 + CLIP_HIGH).long() - (ratio < 1 - CLIP_LOW).long()
        cases = torch.stack((side, advantage.sign().long()))[:, batch.mask]
        assert cases.unique(dim=1).shape[1] == 6, "the batch must hold a ratio below, in and above for either sign"


def test_gspo(device: torch.device) -> None:
    """Sequence-level ratios, the geometric means of the tokens' ratios, need nothing but mean log-probabilities."""
    batch = make_batch(device)
    advantage = torch.tensor([1.5, 1.0, -0.5, -2.0, 0.3, 1.0], dtype=torch.float64, device=device)
    logits, exact_logits = (batch.logits.clone().requires_grad_() for _ in range(2))
    losses = []
    for b in (0, 2, 3, 4, 5):
        tokens = batch.mask[b].nonzero()[:, 0].tolist()
        ratio = torch.ones((), dtype=torch.float64, device=device)
        for t in tokens:
            p = torch.softmax(exact_logits[b, t], dim=-1)[batch.tokens[b, t]]
            ratio = ratio * (p / batch.old_log_prob[b, t].exp()) ** (1 / len(tokens))
        A = advantage[b]
        losses.append(-torch.minimum(ratio * A, torch.clip(ratio, 1 - CLIP_LOW, 1 + CLIP_HIGH) * A))
    exact = torch.stack(losses).mean()

    log_prob, old_log_prob = (
        sequence_log_prob(log_prob, mask=batch.mask, reduction="mean")
        for log_prob in (batch.log_prob(logits), batch.old_log_prob)
    )
    loss = ppo_clip_loss(log_prob, old_log_prob, advantage, clip_low=CLIP_LOW, clip_high=CLIP_HIGH)
    loss = aggregate_loss(loss, mask=batch.mask.any(dim=-1))
    assert_equal_up_to_rounding(loss, exact, torch.float64)
    (grad,) = torch.autograd.grad(loss, logits)
    assert_equal_up_to_rounding(grad, torch.autograd.grad(exact, exact_logits)[0], torch.float64)


def test_on_policy_the_gradient_is_the_policy_gradient(device: torch.device) -> None:
    """∇(−A log p), with `log_prob` itself as the old policy's: its gradient through that side would cancel it to 0."""
    log_prob = -torch.rand(4, 5, device=device)
    advantage = torch.randn(4, 5, device=device)
    log_prob.requires_grad_()
    ppo_clip_loss(log_prob, log_prob, advantage).sum().backward()
    assert log_prob.grad is not None
    assert torch.equal(log_prob.grad, -advantage)


@for_examples
@given(log_ratio=st.floats(-80, 80, width=32), advantage=st.floats(-100, 100, width=32))
def test_clipping_is_pessimistic(log_ratio: float, advantage: float) -> None:
    """The loss is at least the unclipped one, and its gradient is the unclipped one's or 0."""
    difference = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    A = torch.tensor([advantage], dtype=torch.float64)
    loss = ppo_clip_loss(difference, torch.zeros_like(A), A)
    unclipped = -A * difference.detach().exp()
    assert loss >= unclipped - 1e-12 * unclipped.abs()
    loss.backward()
    assert difference.grad is not None
    clipped = loss > unclipped + 1e-12 * unclipped.abs()
    torch.testing.assert_close(difference.grad, torch.where(clipped, 0.0, unclipped), rtol=1e-12, atol=0)


def test_a_ratio_that_overflows() -> None:
    """Beyond a clip it is as good as any other clipped one: autograd's 0 · ∞ must not make a NaN of it. Without a clip
    the loss is what the formula says."""
    log_prob = torch.zeros(2, requires_grad=True)
    loss = ppo_clip_loss(log_prob, torch.full((2,), -1000.0), torch.tensor([3.0, -3.0]))
    torch.testing.assert_close(loss, torch.tensor([-3.6, torch.inf]))
    (grad,) = torch.autograd.grad(loss, log_prob, torch.tensor([0.7, 1.0]))
    torch.testing.assert_close(grad, torch.tensor([0.0, torch.inf]))


def categorical_policies(seed: int) -> tuple[Tensor, Tensor]:
    """Logits of a policy and of a reference, [V] each."""
    generator = torch.Generator().manual_seed(seed)
    policy, reference = torch.randn((2, V), generator=generator, dtype=torch.float64)
    return policy.requires_grad_(), reference


@for_examples
@given(seed=st.integers(0, 2**32))
def test_k3_is_unbiased(seed: int) -> None:
    """Its expectation over all tokens is KL(policy ‖ reference), and that of its gradient is ∇KL(reference ‖ policy):
    what docs/losses.md says of both."""
    policy, reference = categorical_policies(seed)
    log_prob, ref_log_prob = torch.log_softmax(policy, dim=-1), torch.log_softmax(reference, dim=-1)
    k3 = k3_kl(log_prob, ref_log_prob)
    prob = log_prob.detach().exp()
    torch.testing.assert_close(
        (prob * k3).sum(), F.kl_div(ref_log_prob, log_prob, reduction="sum", log_target=True), rtol=1e-10, atol=1e-12
    )
    (grad,) = torch.autograd.grad((prob * k3).sum(), policy)  # prob: how often each token is sampled
    other_direction = F.kl_div(torch.log_softmax(policy, dim=-1), ref_log_prob, reduction="sum", log_target=True)
    torch.testing.assert_close(grad, torch.autograd.grad(other_direction, policy)[0], rtol=1e-10, atol=1e-12)


@for_examples
@given(log_prob=st.floats(-100, 0, width=32), ref_log_prob=st.floats(-100, 0, width=32))
def test_k3_is_never_negative(log_prob: float, ref_log_prob: float) -> None:
    assert k3_kl(torch.tensor(log_prob), torch.tensor(ref_log_prob)) >= 0


def test_k3_of_policies_that_nearly_agree() -> None:
    """The start of every training: exp(r) − 1 − r in fp32 is 0 or rounding there, and r²/2 in truth."""
    r = torch.tensor([1e-2, -1e-3, 3e-3])
    exact = torch.expm1(r.double()) - r.double()
    # expm1's last bit, eps·r, against r²/2.
    torch.testing.assert_close(k3_kl(torch.zeros(3), r).double(), exact, rtol=2 * 2**-23 / 1e-3, atol=0)


def test_k3_of_a_token_without_probability() -> None:
    """A class masked by a bias of −∞ has the log-probability −∞: ∞ − ∞ must not make a NaN of the infinite estimate."""
    log_prob = torch.tensor([-math.inf, -1.0], requires_grad=True)
    loss = k3_kl(log_prob, torch.tensor([-1.0, -math.inf]))
    assert torch.equal(loss, torch.full((2,), math.inf))
    (grad,) = torch.autograd.grad(loss.sum(), log_prob)
    assert torch.equal(grad, torch.tensor([-math.inf, 1.0]))


def test_policy_constants_have_no_gradient() -> None:
    """A reference or a value model in the same graph must not be trained by these terms."""
    log_prob, old, ref, advantage = (torch.randn(3, 4, requires_grad=True) for _ in range(4))
    (ppo_clip_loss(log_prob, old, advantage) + k3_kl(log_prob, ref)).sum().backward()
    assert log_prob.grad is not None
    assert old.grad is None
    assert ref.grad is None
    assert advantage.grad is None


def test_sequences_without_tokens_do_not_count() -> None:
    """The mean is over the sequences that have tokens, not over the batch."""
    loss = torch.tensor([[1.0, 2.0, 9.0], [9.0, 9.0, 9.0], [5.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [False] * 3, [True, False, False]])
    assert aggregate_loss(loss, mask=mask, reduction="sequence_mean") == (1.5 + 5.0) / 2
    assert aggregate_loss(loss, mask=mask) == 8 / 3
    assert aggregate_loss(loss, mask=mask, reduction="sum") == 8
    assert torch.equal(sequence_log_prob(loss, mask=mask), torch.tensor([3.0, 0.0, 5.0]))
    assert torch.equal(sequence_log_prob(loss, mask=mask, reduction="mean"), torch.tensor([1.5, 0.0, 5.0]))
    assert aggregate_loss(loss, reduction="sequence_mean") == aggregate_loss(loss) == loss.mean()
    assert torch.equal(sequence_log_prob(loss, reduction="mean"), loss.mean(dim=-1))


# Each loss of [B, L] tokens as a function of the tensors it reads and a mask.
TOKEN_LOSSES: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "ppo": (3, ppo_clip_loss),
    "k3": (2, k3_kl),
    "token_mean": (1, aggregate_loss),
    "sequence_mean": (1, lambda loss, mask: aggregate_loss(loss, mask=mask, reduction="sequence_mean")),
    "sum": (1, lambda loss, mask: aggregate_loss(loss, mask=mask, reduction="sum")),
    "sequence": (1, sequence_log_prob),
    "sequence, mean": (1, lambda log_prob, mask: sequence_log_prob(log_prob, mask=mask, reduction="mean")),
    "top-k": (2, lambda p, q, mask: top_k_distillation_loss(p[..., None] - 2, q[..., None] - 2, mask=mask)),
}


@pytest.mark.parametrize("name", TOKEN_LOSSES)
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
def test_masked_tokens_may_hold_anything(name: str, junk: float) -> None:
    """Neither the loss nor a gradient sees them, in any argument; their own gradients are 0, not 0 · ∞."""
    number, function = TOKEN_LOSSES[name]
    mask = torch.rand(4, 6) < 0.6
    clean = [torch.randn(4, 6) for _ in range(number)]
    upstream = torch.randn(())
    results = []
    for filler in (0.0, junk):
        tensors = [torch.where(mask, tensor, filler).requires_grad_() for tensor in clean]
        loss = function(*tensors, mask=mask)
        (grad,) = torch.autograd.grad(loss.sum() * upstream, tensors[0])
        assert (grad[~mask] == 0).all()
        results.append((loss.detach(), grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][1].any()


@pytest.mark.parametrize("name", TOKEN_LOSSES)
@pytest.mark.parametrize("shape", [(4, 6), (0, 6), (4, 0)])
def test_nothing_to_learn_from(name: str, shape: tuple[int, int]) -> None:
    """A micro-batch in which no token counts, or without tokens, has loss 0 and gradient 0, not NaN."""
    number, function = TOKEN_LOSSES[name]
    tensors = [torch.full(shape, torch.nan, requires_grad=True) for _ in range(number)]
    loss = function(*tensors, mask=torch.zeros(shape, dtype=torch.bool))
    assert (loss == 0).all()
    (grad,) = torch.autograd.grad(loss.sum(), tensors[0])
    assert (grad == 0).all()


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_a_nan_of_a_token_that_counts_is_not_hidden(name: str) -> None:
    number, function = TOKEN_LOSSES[name]
    for broken in range(number):
        tensors = [torch.randn(4, 6) for _ in range(number)]
        tensors[broken][2, 3] = torch.nan
        assert function(*tensors, mask=torch.ones(4, 6, dtype=torch.bool)).isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_sixteen_bits_are_computed_in_fp32(name: str, dtype: torch.dtype) -> None:
    number, function = TOKEN_LOSSES[name]
    tensors = [torch.randn(4, 6).to(dtype) for _ in range(number)]
    mask = torch.rand(4, 6) < 0.6
    loss = function(*tensors, mask=mask)
    assert loss.dtype == torch.float32
    if name != "top-k":  # whose arguments are shifted in the given dtype here
        assert torch.equal(loss, function(*(tensor.float() for tensor in tensors), mask=mask))


def test_group_advantage() -> None:
    reward = torch.randn(3, 5, dtype=torch.float64) * 10 + 100
    expected = torch.empty_like(reward)
    for i in range(3):
        mean = sum(reward[i]) / 5
        std = (sum((r - mean) ** 2 for r in reward[i]) / 4) ** 0.5
        expected[i] = (reward[i] - mean) / std
    torch.testing.assert_close(group_advantage(reward, eps=0.0), expected, rtol=1e-10, atol=1e-12)
    centered = reward - reward.mean(dim=-1, keepdim=True)
    torch.testing.assert_close(group_advantage(reward, normalize=False), centered, rtol=1e-10, atol=1e-12)


@for_examples
@given(reward=st.floats(-1000, 1000, width=32), size=st.integers(2, 64))
def test_equal_rewards_teach_nothing(reward: float, size: int) -> None:
    """The rounded mean of seven rewards of 10.1 is not 10.1; the quotient by a standard deviation as small is no noise,
    but an advantage of 0.5 for each of them."""
    assert (group_advantage(torch.full((2, size), reward)) == 0).all()


def dpo_by_the_formula(logits: Tensor, batch: Batch, beta: float, label_smoothing: float) -> Tensor:
    """Equation 7 of arXiv:2305.18290 for pairs (0, 2), (3, 4), (5, 2) of answers, with the smoothed label."""
    losses = []
    for chosen, rejected in ((0, 2), (3, 4), (5, 2)):
        log_ratio = []
        for b in (chosen, rejected):
            total = torch.zeros((), dtype=torch.float64, device=logits.device)
            for t in range(L):
                if batch.mask[b, t]:
                    p = torch.softmax(logits[b, t], dim=-1)[batch.tokens[b, t]]
                    total = total + torch.log(p / batch.ref_log_prob[b, t].exp())
            log_ratio.append(total)
        preferred = 1 / (1 + torch.exp(-beta * (log_ratio[0] - log_ratio[1])))
        losses.append(-(1 - label_smoothing) * preferred.log() - label_smoothing * (1 - preferred).log())
    return torch.stack(losses)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("beta", "label_smoothing"), [(0.1, 0.0), (0.5, 0.2)])
def test_dpo(dtype: torch.dtype, beta: float, label_smoothing: float, device: torch.device) -> None:
    batch = make_batch(device)
    exact_logits, logits = (batch.logits.clone().to(d).requires_grad_() for d in (torch.float64, dtype))
    exact = dpo_by_the_formula(exact_logits, batch, beta, label_smoothing)
    policy = sequence_log_prob(batch.log_prob(logits), mask=batch.mask)
    reference = sequence_log_prob(batch.ref_log_prob.to(dtype), mask=batch.mask)
    chosen, rejected = [0, 3, 5], [2, 4, 2]
    loss = dpo_loss(
        policy[chosen],
        policy[rejected],
        reference[chosen],
        reference[rejected],
        beta=beta,
        label_smoothing=label_smoothing,
    )
    assert_equal_up_to_rounding(loss, exact, dtype)
    upstream = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64, device=device)
    (grad,) = torch.autograd.grad(loss, logits, upstream.to(dtype))
    assert_equal_up_to_rounding(grad, torch.autograd.grad(exact, exact_logits, upstream)[0], dtype)


def test_dpo_of_equal_policies() -> None:
    """log 2, whatever β and the smoothing, since the policy prefers neither answer; the references get no gradient."""
    chosen, rejected, ref_chosen, ref_rejected = (
        torch.tensor([-20.0, -700.0], requires_grad=True) * scale for scale in (1, 1.5, 1, 1.5)
    )
    for tensor in (chosen, rejected, ref_chosen, ref_rejected):
        tensor.retain_grad()
    loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.7, label_smoothing=0.1)
    torch.testing.assert_close(loss, torch.full((2,), math.log(2)))
    loss.sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    torch.testing.assert_close(chosen.grad, torch.full((2,), -0.7 * (0.5 - 0.1)))
    assert torch.equal(rejected.grad, -chosen.grad)
    assert ref_chosen.grad is None
    assert ref_rejected.grad is None


def test_dpo_of_policies_far_apart() -> None:
    """A sigmoid taken first would round to 0, and its logarithm to −∞."""
    margin = torch.tensor([-1e4, 1e4], requires_grad=True)
    zero = torch.zeros(2)
    loss = dpo_loss(margin, zero, zero, zero, beta=1.0)
    assert torch.equal(loss, torch.tensor([1e4, 0.0]))
    loss.sum().backward()
    assert margin.grad is not None
    assert torch.equal(margin.grad, torch.tensor([-1.0, 0.0]))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_dpo_of_an_answer_without_probability(label_smoothing: float) -> None:
    """As the formula says, in which the smoothing of an infinite logarithm counts only where there is one."""
    chosen = torch.tensor([-5.0, -math.inf], requires_grad=True)
    rejected = torch.tensor([-math.inf, -5.0], requires_grad=True)
    ref = torch.tensor([-5.0, -6.0])
    loss = dpo_loss(chosen, rejected, ref, ref, beta=0.5, label_smoothing=label_smoothing)
    assert torch.equal(loss, torch.tensor([math.inf if label_smoothing > 0 else 0.0, math.inf]))
    grads = torch.autograd.grad(loss.sum(), [chosen, rejected])
    slope = 0.5 * torch.tensor([label_smoothing, label_smoothing - 1])
    torch.testing.assert_close(grads, (slope, -slope))


class Distillation(NamedTuple):
    """A student's and a teacher's logits [T, V], and the teacher's best K classes [T, K] of each token."""

    student: Tensor
    teacher: Tensor
    classes: Tensor

    def loss(self, **keywords: Any) -> Tensor:
        log_prob = torch.log_softmax(self.student, dim=-1).gather(-1, self.classes)
        teacher_log_prob = torch.log_softmax(self.teacher, dim=-1).gather(-1, self.classes)
        return top_k_distillation_loss(log_prob, teacher_log_prob, **keywords)

    def full_divergence(self) -> Tensor:
        p, q = torch.log_softmax(self.student, dim=-1), torch.log_softmax(self.teacher, dim=-1)
        return F.kl_div(p, q, reduction="none", log_target=True).sum(dim=-1)

    def to(self, dtype: torch.dtype) -> "Distillation":
        return self._replace(student=self.student.detach().to(dtype).requires_grad_(), teacher=self.teacher.to(dtype))


def make_distillation(K: int, *, T: int = 7, scale: float = 2.0, seed: int = 0) -> Distillation:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn((2, T, V), generator=generator, dtype=torch.float64)
    return Distillation(student.requires_grad_(), teacher, teacher.topk(K, dim=-1).indices)


def divergence_of_buckets(problem: Distillation) -> Tensor:
    """[T], from the full distributions, the tail added up class by class."""
    p, q = torch.softmax(problem.student, dim=-1), torch.softmax(problem.teacher, dim=-1)
    losses = []
    for t, classes in enumerate(problem.classes.tolist()):
        tail = [j for j in range(V) if j not in classes]
        buckets = [(p[t, j], q[t, j]) for j in classes]
        if tail:
            buckets.append((p[t, tail].sum(), q[t, tail].sum()))
        losses.append(torch.stack([b * torch.log(b / a) for a, b in buckets]).sum())
    return torch.stack(losses)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [1, 4, V - 1, V])
def test_top_k_distillation(dtype: torch.dtype, K: int) -> None:
    """The divergence of K classes and one tail; of the full distributions for K = V."""
    exact_problem, problem = make_distillation(K), make_distillation(K).to(dtype)
    exact, loss = divergence_of_buckets(exact_problem), problem.loss()
    # The narrowest tail is 3e-4, and 1 − Σ keeps that much fewer digits of it.
    tail = 1 - torch.softmax(exact_problem.student, dim=-1).gather(-1, exact_problem.classes).sum(dim=-1)
    conditioning = 1.0 if K == V else 1 / tail.min().item()
    budget = rounding(dtype) * conditioning
    assert loss.dtype == dtype
    assert (loss.double() - exact).abs().max() <= budget
    upstream = torch.randn(7, dtype=torch.float64)
    (grad,) = torch.autograd.grad(loss, problem.student, upstream.to(dtype))
    (exact_grad,) = torch.autograd.grad(exact, exact_problem.student, upstream)
    assert (grad.double() - exact_grad).abs().max() <= budget
    if K == V:
        torch.testing.assert_close(exact, exact_problem.full_divergence(), rtol=1e-10, atol=1e-12)


@for_examples
@given(seed=st.integers(0, 2**32), K=st.integers(0, V - 1), scale=st.floats(0.1, 20))
def test_more_classes_come_closer_to_the_full_divergence_from_below(seed: int, K: int, scale: float) -> None:
    """Taking a class out of the tail refines the buckets: the divergence can only grow, up to the full one."""
    fewer, more = (make_distillation(k, T=1, scale=scale, seed=seed) for k in (K, K + 1))
    # The loss departs from the formula only in tails below 2⁷ eps of float64, and by less than that.
    slack = 1e-12
    assert (fewer.loss() >= -slack).all()
    assert (fewer.loss() <= more.loss() + slack).all()
    assert (more.loss() <= more.full_divergence() + slack).all()


def test_the_same_tail_ratios_lose_nothing() -> None:
    """The bound is attained where teacher and student differ by a factor within the tail."""
    problem = make_distillation(4)
    student = problem.teacher.clone()
    student.scatter_(-1, problem.classes, problem.student.detach().gather(-1, problem.classes))
    problem = problem._replace(student=student)
    torch.testing.assert_close(problem.loss(), problem.full_divergence(), rtol=1e-10, atol=1e-12)


def test_a_student_like_its_teacher_has_nothing_to_learn() -> None:
    """Loss exactly 0, also where rounding leaves no tail, or less than none."""
    problem = make_distillation(V, T=500).to(torch.float32)
    problem = problem._replace(teacher=problem.student.detach())
    mass = torch.softmax(problem.student, dim=-1).sum(dim=-1)
    assert (mass > 1).any()
    assert (mass < 1).any()
    loss = problem.loss()
    assert (loss == 0).all()
    (grad,) = torch.autograd.grad(loss.sum(), problem.student)
    assert grad.abs().max() < rounding(torch.float32)


@pytest.mark.parametrize("student", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("teacher", [torch.float32, torch.float64], ids=str)
def test_a_student_and_a_teacher_of_different_precision(student: torch.dtype, teacher: torch.dtype) -> None:
    """What rounding leaves of the tail on one side must not be weighed by the other's precision."""
    log_q = torch.randn(1000, 50, generator=torch.Generator().manual_seed(0)).mul(8).log_softmax(-1).topk(20).values
    log_p = log_q.to(student).requires_grad_()
    loss = top_k_distillation_loss(log_p, log_q.to(teacher))
    assert (loss == 0).all()
    (grad,) = torch.autograd.grad(loss.sum(), log_p)
    assert grad.abs().max() <= 1


def test_a_teacher_of_fewer_digits_than_its_student() -> None:
    """The student's exact numbers against the same ones rounded: gradients of rounding, not of its reciprocal."""
    exact = (
        torch.randn(1000, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(8).log_softmax(-1)
    )
    log_p = exact.topk(20).values.requires_grad_()
    (grad,) = torch.autograd.grad(top_k_distillation_loss(log_p, log_p.float()).sum(), log_p)
    assert grad.abs().max() <= 1


def test_a_stored_probability_that_underflows() -> None:
    """It adds nothing, also where the student rules its class out."""
    log_p = torch.tensor([[-0.5, -math.inf]], requires_grad=True)
    loss = top_k_distillation_loss(log_p, torch.tensor([[-0.5, -200.0]]))
    assert torch.equal(loss, torch.zeros(1))
    (grad,) = torch.autograd.grad(loss.sum(), log_p)
    torch.testing.assert_close(grad, torch.zeros(1, 2), rtol=0, atol=2**-22)


@pytest.mark.parametrize("shift", [0.0, 100.0])
@pytest.mark.parametrize("margin", [13.0, 16.0, 20.0, 40.0, 200.0])
def test_a_student_with_hardly_a_tail(margin: float, shift: float) -> None:
    """What remains, 1 − Σ p, is rounding there, or negative, and its reciprocal makes the gradients: they must be small
    and below a probability, and never push the tail down; the loss must be as large as if `floor` remained."""
    student = torch.full((1, V), shift)
    student[0, :2] += torch.tensor([margin, margin - 0.5])
    teacher = torch.zeros(1, V)
    teacher[0, :2] = 3.0
    problem = Distillation(student.requires_grad_(), teacher, torch.tensor([[0, 1]]))
    loss = problem.loss()
    (grad,) = torch.autograd.grad(loss, student)

    log_p, q = torch.log_softmax(student.detach().double(), dim=-1)[0], torch.softmax(teacher.double(), dim=-1)[0]
    q_tail, log_p_tail = q[2:].sum(), log_p[2:].logsumexp(dim=-1)
    head = (q[:2] * (q[:2].log() - log_p[:2])).sum()
    log_floor = math.log(2**7 * 2**-23)
    # Log-probabilities from logits near 100 are off by up to 2⁻¹⁷, half a floor. So is p_tail; its log by a half.
    slack = 0.5 * q_tail
    assert loss <= head + q_tail * (q_tail.log() - log_p_tail) + slack
    assert loss >= head + q_tail * (q_tail.log() - log_p_tail.clamp(min=log_floor)) - slack
    assert (grad[0, 2:] <= 0).all()
    # The two probabilities are to sink by q_tail in all; no more than this is lost in rounding.
    assert (grad[0, :2] - (log_p[:2].exp() - q[:2])).abs().max() < q_tail


def test_a_teacher_whose_probabilities_round_to_more_than_one() -> None:
    """Such as one stored in bfloat16: it has no tail. A negative one would reward the student for losing its own."""
    teacher = torch.tensor([[0.5, 0.3, 0.21]]).log()
    log_prob = torch.log(torch.tensor([[0.4, 0.2, 0.1]])).requires_grad_()
    loss = top_k_distillation_loss(log_prob, teacher)
    torch.testing.assert_close(loss, F.kl_div(log_prob, teacher, reduction="sum", log_target=True)[None])
    (grad,) = torch.autograd.grad(loss, log_prob)
    torch.testing.assert_close(grad, -teacher.exp())


def test_unused_entries_belong_to_the_tail() -> None:
    """Stored lists of different lengths are padded with −∞; the student's number beside it, such as the 0 of an ignored
    class, takes no part."""
    problem = make_distillation(4)
    log_prob = torch.log_softmax(problem.student, dim=-1).gather(-1, problem.classes).detach()
    teacher = torch.log_softmax(problem.teacher, dim=-1).gather(-1, problem.classes)
    expected = top_k_distillation_loss(log_prob[:, :3], teacher[:, :3])
    padded = F.pad(teacher[:, :3], (0, 1), value=-torch.inf)
    for junk in (0.0, torch.nan, torch.inf):
        beside = log_prob.clone()
        beside[:, 3] = junk
        beside.requires_grad_()
        loss = top_k_distillation_loss(beside, padded)
        assert torch.equal(loss, expected)
        (grad,) = torch.autograd.grad(loss.sum(), beside)
        assert torch.isfinite(grad).all()
        assert (grad[:, 3] == 0).all()


def test_the_teacher_has_no_gradient() -> None:
    log_prob, teacher = (torch.full((2, 3), -2.0, requires_grad=True) for _ in range(2))
    top_k_distillation_loss(log_prob, teacher).sum().backward()
    assert teacher.grad is None


def test_inside_one_compiled_graph() -> None:
    """A loss that breaks the graph, as one that reads a number back to the host does, fails here."""

    def loss(log_prob: Tensor, old: Tensor, ref: Tensor, mask: Tensor) -> Tensor:
        tokens = ppo_clip_loss(log_prob, old, ref[:, 0], mask=mask) + k3_kl(log_prob, ref, mask=mask)
        tokens = tokens + top_k_distillation_loss(log_prob[..., None] - 2, ref[..., None] - 2, mask=mask)
        pairs = dpo_loss(*(sequence_log_prob(x, mask=mask) for x in (log_prob, old, ref, ref)))
        return aggregate_loss(tokens, mask=mask, reduction="sequence_mean") + pairs.mean()

    tensors = (torch.randn(4, 6, requires_grad=True), torch.randn(4, 6), torch.randn(4, 6), torch.rand(4, 6) < 0.6)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors)
    expected = loss(*tensors)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, tensors[0])[0] for value in (compiled, expected)))


X, MASK = torch.zeros(4, 7), torch.ones(4, 7, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ppo_clip_loss([1.0], X, X), TypeError, "log_prob must be a tensor, got list"),  # pyright: ignore
        (lambda: ppo_clip_loss(X, X.long(), X), TypeError, "old_log_prob must be a floating-point tensor, got torch.i"),
        (lambda: ppo_clip_loss(X, X, 1.0), TypeError, "advantage must be a tensor, got float"),  # pyright: ignore
        (lambda: ppo_clip_loss(X, X[:3], X), ValueError, r"old_log_prob must have log_prob's shape \(4, 7\), got \(3,"),
        (
            lambda: ppo_clip_loss(X, X, X[0]),
            ValueError,
            r"advantage must have log_prob's shape \(4, 7\), or \(4,\) or \(4, 1\) for one per sequence, got \(7,\)",
        ),
        (lambda: ppo_clip_loss(X, X, X, mask=X), TypeError, "mask must be a bool tensor, got torch.float32"),
        (lambda: ppo_clip_loss(X, X, X, mask=MASK[0]), ValueError, r"mask must have the tokens' shape \(4, 7\), got"),
        (lambda: ppo_clip_loss(X, X, X, clip_low=1.0), ValueError, r"clip_low must be in \[0, 1\), got 1\.0"),
        (lambda: ppo_clip_loss(X, X, X, clip_low=-0.1), ValueError, r"clip_low must be in \[0, 1\), got -0\.1"),
        (lambda: ppo_clip_loss(X, X, X, clip_high=math.nan), ValueError, "clip_high must be at least 0, got nan"),
        (lambda: k3_kl(X, X[:, :1]), ValueError, r"ref_log_prob must have log_prob's shape \(4, 7\), got \(4, 1\)"),
        (
            lambda: aggregate_loss(X, reduction="mean"),  # pyright: ignore
            ValueError,
            r"reduction must be one of \('token_mean', 'sequence_mean', 'sum'\), got 'mean'",
        ),
        (lambda: aggregate_loss(X, mask=[True]), TypeError, "mask must be a bool tensor, got list"),  # pyright: ignore
        (lambda: group_advantage(X[:, :1]), ValueError, r"reward must have shape \(\*, G\) with G >= 2, got \(4, 1\)"),
        (lambda: group_advantage(X, eps=-1.0), ValueError, r"eps must be at least 0, got -1\.0"),
        (
            lambda: sequence_log_prob(X, reduction="none"),  # pyright: ignore
            ValueError,
            r"reduction must be one of \('sum', 'mean'\), got 'none'",
        ),
        (lambda: dpo_loss(X, X, X[0], X), ValueError, r"ref_chosen must have policy_chosen's shape \(4, 7\), got \(7,"),
        (lambda: dpo_loss(X, X, X, X, beta=0.0), ValueError, r"beta must be above 0, got 0\.0"),
        (lambda: dpo_loss(X, X, X, X, label_smoothing=0.5), ValueError, r"label_smoothing must be in \[0, 0\.5\), got"),
        (lambda: top_k_distillation_loss(X[0, 0], X[0, 0]), ValueError, r"log_prob must have shape \(\*, K\), got \("),
        (
            lambda: top_k_distillation_loss(X, X, mask=MASK),
            ValueError,
            r"mask must have the tokens' shape \(4,\), got \(4, 7\)",
        ),
    ],
)
def test_bad_arguments(call: Callable[[], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2, 0.85])
def test_the_label_smoothing_of_megatron(label_smoothing: float) -> None:
    """Megatron's own formula: a share of the mean log-probability of all classes, scaled by V / (V − 1)."""
    logits, target = torch.randn(B, V, dtype=torch.float64), torch.randint(V, (B,))
    log_probs = torch.log_softmax(logits, dim=-1)
    smoothing = label_smoothing * V / (V - 1)
    expected = -(1 - smoothing) * log_probs.gather(1, target[:, None])[:, 0] - smoothing * log_probs.mean(dim=1)
    actual = F.cross_entropy(
        logits, target, label_smoothing=megatron_label_smoothing(label_smoothing, V), reduction="none"
    )
    torch.testing.assert_close(actual, expected)


def test_megatron_label_smoothing_that_leaves_nothing_to_the_target() -> None:
    """Above (V − 1) / V the target would get less than nothing, which torch's label_smoothing refuses."""
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, \(V - 1\) / V\], got 0.95"):
        megatron_label_smoothing(0.95, V)
    with pytest.raises(ValueError, match="vocab_size must be above 1, got 1"):
        megatron_label_smoothing(0.1, 1)

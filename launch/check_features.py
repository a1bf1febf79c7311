"""What ``check.py`` holds to full logits beside the plain cross-entropy, each as one loss per token."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from vocab_parallel_fused import (
    VocabShard,
    linear_cross_entropy,
    linear_distillation,
    linear_token_stats,
    linear_top_k,
)
from vocab_parallel_fused.testing import Problem, Transform, local_rows, local_tokens, transformed_logits

TEMPERATURE = 0.7
TRANSFORM: Transform = {"logit_scale": 1.1, "logit_softcap": 20.0, "temperature": TEMPERATURE}
LABEL_SMOOTHING, Z_LOSS_WEIGHT = 0.1, 1e-3
TOP_K = 5


class Feature(NamedTuple):
    """A loss ``[T]``, from stored logits and from this rank's part of the problem."""

    of_logits: Callable[[Tensor], Tensor]
    of_part: Callable[..., Tensor]


def make_features(problem: Problem, group: ProcessGroup | None, shard: VocabShard) -> dict[str, Feature]:
    """All features of one problem, the same on every rank.

    Outputs that one call has together are added, each times random numbers, so that each has its own upstream gradient.
    """
    T, V = problem.hidden.shape[0], problem.weight.shape[0]
    device, target = problem.hidden.device, problem.target
    generator = torch.Generator(device).manual_seed(1)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device) + 0.5

    class_weight, token_weight, shares = uniform(V), uniform(T), uniform(4, T)
    several = torch.randint(V, (T, 3), generator=generator, device=device)
    # Which classes are on top is a matter of rounding where the next one is as likely: such tokens get no share.
    k = min(TOP_K, V - 1)
    with torch.no_grad():
        logits = F.linear(*(t.double() for t in problem[:3] if t is not None))
        logits = transformed_logits(logits, **TRANSFORM)
        largest, classes = logits.topk(k + 1)
        del logits
    share = uniform(T, 1) * (largest[:, k - 1 : k] - largest[:, k:] > 1e-3)
    teacher_hidden = torch.randn(T, 32, generator=generator, device=device).to(problem.hidden.dtype)
    teacher_weight = torch.randn(V, 32, generator=generator, device=device).div_(4).to(problem.hidden.dtype)
    teacher_logits = teacher_hidden.double() @ teacher_weight.double().t()

    def all_options(logits: Tensor) -> Tensor:
        z = transformed_logits(logits, **TRANSFORM)
        loss = F.cross_entropy(z, target, class_weight.to(z.dtype), reduction="none", label_smoothing=LABEL_SMOOTHING)
        return token_weight * (loss + Z_LOSS_WEIGHT * torch.where(target == -100, 0.0, z.logsumexp(1).square()))

    def all_options_of_part(part: Problem, **keywords: Any) -> Tensor:
        return linear_cross_entropy(
            part.hidden,
            part.weight,
            target,
            linear_bias=part.bias,
            weight=class_weight,
            token_weight=token_weight,
            reduction="none",
            label_smoothing=LABEL_SMOOTHING,
            z_loss_weight=Z_LOSS_WEIGHT,
            **TRANSFORM,
            **keywords,
        )

    def token_stats(logits: Tensor) -> Tensor:
        z = transformed_logits(logits, **TRANSFORM)
        log_probs = z.log_softmax(1)
        log_prob = log_probs.gather(1, several).sum(1)
        entropy = -(log_probs.exp() * log_probs).sum(1)
        return (shares * torch.stack((log_prob, entropy, z.logsumexp(1), z.gather(1, several).sum(1)))).sum(0)

    def token_stats_of_part(part: Problem, **keywords: Any) -> Tensor:
        keywords |= {"linear_bias": part.bias, **TRANSFORM}
        stats = linear_token_stats(part.hidden, part.weight, several, **keywords)
        assert stats.log_prob is not None
        assert stats.entropy is not None
        assert stats.lse is not None
        assert stats.target_logit is not None
        outputs = (stats.log_prob.sum(1), stats.entropy, stats.lse, stats.target_logit.sum(1))
        return (shares * torch.stack(outputs)).sum(0)

    def top_k(logits: Tensor) -> Tensor:
        return (share * transformed_logits(logits, **TRANSFORM).log_softmax(1).gather(1, classes[:, :k])).sum(1)

    def top_k_of_part(part: Problem, **keywords: Any) -> Tensor:
        top = linear_top_k(part.hidden, part.weight, k, linear_bias=part.bias, **TRANSFORM, **keywords)
        return (share * top.log_prob).sum(1)

    def divergence(name: Any) -> Feature:
        def of_logits(logits: Tensor) -> Tensor:
            log_p = transformed_logits(logits, **TRANSFORM).log_softmax(1)
            log_q = (teacher_logits / TEMPERATURE).log_softmax(1).to(log_p.dtype)
            if name == "forward_kl":
                return (log_q.exp() * (log_q - log_p)).sum(1)
            if name == "reverse_kl":
                return (log_p.exp() * (log_p - log_q)).sum(1)
            log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log()
            return (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(1) / 2

        def of_part(part: Problem, **keywords: Any) -> Tensor:
            hidden = local_tokens(teacher_hidden, group, sequence_parallel=keywords["sequence_parallel"])
            return linear_distillation(
                part.hidden,
                part.weight,
                hidden,
                local_rows(teacher_weight, shard),
                divergence=name,
                reduction="none",
                linear_bias=part.bias,
                **TRANSFORM,
                **keywords,
            )

        return Feature(of_logits, of_part)

    return {
        "all options": Feature(all_options, all_options_of_part),
        "token stats": Feature(token_stats, token_stats_of_part),
        f"top {k}": Feature(top_k, top_k_of_part),
        "forward KL": divergence("forward_kl"),
        "reverse KL": divergence("reverse_kl"),
        "Jensen–Shannon": divergence("jensen_shannon"),
    }

"""Divergences of two heads from the statistics of the tokens: PyTorch on [T] that knows no kernel and no group."""

from typing import Literal

import torch
from torch import Tensor

from vocab_parallel_fused.stats import PartStats

Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon"]


def kl_divergence(whole: PartStats) -> Tensor:
    """[T] ``KL(a ‖ b) = Σ_j p_aj (log p_aj − log p_bj)`` of two heads with ``cross``.

    With ``log p_j = u_j − log sum_exp``, the sum is ``cross / sum_exp_a − log sum_exp_a + log sum_exp_b``.
    """
    assert whole.cross is not None
    sum_exp_a, sum_exp_b = whole.sum_exp
    return whole.cross / sum_exp_a - torch.log(sum_exp_a) + torch.log(sum_exp_b)


def dlogits_bound(divergence: str, center: Tensor, grad: Tensor) -> Tensor:
    """[T] a bound of every ``|dz_j|`` of ``eager.local_divergence_grads``.

    ``|p − q| <= 1``. As ``x log(1 / x) <= 1/e``, the negative terms of a divergence add up to no less than −1, so no
    term ``p_j log(p_j / q_j)`` is above it by more than 1.
    """
    return grad.abs() * (1.0 if divergence == "forward_kl" else 1 + 2 * center.abs())

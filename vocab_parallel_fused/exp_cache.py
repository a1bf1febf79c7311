"""What a forward may keep for its backward when it is given memory for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vocab_parallel_fused.transform import Operands

# Numbers of rows that matrix units and copy engines like.
_MULTIPLE = 8


class ExpCache(NamedTuple):
    """Exponentials of all ``T`` tokens over the first ``V_kept`` rows of this shard."""

    exps: Tensor
    """[T, V_kept] ``exp(z − reference) · ∂z/∂a`` in the dtype of the inputs, whose relative precision it has wherever
    the exponential is in range."""

    reference: Tensor
    """[T] fp32, near the largest logit; +∞ where the exponentials turned out to be of no use."""

    max_logit: Tensor
    """[T] fp32 the largest logit of this shard."""


def allocate_cache(head: Operands, max_logit: Tensor, budget_bytes: int, tile_v: int) -> ExpCache | None:
    """Memory for as many rows as ``budget_bytes`` hold, whole tiles of ``tile_v`` or all; None if it holds none.

    Float16 lacks the range for exponentials of unknown size, so it keeps none.
    """
    hidden, weight, *_ = head
    num_tokens, num_rows = hidden.shape[0], weight.shape[0]
    if hidden.dtype == torch.float16:
        return None
    # Products of a number of rows that is odd are slow, so the last few are recomputed.
    num_kept = num_rows - num_rows % _MULTIPLE if num_rows >= _MULTIPLE else num_rows
    fitting = budget_bytes // (num_tokens * hidden.element_size()) // _MULTIPLE * _MULTIPLE
    if fitting < num_kept:
        num_kept = fitting // tile_v * tile_v
    if num_kept == 0:
        return None
    stride = -(-num_kept // _MULTIPLE) * _MULTIPLE
    exps = hidden.new_empty(num_tokens, stride)[:, :num_kept]
    return ExpCache(exps, torch.empty_like(max_logit), max_logit)

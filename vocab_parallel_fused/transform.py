"""What logits are made of: a linear layer, and what happens to them between it and the softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_ALL = slice(None)


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """``z = softcap · tanh(logit_scale · a / softcap) / temperature`` of raw logits ``a = x · w + b``.

    Without a soft cap, ``z = logit_scale · a / temperature``.

    Raises:
        TypeError: if one of them is no number.
        ValueError: if one of them is not finite, or ``softcap`` or ``temperature`` is not positive.
    """

    logit_scale: float = 1.0
    logit_softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("logit_scale", "logit_softcap", "temperature"):
            value = getattr(self, name)
            if value is None and name == "logit_softcap":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
            if name != "logit_scale" and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")

    @property
    def inner(self) -> float:
        """Factor inside the tanh; 1 without one."""
        return 1.0 if self.logit_softcap is None else self.logit_scale / self.logit_softcap

    @property
    def outer(self) -> float:
        """Factor outside the tanh, or the only one: ``z = outer · tanh(inner · a)`` or ``z = outer · a``."""
        return (self.logit_scale if self.logit_softcap is None else self.logit_softcap) / self.temperature

    def apply_(self, raw: Tensor) -> Tensor:
        """``z`` from ``a``, in place."""
        if self.logit_softcap is not None:
            raw.mul_(self.inner).tanh_()
        return raw if self.outer == 1.0 else raw.mul_(self.outer)

    def times_derivative_(self, dlogits: Tensor, logits: Tensor) -> Tensor:
        """``dz · ∂z/∂a``, in place on ``dz``; ``logits`` are ``z``, and may be overwritten.

        ``∂z/∂a = outer · inner · (1 − tanh²)`` with ``tanh = z / outer``, or ``outer`` without a soft cap.
        """
        if self.logit_softcap is not None:
            tanh = logits.div_(self.outer)
            torch.addcmul(logits.new_ones(()), tanh, tanh, value=-1, out=tanh)
            dlogits *= tanh
        factor = self.outer * self.inner
        return dlogits if factor == 1.0 else dlogits.mul_(factor)


class Operands(NamedTuple):
    """What one head's logits are computed from."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    transform: LogitTransform

    def block(self, tokens: slice, rows: slice) -> Operands:
        """The operands of some tokens and rows."""
        bias = None if self.bias is None else part_of(self.bias, rows)
        return Operands(part_of(self.hidden, tokens), part_of(self.weight, rows), bias, self.transform)


def part_of(tensor: Tensor, part: slice) -> Tensor:
    """``tensor[part]``, but no view if that is all of it: to make one takes the host a microsecond."""
    return tensor if part in (_ALL, slice(0, tensor.shape[0])) else tensor[part]

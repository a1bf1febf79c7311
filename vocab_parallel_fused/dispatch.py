"""Which kernels run on which tensors."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vocab_parallel_fused.exp_cache import ExpCache
from vocab_parallel_fused.kernels import eager
from vocab_parallel_fused.options import Impl
from vocab_parallel_fused.stats import DlogitsCoefficients, MergedStats, PartStats, TokenLoss


class Kernels(NamedTuple):
    """The steps of one implementation that no rank needs another for. Signatures and shapes: ``kernels/eager.py``."""

    local_stats: Callable[..., tuple[PartStats, ExpCache | None]]
    local_grads: Callable[..., None]
    token_stats: Callable[..., MergedStats]
    token_loss: Callable[..., TokenLoss]
    token_loss_grads: Callable[..., DlogitsCoefficients]
    local_top_k: Callable[..., tuple[Tensor, Tensor]]
    local_joint_stats: Callable[..., PartStats]
    local_js_sums: Callable[..., Tensor]
    local_divergence_grads: Callable[..., None]


def select_kernels(impl: Impl, input: Tensor) -> Kernels:
    """The implementation for ``input``'s device and dtype.

    Raises:
        ImportError, TypeError, ValueError: if ``impl`` asks for Triton and it is missing, or cannot take this dtype or
            device. An explicit choice never falls back.
    """
    on_gpu = input.device.type == "cuda"  # ROCm devices too
    if impl == "eager" or (impl == "auto" and (not on_gpu or input.dtype == torch.float64)):
        return Kernels(*(getattr(eager, name) for name in Kernels._fields))
    if input.dtype == torch.float64:
        raise TypeError("input must be float16, bfloat16 or float32 for impl='triton', got torch.float64")
    try:  # here, as Triton may be missing
        from vocab_parallel_fused.kernels import backward, divergence, forward, selection, tiles, tokens
    except ImportError as error:
        raise ImportError(f"impl={impl!r} needs Triton, which cannot be imported here: {error}") from error
    if not on_gpu and not tiles.INTERPRETED:
        raise ValueError(
            f"input must be on a CUDA or ROCm device for impl='triton', got {input.device} "
            "(TRITON_INTERPRET=1 in the environment of a new process runs Triton on the CPU)"
        )
    return Kernels(
        forward.local_stats,
        backward.local_grads,
        tokens.token_stats,
        tokens.token_loss,
        tokens.token_loss_grads,
        selection.local_top_k,
        divergence.local_joint_stats,
        divergence.local_js_sums,
        divergence.local_divergence_grads,
    )

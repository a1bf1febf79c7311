"""How the loss is computed, as one frozen object; what it means stays in the keywords of the function."""

from dataclasses import dataclass
from typing import Literal, get_args

Impl = Literal["auto", "triton", "eager"]
Combine = Literal["all_gather", "all_reduce"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeOptions:
    """Choices of computation. Every combination gives the same loss and gradients up to rounding.

    Raises:
        ValueError: if a field is outside the values its documentation names.
    """

    impl: Impl = "auto"
    """Which kernels run on this rank's shard.

    - ``"auto"``: Triton for float16, bfloat16 and float32 on CUDA and ROCm devices, eager tiles for everything else.
    - ``"triton"``: Triton, or an error. On CPU tensors it needs Triton's interpreter (``TRITON_INTERPRET=1``).
    - ``"eager"``: PyTorch operations on one tile of logits at a time, on any device.
    """

    workspace_bytes: int | None = None
    """Scratch memory in bytes, of the backward and of what selects the top ``k``. The block of logit gradients that is
    alive at a time takes no more, but at least one kernel tile; of the sizes that fit, the fastest is chosen. ``None``:
    128 MiB on an accelerator, where a larger block means fewer passes over the fp32 gradient of the hidden states;
    4 MiB on the CPU, where it should stay in the cache."""

    exp_cache_bytes: int = 0
    """Memory in bytes that the forward may keep for a faster backward: exponentials of the logits in the inputs' dtype,
    ``T · linear_weight.element_size()`` bytes for each of the shard's first rows that fit. The backward of these rows
    needs no logits: of the four matrix products of forward and backward it leaves out one. 0: nothing of the logits is
    kept.

    Exact as without: tokens whose exponentials would leave the range of the dtype are recomputed. Used by Triton's
    kernels for bfloat16 and float32, unless label smoothing or an entropy is asked for: their gradients need more
    than exponentials. Each rank may have a budget of its own.
    """

    combine: Combine = "all_gather"
    """How the ranks' statistics become those of the whole vocabulary. Equal on all ranks.

    - ``"all_gather"``: one packed all-gather, merged in rank order by every rank: the result is a function of the
      shards alone, whatever algorithm the communication library picks.
    - ``"all_reduce"``: one maximum and one sum; moves less for large groups. Every rank still holds the same bits
      wherever the library's all-reduce gives all ranks the same bits, as NCCL's and gloo's do.
    """

    accumulate_main_grad: bool = False
    """Add the weight's gradient into ``linear_weight.main_grad``, an fp32 tensor of the weight's shape that the caller
    owns, inside the matrix product that makes it (for float16, after it). ``linear_weight.grad`` is then left alone.
    This is how Megatron sums gradients over micro-batches; the attribute is read in the forward. Any backward of the
    loss adds to it, :func:`torch.autograd.grad` of other inputs too."""

    keep_gathered_hidden: bool = False
    """Under ``sequence_parallel``, keep the hidden states of all tokens from the forward to the backward, which then
    does not gather them again: ``T · H · itemsize`` bytes for one message. Equal on all ranks. Where the backward
    follows the forward of the same tokens at once, no peak is higher, as the backward holds them anyway."""

    def __post_init__(self) -> None:
        if self.impl not in get_args(Impl):
            raise ValueError(f"impl must be one of {get_args(Impl)}, got {self.impl!r}")
        if self.combine not in get_args(Combine):
            raise ValueError(f"combine must be one of {get_args(Combine)}, got {self.combine!r}")
        size = self.workspace_bytes
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"workspace_bytes must be a positive int or None, got {size!r}")
        size = self.exp_cache_bytes
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ValueError(f"exp_cache_bytes must be a non-negative int, got {size!r}")
        for name in ("accumulate_main_grad", "keep_gathered_hidden"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be a bool, got {getattr(self, name)!r}")

"""Arguments of the public functions, checked and flattened: every error is raised here, before ranks communicate.

What only the other ranks can tell, that the shards tile the vocabulary, is checked when their numbers have arrived.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from typing_extensions import TypedDict

from vocab_parallel_fused.autograd import Plan
from vocab_parallel_fused.collectives import Group, rank_and_size, resolve_group
from vocab_parallel_fused.dispatch import select_kernels
from vocab_parallel_fused.options import ComputeOptions
from vocab_parallel_fused.sharding import VocabShard
from vocab_parallel_fused.transform import LogitTransform, Operands

_DEFAULT_OPTIONS = ComputeOptions()
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WORKSPACE_BYTES_ACCELERATOR = 128 * 2**20
_WORKSPACE_BYTES_CPU = 4 * 2**20


class LinearArguments(TypedDict, total=False):
    """Keywords of every function on a linear layer; see :func:`~vocab_parallel_fused.linear_cross_entropy`."""

    linear_bias: Tensor | None
    logit_scale: float
    logit_softcap: float | None
    temperature: float
    group: Group
    shard: VocabShard | None
    sequence_parallel: bool
    options: ComputeOptions | None


class Head(NamedTuple):
    """A linear layer on tokens, and how to compute with it."""

    hidden: Tensor  # [T, H], or this rank's [T / R, H] under sequence parallelism
    weight: Tensor  # [V_local, H]
    bias: Tensor | None  # [V_local]
    plan: Plan
    input_shape: tuple[int, ...]
    vocab_size_is_known: bool  # or derived from this rank's number of rows, as another rank may not

    @property
    def num_parts(self) -> int:
        """Over how many ranks dim 0 of the input is sharded."""
        return rank_and_size(self.plan.group)[1] if self.plan.sequence_parallel else 1

    @property
    def token_shape(self) -> tuple[int, ...]:
        """Shape of all ``T`` tokens."""
        leading = self.input_shape[:-1]
        return leading if self.num_parts == 1 else (self.num_parts * leading[0], *leading[1:])


def resolve_head(
    input: Tensor,
    linear_weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    temperature: float = 1.0,
    group: Group = None,
    shard: VocabShard | None = None,
    sequence_parallel: bool = False,
    options: ComputeOptions | None = None,
) -> Head:
    """Check the layer's arguments, resolve their defaults and flatten the tokens."""
    options = _DEFAULT_OPTIONS if options is None else options
    if not isinstance(options, ComputeOptions):
        raise TypeError(f"options must be a ComputeOptions or None, got {type(options).__name__}")
    if not isinstance(sequence_parallel, bool):
        raise TypeError(f"sequence_parallel must be a bool, got {sequence_parallel!r}")
    transform = LogitTransform(logit_scale, logit_softcap, temperature)
    process_group = resolve_group(group)
    hidden, weight = _resolve_layer(input, linear_weight, linear_bias, ("input", "linear_weight", "linear_bias"))
    rank, world_size = rank_and_size(process_group)
    if sequence_parallel and world_size > 1 and hidden.ndim == 1:
        raise ValueError("input must have a token dimension to be sharded with sequence_parallel, got shape (H,)")
    vocab_size_is_known = shard is not None or world_size == 1
    shard = _resolve_shard(shard, weight, rank, world_size)
    kernels = select_kernels(options.impl, hidden)
    workspace_bytes = options.workspace_bytes
    if workspace_bytes is None:
        workspace_bytes = _WORKSPACE_BYTES_CPU if hidden.device.type == "cpu" else _WORKSPACE_BYTES_ACCELERATOR
    main_grad = _main_grad(linear_weight) if options.accumulate_main_grad else None
    plan = Plan(
        shard,
        process_group,
        sequence_parallel,
        options.keep_gathered_hidden,
        transform,
        kernels,
        workspace_bytes,
        options.exp_cache_bytes,
        options.combine,
        main_grad,
    )
    tokens = hidden.reshape(-1, hidden.shape[-1])
    bias = None if linear_bias is None else linear_bias.contiguous()
    return Head(tokens, weight, bias, plan, tuple(hidden.shape), vocab_size_is_known)


def resolve_target(target: Tensor, ignore_index: int, head: Head, *, several: bool = False) -> Tensor:
    """Targets ``[T, K]``; ``K`` is 1, or with ``several`` may be a last dimension."""
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")
    check_tensor("target", target, head.hidden)
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64 class ids, got {target.dtype}")
    one_each = tuple(target.shape) == head.token_shape
    if not one_each and not (several and tuple(target.shape[:-1]) == head.token_shape):
        reason = f" ({head.num_parts} ranks with sequence_parallel)" if head.num_parts > 1 else ""
        also = f" or {(*head.token_shape, 'K')}" if several else ""
        raise ValueError(
            f"target must have shape {head.token_shape}{also} for input of shape {head.input_shape}{reason}, "
            f"got {tuple(target.shape)}"
        )
    if target.numel() >= 2**31:
        raise ValueError(f"target must have fewer than 2**31 entries, got {tuple(target.shape)}")
    target = target.reshape(math.prod(head.token_shape), 1 if one_each else target.shape[-1]).contiguous()
    if head.vocab_size_is_known:  # otherwise all ranks look at it together, in `check_cover`
        check_target_range(target, ignore_index, head.plan.shard.vocab_size)
    return target


def resolve_teacher(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    head: Head,
) -> Operands:
    """A second head over the same tokens and classes, at the same temperature, of which gradients are not wanted."""
    try:
        transform = LogitTransform(logit_scale, logit_softcap, head.plan.transform.temperature)
    except (TypeError, ValueError) as error:
        raise type(error)(f"teacher_{error}") from None
    check_tensor("teacher_input", hidden, head.hidden)
    hidden, weight = _resolve_layer(hidden, weight, bias, ("teacher_input", "teacher_weight", "teacher_bias"))
    if hidden.dtype != head.hidden.dtype:
        raise TypeError(f"teacher_input must have input's dtype {head.hidden.dtype}, got {hidden.dtype}")
    if tuple(hidden.shape[:-1]) != head.input_shape[:-1]:
        expected = (*head.input_shape[:-1], "H_teacher")
        raise ValueError(f"teacher_input must have shape {expected}, got {tuple(hidden.shape)}")
    if weight.shape[0] != head.weight.shape[0]:
        raise ValueError(f"teacher_weight must have linear_weight's {head.weight.shape[0]} rows, got {weight.shape[0]}")
    bias = None if bias is None else bias.detach().contiguous()
    return Operands(hidden.detach().reshape(-1, hidden.shape[-1]), weight.detach(), bias, transform)


def resolve_class_weight(weight: Tensor | None, head: Head) -> Tensor | None:
    """Class weights ``[V]`` in the precision of the loss."""
    if weight is None:
        return None
    check_tensor("weight", weight, head.hidden)
    if not weight.is_floating_point() or weight.requires_grad:
        requires = ", which requires a gradient" if weight.requires_grad else ""
        raise TypeError(f"weight must be a constant floating-point tensor, got {weight.dtype}{requires}")
    vocab_size = head.plan.shard.vocab_size
    if weight.shape != (vocab_size,):
        raise ValueError(f"weight must have shape ({vocab_size},), got {tuple(weight.shape)}")
    return weight.to(torch.promote_types(head.hidden.dtype, torch.float32)).contiguous()


def resolve_token_weight(token_weight: Tensor | None, head: Head) -> Tensor | None:
    """Weights ``[T]`` of the tokens in the precision of the loss: 16 bits would not hold their sum."""
    if token_weight is None:
        return None
    check_tensor("token_weight", token_weight, head.hidden)
    if not token_weight.is_floating_point():
        raise TypeError(f"token_weight must be a floating-point tensor, got {token_weight.dtype}")
    if token_weight.shape != head.token_shape:
        raise ValueError(f"token_weight must have target's shape {head.token_shape}, got {tuple(token_weight.shape)}")
    return token_weight.reshape(-1).to(torch.promote_types(head.hidden.dtype, torch.float32))


def resolve_number(name: str, value: float, *, largest: float = math.inf) -> float:
    """A finite number in ``[0, largest]``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (math.isfinite(value) and 0 <= value <= largest):
        raise ValueError(f"{name} must be in [0, {largest}], got {value}")
    return value


def check_tensor(name: str, tensor: Tensor, input: Tensor) -> None:
    """A plain tensor on ``input``'s device."""
    if isinstance(tensor, DTensor):
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor of placements {tensor.placements}; pass its to_local() and "
            "the group if it is sharded over that. fully_shard gathers its own in a module's forward, and in methods "
            "made known to it by torch.distributed.fsdp.register_fsdp_forward_method"
        )
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"{name} must be a strided tensor, got {'a nested one' if tensor.is_nested else tensor.layout}")
    if tensor.device != input.device:
        raise ValueError(f"{name} must be on input's device {input.device}, got {tensor.device}")
    if tensor.is_meta:
        raise ValueError(f"{name} must hold data, got a meta tensor")


def _resolve_layer(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, names: tuple[str, str, str]
) -> tuple[Tensor, Tensor]:
    """Input and weight, cast as torch's autocast does for a linear layer. ``names`` are those of all three."""
    of_input, of_weight, of_bias = names
    check_tensor(of_input, hidden, hidden)
    check_tensor(of_weight, weight, hidden)
    if bias is not None:
        check_tensor(of_bias, bias, hidden)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        # It leaves fp64 alone.
        hidden, weight = (tensor.to(dtype) if tensor.dtype in _DTYPES[:3] else tensor for tensor in (hidden, weight))
    if hidden.dtype not in _DTYPES:
        raise TypeError(f"{of_input} must be float16, bfloat16, float32 or float64, got {hidden.dtype}")
    if hidden.ndim < 1 or hidden.shape[-1] < 1:
        raise ValueError(f"{of_input} must have shape (*, H) with H >= 1, got {tuple(hidden.shape)}")
    hidden_size = hidden.shape[-1]
    if weight.ndim != 2 or weight.shape[1] != hidden_size:
        raise ValueError(f"{of_weight} must have shape (V_local, {hidden_size}), got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{of_bias} must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if weight.dtype != hidden.dtype:
        raise TypeError(f"{of_weight} must have {of_input}'s dtype {hidden.dtype}, got {weight.dtype}")
    if bias is not None and bias.dtype not in (hidden.dtype, torch.float32):
        raise TypeError(f"{of_bias} must have {of_input}'s dtype {hidden.dtype}, or fp32, got {bias.dtype}")
    return hidden, weight


def _resolve_shard(shard: VocabShard | None, linear_weight: Tensor, rank: int, world_size: int) -> VocabShard:
    rows = linear_weight.shape[0]
    if shard is None:
        if rows == 0:
            raise ValueError(
                "linear_weight has no rows; pass shard= to say that this rank's part of the vocabulary is empty"
            )
        return VocabShard(rank * rows, (rank + 1) * rows, world_size * rows)
    if not isinstance(shard, VocabShard):
        raise TypeError(f"shard must be a VocabShard or None, got {type(shard).__name__}")
    if shard.num_rows != rows:
        raise ValueError(f"linear_weight must have the {shard.num_rows} rows of {shard}, got {rows}")
    if world_size == 1 and shard.num_valid_rows != shard.vocab_size:
        raise ValueError(f"shard must hold the whole vocabulary on a single rank, got {shard}; pass group= for several")
    return shard


def _main_grad(linear_weight: Tensor) -> Tensor:
    """The tensor that sums the weight's gradients, for ``accumulate_main_grad``."""
    main_grad = getattr(linear_weight, "main_grad", None)
    expected = (linear_weight.shape, torch.float32, linear_weight.device)
    if not isinstance(main_grad, Tensor) or (main_grad.shape, main_grad.dtype, main_grad.device) != expected:
        got = type(main_grad).__name__
        if isinstance(main_grad, Tensor):
            got = f"{tuple(main_grad.shape)}, {main_grad.dtype} on {main_grad.device}"
        raise ValueError(
            f"linear_weight.main_grad must be a tensor {tuple(linear_weight.shape)}, torch.float32 on "
            f"{linear_weight.device} for accumulate_main_grad, got {got}"
        )
    return main_grad


def check_target_range(target: Tensor, ignore_index: int, vocab_size: int) -> None:
    """On the CPU, reject ids outside the vocabulary. Elsewhere `check_cover` asserts."""
    if target.device.type == "cpu":
        outside = (target != ignore_index) & ((target < 0) | (target >= vocab_size))
        if outside.any():
            position = int(outside.flatten().nonzero()[0])
            raise ValueError(
                f"target must be in [0, {vocab_size}) or ignore_index, got {int(target.flatten()[position])} "
                f"at position {position} of the flattened target"
            )


def check_shards(num_classes: Tensor | None, shard: VocabShard) -> None:
    """The classes of all ranks must be as many as all of them expect: a shard left to its default may be wrong."""
    if num_classes is None:
        return
    if num_classes.device.type != "cpu":
        torch._assert_async(  # pyright: ignore[reportPrivateImportUsage]
            num_classes == shard.vocab_size, "the shards of the group do not add up to vocab_size"
        )
    elif num_classes != shard.vocab_size:
        held = int(num_classes)  # its complement if they disagree
        hold = f"{held} classes" if held >= 0 else f"{~held} classes and expect different vocab_sizes"
        raise ValueError(
            f"shard must be one of those that add up to its vocab_size over the group, got {shard} where all ranks "
            f"together hold {hold}"
        )


def check_cover(
    covered: Tensor, owners: Tensor, num_classes: Tensor | None, target: Tensor, ignore_index: int, shard: VocabShard
) -> None:
    """Exactly one rank must have found each target ``[T, K]`` among its rows, or it is no class id, or the shards do
    not tile the vocabulary. ``covered`` knows the outcome: on the GPU one launch asserts it, on the CPU the others say
    what is wrong."""
    if target.device.type != "cpu":
        torch._assert_async(  # pyright: ignore[reportPrivateImportUsage]
            covered, "a target is not in [0, vocab_size), or the shards do not cover that exactly once"
        )
    elif not covered:
        check_shards(num_classes, shard)
        check_target_range(target, ignore_index, shard.vocab_size)
        owners = owners.masked_fill(target == ignore_index, 1).flatten()
        position = int((owners != 1).nonzero()[0])
        raise ValueError(
            f"shard must cover [0, vocab_size) exactly once over the group, but {int(owners[position])} ranks hold "
            f"target {int(target.flatten()[position])} (position {position} of the flattened target)"
        )

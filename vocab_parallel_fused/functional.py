"""The public functions: check the arguments, flatten them, apply the autograd function, reduce the loss."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from vocab_parallel_fused.autograd import Plan, token_stats
from vocab_parallel_fused.collectives import Group, rank_and_size, resolve_group
from vocab_parallel_fused.dispatch import select_kernels
from vocab_parallel_fused.options import ComputeOptions
from vocab_parallel_fused.sharding import VocabShard
from vocab_parallel_fused.stats import TokenStats, cross_entropy, reduce_loss

Reduction = Literal["none", "mean", "sum"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WORKSPACE_BYTES_ACCELERATOR = 128 * 2**20
_WORKSPACE_BYTES_CPU = 4 * 2**20


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    group: Group = None,
    shard: VocabShard | None = None,
    sequence_parallel: bool = False,
    options: ComputeOptions | None = None,
) -> Tensor:
    r"""Cross-entropy of a linear layer whose classes are sharded over a group, without ever storing its logits.

    :func:`torch.nn.functional.linear_cross_entropy` for a sharded vocabulary. With :math:`z_{tj} = x_t \cdot w_j + b_j`
    over the rows of *all* ranks, the loss of token :math:`t` is :math:`\log \sum_j \exp z_{tj} - z_{t y_t}`.

    Every rank of ``group`` calls this with its own rows and gets the same loss, to the bit. Gradients are exact:
    ``linear_weight``'s and ``linear_bias``'s belong to the local rows and need no communication, ``input``'s is
    already summed over the group (so the caller must not reduce it again).

    Communication: one all-gather of ``3·(T + 1)`` numbers in the forward and one all-reduce of ``input``'s gradient in
    the backward. Under sequence parallelism also one all-gather of the hidden states in each, and the all-reduce is a
    reduce-scatter. Extra memory: ``O(T)`` and a fixed tile or buffer of a few MiB in the forward; in the backward
    ``options.workspace_bytes`` plus the fp32 accumulator of ``input``'s gradient. To this add the gathered hidden
    states under sequence parallelism, and a copy of the weight where autocast changes its dtype.

    Args:
        input: ``(*, H)`` hidden states, the same on every rank; with ``sequence_parallel`` this rank's part of dim 0.
        linear_weight: ``(V_local, H)``, this rank's rows, in ``input``'s dtype. Under ``torch.autocast`` both are cast
            as :func:`torch.nn.functional.linear` would.
        target: ``(*)`` int64 global class ids of all tokens, the same on every rank.
        linear_bias: ``(V_local,)`` bias of the local rows, in ``input``'s dtype.
        reduction: ``"none"``: one loss per token, shaped like ``target``; ``"sum"``; ``"mean"`` over the tokens that
            are not ignored.
        ignore_index: tokens with this target have loss 0 and no gradient.
        group: process group or one-dimensional device mesh over which the vocabulary is sharded. None: one rank that
            holds all rows.
        shard: which rows this rank holds. Default: equal shards in rank order, no padding.
        sequence_parallel: dim 0 of ``input`` is sharded evenly over the group, in rank order.
        options: how to compute. Default: :class:`~vocab_parallel_fused.ComputeOptions`\ ``()``.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs), whatever the inputs' dtype. Unlike torch's, the mean over zero valid
        tokens is 0 with zero gradients. With more than one rank the loss requires a gradient even if every input is
        frozen on this rank, because the others wait for it in the backward.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or shards do not fit together, or (on the CPU) a target is no class id. On CUDA such
            a target is an asynchronous device assertion, as in torch, since reading it would stall the device.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}")
    stats, valid = _token_stats(
        input,
        linear_weight,
        target,
        linear_bias=linear_bias,
        ignore_index=ignore_index,
        group=group,
        shard=shard,
        sequence_parallel=sequence_parallel,
        options=options,
    )
    loss = reduce_loss(cross_entropy(stats, valid), valid, reduction)
    return loss.view(target.shape) if reduction == "none" else loss


def _token_stats(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None,
    ignore_index: int,
    group: Group,
    shard: VocabShard | None,
    sequence_parallel: bool,
    options: ComputeOptions | None,
) -> tuple[TokenStats, Tensor]:
    """Statistics of all ``T`` tokens, flattened, and which of them are not ignored ``[T]``."""
    options = ComputeOptions() if options is None else options
    if not isinstance(options, ComputeOptions):
        raise TypeError(f"options must be a ComputeOptions or None, got {type(options).__name__}")
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")
    if not isinstance(sequence_parallel, bool):
        raise TypeError(f"sequence_parallel must be a bool, got {sequence_parallel!r}")
    process_group = resolve_group(group)
    hidden, weight, bias = _autocast(input, linear_weight, linear_bias)
    _check_tensors(hidden, weight, target, bias)
    rank, world_size = rank_and_size(process_group)
    _check_token_counts(hidden, target, world_size if sequence_parallel else 1)
    shard = _resolve_shard(shard, weight, rank, world_size)
    kernels = select_kernels(options.impl, hidden)

    target = target.reshape(-1)
    valid = target != ignore_index
    _check_target_range(target, valid, shard.vocab_size)
    workspace_bytes = options.workspace_bytes
    if workspace_bytes is None:
        workspace_bytes = _WORKSPACE_BYTES_CPU if hidden.device.type == "cpu" else _WORKSPACE_BYTES_ACCELERATOR
    main_grad = _main_grad(linear_weight) if options.accumulate_main_grad else None
    plan = Plan(shard, process_group, sequence_parallel, kernels, workspace_bytes, options.combine, main_grad)
    tokens = hidden.reshape(-1, hidden.shape[-1])
    if bias is not None:
        bias = bias.contiguous()
    stats, num_classes = token_stats(tokens, weight, bias, target, plan)  # pyright: ignore[reportCallIssue]
    _check_shards(num_classes, shard)
    _check_owners(stats.owners, target, valid)
    return stats, valid


def _autocast(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as torch's autocast does for a linear layer, if it is on for the input's device."""
    if not isinstance(input, Tensor) or not torch.is_autocast_enabled(input.device.type):
        return input, linear_weight, linear_bias
    dtype = torch.get_autocast_dtype(input.device.type)

    def cast(tensor: Any) -> Any:
        # Autocast leaves fp64 alone.
        return tensor.to(dtype) if isinstance(tensor, Tensor) and tensor.dtype in _DTYPES[:3] else tensor

    return cast(input), cast(linear_weight), cast(linear_bias)


def _check_tensors(input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None) -> None:
    named = {"input": input, "linear_weight": linear_weight, "target": target}
    if linear_bias is not None:
        named["linear_bias"] = linear_bias
    for name, tensor in named.items():
        if isinstance(tensor, DTensor):
            raise TypeError(f"{name} must be a plain tensor, got a DTensor; pass its to_local() and the group")
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.device != input.device:
            raise ValueError(f"{name} must be on input's device {input.device}, got {tensor.device}")
    if input.dtype not in _DTYPES:
        raise TypeError(f"input must be float16, bfloat16, float32 or float64, got {input.dtype}")
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64 class ids, got {target.dtype}")
    if input.ndim < 1 or input.shape[-1] < 1:
        raise ValueError(f"input must have shape (*, H) with H >= 1, got {tuple(input.shape)}")
    hidden_size = input.shape[-1]
    if linear_weight.ndim != 2 or linear_weight.shape[1] != hidden_size:
        raise ValueError(f"linear_weight must have shape (V_local, {hidden_size}), got {tuple(linear_weight.shape)}")
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:1]:
        raise ValueError(f"linear_bias must have shape ({linear_weight.shape[0]},), got {tuple(linear_bias.shape)}")
    for name in ("linear_weight", "linear_bias"):
        if name in named and named[name].dtype != input.dtype:
            raise TypeError(f"{name} must have input's dtype {input.dtype}, got {named[name].dtype}")


def _check_token_counts(input: Tensor, target: Tensor, num_parts: int) -> None:
    """``target`` must describe ``num_parts`` times the tokens of ``input``, along dim 0."""
    expected = tuple(input.shape[:-1])
    if num_parts > 1:
        if not expected:
            raise ValueError("input must have a token dimension to be sharded with sequence_parallel, got shape (H,)")
        expected = (num_parts * expected[0], *expected[1:])
    if tuple(target.shape) != expected:
        reason = f" ({num_parts} ranks with sequence_parallel)" if num_parts > 1 else ""
        raise ValueError(
            f"target must have shape {expected} for input of shape {tuple(input.shape)}{reason}, "
            f"got {tuple(target.shape)}"
        )


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


def _check_target_range(target: Tensor, valid: Tensor, vocab_size: int) -> None:
    """On the CPU, reject ids outside the vocabulary before any communication. Elsewhere `_check_owners` asserts."""
    if target.device.type == "cpu":
        outside = valid & ((target < 0) | (target >= vocab_size))
        if outside.any():
            position = int(outside.nonzero()[0])
            raise ValueError(
                f"target must be in [0, {vocab_size}) or ignore_index, got {int(target[position])} "
                f"at position {position} of the flattened target"
            )


def _check_shards(num_classes: Tensor | None, shard: VocabShard) -> None:
    """The classes of all ranks must be as many as each of them believes: a shard left to its default may be wrong."""
    if num_classes is None:
        return
    if num_classes.device.type != "cpu":
        torch._assert_async(  # pyright: ignore[reportPrivateImportUsage]
            num_classes == shard.vocab_size, "the shards of the group do not add up to vocab_size"
        )
    elif num_classes != shard.vocab_size:
        raise ValueError(
            f"shard must be one of those that add up to its vocab_size over the group, got {shard} where all ranks "
            f"together hold {int(num_classes)} classes"
        )


def _check_owners(owners: Tensor, target: Tensor, valid: Tensor) -> None:
    """Exactly one rank must have found each target among its rows, or the shards do not tile the vocabulary."""
    good = torch.where(valid, owners == 1, True)
    if target.device.type != "cpu":
        torch._assert_async(  # pyright: ignore[reportPrivateImportUsage]
            good.all(), "a target is not in [0, vocab_size), or the shards do not cover it exactly once"
        )
        return
    if not good.all():
        position = int((~good).nonzero()[0])
        raise ValueError(
            f"shard must cover [0, vocab_size) exactly once over the group, but {int(owners[position])} ranks hold "
            f"target {int(target[position])} (position {position} of the flattened target)"
        )

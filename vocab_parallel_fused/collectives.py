"""Every message that the op sends. Nothing else in the package communicates.

Forward: ``gather_stats``, and ``gather_hidden`` under sequence parallelism. Backward: ``reduce_hidden_grad``, and
``gather_hidden`` again under sequence parallelism. Which of them run, in which order and with which sizes, depends only
on arguments that are equal on all ranks.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from vocab_parallel_fused.stats import TokenStats, merge_stats

Group = ProcessGroup | DeviceMesh | None
"""What users may pass as a group; None is a single rank, never the default world."""

# torch 2.13 renamed these two and warns on the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def resolve_group(group: Group | Any) -> ProcessGroup | None:
    """The process group behind what a user passed.

    Raises:
        TypeError: if it is no group.
        ValueError: if it is a mesh of several dimensions, or a group that this rank is not part of.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                "group must be a one-dimensional DeviceMesh, got one with dimensions "
                f"{group.mesh_dim_names or group.ndim}; pass mesh['name of the tensor-parallel dimension']"
            )
        group = group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group does not contain this rank")
    if group is not None and not isinstance(group, ProcessGroup):
        raise TypeError(
            f"group must be a ProcessGroup, a one-dimensional DeviceMesh or None, got {type(group).__name__}"
        )
    return group


def rank_and_size(group: ProcessGroup | None) -> tuple[int, int]:
    """This rank's number in the group, and how many there are; ``(0, 1)`` without a group."""
    return (0, 1) if group is None else (group.rank(), group.size())


def gather_stats(
    local: TokenStats, num_rows: int, group: ProcessGroup | None, combine: str
) -> tuple[TokenStats, Tensor | None]:
    """Statistics of the whole vocabulary from those of each rank's shard: the same bits on all ranks.

    Args:
        local: ``[T]`` each, of this rank's shard.
        num_rows: how many classes the shard holds. The number travels as one more token.
        combine: see :class:`~vocab_parallel_fused.ComputeOptions`.

    Returns:
        The statistics, and how many classes all shards hold, a number on the device; None for a single rank.
    """
    _, world_size = rank_and_size(group)
    if world_size == 1:
        return local, None
    packed = F.pad(torch.stack(local), (0, 1))  # [3, T + 1]
    packed[2, -1] = num_rows
    if combine == "all_gather":
        parts = packed.new_empty(world_size, *packed.shape)
        _all_gather(parts.flatten(0, 1), packed, group=group)
        merged = merge_stats(parts)
    else:
        max_lse = packed[0].clone()
        dist.all_reduce(max_lse, dist.ReduceOp.MAX, group=group)
        # Where every shard is −inf the reference must be finite, or −inf − −inf would make a NaN.
        reference = max_lse.masked_fill(max_lse == -torch.inf, 0.0)
        packed[0] = torch.exp(packed[0] - reference)
        dist.all_reduce(packed, group=group)
        sum_exp, target_logit, owners = packed.unbind()
        merged = TokenStats(reference + torch.log(sum_exp), target_logit, owners)
    return TokenStats(*(column[:-1] for column in merged)), merged.owners[-1]


def gather_hidden(hidden: Tensor, group: ProcessGroup | None) -> Tensor:
    """All ranks' tokens ``[T, H]`` from this rank's ``[T / R, H]``."""
    _, world_size = rank_and_size(group)
    if world_size == 1 or hidden.numel() == 0:
        return hidden
    gathered = hidden.new_empty(world_size * hidden.shape[0], *hidden.shape[1:])
    _all_gather(gathered, hidden.contiguous(), group=group)
    return gathered


def reduce_hidden_grad(dhidden_partial: Tensor, group: ProcessGroup | None, *, sequence_parallel: bool) -> Tensor:
    """Sum the ranks' partial gradients of the hidden states, once.

    Args:
        dhidden_partial: ``[T, H]``, this shard's share; may be overwritten.
        sequence_parallel: return this rank's tokens ``[T / R, H]`` (reduce-scatter) instead of all (all-reduce).
    """
    _, world_size = rank_and_size(group)
    if world_size == 1 or dhidden_partial.numel() == 0:
        return dhidden_partial
    if not sequence_parallel:
        dist.all_reduce(dhidden_partial, group=group)
        return dhidden_partial
    tokens, *rest = dhidden_partial.shape
    dhidden = dhidden_partial.new_empty(tokens // world_size, *rest)
    _reduce_scatter(dhidden, dhidden_partial, group=group)
    return dhidden


def gather_row_counts(linear_weight: Tensor, group: ProcessGroup | None) -> list[int]:
    """How many rows each rank holds, in rank order, on the host."""
    _, world_size = rank_and_size(group)
    rows = linear_weight.shape[0]
    if world_size == 1:
        return [rows]
    counts = torch.empty(world_size, dtype=torch.int64, device=linear_weight.device)
    _all_gather(counts, counts.new_tensor([rows]), group=group)
    return counts.tolist()

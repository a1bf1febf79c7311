"""Every message that the op sends. Nothing else in the package communicates.

Forward: ``gather_stats``, and ``gather_hidden`` under sequence parallelism; ``gather_top_k`` before it to select
classes, ``reduce_sums`` after it for a Jensen–Shannon divergence. Backward: ``reduce_hidden_grad``, and
``gather_hidden`` again under sequence parallelism, unless what it gathered was kept. Which of them run, in which order
and with which sizes, depends only on arguments that are equal on all ranks. Once, when a model is built:
``gather_row_counts``, ``gather_rows``.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from vocab_parallel_fused.arrival import Arrival
from vocab_parallel_fused.stats import DIGIT, PartStats, measured_from, merge_stats, top_k_order

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
        if group.get_coordinate() is None:
            raise ValueError("group does not contain this rank")
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
    parts: PartStats, num_rows: int, vocab_size: int, group: ProcessGroup | None, combine: str
) -> tuple[PartStats, Tensor | None]:
    """Statistics of disjoint parts that make up the whole vocabulary, stacked: the same bits on all ranks.

    Args:
        parts: those of this rank's shard, stacked, ``argmax`` as global ids.
        num_rows, vocab_size: how many classes the shard holds, and all shards should. They travel with the statistics,
            as two digits each.
        combine: see :class:`~vocab_parallel_fused.ComputeOptions`.

    Returns:
        The parts ``[P, *]``, one of each rank or one of all of them, and what :func:`~stats.count_classes` takes, the
        same on all ranks; of a single rank its parts as they are, and None.
    """
    _, world_size = rank_and_size(group)
    if world_size == 1:
        return parts, None
    local = merge_stats(parts)
    if combine == "all_gather":
        fields, sizes = _unpack(gather_stacked(_pack(local[:-1], num_rows, vocab_size), group), local[:-1])
        argmax = None if local.argmax is None else gather_stacked(local.argmax, group)
        return PartStats._make([*fields, argmax]), sizes
    # The largest and the smallest number that a rank expects are equal if all are.
    message = _pack(local[:1], vocab_size, -vocab_size)
    dist.all_reduce(message, dist.ReduceOp.MAX, group=group)
    max_logit = message[:-4].view_as(local.max_logit)
    largest, smallest = message[-4:-2], -message[-2:]
    aligned = measured_from(local, max_logit)
    message = _pack(aligned[1:-1], num_rows)
    dist.all_reduce(message, group=group)
    sums, held = _unpack(message[None], aligned[1:-1])
    if aligned.argmax is not None:
        dist.all_reduce(aligned.argmax, dist.ReduceOp.MIN, group=group)
    argmax = None if aligned.argmax is None else aligned.argmax[None]
    sizes = torch.stack([torch.cat([held[0], largest]), torch.cat([torch.zeros_like(held[0]), smallest])])
    return PartStats._make([max_logit[None], *sums, argmax]), sizes


def gather_top_k(logit: Tensor, index: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The ``k`` largest logits ``[T, k]`` of all shards and their global ids, descending, from those of each shard.

    Of several equal logits those of smaller ids count. An id below 0 stands for none.
    """
    k = logit.shape[1]
    if rank_and_size(group)[1] > 1:
        logit, index = (gather_stacked(part, group).movedim(0, 1).flatten(1) for part in (logit, index))
    order = top_k_order(logit, index, k)
    return logit.gather(1, order), index.gather(1, order)


def reduce_sums(sums: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum over the ranks, in rank order: the same bits on all of them."""
    return sums if rank_and_size(group)[1] == 1 else gather_stacked(sums, group).sum(dim=0)


def gather_stacked(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """``[R, *]``, one ``[*]`` of each rank."""
    gathered = tensor.new_empty(rank_and_size(group)[1], *tensor.shape)
    _all_gather(gathered.flatten(), tensor.flatten(), group=group)
    return gathered


def _pack(statistics: Sequence[Tensor | None], *numbers: int) -> Tensor:
    """One message with statistics, and two digits of each number, which have its sign."""
    fields = [field.flatten() for field in statistics if field is not None]
    num_digits = 2 * len(numbers)
    message = fields[0].new_empty(sum(field.numel() for field in fields) + num_digits)
    torch.cat(fields, out=message[:-num_digits])
    for number, digits in zip(numbers, message[-num_digits:].split(2), strict=True):
        high = int(number / DIGIT)
        # By one launch: to assign a number to an element is a copy from the host, for which it would wait.
        torch.linspace(high, number - high * DIGIT, 2, out=digits, device=digits.device)
    return message


def _unpack(message: Tensor, like: Sequence[Tensor | None]) -> tuple[list[Tensor | None], Tensor]:
    """The statistics in messages ``[P, N]``, and the digits after them."""
    sizes = [0 if field is None else field.numel() for field in like]
    *chunks, digits = message.split([*sizes, message.shape[-1] - sum(sizes)], dim=-1)
    fields = [
        None if field is None else chunk.unflatten(-1, field.shape) for chunk, field in zip(chunks, like, strict=True)
    ]
    return fields, digits


def gather_hidden(hidden: Tensor, group: ProcessGroup | None) -> Tensor:
    """All ranks' tokens ``[T, H]`` from this rank's ``[T / R, H]``."""
    gathered, arrival = gather_hidden_beside(hidden, group)
    if arrival is not None:
        arrival.wait()
    return gathered


def gather_hidden_beside(hidden: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Arrival | None]:
    """Begin to gather all ranks' tokens ``[T, H]`` from this rank's ``[T / R, H]``.

    Returns:
        The gathered, and what may be read of them when; None: all, at once.
    """
    rank, world_size = rank_and_size(group)
    if world_size == 1 or hidden.numel() == 0:
        return hidden, None
    tokens, hidden = hidden.shape[0], hidden.contiguous()
    gathered = hidden.new_empty(world_size * tokens, *hidden.shape[1:])
    with _beside(hidden.device) as (join, side):
        _all_gather(gathered, hidden, group=group)
    return gathered, Arrival(slice(rank * tokens, (rank + 1) * tokens), hidden, join, side)


def reduce_hidden_grad(
    dhidden_partial: Tensor, group: ProcessGroup | None, *, sequence_parallel: bool
) -> Callable[[], Tensor]:
    """Begin to sum the ranks' partial gradients of the hidden states, once.

    Args:
        dhidden_partial: ``[T, H]``, this shard's share; may be overwritten, so leave it alone.
        sequence_parallel: give this rank's tokens ``[T / R, H]`` (reduce-scatter) instead of all (all-reduce).

    Returns:
        What ends it: a function of no arguments that gives the sum. The device, not the host, waits there.
    """
    _, world_size = rank_and_size(group)
    if world_size == 1 or dhidden_partial.numel() == 0:
        return lambda: dhidden_partial
    dhidden = dhidden_partial
    if sequence_parallel:
        tokens, *rest = dhidden_partial.shape
        dhidden = dhidden_partial.new_empty(tokens // world_size, *rest)
    with _beside(dhidden.device) as (join, _):
        if sequence_parallel:
            _reduce_scatter(dhidden, dhidden_partial, group=group)
        else:
            dist.all_reduce(dhidden, group=group)

    def finish() -> Tensor:
        join()
        return dhidden

    return finish


def reduction_bytes(hidden: Tensor, group: ProcessGroup | None, *, sequence_parallel: bool) -> int:
    """What a rank sends in :func:`reduce_hidden_grad` of ``[T, H]`` hidden states, in a ring: all parts but one, for an
    all-reduce twice."""
    _, world_size = rank_and_size(group)
    return hidden.nbytes // world_size * (world_size - 1) * (1 if sequence_parallel else 2)


@contextmanager
def _beside(device: torch.device) -> Iterator[tuple[Callable[[], None], torch.cuda.Stream | None]]:
    """Let the messages inside run at a time with what is launched next.

    Yields:
        What makes the stream that is then current wait for them, and the stream on which they run; None: the current
            one.
    """
    if device.type != "cuda":
        yield lambda: None, None
        return
    current, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(current)
    begun, ended = side.record_event(), torch.cuda.Event()
    with torch.cuda.stream(side):
        yield lambda: ended.wait(torch.cuda.current_stream(device)), side
        ended.record()
    # A product that comes first takes all processors, and leaves none for a message before it ends.
    current.wait_event(begun)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Of high priority: its kernels are few, and others wait for them."""
    return torch.cuda.Stream(device, priority=-1)


def gather_row_counts(linear_weight: Tensor, group: ProcessGroup | None) -> list[int]:
    """How many rows each rank holds, in rank order, on the host."""
    _, world_size = rank_and_size(group)
    rows = linear_weight.shape[0]
    if world_size == 1:
        return [rows]
    counts = torch.empty(world_size, dtype=torch.int64, device=linear_weight.device)
    _all_gather(counts, counts.new_tensor([rows]), group=group)
    return counts.tolist()


def gather_rows(rows: Tensor, start: int, total: int, group: ProcessGroup | None) -> Tensor:
    """All ``[total, ...]`` rows, on every rank, where each rank holds those from ``start`` on and together all, once.

    Rows are summed with zeros, so that they may be dealt in any way: unevenly, out of rank order, all to one rank.
    """
    _, world_size = rank_and_size(group)
    if world_size == 1:
        return rows
    gathered = rows.new_zeros(total, *rows.shape[1:])
    gathered[start : start + len(rows)] = rows
    dist.all_reduce(gathered, group=group)
    return gathered

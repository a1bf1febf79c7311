"""Which rows of the vocabulary a rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vocab_parallel_fused.collectives import gather_row_counts, rank_and_size, resolve_group

if TYPE_CHECKING:
    from torch import Tensor

    from vocab_parallel_fused.collectives import Group


@dataclass(frozen=True, slots=True)
class VocabShard:
    """Rows ``[start, stop)`` of a vocabulary of ``vocab_size`` classes, held by one rank.

    The shards of a group must cover ``[0, vocab_size)`` exactly once; they may be uneven, and some may be empty.
    Rows whose id is ``vocab_size`` or more are padding: they take no part in the softmax and get zero gradients.

    Raises:
        TypeError: if one of them is no int.
        ValueError: unless ``0 <= start <= stop`` and ``vocab_size >= 1``.
    """

    start: int
    """Global id of the first row."""

    stop: int
    """Global id after the last row, padding included."""

    vocab_size: int
    """Number of real classes over the whole group."""

    def __post_init__(self) -> None:
        for name in ("start", "stop", "vocab_size"):
            _check_int(f"shard.{name}", getattr(self, name))
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"shard must have 0 <= start <= stop, got start={self.start}, stop={self.stop}")
        check_size("shard.vocab_size", self.vocab_size)

    @property
    def num_rows(self) -> int:
        """Rows of the local weight, padding included."""
        return self.stop - self.start

    @property
    def num_valid_rows(self) -> int:
        """Rows that take part in the softmax: the first ones of the shard."""
        return max(0, min(self.stop, self.vocab_size) - self.start)

    def local_rows(self, target: Tensor) -> Tensor:
        """Map global class ids to row numbers of this shard; ids that it does not hold to numbers that are no row of
        it, which are below 0 or from ``num_valid_rows`` on."""
        return target - self.start if self.start else target

    @classmethod
    def even(cls, vocab_size: int, group: Group) -> VocabShard:
        """This rank's part when rows are dealt in rank order, ``ceil(vocab_size / R)`` to each rank until none is left.

        This is the split of ``torch.chunk`` and of DTensor's ``Shard(0)``: the last ranks may hold fewer rows, or none.
        """
        check_size("vocab_size", vocab_size)
        rank, world_size = rank_and_size(resolve_group(group))
        rows = -(-vocab_size // world_size)
        return cls(min(rank * rows, vocab_size), min((rank + 1) * rows, vocab_size), vocab_size)

    @classmethod
    def gathered(cls, linear_weight: Tensor, group: Group, *, vocab_size: int | None = None) -> VocabShard:
        """This rank's part when every rank's rows follow those of the rank before it, whatever their numbers.

        Communicates: one all-gather of a number, read on the host. Call it once, when the model is built.

        Args:
            linear_weight: ``(V_local, H)``, this rank's rows.
            group: the group over which the vocabulary is sharded.
            vocab_size: number of real classes; rows from there on are padding. Default: all rows are real.
        """
        group = resolve_group(group)
        rank, _ = rank_and_size(group)
        counts = gather_row_counts(linear_weight, group)
        start = sum(counts[:rank])
        return cls(start, start + counts[rank], sum(counts) if vocab_size is None else vocab_size)


def check_size(name: str, value: int) -> None:
    """An int of at least 1."""
    _check_int(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _check_int(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")

"""Which rows a rank holds, and which of its rows a target is."""

import pytest
import torch
from torch.distributed import ProcessGroup

from vocab_parallel_fused import VocabShard
from vocab_parallel_fused.testing import run_on_ranks


@pytest.mark.parametrize(
    ("shard", "num_rows", "num_valid_rows"),
    [
        (VocabShard(0, 10, 10), 10, 10),
        (VocabShard(5, 10, 10), 5, 5),
        (VocabShard(4, 12, 10), 8, 6),
        (VocabShard(10, 12, 10), 2, 0),
        (VocabShard(12, 14, 10), 2, 0),
        (VocabShard(3, 3, 10), 0, 0),
    ],
)
def test_rows(shard: VocabShard, num_rows: int, num_valid_rows: int) -> None:
    assert (shard.num_rows, shard.num_valid_rows) == (num_rows, num_valid_rows)


@pytest.mark.parametrize("shard", [VocabShard(4, 12, 10), VocabShard(0, 4, 10), VocabShard(4, 4, 10)])
def test_local_rows(shard: VocabShard) -> None:
    """Only ids that the shard holds become numbers of its rows: no neighbour's id and no padding row does."""
    ids = torch.tensor([-100, -1, 0, 3, 4, 9, 10, 11, 2**40])
    row = shard.local_rows(ids)
    held = [shard.start <= i < min(shard.stop, shard.vocab_size) for i in ids.tolist()]
    assert ((row >= 0) & (row < shard.num_valid_rows)).tolist() == held
    assert row[held].tolist() == [i - shard.start for i, own in zip(ids.tolist(), held, strict=True) if own]


def even_shard(group: ProcessGroup, vocab_size: int) -> VocabShard:
    return VocabShard.even(vocab_size, group)


@pytest.mark.parametrize("world_size", [1, 3, 4])
@pytest.mark.parametrize("vocab_size", [1, 5, 12])
def test_even_shards_are_those_of_chunk(world_size: int, vocab_size: int) -> None:
    shards = run_on_ranks(even_shard, world_size, vocab_size)
    chunks = [chunk.tolist() for chunk in torch.arange(vocab_size).chunk(world_size)]
    chunks += [[]] * (world_size - len(chunks))
    assert [list(range(shard.start, shard.stop)) for shard in shards] == chunks


def test_without_a_group_a_rank_holds_everything() -> None:
    assert VocabShard.even(7, None) == VocabShard(0, 7, 7)
    assert VocabShard.gathered(torch.zeros(7, 2), None, vocab_size=6) == VocabShard(0, 7, 6)

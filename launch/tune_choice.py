"""Which tiles are worth timing on a device, and which of the timed ones to record."""

from collections.abc import Mapping
from itertools import pairwise, product
from typing import NamedTuple

from vocab_parallel_fused.kernels.configs import TileConfig, TokenRange, tile_problem

# Sums that a thread holds: at most half of its registers; where eight warps would have fewer than this, four do.
MOST_SUMS = 128
LEAST_SUMS = 32
MOST_STAGES = 5
# Blocks of so many tokens run side by side: 16 MiB of bfloat16 at a hidden size of 4096, which an L2 cache holds.
GROUP_TOKENS = 2048
# Times no further apart are the same, and one tile may serve both ranges.
NOISE = 1.01


class Device(NamedTuple):
    """What a tile has to fit."""

    arch: str
    shared_memory_bytes: int
    warp_size: int


class Timing(NamedTuple):
    """Milliseconds of the forward's kernel and the backward's with one tile."""

    stats_ms: float
    dlogits_ms: float

    @property
    def total_ms(self) -> float:
        return self.stats_ms + self.dlogits_ms


def candidates(num_tokens: int, itemsize: int, device: Device) -> list[TileConfig]:
    """Some dozens of legal tiles, of which the kernels of two heads can hold one each.

    Args:
        num_tokens: ``T``. Few tokens are tried in one block of their own size and in one of 64; more, in blocks of 64
            to 256.
        itemsize: bytes per element of the operands. Of ``H``, 64 to 256 bytes are taken at a time.
        device: what the tiles have to fit. Three stages are tried, as many as fill the shared memory, and as many as
            leave room for a second program.
    """
    from vocab_parallel_fused.kernels.divergence import narrowed  # needs Triton

    def fits(tile: TileConfig, heads: int) -> bool:
        sums = heads * tile.block_t * tile.block_v // (tile.num_warps * device.warp_size)
        return sums <= MOST_SUMS and tile_problem(tile, itemsize, device.shared_memory_bytes) is None

    fitting = max(16, 1 << (num_tokens - 1).bit_length())
    blocks_t = [block_t for block_t in (16, 32, 64, 128, 256) if block_t in (fitting, 64) or 64 < block_t < fitting]
    depths = (64, 128, 256) if num_tokens <= 64 else (64, 128)
    tiles = []
    for block_t, block_v, depth, num_warps in product(blocks_t, (64, 128, 256), depths, (4, 8)):
        if num_warps == 8 and block_t * block_v < LEAST_SUMS * num_warps * device.warp_size:
            continue
        filling = device.shared_memory_bytes // ((block_t + block_v) * depth)
        for num_stages in sorted({3, min(MOST_STAGES, filling), min(MOST_STAGES, filling // 2)} - {0, 1}):
            tile = TileConfig(
                block_t=block_t,
                block_v=block_v,
                block_h=depth // itemsize,
                group_t=GROUP_TOKENS // block_t,
                num_warps=num_warps,
                num_stages=num_stages,
            )
            if fits(tile, heads=1) and fits(narrowed(tile), heads=2):
                tiles.append(tile)
    return tiles


def choose(timings: Mapping[int, Mapping[TileConfig, Timing]]) -> list[TokenRange]:
    """The fewest ranges of tokens whose tiles are the fastest, up to `NOISE`.

    Args:
        timings: by number of tokens, those of some tiles. What is fastest there serves all numbers of tokens down to
            the next smaller one; at the largest, any more too.
    """
    ranges: list[TokenRange] = []
    for num_tokens, of_tiles in sorted(timings.items()):
        tile = min(of_tiles, key=lambda tile: of_tiles[tile].total_ms)
        before = ranges[-1].tile if ranges else tile
        if before in of_tiles and of_tiles[before].total_ms <= NOISE * of_tiles[tile].total_ms:
            tile = before
        ranges.append(TokenRange(num_tokens, tile))
    return merged([*ranges[:-1], TokenRange(None, ranges[-1].tile)])


def merged(ranges: list[TokenRange]) -> list[TokenRange]:
    """Neighbours of the same tile as one."""
    return [this for this, following in pairwise(ranges) if this.tile != following.tile] + ranges[-1:]

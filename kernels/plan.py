"""Which blocks the backward's walk takes, and in which order: :func:`plan_groups`, on the host and from sizes alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

# What a byte of traffic and a launch cost, counted in operations of the matrix units: 680 TFLOP/s over 4.2 TB/s and
# 4 µs on an H200. Only their order of magnitude matters.
_FLOPS_PER_BYTE = 160
_FLOPS_PER_LAUNCH = 2.7e9
_MOST_GROUPS = 64
_MOST_BLOCK_SIZES = 8
_MOST_BLOCKS_COMPARED = 32


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def slices(stop: int, block: int, start: int = 0) -> Iterator[slice]:
    """Blocks of ``[start, stop)``."""
    return (slice(first, min(first + block, stop)) for first in range(start, stop, block))


def even_block(total: int, largest: int, tile: int) -> int:
    """A multiple of ``tile`` that cuts ``total`` into nearly equal blocks: at most ``largest`` rounded up to it."""
    num_tiles = max(1, ceil_div(total, tile))
    tiles_per_block = num_tiles if largest >= total else max(1, largest // tile)
    num_blocks = ceil_div(num_tiles, tiles_per_block)
    return ceil_div(num_tiles, num_blocks) * tile


class Group(NamedTuple):
    """Tokens whose dhidden is finished before that of the next is begun, and the blocks in which they are taken."""

    tokens: slice
    block_t: int
    block_v: int
    lent: slice | None
    """Rows of dhidden in whose memory the group's sum lies; None: in the workspace, or there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Walk:
    """Sizes and limits of a backward, from which :func:`plan_groups` decides."""

    T: int
    H: int
    V: int
    bytes_per_logit: int
    """Memory for each element of a block."""
    dhidden_sum_bytes: int
    """Bytes per element of an fp32 sum of dhidden; 0: dhidden itself takes sums."""
    dweight_sum_bytes: int
    """The same of dweight, where one block of rows needs it at a time."""
    dhidden_takes_product: bool
    """It needs no sum if one product makes all of it."""
    dweight_takes_product: bool
    several_groups: bool
    """There may be several: dweight, if it is wanted, takes sums, and can be visited again and again."""
    workspace_bytes: int
    """For a block and a block's dweight sum; where there may be groups for dhidden's sum too."""
    tile: tuple[int, int]
    """(tokens, rows) that a block is a multiple of."""
    largest: tuple[int, int]
    """(tokens, rows) of a block."""
    processors: int = 1
    """How many tiles run at a time."""
    first_token: int = 0
    """Which the first of several groups has. The others follow from there on, and round."""


class _Plan(NamedTuple):
    cost: float  # in operations of the matrix units
    groups: tuple[Group, ...] = ()


def _cheapest(plans: Sequence[_Plan]) -> _Plan:
    """The last of those that cost least: of plans that do not fit, that of the smallest groups."""
    return min(reversed(plans), key=lambda plan: plan.cost)


@functools.lru_cache(maxsize=1024)
def plan_groups(walk: Walk) -> tuple[Group, ...]:
    """The cheapest groups and blocks that fit the workspace, in their order; at least one tile each.

    An fp32 sum takes the memory of twice as many rows of dhidden in 16 bits. A group lays it over its own rows and as
    many that come later, or over others that come later, where there are so many; else it has it in the workspace, as
    the last group must. Towards the end groups become smaller for it.
    """
    T, tile_t = walk.T, walk.tile[0]
    cost, block_t, block_v = _cheapest_blocks(walk, T, in_dhidden=False)
    plans = [_Plan(cost, (Group(slice(0, T), block_t, block_v, None),))]
    if walk.several_groups and walk.dhidden_sum_bytes > 0:
        first_token = min(walk.first_token, T - 1)
        for i in range(1, min(_MOST_GROUPS, ceil_div(T, tile_t)).bit_length()):
            most_tokens = ceil_div(ceil_div(T, 1 << i), tile_t) * tile_t
            # Groups that begin with the token itself may end with one that is left over.
            starts = dict.fromkeys(first_token // size * size for size in (most_tokens, tile_t))
            plans += (_groups_from(walk, start, 0, most_tokens) for start in starts)
    return _cheapest(plans).groups


def _groups_from(walk: Walk, start: int, done: int, most_tokens: int) -> _Plan:
    """Groups of at most so many tokens, for the tokens that remain once ``done`` of them, counted from ``start``, are
    finished."""
    if done == walk.T:
        return _Plan(0.0)
    # Not written yet: the rows [token, end) and, before the walk comes round to them, [0, before).
    comes_round = start + done >= walk.T
    token, end, before = (start + done - walk.T, start, 0) if comes_round else (start + done, walk.T, start)
    most_in_dhidden = max(end - token, before) // 2
    tokens = min(most_tokens, end - token)
    choices = [(tokens, tokens <= most_in_dhidden)]
    if 0 < (fewer := most_in_dhidden // walk.tile[0] * walk.tile[0]) < tokens:
        choices.append((fewer, True))
    plans = []
    for count, in_dhidden in choices:
        cost, block_t, block_v = _cheapest_blocks(walk, count, in_dhidden=in_dhidden)
        lent = None
        if in_dhidden and _needs_dhidden_sum(walk, block_v):
            first = 0 if 2 * count <= before else token
            lent = slice(first, first + 2 * count)
        rest = _groups_from(walk, start, done + count, most_tokens)
        group = Group(slice(token, token + count), block_t, block_v, lent)
        plans.append(_Plan(cost + rest.cost, (group, *rest.groups)))
    return _cheapest(plans)


def _needs_dhidden_sum(walk: Walk, block_v: int) -> bool:
    return block_v < walk.V or not walk.dhidden_takes_product


@functools.lru_cache(maxsize=1024)
def _cheapest_blocks(walk: Walk, tokens: int, *, in_dhidden: bool) -> tuple[float, int, int]:
    """The cost of a group of so many tokens, and its blocks of tokens and rows.

    Args:
        in_dhidden: whether its sum of dhidden, if it needs one, lies there and not in the workspace.
    """
    tile_t, tile_v = walk.tile
    most_tokens = min(walk.largest[0], walk.workspace_bytes // (walk.bytes_per_logit * tile_v))
    block_t = even_block(tokens, most_tokens, tile_t)
    # A block of all tokens may have too few rows: each block of rows passes over all of dhidden's sum, which can cost
    # more than to add up its dweight over several blocks of tokens. Where there are groups, they do that.
    num_sizes = 1 if walk.several_groups else _MOST_BLOCK_SIZES
    choices = [
        (_cost(walk, tokens, *blocks), *blocks)
        for size in dict.fromkeys(even_block(block_t, block_t >> i, tile_t) for i in range(num_sizes))
        for blocks in _fitting_blocks(walk, tokens, size, in_dhidden)
    ]
    return min(choices, default=(math.inf, tile_t, tile_v))


def _fitting_blocks(walk: Walk, tokens: int, block_t: int, in_dhidden: bool) -> Iterator[tuple[int, int]]:
    """Blocks of so many tokens that fit the workspace, beside the sums that are to be in it."""
    tile_v = walk.tile[1]
    needs_dweight_sum = not (walk.dweight_takes_product and block_t >= walk.T)
    bytes_per_row = min(block_t, tokens) * walk.bytes_per_logit + walk.H * walk.dweight_sum_bytes * needs_dweight_sum
    most_rows = min(walk.largest[1], walk.workspace_bytes // bytes_per_row)
    if walk.several_groups and not in_dhidden and _needs_dhidden_sum(walk, most_rows):
        left = walk.workspace_bytes - walk.dhidden_sum_bytes * tokens * walk.H
        most_rows = min(walk.largest[1], left // bytes_per_row)
    if most_rows >= min(walk.V, tile_v):
        most_tiles = ceil_div(walk.V, tile_v) if most_rows >= walk.V else most_rows // tile_v
        for tiles in range(most_tiles, most_tiles // 2, -ceil_div(most_tiles, _MOST_BLOCKS_COMPARED)):
            yield block_t, tiles * tile_v


def _cost(walk: Walk, tokens: int, block_t: int, block_v: int) -> float:
    """Waves of tiles in which the processors compute the dlogits and the product for dweight, the last of each block's
    unfilled; the traffic of the two sums; and the launches."""
    H, V, (tile_t, tile_v) = walk.H, walk.V, walk.tile
    flops = launches = 0
    for rows, count in ((block_v, V // block_v), (V % block_v, 1)):
        if rows > 0:
            waves = ceil_div(ceil_div(block_t, tile_t) * ceil_div(rows, tile_v), walk.processors)
            per_row = H * tile_v * waves + block_t * _product_columns(walk, rows)
            flops += 2 * count * tile_t * walk.processors * per_row
            launches += 3 * count
    num_blocks = ceil_div(V, block_v)
    visits = ceil_div(tokens, block_t)
    traffic = 2 * walk.dhidden_sum_bytes * tokens * H * (num_blocks > 1) * num_blocks + 2 * 4 * V * H * visits
    return visits * (flops + launches * _FLOPS_PER_LAUNCH) + traffic * _FLOPS_PER_BYTE


def _product_columns(walk: Walk, rows: int) -> int:
    """Columns of dweight ``[rows, H]`` that each processor computes, of ``tile_t`` rows.

    The product is taken to have tiles of the dlogits' size or three quarters of it, whichever fit better.
    """
    tile_t, tile_v = walk.tile
    row_tiles = ceil_div(rows, tile_t)
    widths = (tile_v, 3 * tile_v // 4)
    return min(width * ceil_div(row_tiles * ceil_div(walk.H, width), walk.processors) for width in widths)

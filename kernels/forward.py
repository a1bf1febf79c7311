"""Local statistics: a GEMM whose epilogue reduces each tile of logits, and a merge of what the tiles leave.

    m_t = max_j z_tj,    s_t = Σ_j exp(z_tj − m_t),    z_t(y_tk) of each target, and what else is wanted

``partial_stats_kernel`` computes one tile a program and writes one number per token, tile and statistic;
``merge_partials_kernel`` merges them. Rows are walked in chunks whose partials fit a fixed buffer, so memory does not
grow with the vocabulary.
``target_logit_kernel`` computes the targets' logits once more, from their rows alone: to look for them in every tile
costs several times as much. But where one tile has all tokens, the weight's bytes are what counts; then each tile looks
for the targets too, so that its partials are the statistics of a part of the vocabulary, which may be left unmerged.

With a budget for it, ``exp(z − r) · ∂z/∂a`` of the first rows is kept for the backward, in the inputs' dtype. The
reference ``r`` must be known before the first tile: it is the largest of a few dozen logits of the token that
``target_logit_kernel`` computes anyway. Any ``r`` near the maximum will do (``exp_cache.py``).
``T`` tokens, ``V`` rows of the shard, ``H`` hidden size, ``K`` targets a token. A pointer that is None is a statistic
that nobody wants.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vocab_parallel_fused.arrival import Arrival
from vocab_parallel_fused.exp_cache import ExpCache, allocate_cache
from vocab_parallel_fused.kernels import hopper_tiles
from vocab_parallel_fused.kernels.configs import TileConfig, tile_config
from vocab_parallel_fused.kernels.hopper import new_counters
from vocab_parallel_fused.kernels.launcher import Launcher
from vocab_parallel_fused.kernels.plan import ceil_div, slices
from vocab_parallel_fused.kernels.streams import MOST_PARTS, Fork, in_order_of_arrival
from vocab_parallel_fused.kernels.tiles import (
    LEAST_LOG2,
    LN2,
    LOG2E,
    aligned,
    aligned_hidden,
    current_arch,
    log2_from,
    logits_tile,
    num_processors,
    operand_kwargs,
    product_precision,
    rows_per_copy,
    rows_product,
    tile_position,
    times_derivative,
    transform_kwargs,
    transform_logits,
    whole_waves,
)
from vocab_parallel_fused.stats import PartStats, Wanted, empty_stats, stacked
from vocab_parallel_fused.transform import Operands, part_of

_PARTIAL_BYTES = 6 * 2**20 + 2**19
# Small blocks of tokens, so that few tokens still occupy many processors; 64 are one of Hopper's matrix instructions.
_TARGET_BLOCK_T = 64
_LEAST_TOKENS_ASIDE = 512
# What tiles leave partials of, by the kernels' names, and their argument with these.
_PARTIALS = {
    name: f"partial_{name}_ptr"
    for name in ("max", "sum_exp", "target_logit", "owners", "class_sum", "logit_sum", "sum_exp_logit", "argmax")
}
_MERGE_LAUNCH: dict[str, Any] = {"BLOCK_T": 64, "BLOCK_P": 16}


@triton.jit(
    do_not_specialize=["first_row", "T", "V", "stride_partial", "inner", "outer"],
    # A number for each token, of few tokens.
    do_not_specialize_on_alignment=["target_row_ptr", "reference_ptr", *_PARTIALS.values()],
)
def partial_stats_kernel(
    hidden,  # [T, H] descriptor or pointer
    weight,  # [V, H] descriptor or pointer
    bias_ptr,  # [V] or None
    class_weight_ptr,  # [V] or None: all 1
    target_row_ptr,  # [T] int64, or None: not looked for
    partial_max_ptr,  # [num_tiles, T] out
    partial_sum_exp_ptr,  # [num_tiles, T] out
    partial_target_logit_ptr,  # [num_tiles, T] out, 0 where the target is not in the tile, or None
    partial_owners_ptr,  # [num_tiles, T] out, 1 or 0, or None
    partial_class_sum_ptr,  # [num_tiles, T] out, or None if the next is
    partial_logit_sum_ptr,  # [num_tiles, T] out, or None
    partial_sum_exp_logit_ptr,  # [num_tiles, T] out, or None
    partial_argmax_ptr,  # [num_tiles, T] int32 out, or None
    reference_ptr,  # [T] or None: no exponentials are kept
    exps_ptr,  # [T, V] out, or None
    first_row,  # number of the first row in the shard, as targets and argmax count
    T,
    V,
    H,
    stride_hidden_t,
    stride_hidden_h,
    stride_weight_v,
    stride_weight_h,
    stride_exps_t,
    stride_partial,  # at least T: other launches may have their tokens beside these
    inner,
    outer,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP_T: tl.constexpr,
    TRANSFORM: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid_t, pid_v = tile_position(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.cdiv(V, BLOCK_V), GROUP_T)  # pyright: ignore[reportGeneralTypeIssues]
    off_t = pid_t * BLOCK_T
    off_v = pid_v * BLOCK_V
    offs_t = off_t + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    if exps_ptr is not None:
        reference = tl.load(reference_ptr + offs_t, mask=mask_t, other=0.0)
    z = logits_tile(
        hidden,
        weight,
        bias_ptr,
        off_t,
        off_v,
        T,
        V,
        H,
        stride_hidden_t,
        stride_hidden_h,
        stride_weight_v,
        stride_weight_h,
        inner,
        outer,
        BLOCK_T,
        BLOCK_V,
        BLOCK_H,
        TRANSFORM,
        USE_DESCRIPTORS,
        PRECISION,
    )
    offs_v = off_v + tl.arange(0, BLOCK_V)
    out = pid_v.to(tl.int64) * stride_partial + offs_t

    if off_v + BLOCK_V > V:
        z = tl.where((offs_v < V)[None, :], z, -float("inf"))
    maximum = tl.max(z, axis=1)
    # A bias may be −inf for a whole tile.
    finite = tl.where(maximum == -float("inf"), 0.0, maximum)
    shifted, rounding = log2_from(z, finite)
    exps = tl.exp2(shifted)
    largest = tl.exp2(rounding)
    tl.store(partial_max_ptr + out, maximum, mask=mask_t)
    # Rounded correctly, since a sum that falls below 1 would make a positive log-probability.
    tl.store(partial_sum_exp_ptr + out, tl.div_rn(tl.sum(exps, axis=1), largest), mask=mask_t)
    if target_row_ptr is not None:
        target_row = tl.load(target_row_ptr + offs_t, mask=mask_t, other=-1) - first_row
        column = tl.where((target_row >= off_v) & (target_row < V), target_row - off_v, BLOCK_V).to(tl.int32)
        is_target = tl.arange(0, BLOCK_V)[None, :] == column[:, None]
        tl.store(partial_target_logit_ptr + out, tl.sum(tl.where(is_target, z, 0.0), axis=1), mask=mask_t)
        tl.store(partial_owners_ptr + out, (column < BLOCK_V).to(tl.float32), mask=mask_t)
    if exps_ptr is not None:
        factor = tl.exp2((maximum - reference) * LOG2E) / largest
        kept = times_derivative(exps * factor[:, None], z, inner, outer, TRANSFORM)
        tl.store(
            exps_ptr + offs_t.to(tl.int64)[:, None] * stride_exps_t + offs_v[None, :],
            kept.to(exps_ptr.dtype.element_ty),
            mask=mask_t[:, None] & (offs_v < V)[None, :],
        )
    if partial_sum_exp_logit_ptr is not None:
        terms = exps * tl.maximum(shifted - rounding[:, None], LEAST_LOG2)
        tl.store(partial_sum_exp_logit_ptr + out, tl.sum(terms, axis=1) * (LN2 / largest), mask=mask_t)
    if partial_logit_sum_ptr is not None:
        if class_weight_ptr is not None:
            class_weight = tl.load(class_weight_ptr + offs_v, mask=offs_v < V, other=0.0)
        else:
            class_weight = (offs_v < V).to(tl.float32)
        # Times log2(e), a finite logit near the end of fp32's range is infinite, and that times a weight of 0 a NaN.
        differences = tl.where(z < -1e38, z - finite[:, None], (shifted - rounding[:, None]) * LN2)
        terms = class_weight[None, :] * differences
        if off_v + BLOCK_V > V:
            terms = tl.where((offs_v < V)[None, :], terms, 0.0)
        tl.store(partial_class_sum_ptr + out, tl.zeros_like(maximum) + tl.sum(class_weight, axis=0), mask=mask_t)
        tl.store(partial_logit_sum_ptr + out, tl.sum(terms, axis=1), mask=mask_t)
    if partial_argmax_ptr is not None:
        # Where nothing equals the maximum, which takes a NaN, any row will do.
        row = tl.min(tl.where(z == maximum[:, None], offs_v[None, :], V - 1), axis=1)
        tl.store(partial_argmax_ptr + out, first_row + row, mask=mask_t)


_launch_stats = Launcher(partial_stats_kernel)
_NO_POINTERS = dict.fromkeys(name for name in partial_stats_kernel.arg_names if name.endswith("_ptr"))


@triton.jit
def merge_partials_kernel(
    partial_max_ptr,  # [num_partials, T]
    partial_sum_exp_ptr,  # [num_partials, T]
    partial_target_logit_ptr,  # [num_partials, T] or None
    partial_owners_ptr,  # [num_partials, T] or None
    partial_class_sum_ptr,  # [num_partials, T] or None
    partial_logit_sum_ptr,  # [num_partials, T] or None
    partial_sum_exp_logit_ptr,  # [num_partials, T] or None
    partial_argmax_ptr,  # [num_partials, T] int32, or None
    max_ptr,  # [T] in unless FIRST, out; so are the others
    sum_exp_ptr,  # [T]
    target_logit_ptr,  # [T] or None
    owners_ptr,  # [T] or None
    class_sum_ptr,  # [T] or None
    logit_sum_ptr,  # [T] or None
    sum_exp_logit_ptr,  # [T] or None
    argmax_ptr,  # [T] int64, or None
    num_partials,
    T,
    FIRST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """`stats.merge_stats` of what is there, unless FIRST, and the partials."""
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_p = tl.arange(0, BLOCK_P)
    mask_t = offs_t < T
    maximum = _merged_before(max_ptr, offs_t, mask_t, -float("inf"), FIRST, BLOCK_T)
    sum_exp = _merged_before(sum_exp_ptr, offs_t, mask_t, 0.0, FIRST, BLOCK_T)
    target_logit = _merged_before(target_logit_ptr, offs_t, mask_t, 0.0, FIRST, BLOCK_T)
    owners = _merged_before(owners_ptr, offs_t, mask_t, 0.0, FIRST, BLOCK_T)
    class_sum = _merged_before(class_sum_ptr, offs_t, mask_t, 0.0, FIRST, BLOCK_T)
    logit_sum = _merged_before(logit_sum_ptr, offs_t, mask_t, 0.0, FIRST, BLOCK_T)
    sum_exp_logit = _merged_before(sum_exp_logit_ptr, offs_t, mask_t, 0.0, FIRST, BLOCK_T)
    argmax = _merged_before(argmax_ptr, offs_t, mask_t, 0, FIRST, BLOCK_T).to(tl.int64)
    for first in range(0, num_partials, BLOCK_P):
        partials = first + offs_p
        offs = partials.to(tl.int64)[:, None] * T + offs_t[None, :]
        mask = (partials < num_partials)[:, None] & mask_t[None, :]
        part_max = tl.load(partial_max_ptr + offs, mask=mask, other=-float("inf"))
        part_sum_exp = tl.load(partial_sum_exp_ptr + offs, mask=mask, other=0.0)
        block_max = tl.max(part_max, axis=0)
        new_max = tl.maximum(maximum, block_max)
        finite = tl.where(new_max == -float("inf"), 0.0, new_max)
        shift = maximum - finite
        part_shift = part_max - finite[None, :]
        scale = tl.exp(shift)
        part_scale = tl.exp(part_shift)
        target_logit += _sum_of_partials(partial_target_logit_ptr, offs, mask, BLOCK_T)
        owners += _sum_of_partials(partial_owners_ptr, offs, mask, BLOCK_T)
        if logit_sum_ptr is not None:
            # In an empty part, or one of −inf alone, nothing is left to shift.
            part_class_sum = tl.load(partial_class_sum_ptr + offs, mask=mask, other=0.0)
            part_logit_sum = tl.load(partial_logit_sum_ptr + offs, mask=mask, other=0.0)
            part_logit_sum += part_class_sum * tl.where(part_shift == -float("inf"), 0.0, part_shift)
            logit_sum += class_sum * tl.where(shift == -float("inf"), 0.0, shift) + tl.sum(part_logit_sum, axis=0)
            class_sum += tl.sum(part_class_sum, axis=0)
        if sum_exp_logit_ptr is not None:
            part_logit = tl.load(partial_sum_exp_logit_ptr + offs, mask=mask, other=0.0)
            part_logit = part_scale * (part_logit + part_sum_exp * tl.maximum(part_shift, -128.0))
            sum_exp_logit = scale * (sum_exp_logit + sum_exp * tl.maximum(shift, -128.0)) + tl.sum(part_logit, axis=0)
        if argmax_ptr is not None:
            part_row = tl.load(partial_argmax_ptr + offs, mask=mask, other=0)
            row = tl.min(tl.where(part_max == block_max[None, :], part_row, 0x7FFFFFFF), axis=0)
            # Rows come in ascending order, so of several largest logits the first stays.
            argmax = tl.where(block_max > maximum, row.to(tl.int64), argmax)
        sum_exp = sum_exp * scale + tl.sum(part_sum_exp * part_scale, axis=0)
        maximum = new_max
    _store_merged(max_ptr, offs_t, mask_t, maximum)
    _store_merged(sum_exp_ptr, offs_t, mask_t, sum_exp)
    _store_merged(target_logit_ptr, offs_t, mask_t, target_logit)
    _store_merged(owners_ptr, offs_t, mask_t, owners)
    _store_merged(class_sum_ptr, offs_t, mask_t, class_sum)
    _store_merged(logit_sum_ptr, offs_t, mask_t, logit_sum)
    _store_merged(sum_exp_logit_ptr, offs_t, mask_t, sum_exp_logit)
    _store_merged(argmax_ptr, offs_t, mask_t, argmax)


@triton.jit
def _merged_before(ptr, offs_t, mask_t, nothing, FIRST: tl.constexpr, BLOCK_T: tl.constexpr):
    """[BLOCK_T] what earlier launches merged: of the FIRST, and of a statistic that nobody wants, nothing."""
    merged = tl.full((BLOCK_T,), nothing, dtype=tl.float32)
    if ptr is not None:  # noqa: SIM102 (the compiler would not see that `ptr is not None and not FIRST` is a constant)
        if not FIRST:
            merged = tl.load(ptr + offs_t, mask=mask_t, other=0)
    return merged


@triton.jit
def _sum_of_partials(ptr, offs, mask, BLOCK_T: tl.constexpr):
    """[BLOCK_T] of those at [BLOCK_P, BLOCK_T] offsets; of a statistic that nobody wants, nothing."""
    total = tl.zeros((BLOCK_T,), dtype=tl.float32)
    if ptr is not None:
        total = tl.sum(tl.load(ptr + offs, mask=mask, other=0.0), axis=0)
    return total


@triton.jit
def _store_merged(ptr, offs_t, mask_t, merged):
    if ptr is not None:
        tl.store(ptr + offs_t, merged, mask=mask_t)


@triton.jit
def target_logit_kernel(
    hidden_ptr,  # [T, H]
    weight_ptr,  # [V, H]
    bias_ptr,  # [V] or None
    target_row_ptr,  # [T, K] int64, not in [0, V): not in this shard
    target_logit_ptr,  # [T, K] out, 0 where the target is not in this shard
    owners_ptr,  # [T, K] out, 1 or 0
    reference_ptr,  # [T] out, or None: the largest logit of some of the token's
    T,
    V,
    H,
    K,
    stride_hidden_t,
    stride_hidden_h,
    stride_weight_v,
    stride_weight_h,
    inner,
    outer,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    TRANSFORM: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """The diagonal of a tile whose rows are tokens and whose columns are a target of each, so that every sum over H
    runs in the order it has in `partial_stats_kernel`: what rounding does to the largest logits and to a confident
    target's then cancels in their difference. The rest of the tile is a sample of each token's logits: the targets of
    its neighbours, and rows from the start of the shard, which in most vocabularies are frequent classes."""
    offs = tl.arange(0, BLOCK_T)
    offs_n = tl.program_id(0) * BLOCK_T + offs
    mask_n = offs_n < T * K
    target_row = tl.load(target_row_ptr + offs_n, mask=mask_n, other=-1)
    owned = (target_row >= 0) & (target_row < V)
    rows_v = tl.where(owned, target_row, offs_n % V)
    rows_t = tl.minimum(offs_n // K, T - 1)
    raw = rows_product(
        hidden_ptr,
        weight_ptr,
        rows_t,
        rows_v,
        H,
        stride_hidden_t,
        stride_hidden_h,
        stride_weight_v,
        stride_weight_h,
        BLOCK_T,
        BLOCK_T,
        BLOCK_H,
        PRECISION,
        ALIGNMENT,
    )
    if bias_ptr is not None:
        raw += tl.load(bias_ptr + rows_v).to(tl.float32)[None, :]
    z = transform_logits(raw, inner, outer, TRANSFORM)
    target_logit = tl.sum(tl.where((offs[:, None] == offs[None, :]) & owned[:, None], z, 0.0), axis=1)
    tl.store(target_logit_ptr + offs_n, target_logit, mask=mask_n)
    tl.store(owners_ptr + offs_n, owned.to(tl.float32), mask=mask_n)
    if reference_ptr is not None:
        # Where no logit of the sample is finite, the backward recomputes the token.
        reference = tl.max(z, axis=1)
        tl.store(reference_ptr + rows_t, reference, mask=mask_n & (offs_n % K == 0))


class _Tiles(NamedTuple):
    """Which kernel computes the tiles, and their sizes."""

    arch: str
    config: TileConfig
    on_hopper: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens and rows of a tile."""
        return hopper_tiles.tile_shape(self.on_hopper, self.config)

    def launch(
        self,
        block: Operands,
        strip: int,
        counter: Tensor | None,
        stride_partial: int,
        pointers: dict[str, Tensor | None],
        *,
        exps: Tensor | None = None,
        first_row: int = 0,
        leave_room: bool = False,
    ) -> None:
        """Launch the tiles of a block.

        Args:
            block: its tokens and rows, aligned.
            strip: how many tiles of the same tokens leave one partial.
            counter: of Hopper's kernel, or None.
            stride_partial: from one partial of a token to its next.
            pointers: others of the kernel's arguments; None is not wanted, and as good as left out.
            exps: where exponentials are kept; None: they are not.
            first_row: number of the block's first row in the shard.
            leave_room: see :func:`in_order_of_arrival`.
        """
        if self.on_hopper:
            hopper_tiles.launch_tiles(block, exps, counter, strip, stride_partial, leave_room=leave_room, **pointers)
            return
        num_tokens, num_rows = block.hidden.shape[0], block.weight.shape[0]
        arguments = {
            **_NO_POINTERS,
            **pointers,
            **operand_kwargs(block, self.arch, self.config),
            "exps_ptr": exps,
            "first_row": first_row,
            "stride_exps_t": 0 if exps is None else exps.stride(0),
            "stride_partial": stride_partial,
        }
        num_tiles = ceil_div(num_tokens, self.config.block_t) * ceil_div(num_rows, self.config.block_v)
        _launch_stats(num_tiles, block.hidden.device, arguments)


@dataclass(frozen=True, slots=True)
class _Statistics:
    """What the statistics are computed from, where they go, and the launches that write them for a block."""

    head: Operands  # hidden aligned
    target_row: Tensor
    class_weight: Tensor | None
    stats: PartStats
    cache: ExpCache | None
    tiles: _Tiles

    @property
    def reduced(self) -> dict[str, Tensor | None]:
        """The statistics ``[T]`` that tiles leave partials of, by the kernels' names."""
        return _by_name(self.stats) | {"target_logit": None, "owners": None}

    @property
    def num_kept(self) -> int:
        return 0 if self.cache is None else self.cache.exps.shape[1]

    def launches(self, first_token: int) -> Iterator[tuple[slice, slice, int]]:
        """The tokens and rows of each launch of tiles, and how many tiles of the same tokens leave one partial. Tokens
        that are launched with ``first_token`` come first."""
        hidden, weight, *_ = self.head
        T, V = hidden.shape[0], weight.shape[0]
        block_t, block_v = self.tiles.shape
        on_hopper = self.tiles.on_hopper
        num_wanted = sum(field is not None for field in self.reduced.values())
        most_tokens = hopper_tiles.tokens_per_launch(V, 4 * num_wanted, _PARTIAL_BYTES) if on_hopper else T
        groups = [*slices(T, most_tokens)]
        first = first_token // most_tokens
        for tokens in groups[first:] + groups[:first]:
            num_tokens = tokens.stop - tokens.start
            most_partials = max(1, _PARTIAL_BYTES // (4 * num_tokens * num_wanted))
            tiles_t = ceil_div(num_tokens, block_t)
            for part in (slice(0, self.num_kept), slice(self.num_kept, V)):
                tiles_v = ceil_div(part.stop - part.start, block_v)
                if tiles_v == 0:
                    continue
                # Hopper's kernel merges strips of tiles itself; else several launches keep the partials few.
                strip, most = (ceil_div(tiles_v, most_partials), tiles_v) if on_hopper else (1, most_partials)
                most = min(most, ceil_div(rows_per_copy(weight), block_v))
                chunk = whole_waves(tiles_v, most, tiles_t, num_processors(hidden.device))
                for rows in slices(part.stop, chunk * block_v, part.start):
                    yield tokens, rows, strip

    def write(self, tokens: slice, rows: slice, strip: int, arrival: Arrival | None, *, is_last: bool) -> None:
        """Merge the block's statistics into those of the tokens' earlier rows and keep its exponentials; write the
        targets' logits before the first tiles that need their reference, or with the last. All hidden states have then
        arrived."""
        hidden = self.head.hidden
        of_tokens = {name: None if field is None else part_of(field, tokens) for name, field in self.reduced.items()}
        block_t, block_v = self.tiles.shape
        num_tokens, num_partials = tokens.stop - tokens.start, ceil_div(rows.stop - rows.start, strip * block_v)
        partials = _empty_partials(of_tokens, num_partials)
        block = self.head.block(slice(None), rows)
        block = block._replace(weight=aligned(block.weight))
        counters = iter(new_counters(hidden.device, MOST_PARTS)) if self.tiles.on_hopper else None
        class_weight = None if self.class_weight is None else self.class_weight[rows]

        def launch(part: slice, part_hidden: Tensor, leave_room: bool) -> None:
            if self.cache is not None and rows.start == 0:
                self.write_targets(part, part_hidden)
            here = slice(part.start - tokens.start, part.stop - tokens.start)
            part_partials = partials
            if part != tokens:
                part_partials = {name: None if field is None else field[:, here] for name, field in partials.items()}
            exps = reference = None
            if self.cache is not None and rows.start < self.num_kept:
                exps, reference = self.cache.exps[part, rows], self.cache.reference[part]
            self.tiles.launch(
                block._replace(hidden=part_hidden),
                strip,
                None if counters is None else next(counters),
                num_tokens,
                {"class_weight_ptr": class_weight, "reference_ptr": reference, **part_partials},
                exps=exps,
                first_row=rows.start,
                leave_room=leave_room,
            )

        with Fork(hidden.device) as fork:
            in_order_of_arrival(launch, fork, hidden, tokens, arrival, block_t)
            if self.cache is None and is_last:
                # They wait for memory, where tiles wait for multiplications: the last tiles leave them room. Of few
                # tokens they take no longer than a fork.
                with fork.aside() if hidden.shape[0] >= _LEAST_TOKENS_ASIDE else nullcontext():
                    if arrival is not None:
                        arrival.wait()
                    self.write_targets(slice(0, hidden.shape[0]), hidden)
        _merge_partials(partials, of_tokens, num_partials, num_tokens, first=rows.start == 0)

    def write_targets(self, tokens: slice, hidden: Tensor) -> None:
        """Write ``target_logit`` and ``owners``, and the cache's reference."""
        _target_logits(
            self.head._replace(hidden=hidden),
            part_of(self.target_row, tokens),
            part_of(self.stats.target_logit, tokens),
            part_of(self.stats.owners, tokens),
            None if self.cache is None else part_of(self.cache.reference, tokens),
            self.tiles.arch,
            self.tiles.config,
        )


def local_stats(
    head: Operands,
    target_row: Tensor,
    class_weight: Tensor | None,
    wanted: Wanted,
    exp_cache_bytes: int,
    arrival: Arrival | None,
    *,
    one_part: bool = True,
) -> tuple[PartStats, ExpCache | None]:
    """As ``eager.local_stats``."""
    hidden, weight, *_ = head
    T, V = hidden.shape[0], weight.shape[0]
    if T == 0 or V == 0:
        return stacked(empty_stats(target_row, torch.float32, wanted)), None
    arch = current_arch()
    on_hopper = hopper_tiles.takes(hidden, arch) and not (wanted.logit_sum or wanted.argmax)
    tiles = _Tiles(arch, tile_config(arch, hidden.dtype, T), on_hopper)
    if arrival is None and exp_cache_bytes == 0 and _tiles_find_targets(head, target_row, tiles):
        parts = _parts_of_tiles(head, target_row, class_weight, wanted, tiles)
        return _merged(parts) if one_part else parts, None
    # Not parts of one tensor, of which a cache would hold all.
    numbers = (hidden.new_empty(T, dtype=torch.float32) for _ in range(5))
    stats = PartStats(
        next(numbers),
        next(numbers),
        *hidden.new_empty(2, *target_row.shape, dtype=torch.float32),
        class_sum=next(numbers) if wanted.logit_sum else None,
        logit_sum=next(numbers) if wanted.logit_sum else None,
        sum_exp_logit=next(numbers) if wanted.expected_logit else None,
        argmax=hidden.new_empty(T, dtype=torch.int64) if wanted.argmax else None,
    )
    cache = None
    # The terms that these two add to the gradient are no multiples of a kept exponential.
    if not (wanted.logit_sum or wanted.expected_logit):
        cache = allocate_cache(head, stats.max_logit, exp_cache_bytes, tiles.shape[1])
    hidden, arrival = aligned_hidden(hidden, arrival)
    statistics = _Statistics(head._replace(hidden=hidden), target_row, class_weight, stats, cache, tiles)
    launches = [*statistics.launches(0 if arrival is None else arrival.own.start)]
    for launch in launches:
        statistics.write(*launch, arrival, is_last=launch is launches[-1])
        arrival = None
    return stacked(stats), cache


def _tiles_find_targets(head: Operands, target_row: Tensor, tiles: _Tiles) -> bool:
    """Whether one launch of tiles takes all rows and finds the targets among them: where the tokens are one tile's,
    each row is read once, and what is then done with it costs nothing beside that."""
    T, V = target_row.shape[0], head.weight.shape[0]
    block_t, block_v = tiles.shape
    most_partials = _PARTIAL_BYTES // (4 * len(PartStats._fields) * T)
    return (
        block_t >= T
        and target_row.shape[1] <= 1
        and ceil_div(V, block_v) <= most_partials
        and rows_per_copy(head.weight) >= V
    )


def _parts_of_tiles(
    head: Operands, target_row: Tensor, class_weight: Tensor | None, wanted: Wanted, tiles: _Tiles
) -> PartStats:
    """Statistics ``[P, T]`` of each tile or, on Hopper, each program's tiles; ``argmax`` in int32."""
    hidden, weight, *_ = head
    T = hidden.shape[0]
    num_tiles = ceil_div(weight.shape[0], tiles.shape[1])
    strip = ceil_div(num_tiles, num_processors(hidden.device)) if tiles.on_hopper else 1
    num_parts = ceil_div(num_tiles, strip)

    def empty(*of_token: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return hidden.new_empty(num_parts, T, *of_token, dtype=dtype)

    parts = PartStats(
        empty(),
        empty(),
        empty(target_row.shape[1]),
        empty(target_row.shape[1]),
        class_sum=empty() if wanted.logit_sum else None,
        logit_sum=empty() if wanted.logit_sum else None,
        sum_exp_logit=empty() if wanted.expected_logit else None,
        argmax=empty(dtype=torch.int32) if wanted.argmax else None,
    )
    target_row_ptr = target_row if target_row.shape[1] == 1 else None
    pointers = {"class_weight_ptr": class_weight, "target_row_ptr": target_row_ptr, **_partials(_by_name(parts))}
    tiles.launch(head._replace(hidden=aligned(hidden)), strip, None, T, pointers)
    return parts


def _merged(parts: PartStats) -> PartStats:
    """One part ``[1, T]`` of those that tiles found."""
    num_parts, T = parts.max_logit.shape
    merged = PartStats._make(
        None
        if field is None
        else field.new_empty(1, *field.shape[1:], dtype=torch.int64 if field is parts.argmax else torch.float32)
        for field in parts
    )
    _merge_partials(_partials(_by_name(parts)), _by_name(merged), num_parts, T, first=True)
    return merged


def _by_name(stats: PartStats) -> dict[str, Tensor | None]:
    """The statistics that tiles leave partials of, by the kernels' names; of no targets, none."""
    has_targets = stats.target_logit.shape[-1] > 0
    return {
        "max": stats.max_logit,
        "sum_exp": stats.sum_exp,
        "target_logit": stats.target_logit if has_targets else None,
        "owners": stats.owners if has_targets else None,
        "class_sum": stats.class_sum,
        "logit_sum": stats.logit_sum,
        "sum_exp_logit": stats.sum_exp_logit,
        "argmax": stats.argmax,
    }


def _partials(reduced: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Partials by the names of the kernels' arguments."""
    return {_PARTIALS[name]: field for name, field in reduced.items()}


def _empty_partials(reduced: dict[str, Tensor | None], num_partials: int) -> dict[str, Tensor | None]:
    """Memory for partials of statistics ``[T]``, by the kernels' names."""
    return {
        _PARTIALS[name]: None
        if field is None
        else field.new_empty(num_partials, *field.shape, dtype=torch.int32 if name == "argmax" else torch.float32)
        for name, field in reduced.items()
    }


def _merge_partials(
    partials: dict[str, Tensor | None],
    into: dict[str, Tensor | None],
    num_partials: int,
    num_tokens: int,
    *,
    first: bool,
) -> None:
    """Merge partials into statistics ``[T]`` by the kernels' names, unless ``first`` with what is there."""
    merge_partials_kernel[(ceil_div(num_tokens, _MERGE_LAUNCH["BLOCK_T"]),)](
        **partials,
        **{f"{name}_ptr": field for name, field in into.items()},
        num_partials=num_partials,
        T=num_tokens,
        **{"FIRST": first, **_MERGE_LAUNCH},
    )


def target_launch(arch: str, tile: TileConfig) -> dict[str, Any]:
    """How ``target_logit_kernel`` is launched beside a tile: with deep blocks, as its work is to read rows."""
    num_stages = 2 if arch.startswith("gfx") else 4
    return {"BLOCK_T": _TARGET_BLOCK_T, "BLOCK_H": min(2 * tile.block_h, 128), "num_stages": num_stages}


def _target_logits(
    head: Operands,
    target_row: Tensor,
    target_logit: Tensor,
    owners: Tensor,
    reference: Tensor | None,
    arch: str,
    tile: TileConfig,
) -> None:
    """Write ``target_logit`` and ``owners``, and the cache's reference."""
    hidden, weight, bias, transform = head
    if target_row.shape[1] == 0:
        if reference is None:
            return
        # Of no target, only the sample is of use.
        target_row = target_row.new_full((target_row.shape[0], 1), -1)
        target_logit, owners = torch.empty(2, *target_row.shape, device=hidden.device)
    T, num_targets = target_row.shape
    target_logit_kernel[(ceil_div(T * num_targets, _TARGET_BLOCK_T),)](
        hidden,
        weight,
        bias,
        target_row,
        target_logit,
        owners,
        reference,
        T,
        weight.shape[0],
        weight.shape[1],
        num_targets,
        hidden.stride(0),
        hidden.stride(1),
        weight.stride(0),
        weight.stride(1),
        **{
            "PRECISION": product_precision(hidden.dtype, arch),
            "ALIGNMENT": math.gcd(weight.shape[1], hidden.stride(0), weight.stride(0), 16 // weight.element_size()),
            **transform_kwargs(transform),
            **target_launch(arch, tile),
        },
    )

"""The backward's walk over blocks of tokens and rows, shared by every implementation.

    for each group of tokens                                mostly one: all tokens
        for each block of rows
            for each block of tokens                        mostly one: the group
                dlogits [block_t, block_v]  ←  recomputed by the implementation, in the workspace
                dhidden [group_t, H]        += dlogits @ weight       fp32, over the blocks of rows
                dweight [block_v, H]        += dlogitsᵀ @ hidden      fp32, over the blocks of tokens
                dbias   [block_v]           += Σ_t dlogits

With one group, rows of ``dweight`` are finished once and never read again, and ``dhidden`` needs an fp32 sum of its
size. Where ``dweight`` itself is fp32 and can take sums, several groups keep that sum small, and where tokens outnumber
rows, an fp32 sum of all ``dweight`` is the smaller one. :func:`plan_blocks` weighs traffic and waves. Sums are fp32
whatever the dtype of the inputs.

The first rows may have their dlogits kept from the forward, but for a factor per token (:class:`KeptDlogits`): that
factor commutes with both products, so they take one GEMM each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vocab_parallel_fused.transform import Operands

# What a byte of traffic and a launch cost, counted in operations of the matrix units: 680 TFLOP/s over 4.2 TB/s and
# 4 µs on an H200. Only their order of magnitude matters.
_FLOPS_PER_BYTE = 160
_FLOPS_PER_LAUNCH = 2.7e9
_MOST_GROUPS = 64
_MOST_BLOCKS_COMPARED = 32
# GEMMs whose inner or outer dimension is no multiple of this leave the fast path: it would be two times slower.
_GEMM_ROWS = 8


Matmul = Callable[[Tensor, Tensor, Tensor], None]
"""``(out, a, b)``: ``out = a @ b``, see :func:`matmul_into`."""


class GradBuffers(NamedTuple):
    """Where a head's gradients go; None: not wanted."""

    dhidden: Tensor | None  # [T, H], overwritten with this shard's share of the hidden states' gradient
    dweight: Tensor | None  # [V, H], overwritten, or added to if accumulate_dweight
    dbias: Tensor | None  # [V], overwritten
    accumulate_dweight: bool
    dhidden_ready: Callable[[], None] | None = None
    """Called as soon as dhidden is complete, a product for dweight being still to come; None: nobody waits for it."""
    message_bytes: int = 0
    """What this rank then sends, beside that product."""


class KeptDlogits(NamedTuple):
    """Gradients of the logits of the first rows that need no recomputation: ``dlogits = scale[:, None] · values``."""

    values: Tensor  # [T, V_kept], in the dtype of the operands
    scale: Tensor  # [T] fp32
    scale_rows: Callable[[Tensor, Tensor, Tensor], None]  # (matrix [N, H], scale [N], out [N, H])
    scaled_matmul: Callable[[Tensor, Tensor, Tensor, Tensor], None]  # (out [N, H], values [N, V], matrix, scale [N])
    complete: Callable[[Tensor | None], None]
    """Waits for hidden states on their way, and completes values, and dhidden ``[T, H]`` if that was made of them."""


class Blocks(NamedTuple):
    """Sizes of a sweep's groups and blocks."""

    group_t: int
    block_t: int
    block_v: int


def even_block(total: int, largest: int, tile: int) -> int:
    """A multiple of ``tile`` that cuts ``total`` into nearly equal blocks: at most ``largest`` rounded up to it."""
    num_tiles = max(1, ceil_div(total, tile))
    tiles_per_block = num_tiles if largest >= total else max(1, largest // tile)
    num_blocks = ceil_div(num_tiles, tiles_per_block)
    return ceil_div(num_tiles, num_blocks) * tile


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def slices(stop: int, block: int, start: int = 0) -> Iterator[slice]:
    """Blocks of ``[start, stop)``."""
    return (slice(first, min(first + block, stop)) for first in range(start, stop, block))


@functools.lru_cache(maxsize=1024)
def plan_blocks(
    T: int,
    H: int,
    V: int,
    *,
    bytes_per_logit: int,
    dhidden_sum_bytes: int,
    dweight_sum_bytes: int,
    dhidden_takes_product: bool,
    dweight_takes_product: bool,
    dweight_takes_sums: bool,
    workspace_bytes: int,
    tile: tuple[int, int],
    largest: tuple[int, int],
    processors: int,
) -> Blocks:
    """The cheapest blocks that fit the workspace; at least one tile.

    Counted are the waves of tiles in which ``processors`` compute the dlogits and the product for dweight, the last of
    each block's unfilled; the traffic of the two sums; and the launches. The product is taken to have tiles of the same
    size, or three quarters of it, whichever fit better.

    Args:
        T, H, V: tokens, hidden size and rows.
        bytes_per_logit: memory for each element of a block.
        dhidden_sum_bytes, dweight_sum_bytes: bytes per element of a sum that needs memory of its own, else 0.
        dhidden_takes_product, dweight_takes_product: whether it needs no sum if one product makes all of it.
        dweight_takes_sums: whether dweight, if wanted, can be visited several times, so that groups may be smaller.
        workspace_bytes: for a block and a block's dweight sum; with ``dweight_takes_sums`` for dhidden's sum too.
        tile: (tokens, rows) that a block is a multiple of.
        largest: (tokens, rows) of a block.
        processors: how many tiles run at a time.
    """
    tile_t, tile_v = tile

    def product_columns(rows: int) -> int:
        """Columns of dweight ``[rows, H]`` that each processor computes, of ``tile_t`` rows."""
        row_tiles = ceil_div(rows, tile_t)
        widths = (tile_v, 3 * tile_v // 4)
        return min(width * ceil_div(row_tiles * ceil_div(H, width), processors) for width in widths)

    def cost(blocks: Blocks) -> float:
        flops = launches = 0
        group_t, block_t, block_v = blocks
        for rows, count in ((block_v, V // block_v), (V % block_v, 1)):
            if rows > 0:
                tiles = ceil_div(block_t, tile_t) * ceil_div(rows, tile_v)
                per_row = H * tile_v * ceil_div(tiles, processors) + block_t * product_columns(rows)
                flops += 2 * count * tile_t * processors * per_row
                launches += 3 * count
        num_groups, num_rows_blocks = ceil_div(T, group_t), ceil_div(V, block_v)
        visits = num_groups * ceil_div(group_t, block_t)
        traffic = 2 * dhidden_sum_bytes * T * H * (num_rows_blocks > 1) * num_rows_blocks
        traffic += 2 * 4 * V * H * num_groups
        return visits * (flops + launches * _FLOPS_PER_LAUNCH) + traffic * _FLOPS_PER_BYTE

    def candidates(num_groups: int) -> Iterator[Blocks]:
        group_t = ceil_div(ceil_div(T, num_groups), tile_t) * tile_t
        block_t = even_block(min(group_t, T), min(largest[0], workspace_bytes // (bytes_per_logit * tile_v)), tile_t)
        needs_sum = not (dweight_takes_product and block_t >= T)
        bytes_per_row = block_t * bytes_per_logit + H * dweight_sum_bytes * needs_sum
        sum_bytes = dhidden_sum_bytes * group_t * H if dweight_takes_sums else 0
        for budget, least_rows in ((workspace_bytes, V), (workspace_bytes - sum_bytes, 1)):
            rows = min(largest[1], budget // bytes_per_row)
            if rows < least_rows or (least_rows == V > 1 and not dhidden_takes_product):
                continue
            num_tiles = ceil_div(V, tile_v) if rows >= V else max(1, rows // tile_v)
            step = ceil_div(num_tiles, _MOST_BLOCKS_COMPARED)
            for tiles in range(num_tiles, num_tiles // 2, -step):
                yield Blocks(group_t, block_t, tiles * tile_v)

    most_groups = min(_MOST_GROUPS, ceil_div(T, tile_t)) if dweight_takes_sums and dhidden_sum_bytes else 1
    num_groups = [1 << i for i in range(most_groups.bit_length())]
    fitting = [blocks for groups in num_groups for blocks in candidates(groups)]
    smallest = Blocks(ceil_div(ceil_div(T, num_groups[-1]), tile_t) * tile_t, tile_t, tile_v)
    return min(fitting, key=cost, default=smallest)


def sweep_grads(
    write_dlogits: Callable[[slice, slice, Tensor], None],
    head: Operands,
    buffers: GradBuffers,
    *,
    dlogits_dtype: torch.dtype,
    unscale: Tensor | None = None,
    bytes_per_logit: int,
    workspace_bytes: int,
    tile: tuple[int, int],
    largest: tuple[int, int],
    processors: int = 1,
    kept: KeptDlogits | None = None,
    matmul_beside: Matmul | None = None,
    first_token: int = 0,
) -> None:
    """Write the gradients that are wanted.

    Args:
        write_dlogits: called with a slice of tokens, a slice of rows and a ``[tokens, rows]`` view of the workspace,
            which it fills.
        head: of which the gradients are.
        buffers: for the results.
        dlogits_dtype: of the workspace; the operand of the two GEMMs.
        unscale: a number that turns what is written into the gradients of the logits; see :func:`scale_into_fp16`.
        bytes_per_logit: memory for each element of a block, the implementation's temporaries included.
        workspace_bytes: memory that blocks may take.
        tile, largest, processors: see :func:`plan_blocks`.
        kept: dlogits of the first rows, for which ``write_dlogits`` is then not called.
        matmul_beside: used instead of :func:`matmul_into` where a message shares the device.
        first_token: whose group comes first.
    """
    hidden, weight, *_ = head
    (T, H), V = hidden.shape, weight.shape[0]
    dhidden, dweight, dbias, accumulate_dweight, *_ = buffers
    dtype = torch.promote_types(dlogits_dtype, torch.float32)
    num_kept = 0 if kept is None else kept.values.shape[1]
    if T == 0 or V == 0:
        _write_zeros(buffers)
        return
    dweight_total = None
    if (
        dweight is not None
        and not accumulate_dweight
        and unscale is None
        and dweight.dtype != dtype
        and T > V > num_kept
        and T * V * bytes_per_logit > workspace_bytes
    ):
        # A sum of all dweight is smaller than one of all dhidden, and lets that be finished group by group.
        dweight_total = torch.empty(V, H, dtype=dtype, device=hidden.device)
        dweight = dweight_total
    dbias_sum = None if dbias is None else dbias.new_zeros(V, dtype=dtype)
    sums = GradBuffers(dhidden, dweight, dbias_sum, accumulate_dweight, buffers.dhidden_ready)
    if kept is not None and num_kept == V:
        _write_kept(kept, head, sums, matmul_beside)
    else:
        # Sums may be added up in a gradient of their own dtype. A single product rounds its fp32 sum once, so it can
        # be written into a gradient of its operands' dtype.
        takes_sums = [grad is None or (unscale is None and grad.dtype == dtype) for grad in (dhidden, dweight)]
        takes_product = [
            grad is None or (unscale is None and grad.dtype == dlogits_dtype) for grad in (dhidden, dweight)
        ]
        blocks = plan_blocks(
            T,
            H,
            V - num_kept,
            bytes_per_logit=bytes_per_logit,
            dhidden_sum_bytes=0 if takes_sums[0] else dtype.itemsize,
            dweight_sum_bytes=0 if takes_sums[1] else dtype.itemsize,
            dhidden_takes_product=takes_product[0] and kept is None and V % _GEMM_ROWS == 0,
            dweight_takes_product=takes_product[1] and not accumulate_dweight,
            dweight_takes_sums=takes_sums[1],
            workspace_bytes=workspace_bytes,
            tile=tile,
            largest=largest,
            processors=processors,
        )
        # A full block comes last, so that its product for dweight hides dhidden's message; a second one, if there is,
        # first, where it hides the arrival of hidden states. What is left over is between them.
        aligned = max(num_kept, V - V % _GEMM_ROWS)
        wide = [*slices(aligned, blocks.block_v, num_kept)]
        wide[-2:] = reversed(wide[-2:])
        row_blocks = [*wide[:-1], *slices(V, _GEMM_ROWS, aligned), *wide[-1:]]
        groups = [*slices(T, blocks.group_t)]
        first_group = min(first_token, T - 1) // blocks.group_t
        hidden_in_place = takes_sums[0] or (takes_product[0] and len(row_blocks) == 1 and kept is None)
        weight_in_place = takes_sums[1] or (takes_product[1] and blocks.block_t >= T and not accumulate_dweight)
        _sweep_blocks(
            write_dlogits,
            head,
            groups[first_group:] + groups[:first_group],
            row_blocks,
            blocks.block_t,
            hidden.new_empty(min(blocks.block_t, T), blocks.block_v, dtype=dlogits_dtype),
            _Sum(dhidden, min(blocks.group_t, T), dtype, in_place=hidden_in_place),
            _Sum(dweight, min(blocks.block_v, V), dtype, in_place=weight_in_place),
            sums,
            unscale,
            kept,
            matmul_beside,
        )
    for grad, total in ((dbias, dbias_sum), (buffers.dweight, dweight_total)):
        if grad is not None and total is not None:
            grad.copy_(total if unscale is None else total * unscale)


def _sweep_blocks(
    write_dlogits: Callable[[slice, slice, Tensor], None],
    head: Operands,
    groups: list[slice],
    row_blocks: list[slice],
    block_t: int,
    workspace: Tensor,
    dhidden_sum: _Sum,
    dweight_sum: _Sum,
    sums: GradBuffers,
    unscale: Tensor | None,
    kept: KeptDlogits | None,
    matmul_beside: Matmul | None,
) -> None:
    """The walk over groups, blocks of rows and blocks of tokens, in the order in which they are given."""
    hidden, weight, *_ = head
    accumulates_in_place = sums.accumulate_dweight and dweight_sum.in_place
    # Where all rows but a tail are kept, theirs is the product to come after dhidden.
    rows_left = sum(rows.stop - rows.start for rows in row_blocks)
    kept_last = sums.dhidden_ready is not None and len(groups) == 1 and rows_left < _GEMM_ROWS
    matmul = None
    for group in groups:
        is_first, is_last = group is groups[0], group is groups[-1]
        if kept is not None:
            part = None if sums.dhidden is None else dhidden_sum.part(group, group)
            if is_first and not is_last:
                kept.complete(None)
            _write_kept_dhidden(kept, group, weight, part)
            if is_first:
                if is_last:
                    kept.complete(part)
                if not kept_last:
                    _write_kept_dweight(kept, hidden, sums, None if dhidden_sum.in_place else sums.dhidden, None)
        for rows in row_blocks:
            for tokens in slices(group.stop, block_t, group.start):
                dlogits = workspace[: tokens.stop - tokens.start, : rows.stop - rows.start]
                write_dlogits(tokens, rows, dlogits)
                first = rows is row_blocks[0] and kept is None
                dhidden_sum.add(tokens, group, dlogits, weight[rows], first=first)
                if tokens.stop == group.stop and rows is row_blocks[-1]:
                    dhidden_sum.finish(group, unscale)
                    if is_last and sums.dhidden_ready is not None:
                        sums.dhidden_ready()
                        matmul = matmul_beside
                first = is_first and tokens.start == group.start and not accumulates_in_place
                dweight_sum.add(rows, rows, dlogits.t(), hidden[tokens], first=first, matmul=matmul)
                if sums.dbias is not None:
                    sums.dbias[rows] += dlogits.sum(dim=0, dtype=sums.dbias.dtype)
            dweight_sum.finish(rows, unscale, accumulate=sums.accumulate_dweight)
    if kept is not None and kept_last:
        _write_kept_dweight(kept, hidden, sums, None, matmul)


def _write_zeros(buffers: GradBuffers) -> None:
    for grad in (buffers.dhidden, None if buffers.accumulate_dweight else buffers.dweight, buffers.dbias):
        if grad is not None:
            grad.zero_()
    if buffers.dhidden_ready is not None:
        buffers.dhidden_ready()


class _Sum:
    """Products added up in a range of a gradient's rows: in the gradient itself, or in memory of their own."""

    def __init__(self, grad: Tensor | None, most_rows: int, dtype: torch.dtype, *, in_place: bool) -> None:
        self.grad = grad
        self.in_place = in_place
        self.own = None
        if grad is not None and not in_place:
            self.own = torch.empty(most_rows, *grad.shape[1:], dtype=dtype, device=grad.device)

    def part(self, rows: slice, of: slice) -> Tensor:
        """Where the sum of some rows is, while the range is ``of``."""
        assert self.grad is not None
        return self.grad[rows] if self.own is None else self.own[rows.start - of.start : rows.stop - of.start]

    def add(self, rows: slice, of: slice, a: Tensor, b: Tensor, *, first: bool, matmul: Matmul | None = None) -> None:
        if self.grad is not None:
            _add_product(self.part(rows, of), a, b, first=first, matmul=matmul)

    def finish(self, rows: slice, unscale: Tensor | None, *, accumulate: bool = False) -> None:
        """Round the sum into the gradient, or add it, undoing the scale."""
        if self.grad is None or self.own is None:
            return
        total = self.part(rows, rows)
        if unscale is not None:
            total *= unscale
        self.grad[rows].add_(total) if accumulate else self.grad[rows].copy_(total)


def _write_kept(kept: KeptDlogits, head: Operands, sums: GradBuffers, matmul_beside: Matmul | None) -> None:
    """All gradients, of a shard that is kept whole."""
    hidden, weight, *_ = head
    tokens = slice(0, hidden.shape[0])
    if sums.dhidden_ready is None:
        kept.complete(None)
        # dhidden's memory can hold the scaled hidden states before it is written.
        _write_kept_dweight(kept, hidden, sums, sums.dhidden, None)
        _write_kept_dhidden(kept, tokens, weight, sums.dhidden)
    else:
        _write_kept_dhidden(kept, tokens, weight, sums.dhidden)
        kept.complete(sums.dhidden)
        sums.dhidden_ready()
        _write_kept_dweight(kept, hidden, sums, None, matmul_beside)


def _write_kept_dweight(
    kept: KeptDlogits, hidden: Tensor, sums: GradBuffers, lent: Tensor | None, matmul: Matmul | None
) -> None:
    """Gradients of the rows that are kept; ``lent`` is memory ``[T, H]`` that nobody needs yet."""
    num_kept = kept.values.shape[1]
    if sums.dweight is not None:
        if lent is None or lent.dtype != hidden.dtype:
            lent = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        kept.scale_rows(hidden, kept.scale, lent)
        dweight, first = sums.dweight[:num_kept], not sums.accumulate_dweight
        _add_product(dweight, kept.values.t(), lent, first=first, matmul=matmul)
    if sums.dbias is not None:
        scale = kept.scale.to(kept.values.dtype)[:, None]
        matmul_into(sums.dbias[:num_kept, None], kept.values.t(), scale)


def _write_kept_dhidden(kept: KeptDlogits, tokens: slice, weight: Tensor, out: Tensor | None) -> None:
    if out is not None:
        kept.scaled_matmul(out, kept.values[tokens], weight[: kept.values.shape[1]], kept.scale[tokens])


def scale_into_fp16(bound: Tensor) -> tuple[Tensor, Tensor]:
    """A power of two that brings logit gradients of at most ``bound`` into (2¹⁴, 2¹⁵], and the factor that undoes it.

    In fp16 the gradient of a mean over many tokens, or an upstream gradient scaled against underflow elsewhere, would
    leave the range of the workspace; this way small ones keep as much of its range as there is. A power of two changes
    no bit of what stays inside. Tokens whose gradients are not finite have no say in it.
    """
    largest = bound.where(torch.isfinite(bound), 0.0).amax()
    exponent = torch.ceil(torch.log2(largest.where(largest > 0, 1.0)))
    # fp32 holds 2^±126 as a normal number, so that neither factor is lost.
    unscale = torch.exp2((exponent - 15).clamp(-126, 126))
    return 1 / unscale, unscale


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool, matmul: Matmul | None) -> None:
    if first and matmul is not None:
        matmul(total, a, b)
    else:
        matmul_into(total, a, b, accumulate=not first)


def matmul_into(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
    """``out = a @ b``, or ``out += a @ b``, summed in ``out``'s precision and at least fp32 inside the GEMM."""
    beta = 1 if accumulate else 0
    if a.dtype == b.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif a.dtype == b.dtype and _has_mixed_gemm(out.device, a.dtype):
        torch.addmm(out, a, b, beta=beta, out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)


@functools.cache
def _has_mixed_gemm(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this device adds products of 16-bit matrices into an fp32 one. CUDA does; only asking tells."""
    a = torch.zeros(16, 16, dtype=dtype, device=device)
    out = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        torch.addmm(out, a, a, out_dtype=torch.float32, out=out)
    except (NotImplementedError, RuntimeError, TypeError) as error:
        # Memory that ran out, in torch or in cuBLAS's own words, is no answer, and would be kept for one.
        if isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error):
            raise
        return False
    return True

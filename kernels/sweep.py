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
rows, an fp32 sum of all ``dweight`` is the smaller one. With several groups, a sum lies over rows of ``dhidden`` that
are not written yet, where there are enough. ``plan.py`` weighs traffic and waves. Sums are fp32 whatever the dtype of
the inputs.

The first rows may have their dlogits kept from the forward, but for a factor per token (:class:`KeptDlogits`): that
factor commutes with both products, so they take one GEMM each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vocab_parallel_fused.kernels.plan import Group, Walk, plan_groups, slices
from vocab_parallel_fused.transform import Operands, part_of

# GEMMs whose inner or outer dimension is no multiple of this leave the fast path: it would be two times slower.
_GEMM_ROWS = 8
# Rows that are rounded in memory of their own.
_ROWS_ASIDE = 16


Matmul = Callable[[Tensor, Tensor, Tensor], None]
"""``(out, a, b)``: ``out = a @ b``, see :func:`matmul_into`."""


class GradBuffers(NamedTuple):
    """Where a head's gradients go; None: not wanted."""

    dhidden: Tensor | None  # [T, H], contiguous, overwritten with this shard's share of the hidden states' gradient
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
        tile, largest, processors: see :class:`~vocab_parallel_fused.kernels.plan.Walk`.
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
    sums = buffers._replace(dweight=dweight, dbias=dbias_sum)
    if kept is not None and num_kept == V:
        _write_kept(kept, head, sums, matmul_beside)
    else:
        # Sums may be added up in a gradient of their own dtype. A single product rounds its fp32 sum once, so it can
        # be written into a gradient of its operands' dtype.
        takes_sums = [grad is None or (unscale is None and grad.dtype == dtype) for grad in (dhidden, dweight)]
        takes_product = [
            grad is None or (unscale is None and grad.dtype == dlogits_dtype) for grad in (dhidden, dweight)
        ]
        groups = plan_groups(
            Walk(
                T=T,
                H=H,
                V=V - num_kept,
                bytes_per_logit=bytes_per_logit,
                dhidden_sum_bytes=0 if takes_sums[0] else dtype.itemsize,
                dweight_sum_bytes=0 if takes_sums[1] else dtype.itemsize,
                dhidden_takes_product=takes_product[0] and kept is None and V % _GEMM_ROWS == 0,
                dweight_takes_product=takes_product[1] and not accumulate_dweight,
                several_groups=takes_sums[1],
                workspace_bytes=workspace_bytes,
                tile=tile,
                largest=largest,
                processors=processors,
                first_token=first_token,
            )
        )
        dweight_memory = None
        if not takes_sums[1] and not (takes_product[1] and groups[0].block_t >= T and not accumulate_dweight):
            dweight_memory = hidden.new_empty(min(groups[0].block_v, V), H, dtype=dtype)
        sweep = _Sweep(
            write_dlogits=write_dlogits,
            head=head,
            sums=sums,
            dlogits_dtype=dlogits_dtype,
            sum_dtype=dtype,
            dhidden_takes_sums=takes_sums[0],
            dhidden_takes_product=takes_product[0] and kept is None,
            dweight_memory=dweight_memory,
            unscale=unscale,
            kept=kept,
            matmul_beside=matmul_beside,
        )
        # All at once: of memory in several sizes an allocator would hold more.
        memory = hidden.new_empty(max(map(sweep.memory_size, groups)), dtype=dlogits_dtype)
        for group in groups:
            sweep.group(group, memory, is_first=group is groups[0], is_last=group is groups[-1])
    for grad, total in ((dbias, dbias_sum), (buffers.dweight, dweight_total)):
        if grad is not None and total is not None:
            grad.copy_(total if unscale is None else total * unscale)


def _write_zeros(buffers: GradBuffers) -> None:
    for grad in (buffers.dhidden, None if buffers.accumulate_dweight else buffers.dweight, buffers.dbias):
        if grad is not None:
            grad.zero_()
    if buffers.dhidden_ready is not None:
        buffers.dhidden_ready()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sweep:
    """The walk over blocks of rows and blocks of tokens, a group at a time."""

    write_dlogits: Callable[[slice, slice, Tensor], None]
    head: Operands
    sums: GradBuffers
    dlogits_dtype: torch.dtype
    sum_dtype: torch.dtype
    dhidden_takes_sums: bool
    dhidden_takes_product: bool
    dweight_memory: Tensor | None  # for the sum of a block's rows; None: the gradient itself takes it
    unscale: Tensor | None
    kept: KeptDlogits | None
    matmul_beside: Matmul | None

    def memory_size(self, group: Group) -> int:
        """Elements, of the dlogits' dtype, for a group's block and for its sum of dhidden, if that lies elsewhere."""
        return sum(self._memory_sizes(group))

    def group(self, group: Group, memory: Tensor, *, is_first: bool, is_last: bool) -> None:
        """All gradients' share of some tokens, in memory of at least :meth:`memory_size`."""
        (hidden, weight, *_), kept, tokens_of_group = self.head, self.kept, group.tokens
        row_blocks, in_place = self._row_blocks(group), self._sums_in_place(group)
        if kept is not None and is_first and not is_last:
            kept.complete(None)
            _write_kept_dweight(kept, hidden, self.sums, self.sums.dhidden, None)
        workspace, sum_memory = self._memory_of(group, memory)
        dhidden_sum = _Sum(self.sums.dhidden, tokens_of_group, sum_memory)
        # Where all rows but a tail are kept, theirs is the product to come after dhidden.
        rows_left = sum(rows.stop - rows.start for rows in row_blocks)
        kept_last = is_first and is_last and self.sums.dhidden_ready is not None and rows_left < _GEMM_ROWS
        if kept is not None:
            _write_kept_dhidden(kept, tokens_of_group, weight, dhidden_sum.total)
            if is_first and is_last:
                kept.complete(dhidden_sum.total)
                if not kept_last:
                    _write_kept_dweight(kept, hidden, self.sums, None if in_place else self.sums.dhidden, None)
        matmul = None
        for rows in row_blocks:
            dweight_sum = _Sum(self.sums.dweight, rows, self.dweight_memory)
            for tokens in slices(tokens_of_group.stop, group.block_t, tokens_of_group.start):
                dlogits = workspace[: tokens.stop - tokens.start, : rows.stop - rows.start]
                self.write_dlogits(tokens, rows, dlogits)
                dhidden_sum.add(tokens, dlogits, part_of(weight, rows), first=rows is row_blocks[0] and kept is None)
                if tokens.stop == tokens_of_group.stop and rows is row_blocks[-1]:
                    dhidden_sum.finish(self.unscale)
                    if is_last and self.sums.dhidden_ready is not None:
                        self.sums.dhidden_ready()
                        matmul = self.matmul_beside
                adds_to_grad = self.sums.accumulate_dweight and dweight_sum.in_place
                first = is_first and tokens.start == tokens_of_group.start and not adds_to_grad
                dweight_sum.add(rows, dlogits.t(), part_of(hidden, tokens), first=first, matmul=matmul)
                if self.sums.dbias is not None:
                    self.sums.dbias[rows] += dlogits.sum(dim=0, dtype=self.sums.dbias.dtype)
            dweight_sum.finish(self.unscale, accumulate=self.sums.accumulate_dweight)
        if kept is not None and kept_last:
            _write_kept_dweight(kept, hidden, self.sums, None, matmul)

    def _memory_sizes(self, group: Group) -> tuple[int, int]:
        num_tokens = group.tokens.stop - group.tokens.start
        sum_size = num_tokens * self.head.hidden.shape[1] * self.sum_dtype.itemsize // self.dlogits_dtype.itemsize
        in_dhidden = group.lent is not None or self._sums_in_place(group)
        return min(group.block_t, num_tokens) * group.block_v, 0 if in_dhidden else sum_size

    def _memory_of(self, group: Group, memory: Tensor) -> tuple[Tensor, Tensor | None]:
        """``[block_t, block_v]`` for a block, ``[tokens, H]`` for the sum of dhidden; None: dhidden itself takes it."""
        block_size, sum_size = self._memory_sizes(group)
        workspace = memory[:block_size].view(-1, group.block_v)
        if self._sums_in_place(group):
            return workspace, None
        dhidden = self.sums.dhidden
        assert dhidden is not None
        lent = memory[block_size : block_size + sum_size] if group.lent is None else dhidden[group.lent].view(-1)
        return workspace, lent.view(self.sum_dtype).view(-1, dhidden.shape[1])

    def _sums_in_place(self, group: Group) -> bool:
        """Whether dhidden itself takes the group's sum, or needs none."""
        return self.dhidden_takes_sums or (self.dhidden_takes_product and len(self._row_blocks(group)) == 1)

    def _row_blocks(self, group: Group) -> tuple[slice, ...]:
        num_kept = 0 if self.kept is None else self.kept.values.shape[1]
        return _row_blocks(num_kept, self.head.weight.shape[0], group.block_v)


@functools.lru_cache
def _row_blocks(first: int, V: int, block_v: int) -> tuple[slice, ...]:
    """Rows ``[first, V)``. A full block comes last, so that its product for dweight hides dhidden's message; a second
    one, if there is, first, where it hides the arrival of hidden states. What is left over is between them."""
    aligned = max(first, V - V % _GEMM_ROWS)
    wide = [*slices(aligned, block_v, first)]
    wide[-2:] = reversed(wide[-2:])
    return *wide[:-1], *slices(V, _GEMM_ROWS, aligned), *wide[-1:]


class _Sum:
    """Products added up in some rows of a gradient: in the gradient itself, or elsewhere until they are all there."""

    def __init__(self, grad: Tensor | None, rows: slice, memory: Tensor | None) -> None:
        """
        Args:
            grad: None: not wanted.
            rows: of the gradient.
            memory: of as many rows or more; None: the gradient's.
        """
        self.first_row = rows.start
        self.grad = None if grad is None else part_of(grad, rows)
        self.in_place = memory is None
        self.total = self.grad if memory is None or self.grad is None else memory[: len(self.grad)]

    def add(self, rows: slice, a: Tensor, b: Tensor, *, first: bool, matmul: Matmul | None = None) -> None:
        if self.total is not None:
            total = part_of(self.total, slice(rows.start - self.first_row, rows.stop - self.first_row))
            _add_product(total, a, b, first=first, matmul=matmul)

    def finish(self, unscale: Tensor | None, *, accumulate: bool = False) -> None:
        """Round the sum into the gradient, or add it, undoing the scale."""
        if self.grad is None or self.total is None or self.in_place:
            return
        if unscale is not None:
            self.total *= unscale
        if accumulate:
            self.grad += self.total
        else:
            _round_into(self.grad, self.total)


def _round_into(out: Tensor, total: Tensor) -> None:
    """``out = total``, which may begin where ``out`` does, with rows twice as long.

    A row of ``total`` lies where two rows of ``out`` come, of twice its number: it is read before they are written if
    rows go up, no more at a time than have gone before.
    """
    if total.data_ptr() != out.data_ptr():
        out.copy_(total)
        return
    done = min(_ROWS_ASIDE, len(out))
    out[:done] = total[:done].to(out.dtype)
    while done < len(out):
        rows = slice(done, 2 * done)
        out[rows] = total[rows]
        done *= 2


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
    kept: KeptDlogits, hidden: Tensor, sums: GradBuffers, scaled: Tensor | None, matmul: Matmul | None
) -> None:
    """Gradients of the rows that are kept; ``scaled`` is memory ``[T, H]`` that nobody needs yet."""
    num_kept = kept.values.shape[1]
    if sums.dweight is not None:
        if scaled is None or scaled.dtype != hidden.dtype:
            scaled = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        kept.scale_rows(hidden, kept.scale, scaled)
        dweight, first = sums.dweight[:num_kept], not sums.accumulate_dweight
        _add_product(dweight, kept.values.t(), scaled, first=first, matmul=matmul)
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

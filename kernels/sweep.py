"""The backward's walk over blocks of the vocabulary, shared by every implementation.

For each block of rows, and within it each block of tokens:

    dlogits [block_t, block_v]  ←  recomputed by the implementation, in the workspace
    dhidden [block_t, H]        += dlogits @ weight            fp32, over all blocks of rows
    dweight [block_v, H]        +=  dlogitsᵀ @ hidden          fp32, over the blocks of tokens (mostly one)
    dbias   [block_v]           += Σ_t dlogits

Rows of ``dweight`` are finished once and never read again. Both sums are accumulated in fp32, whatever the dtype of
the inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vocab_parallel_fused.transform import Operands


class GradBuffers(NamedTuple):
    """Where a head's gradients go; None: not wanted."""

    dhidden: Tensor | None  # [T, H], overwritten with this shard's share of the hidden states' gradient
    dweight: Tensor | None  # [V, H], overwritten, or added to if accumulate_dweight
    dbias: Tensor | None  # [V], overwritten
    accumulate_dweight: bool


def even_block(total: int, largest: int, tile: int) -> int:
    """A multiple of ``tile`` that cuts ``total`` into nearly equal blocks: at most ``largest`` rounded up to it."""
    num_tiles = max(1, -(-total // tile))
    tiles_per_block = num_tiles if largest >= total else max(1, largest // tile)
    num_blocks = -(-num_tiles // tiles_per_block)
    return -(-num_tiles // num_blocks) * tile


def slices(total: int, block: int) -> Iterator[slice]:
    """Blocks of ``[0, total)``."""
    return (slice(start, min(start + block, total)) for start in range(0, total, block))


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
        workspace_bytes: memory that blocks may take. All tokens are one block if a tile of rows then fits.
        tile, largest: (tokens, rows) that a block is a multiple of, and at most. A block is at least one tile.
    """
    hidden, weight, *_ = head
    (T, H), V = hidden.shape, weight.shape[0]
    dhidden, dweight, dbias, accumulate_dweight = buffers
    if T == 0 or V == 0:
        for grad in (dhidden, None if accumulate_dweight else dweight, dbias):
            if grad is not None:
                grad.zero_()
        return
    dtype = torch.promote_types(dlogits_dtype, torch.float32)

    block_t = even_block(T, min(largest[0], workspace_bytes // (bytes_per_logit * tile[1])), tile[0])
    # A GEMM over all tokens rounds its fp32 sum once, so it can write dweight itself. Else the sum needs memory of
    # its own, unless dweight is as precise.
    dweight_takes_sum = (
        dweight is not None
        and unscale is None
        and (dweight.dtype == dtype or (dweight.dtype == dlogits_dtype and block_t >= T and not accumulate_dweight))
    )
    bytes_per_row = block_t * bytes_per_logit + (0 if dweight_takes_sum or dweight is None else H * dtype.itemsize)
    block_v = even_block(V, min(largest[1], workspace_bytes // bytes_per_row), tile[1])

    workspace = hidden.new_empty(block_t, block_v, dtype=dlogits_dtype)
    dhidden_sum = dhidden
    if dhidden is not None and dhidden.dtype != dtype:
        dhidden_sum = torch.empty(T, H, dtype=dtype, device=dhidden.device)
    for rows in slices(V, block_v):
        dweight_rows = None if dweight is None else dweight[rows]
        dweight_sum = dweight_rows
        if dweight_rows is not None and not dweight_takes_sum:
            dweight_sum = torch.empty(dweight_rows.shape, dtype=dtype, device=dweight_rows.device)
        dbias_sum = None if dbias is None else dbias.new_zeros(rows.stop - rows.start, dtype=dtype)
        for tokens in slices(T, block_t):
            dlogits = workspace[: tokens.stop - tokens.start, : rows.stop - rows.start]
            write_dlogits(tokens, rows, dlogits)
            if dhidden_sum is not None:
                _matmul_into(dhidden_sum[tokens], dlogits, weight[rows], accumulate=rows.start > 0)
            if dweight_sum is not None:
                accumulate = tokens.start > 0 or (accumulate_dweight and dweight_takes_sum)
                _matmul_into(dweight_sum, dlogits.t(), hidden[tokens], accumulate=accumulate)
            if dbias_sum is not None:
                dbias_sum += dlogits.sum(dim=0, dtype=dtype)
        _finish(dweight_rows, dweight_sum, unscale, accumulate=accumulate_dweight)
        _finish(None if dbias is None else dbias[rows], dbias_sum, unscale)
    _finish(dhidden, dhidden_sum, unscale)


def scale_into_fp16(bound: Tensor) -> tuple[Tensor, Tensor]:
    """A power of two that brings logit gradients of at most ``bound`` into (2¹⁴, 2¹⁵], and the factor that undoes it.

    In fp16 the gradient of a mean over many tokens, or an upstream gradient scaled against underflow elsewhere, would
    leave the range of the workspace; this way small ones keep as much of its range as there is. A power of two changes
    no bit of what stays inside.
    """
    largest = bound.amax()
    usable = (largest > 0) & torch.isfinite(largest)
    exponent = torch.ceil(torch.log2(largest.where(usable, 1.0)))
    # fp32 holds 2^±126 as a normal number, so that neither factor is lost.
    unscale = torch.exp2((exponent - 15).clamp(-126, 126))
    return 1 / unscale, unscale


def _finish(out: Tensor | None, total: Tensor | None, unscale: Tensor | None, *, accumulate: bool = False) -> None:
    """Round a finished sum into ``out``, or add it, undoing the scale; nothing is left if ``out`` took the sum."""
    if out is None or total is None:
        return
    if unscale is not None:
        total *= unscale
    if total is not out:
        out.add_(total) if accumulate else out.copy_(total)


def _matmul_into(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
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
    except (NotImplementedError, RuntimeError, TypeError):
        return False
    return True

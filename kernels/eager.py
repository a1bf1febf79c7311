"""The local steps in plain PyTorch, one tile of logits at a time: the specification, and the path of the CPU.

    a_tj = x_t · w_j + b_j,   z_tj = transform(a_tj)      logits, never kept beyond a tile
    m_t = max_j z_tj,   s_t = Σ_j exp(z_tj − m_t)         forward, with the targets' logits and what else is wanted
    u_tj = z_tj − m_t                                     backward, from the whole vocabulary's m_t
    dz_tj = exp(u_tj) · (level_t + slope_t · u_tj) + grad_logit_sum_t · c_j + Σ_k [j = y_tk] grad_target_tk
    da_tj = dz_tj · ∂z/∂a

``T`` tokens, ``V`` rows of this rank's shard (padding already cut off), ``H`` hidden size, ``K`` targets a token. A
tile is computed in fp32 from upcast operands (fp64 for fp64), so nothing is rounded to 16 bits before the results are.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vocab_parallel_fused.kernels.sweep import GradBuffers, slices, sweep_grads
from vocab_parallel_fused.stats import DlogitsCoefficients, PartStats, Wanted, empty_stats, merge_stats, top_k_order
from vocab_parallel_fused.transform import LogitTransform

_TILE_TOKENS = 1024
_TILE_ROWS = 1024
_TILE_COPIES = 3  # logits, their gradients and the result of an elementwise step are alive together


def local_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_row: Tensor,
    class_weight: Tensor | None,
    *,
    transform: LogitTransform,
    wanted: Wanted,
) -> PartStats:
    """Statistics of this shard.

    Args:
        hidden: ``[T, H]``.
        weight: ``[V, H]``.
        bias: ``[V]`` or None.
        target_row: ``[T, K]`` int64, rows of ``weight`` that are the token's targets, −1 if not in this shard.
        class_weight: ``[V]`` fp32 (fp64 for fp64), the ``c_j`` of ``logit_sum``; None: all 1.
        transform: of the logits.
        wanted: which statistics; ``argmax`` counts rows of the shard.
    """
    T, V = hidden.shape[0], weight.shape[0]
    stats = empty_stats(target_row, _accumulator_dtype(hidden), wanted)
    chunks = []
    for t in range(0, max(T, 1), _TILE_TOKENS):
        tokens = slice(t, t + _TILE_TOKENS)
        merged = PartStats._make(None if field is None else field[tokens] for field in stats)
        for v in range(0, V, _TILE_ROWS):
            rows = slice(v, v + _TILE_ROWS)
            logits = transform.apply_(_raw_logits(hidden[tokens], weight[rows], None if bias is None else bias[rows]))
            weights = None if class_weight is None else class_weight[rows]
            tile = _tile_stats(logits, v, target_row[tokens], weights, wanted)
            merged = merge_stats(_over(torch.stack, merged, tile))
        chunks.append(merged)
    return _over(torch.cat, *chunks)


def _over(join: Callable[[list[Tensor]], Tensor], *parts: PartStats) -> PartStats:
    """Join parts field by field."""
    return PartStats._make(None if column[0] is None else join(list(column)) for column in zip(*parts, strict=True))


def _tile_stats(
    logits: Tensor, first_row: int, target_row: Tensor, class_weight: Tensor | None, wanted: Wanted
) -> PartStats:
    """Statistics of one tile ``[tokens, rows]``, which is overwritten."""
    owned, column = _target_column(target_row, first_row, logits.shape[1])
    target_logit = logits.gather(1, column).masked_fill(~owned, 0.0)
    logit_sum = None
    if wanted.logit_sum:
        logit_sum = logits.sum(dim=1) if class_weight is None else logits @ class_weight
    max_logit, argmax = logits.max(dim=1)
    # Where all logits are −inf the reference must be finite, or −inf − −inf would make a NaN.
    differences = logits.sub_(max_logit.masked_fill(max_logit == -torch.inf, 0.0)[:, None])
    exps = differences.exp()
    sum_exp_logit = None
    if wanted.expected_logit:
        # A class of logit −inf has probability 0, and 0 · −inf must be 0.
        sum_exp_logit = (exps * differences.masked_fill_(differences == -torch.inf, 0.0)).sum(dim=1)
    return PartStats(
        max_logit,
        exps.sum(dim=1),
        target_logit,
        torch.zeros_like(target_logit),
        logit_sum,
        sum_exp_logit,
        argmax + first_row if wanted.argmax else None,
    )


def local_grads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_row: Tensor,
    target_logit: Tensor,
    class_weight: Tensor | None,
    max_logit: Tensor,
    coefficients: DlogitsCoefficients,
    buffers: GradBuffers,
    *,
    transform: LogitTransform,
    workspace_bytes: int,
) -> None:
    """Write this shard's gradients.

    Args:
        hidden, weight, bias, target_row, class_weight, transform: as in :func:`local_stats`.
        target_logit: ``[T, K]`` of this shard, as :func:`local_stats` returned it.
        max_logit: ``[T]`` of the whole vocabulary.
        coefficients: of the gradient of the logits.
        buffers: for the gradients that are wanted.
        workspace_bytes: memory for the tile of logit gradients and its temporaries.
    """
    del target_logit  # recomputed with its tile
    dtype = _accumulator_dtype(hidden)
    level, slope, grad_logit_sum, grad_target_logit = coefficients

    def write_dlogits(tokens: slice, rows: slice, out: Tensor) -> None:
        logits = transform.apply_(_raw_logits(hidden[tokens], weight[rows], None if bias is None else bias[rows]))
        differences = logits - max_logit[tokens, None]
        torch.exp(differences, out=out)
        if slope is None:
            out *= level[tokens, None]
        else:
            differences.masked_fill_(differences == -torch.inf, 0.0)
            out *= differences.mul_(slope[tokens, None]).add_(level[tokens, None])
        if grad_logit_sum is not None:
            weights = 1.0 if class_weight is None else class_weight[rows]
            out += grad_logit_sum[tokens, None] * weights
        owned, column = _target_column(target_row[tokens], rows.start, out.shape[1])
        out.scatter_add_(1, column, grad_target_logit[tokens] * owned)
        transform.times_derivative_(out, logits)

    sweep_grads(
        write_dlogits,
        hidden,
        weight,
        buffers,
        dlogits_dtype=dtype,
        bytes_per_logit=_TILE_COPIES * dtype.itemsize,
        workspace_bytes=workspace_bytes,
        tile=(32, 32),
        largest=(_TILE_TOKENS, _TILE_ROWS),
    )


def local_top_k(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    *,
    transform: LogitTransform,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    """The ``k`` largest logits ``[T, k]`` of this shard and their rows, of several equal ones the smallest rows.

    In no particular order. −inf and row −1 fill up where the shard has fewer than ``k`` rows.

    Args:
        hidden, weight, bias, transform: as in :func:`local_stats`.
        k: how many, at least 1.
        workspace_bytes: memory for a block of logits.
    """
    del workspace_bytes  # a tile, as in the other steps
    T, V = hidden.shape[0], weight.shape[0]
    top_logit = hidden.new_full((T, k), -torch.inf, dtype=_accumulator_dtype(hidden))
    top_row = hidden.new_full((T, k), -1, dtype=torch.int64)
    for tokens in slices(T, _TILE_TOKENS):
        for rows in slices(V, _TILE_ROWS):
            logits = transform.apply_(_raw_logits(hidden[tokens], weight[rows], None if bias is None else bias[rows]))
            row = torch.arange(rows.start, rows.stop, device=hidden.device).expand_as(logits)
            logits, row = torch.cat((top_logit[tokens], logits), 1), torch.cat((top_row[tokens], row), 1)
            order = top_k_order(logits, row, k)
            top_logit[tokens], top_row[tokens] = logits.gather(1, order), row.gather(1, order)
    return top_logit, top_row


def _accumulator_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _raw_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[tokens, rows] in the accumulator's precision, before the transform."""
    dtype = _accumulator_dtype(hidden)
    logits = hidden.to(dtype) @ weight.to(dtype).t()
    return logits if bias is None else logits.add_(bias.to(dtype))


def _target_column(target_row: Tensor, first_row: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """Whether each target is in the tile, and its column there (0 where it is not), ``[tokens, K]`` each."""
    column = target_row - first_row
    owned = (column >= 0) & (column < num_rows)
    return owned, column.where(owned, 0)

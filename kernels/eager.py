"""The local steps in plain PyTorch, one tile of logits at a time: the specification, and the path of the CPU.

    z_tj = x_t · w_j + b_j                        logits, never kept beyond a tile
    lse_t = log Σ_j exp(z_tj)                     forward, with the target's logit
    dz_tj = p_tj · g_lse_t + [j = y_t] · g_target_t,   p_tj = exp(z_tj − lse_t)     backward

``T`` tokens, ``V`` rows of this rank's shard (padding already cut off), ``H`` hidden size. A tile is computed in fp32
from upcast operands (fp64 for fp64), so nothing is rounded to 16 bits before the results are.
"""

import torch
from torch import Tensor

from vocab_parallel_fused.kernels.sweep import DlogitsCoefficients, sweep_grads
from vocab_parallel_fused.stats import TokenStats, merge_stats

_TILE_TOKENS = 1024
_TILE_ROWS = 1024
_TILE_COPIES = 3  # logits, probabilities and the result of an elementwise step are alive together


def local_stats(hidden: Tensor, weight: Tensor, bias: Tensor | None, target_row: Tensor) -> TokenStats:
    """Statistics ``[T]`` of this shard.

    Args:
        hidden: ``[T, H]``.
        weight: ``[V, H]``.
        bias: ``[V]`` or None.
        target_row: ``[T]`` int64, the row of ``weight`` that is the token's target, −1 if it is not in this shard.
    """
    T, V = hidden.shape[0], weight.shape[0]
    owners = (target_row >= 0).to(_accumulator_dtype(hidden))
    stats = TokenStats(torch.full_like(owners, -torch.inf), torch.zeros_like(owners), owners)
    for t in range(0, T, _TILE_TOKENS):
        tokens = slice(t, t + _TILE_TOKENS)
        merged = torch.stack([column[tokens] for column in stats])
        for v in range(0, V, _TILE_ROWS):
            rows = slice(v, v + _TILE_ROWS)
            logits = _logits(hidden[tokens], weight[rows], None if bias is None else bias[rows])
            owned, column = _target_column(target_row[tokens], v, logits.shape[1])
            target_logit = logits.gather(1, column[:, None])[:, 0].masked_fill(~owned, 0.0)
            tile = torch.stack((torch.logsumexp(logits, dim=1), target_logit, torch.zeros_like(target_logit)))
            merged = torch.stack(merge_stats(torch.stack((merged, tile))))
        for column, values in zip(stats, merged, strict=True):
            column[tokens] = values
    return stats


def local_grads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_row: Tensor,
    target_logit: Tensor,
    lse: Tensor,
    grad_lse: Tensor,
    grad_target_logit: Tensor,
    *,
    dhidden: Tensor | None,
    dweight: Tensor | None,
    accumulate_dweight: bool,
    dbias: Tensor | None,
    workspace_bytes: int,
) -> None:
    """Write this shard's gradients.

    Args:
        hidden, weight, bias, target_row: as in :func:`local_stats`.
        target_logit: ``[T]`` of this shard, as :func:`local_stats` returned it.
        lse: ``[T]`` of the whole vocabulary, fp32.
        grad_lse, grad_target_logit: ``[T]`` upstream gradients of the two statistics, fp32.
        dhidden: ``[T, H]``, overwritten with this shard's share of the hidden states' gradient; None: not wanted.
        dweight: ``[V, H]``, overwritten, or added to if ``accumulate_dweight``; None: not wanted.
        dbias: ``[V]``, overwritten; None: not wanted.
        workspace_bytes: memory for the tile of logit gradients and its temporaries.
    """
    del target_logit  # recomputed with its tile
    dtype = _accumulator_dtype(hidden)

    def write_dlogits(tokens: slice, rows: slice, coefficients: DlogitsCoefficients, out: Tensor) -> None:
        torch.exp(
            _logits(hidden[tokens], weight[rows], None if bias is None else bias[rows]) - lse[tokens, None], out=out
        )
        out *= coefficients.grad_lse[tokens, None]
        owned, column = _target_column(target_row[tokens], rows.start, out.shape[1])
        out.scatter_add_(1, column[:, None], (coefficients.grad_target_logit[tokens] * owned)[:, None])

    sweep_grads(
        write_dlogits,
        hidden,
        weight,
        DlogitsCoefficients(grad_lse, grad_target_logit),
        dlogits_dtype=dtype,
        bytes_per_logit=_TILE_COPIES * dtype.itemsize,
        workspace_bytes=workspace_bytes,
        tile=(32, 32),
        largest=(_TILE_TOKENS, _TILE_ROWS),
        dhidden=dhidden,
        dweight=dweight,
        accumulate_dweight=accumulate_dweight,
        dbias=dbias,
    )


def _accumulator_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[tokens, rows] in the accumulator's precision."""
    dtype = _accumulator_dtype(hidden)
    logits = hidden.to(dtype) @ weight.to(dtype).t()
    return logits if bias is None else logits.add_(bias.to(dtype))


def _target_column(target_row: Tensor, first_row: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """Whether each token's target is in the tile, and its column there (0 where it is not)."""
    column = target_row - first_row
    owned = (column >= 0) & (column < num_rows)
    return owned, column.where(owned, 0)

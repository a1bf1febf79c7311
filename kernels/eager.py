"""The local steps in plain PyTorch, one tile of logits at a time: the specification, and the path of the CPU.

    a_tj = x_t · w_j + b_j,   z_tj = transform(a_tj)      logits, never kept beyond a tile
    m_t = max_j z_tj,   s_t = Σ_j exp(z_tj − m_t)         forward, with the targets' logits and what else is wanted
    u_tj = z_tj − m_t                                     backward, from the whole vocabulary's m_t
    dz_tj = exp(u_tj) · (level_t + slope_t · u_tj) + grad_logit_sum_t · c_j + Σ_k [j = y_tk] grad_target_tk
    da_tj = dz_tj · ∂z/∂a

``T`` tokens, ``V`` rows of this rank's shard (padding already cut off), ``H`` hidden size, ``K`` targets a token. A
tile is computed in fp32 from upcast operands (fp64 for fp64), so nothing is rounded to 16 bits before the results are.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vocab_parallel_fused.arrival import Arrival
from vocab_parallel_fused.exp_cache import ExpCache
from vocab_parallel_fused.kernels.plan import slices
from vocab_parallel_fused.kernels.sweep import GradBuffers, sweep_grads
from vocab_parallel_fused.stats import (
    DlogitsCoefficients,
    MergedStats,
    PartStats,
    TokenLoss,
    Wanted,
    count_classes,
    empty_joint_stats,
    empty_stats,
    merge_stats,
    stacked,
    top_k_order,
    whole_stats,
)
from vocab_parallel_fused.transform import Operands

_TILE_TOKENS = 1024
_TILE_ROWS = 1024
_TILE_COPIES = 3  # logits, their gradients and the result of an elementwise step are alive together
# Of a logit from the largest one: exp is 0 there, in fp64 too, and 0 times a finite number is no NaN.
_LEAST_DIFFERENCE = -1000.0


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
    """Statistics of the parts that make up this shard, stacked, and what is kept for the backward: here nothing.

    Args:
        head: hidden states of all tokens, and this shard's rows.
        target_row: ``[T, K]`` int64, rows of the shard that are the token's targets; other numbers: not in this shard.
        class_weight: ``[V]`` fp32 (fp64 for fp64), the ``c_j`` of ``logit_sum``; None: all 1.
        wanted: which statistics; ``argmax`` counts rows of the shard.
        exp_cache_bytes: memory that may be kept.
        arrival: of hidden states that are on their way; None: all are here.
        one_part: merge them all. Else there may be several, here there never are.
    """
    del exp_cache_bytes  # to take an exponential again costs nothing beside this implementation's products
    del one_part
    if arrival is not None:
        arrival.wait()
    T, V = head.hidden.shape[0], head.weight.shape[0]
    stats = empty_stats(target_row, _accumulator_dtype(head.hidden), wanted)
    chunks = []
    for tokens in slices(max(T, 1), _TILE_TOKENS):
        merged = PartStats._make(None if field is None else field[tokens] for field in stats)
        for rows in slices(V, _TILE_ROWS):
            weights = None if class_weight is None else class_weight[rows]
            tile = _tile_stats(_logits(head.block(tokens, rows)), rows.start, target_row[tokens], weights, wanted)
            merged = merge_stats(_over(torch.stack, merged, tile))
        chunks.append(merged)
    return stacked(_over(torch.cat, *chunks)), None


def _over(join: Callable[[list[Tensor]], Tensor], *parts: PartStats) -> PartStats:
    """Join parts field by field."""
    return PartStats._make(None if column[0] is None else join(list(column)) for column in zip(*parts, strict=True))


def _tile_stats(
    logits: Tensor, first_row: int, target_row: Tensor, class_weight: Tensor | None, wanted: Wanted
) -> PartStats:
    """Statistics of one tile ``[tokens, rows]``, which is overwritten."""
    owned, column = _target_column(target_row, first_row, logits.shape[1])
    target_logit = logits.gather(1, column).masked_fill(~owned, 0.0)
    max_logit, argmax = logits.max(dim=1)
    # Where all logits are −inf the reference must be finite, or −inf − −inf would make a NaN.
    differences = logits.sub_(max_logit.masked_fill(max_logit == -torch.inf, 0.0)[:, None])
    exps = differences.exp()
    class_sum = logit_sum = sum_exp_logit = None
    if wanted.logit_sum:
        weights = logits.new_ones(logits.shape[1]) if class_weight is None else class_weight
        class_sum, logit_sum = weights.sum().expand_as(max_logit), differences @ weights
    if wanted.expected_logit:
        # A class of logit −inf has probability 0, and 0 · −inf must be 0.
        sum_exp_logit = (exps * differences.masked_fill_(differences == -torch.inf, 0.0)).sum(dim=1)
    return PartStats(
        max_logit,
        exps.sum(dim=1),
        target_logit,
        owned.to(logits.dtype),
        class_sum,
        logit_sum,
        sum_exp_logit,
        argmax=argmax + first_row if wanted.argmax else None,
    )


def local_grads(
    head: Operands,
    target_row: Tensor,
    target_logit: Tensor,
    class_weight: Tensor | None,
    max_logit: Tensor,
    coefficients: DlogitsCoefficients,
    cache: ExpCache | None,
    buffers: GradBuffers,
    workspace_bytes: int,
    arrival: Arrival | None,
) -> None:
    """Write this shard's gradients.

    Args:
        head, target_row, class_weight: as in :func:`local_stats`.
        target_logit: ``[T, K]`` of this shard, as :func:`local_stats` returned it.
        max_logit: ``[T]`` of the whole vocabulary.
        coefficients: of the gradient of the logits.
        cache: what :func:`local_stats` kept.
        buffers: for the gradients that are wanted.
        workspace_bytes: memory for the tile of logit gradients and its temporaries.
        arrival: as in :func:`local_stats`.
    """
    del target_logit, cache  # recomputed with its tile; there is none
    if arrival is not None:
        arrival.wait()
    dtype = _accumulator_dtype(head.hidden)
    level, slope, grad_logit_sum, grad_target_logit = coefficients

    def write_dlogits(tokens: slice, rows: slice, out: Tensor) -> None:
        logits = _logits(head.block(tokens, rows))
        differences = logits - max_logit[tokens, None]
        torch.exp(differences, out=out)
        if slope is None:
            out *= level[tokens, None]
        else:
            differences.clamp_(min=_LEAST_DIFFERENCE)
            out *= differences.mul_(slope[tokens, None]).add_(level[tokens, None])
        if grad_logit_sum is not None:
            weights = 1.0 if class_weight is None else class_weight[rows]
            out += grad_logit_sum[tokens, None] * weights
        owned, column = _target_column(target_row[tokens], rows.start, out.shape[1])
        # Not 0 times a gradient that may be infinite: others' targets are added to some class too.
        out.scatter_add_(1, column, grad_target_logit[tokens].masked_fill(~owned, 0.0))
        head.transform.times_derivative_(out, logits)

    sweep_grads(
        write_dlogits,
        head,
        buffers,
        dlogits_dtype=dtype,
        bytes_per_logit=_TILE_COPIES * dtype.itemsize,
        workspace_bytes=workspace_bytes,
        tile=(32, 32),
        largest=(_TILE_TOKENS, _TILE_ROWS),
    )


def token_stats(
    parts: PartStats, sizes: Tensor | None, target: Tensor, vocab_size: int, ignore_index: int
) -> MergedStats:
    """The statistics of the whole vocabulary.

    Args:
        parts: of the whole vocabulary, stacked.
        sizes: ``[N, 4]`` what ``stats.count_classes`` takes, or None.
        target: ``[T, K]`` class ids.
        vocab_size: how many classes there are.
        ignore_index: targets that are left out.
    """
    whole = merge_stats(parts)
    return MergedStats(whole, whole_stats(whole), *_cover(whole, sizes, target, vocab_size, ignore_index))


def _cover(
    whole: PartStats, sizes: Tensor | None, target: Tensor, vocab_size: int, ignore_index: int
) -> tuple[Tensor, Tensor | None]:
    """``covered`` and ``num_classes`` as in ``MergedStats``."""
    covered = ((whole.owners == 1) | (target == ignore_index)).all()
    num_classes = None if sizes is None else count_classes(sizes)
    if num_classes is not None:
        covered &= num_classes == vocab_size
    return covered, num_classes


def token_loss(
    parts: PartStats, sizes: Tensor | None, target: Tensor, vocab_size: int, ignore_index: int, reduction: str
) -> TokenLoss:
    """The cross-entropy without any option, as ``cross_entropy.cross_entropy`` has it.

    Args:
        parts, sizes, target, vocab_size, ignore_index: as in :func:`token_stats`, with one target of each token.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``.
    """
    whole = merge_stats(parts)
    valid = target[:, 0] != ignore_index
    differences = (whole.target_logit[:, 0] - whole.max_logit).clamp_(max=0)
    loss = torch.where(valid, whole.sum_exp.log() - differences, 0.0)
    num_valid = valid.sum().clamp_(min=1).to(loss.dtype)
    if reduction != "none":
        loss = loss.sum() / num_valid if reduction == "mean" else loss.sum()
    return TokenLoss(loss, *whole[:4], num_valid, *_cover(whole, sizes, target, vocab_size, ignore_index))


def token_loss_grads(
    grad: Tensor, sum_exp: Tensor, target: Tensor, num_valid: Tensor | None, ignore_index: int
) -> DlogitsCoefficients:
    """The gradient of the logits of :func:`token_loss`.

    Args:
        grad: upstream gradient, shaped like the loss.
        sum_exp: ``[T]`` of the whole vocabulary.
        target, ignore_index: as in :func:`token_loss`.
        num_valid: what the loss was divided by, if it was.
    """
    valid = target[:, 0] != ignore_index
    grads = torch.where(valid, grad if num_valid is None else grad / num_valid, 0.0)
    return DlogitsCoefficients(grads / sum_exp, None, None, -grads[:, None])


def local_top_k(head: Operands, k: int, workspace_bytes: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest logits ``[T, k]`` of this shard and their rows, of several equal ones the smallest rows.

    In no particular order. −inf and row −1 fill up where the shard has fewer than ``k`` rows.

    Args:
        head: as in :func:`local_stats`.
        k: how many, at least 1.
        workspace_bytes: memory for a block of logits.
    """
    del workspace_bytes  # a tile, as in the other steps
    T, V = head.hidden.shape[0], head.weight.shape[0]
    top_logit = head.hidden.new_full((T, k), -torch.inf, dtype=_accumulator_dtype(head.hidden))
    top_row = head.hidden.new_full((T, k), -1, dtype=torch.int64)
    for tokens in slices(T, _TILE_TOKENS):
        for rows in slices(V, _TILE_ROWS):
            logits = _logits(head.block(tokens, rows))
            row = torch.arange(rows.start, rows.stop, device=logits.device).expand_as(logits)
            logits, row = torch.cat((top_logit[tokens], logits), 1), torch.cat((top_row[tokens], row), 1)
            order = top_k_order(logits, row, k)
            top_logit[tokens], top_row[tokens] = logits.gather(1, order), row.gather(1, order)
    return top_logit, top_row


def local_joint_stats(a: Operands, b: Operands, *, cross: bool) -> PartStats:
    """``max_logit`` and ``sum_exp`` ``[2, T]`` of two heads over the same rows, and ``cross`` ``[T]`` if wanted.

    Args:
        a, b: the heads. Their hidden sizes may differ.
        cross: the ``Σ_j exp(u_aj) (u_aj − u_bj)`` of the divergence of ``b`` from ``a``.
    """
    T, V = a.hidden.shape[0], a.weight.shape[0]
    stats = empty_joint_stats(T, _accumulator_dtype(a.hidden), a.hidden.device, cross=cross)
    for tokens in slices(T, _TILE_TOKENS):
        num_tokens = tokens.stop - tokens.start
        merged = empty_joint_stats(num_tokens, stats.sum_exp.dtype, stats.sum_exp.device, cross=cross)
        for rows in slices(V, _TILE_ROWS):
            logits = torch.stack([_logits(head.block(tokens, rows)) for head in (a, b)])
            max_logit = logits.amax(dim=2)
            differences = logits.sub_(max_logit.masked_fill(max_logit == -torch.inf, 0.0)[..., None])
            exps = differences.exp()
            sum_cross = None
            if cross:
                # What has no probability under a contributes nothing, whatever it has under b.
                sum_cross = torch.where(exps[0] > 0, exps[0] * (differences[0] - differences[1]), 0.0).sum(dim=1)
            tile = merged._replace(max_logit=max_logit, sum_exp=exps.sum(dim=2), cross=sum_cross)
            merged = merge_stats(_over(torch.stack, merged, tile))
        for field, values in (
            (stats.max_logit, merged.max_logit),
            (stats.sum_exp, merged.sum_exp),
            (stats.cross, merged.cross),
        ):
            if field is not None and values is not None:
                field[..., tokens] = values
    return stats


def local_js_sums(a: Operands, b: Operands, max_logit: Tensor, log_sum_exp: Tensor) -> Tensor:
    """``Σ_j p_j log(p_j / m_j)`` ``[2, T]`` over this shard's rows, for ``p`` of either head and ``m`` their mean.

    Args:
        a, b: the heads.
        max_logit, log_sum_exp: ``[2, T]`` of the whole vocabulary.
    """
    T, V = a.hidden.shape[0], a.weight.shape[0]
    sums = torch.zeros_like(log_sum_exp)
    for tokens in slices(T, _TILE_TOKENS):
        for rows in slices(V, _TILE_ROWS):
            log_probs = _log_probs(a, b, max_logit, log_sum_exp, tokens, rows)
            log_ratios = log_probs - (torch.logaddexp(*log_probs) - math.log(2))
            probs = log_probs.exp()
            sums[:, tokens] += torch.where(probs == 0, 0.0, probs * log_ratios).sum(dim=2)  # a NaN stays
    return sums


def local_divergence_grads(
    student: Operands,
    teacher: Operands,
    max_logit: Tensor,
    log_sum_exp: Tensor,
    center: Tensor,
    grad: Tensor,
    buffers: GradBuffers,
    divergence: str,
    workspace_bytes: int,
) -> None:
    """Write this shard's gradients of the student's inputs; the teacher is a constant.

    With ``p`` the student's probabilities, ``q`` the teacher's, ``m`` their mean, and upstream gradient ``g``:

        forward_kl       dz_j = g (p_j − q_j)
        reverse_kl       dz_j = g p_j (log(p_j / q_j) − center)         center = KL(p ‖ q)
        jensen_shannon   dz_j = g p_j (log(p_j / m_j) − center) / 2     center = KL(p ‖ m)

    Args:
        student, teacher: the heads.
        max_logit, log_sum_exp: ``[2, T]`` of the whole vocabulary, the student's and the teacher's.
        center: ``[T]`` as above.
        grad: ``[T]`` upstream gradients of the tokens' divergences.
        buffers: for the student's gradients that are wanted.
        divergence: one of the three.
        workspace_bytes: memory for the tile of logit gradients and its temporaries.
    """
    dtype = _accumulator_dtype(student.hidden)

    def write_dlogits(tokens: slice, rows: slice, out: Tensor) -> None:
        log_p, log_q = _log_probs(student, teacher, max_logit, log_sum_exp, tokens, rows)
        p = log_p.exp()
        if divergence == "forward_kl":
            dlogits = p - log_q.exp()
        else:
            other = log_q if divergence == "reverse_kl" else torch.logaddexp(log_p, log_q) - math.log(2)
            dlogits = torch.where(p == 0, 0.0, p * (log_p - other - center[tokens, None]))
            if divergence == "jensen_shannon":
                dlogits = dlogits / 2
        torch.mul(dlogits, grad[tokens, None], out=out)
        logits = log_p.add_((max_logit + log_sum_exp)[0, tokens, None])
        student.transform.times_derivative_(out, logits)
        out.masked_fill_(grad[tokens, None] == 0, 0.0)  # also where a divergence is infinite

    sweep_grads(
        write_dlogits,
        student,
        buffers,
        dlogits_dtype=dtype,
        bytes_per_logit=2 * _TILE_COPIES * dtype.itemsize,
        workspace_bytes=workspace_bytes,
        tile=(32, 32),
        largest=(_TILE_TOKENS, _TILE_ROWS),
    )


def _log_probs(a: Operands, b: Operands, max_logit: Tensor, log_sum_exp: Tensor, tokens: slice, rows: slice) -> Tensor:
    """[2, tokens, rows] log-probabilities of both heads over the whole vocabulary."""
    logits = torch.stack([_logits(head.block(tokens, rows)) for head in (a, b)])
    return logits.sub_(max_logit[:, tokens, None]).sub_(log_sum_exp[:, tokens, None])


def _logits(head: Operands) -> Tensor:
    """[tokens, rows] in the accumulator's precision."""
    dtype = _accumulator_dtype(head.hidden)
    raw = head.hidden.to(dtype) @ head.weight.to(dtype).t()
    return head.transform.apply_(raw if head.bias is None else raw.add_(head.bias.to(dtype)))


def _accumulator_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _target_column(target_row: Tensor, first_row: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """Whether each target is in the tile, and its column there (0 where it is not), ``[tokens, K]`` each."""
    column = target_row - first_row
    owned = (column >= 0) & (column < num_rows)
    return owned, column.where(owned, 0)

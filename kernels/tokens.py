"""What is computed of ``[T]`` numbers, each in one launch: as operations of torch it takes some thirty.

    m_t = max_p m_pt,   s_t = Σ_p s_pt · exp(m_pt − m_t)      parts ``p`` of the vocabulary, ranks' or tiles', merged

``token_stats_kernel`` merges all statistics so, see ``stats.py``, and gives those of the whole. The plain cross-entropy
needs no more than ``token_loss_kernel`` and, for the backward, ``token_loss_grads_kernel``:

    loss_t = log s_t − min(z_t(y_t) − m_t, 0)  if y_t is not ignored, else 0;    their sum or mean
    level_t = g_t / s_t,    grad_target_t = −g_t      what the backward needs to know of it, 0 if y_t is ignored

The mean of many tokens is the work of several programs, of which the last to come adds up the sums of all; a counter
tells which that is, whose zero is a launch more. Any other loss is made of statistics by torch's own operations, see
``cross_entropy.py``.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vocab_parallel_fused.kernels.launcher import Launcher
from vocab_parallel_fused.kernels.tiles import INTERPRETED
from vocab_parallel_fused.stats import (
    DIGIT,
    NO_CLASS,
    DlogitsCoefficients,
    MergedStats,
    PartStats,
    TokenLoss,
    TokenStats,
)

# The interpreter takes each number that is reduced by itself.
_LAUNCH: dict[str, Any] = {"BLOCK_T": 128 if INTERPRETED else 1024, "BLOCK_P": 1, "num_warps": 8}
# Of few tokens each tile may have left a part: one program takes them all, so many numbers at a time.
_FEW_TOKENS = (16, 64, 128)
_FEW_TOKENS_NUMBERS = 2**8 if INTERPRETED else 2**13
_GRADS_LAUNCH: dict[str, Any] = {"BLOCK_T": 512}
_DIGIT = tl.constexpr(DIGIT)
_NO_CLASS = tl.constexpr(NO_CLASS)
_BLOCK_SUMS = tl.constexpr(128)  # of programs that are added up at a time
# Pointers of the kernels that merge parts. Parts may lie anywhere in a message, and what comes of them is little.
_PARTS = [f"part_{name}_ptr" for name in ("max", "sum_exp", "target_logit", "owners")]
_MERGED = [f"{name}_ptr" for name in ("sizes", "target", "max", "sum_exp", "target_logit", "owners")]
_MERGED += ["covered_ptr", "num_classes_ptr"]
_OF_LOSS = ["loss_ptr", "total_ptr", "num_valid_ptr", "sums_ptr", "counter_ptr"]
_OF_STATS = [f"{part}{name}_ptr" for name in ("logit_sum", "sum_exp_logit") for part in ("", "part_")]
_OF_STATS += ["part_class_sum_ptr", "lse_ptr", "difference_ptr", "expected_logit_ptr", "argmax_ptr"]
_OF_GRADS = [f"{name}_ptr" for name in ("grad", "sum_exp", "target", "num_valid", "level", "grad_target_logit")]
_DO_NOT_SPECIALIZE = ["P", "T", "stride_part", "N", "stride_sizes"]


@triton.jit(
    do_not_specialize=_DO_NOT_SPECIALIZE,
    do_not_specialize_on_alignment=[*_PARTS, *_MERGED, *_OF_STATS],
)
def token_stats_kernel(
    part_max_ptr,  # [P, T]
    part_sum_exp_ptr,  # [P, T]
    part_target_logit_ptr,  # [P, T, K], or None: no targets
    part_owners_ptr,  # [P, T, K], or None
    part_class_sum_ptr,  # [P, T], or None
    part_logit_sum_ptr,  # [P, T], or None
    part_sum_exp_logit_ptr,  # [P, T], or None
    part_argmax_ptr,  # [P, T] of any integers, or None
    sizes_ptr,  # [N, 4] as `stats.count_classes` takes them, or None
    target_ptr,  # [T, K] int64, or None
    max_ptr,  # [T] out
    sum_exp_ptr,  # [T] out
    target_logit_ptr,  # [T, K] out, or None
    owners_ptr,  # [T, K] out, or None
    logit_sum_ptr,  # [T] out, or None
    sum_exp_logit_ptr,  # [T] out, or None
    lse_ptr,  # [T] out, and the others as `TokenStats` has them
    difference_ptr,  # [T, K] out, the targets', or None
    expected_logit_ptr,  # [T] out, or None
    argmax_ptr,  # [T] int64 out, or None
    covered_ptr,  # [programs] int32 out: 1 if every valid target has one owner, and the parts have all classes
    num_classes_ptr,  # [] int64 out, or None if there are no sizes
    P,
    T,
    K,  # 1 without targets
    stride_part,
    N,
    stride_sizes,
    vocab_size,
    ignore_index,
    BLOCK_T: tl.constexpr,  # targets, not tokens
    BLOCK_P: tl.constexpr,
):
    offs_n = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_t = offs_n // K
    mask_n = offs_n < T * K
    maximum, sum_exp, logit_sum, sum_exp_logit = _merge_parts(  # pyright: ignore[reportGeneralTypeIssues]
        part_max_ptr,
        part_sum_exp_ptr,
        part_class_sum_ptr,
        part_logit_sum_ptr,
        part_sum_exp_logit_ptr,
        offs_t,
        mask_n,
        P,
        stride_part,
        BLOCK_T,
        BLOCK_P,
    )
    # What is a token's own, all its targets write.
    tl.store(max_ptr + offs_t, maximum, mask=mask_n)
    tl.store(sum_exp_ptr + offs_t, sum_exp, mask=mask_n)
    tl.store(lse_ptr + offs_t, tl.log(sum_exp), mask=mask_n)
    if logit_sum_ptr is not None:
        tl.store(logit_sum_ptr + offs_t, logit_sum, mask=mask_n)
    if sum_exp_logit_ptr is not None:
        tl.store(sum_exp_logit_ptr + offs_t, sum_exp_logit, mask=mask_n)
        tl.store(expected_logit_ptr + offs_t, tl.div_rn(sum_exp_logit, sum_exp), mask=mask_n)
    if argmax_ptr is not None:
        smallest = tl.full((BLOCK_T, BLOCK_P), _NO_CLASS, tl.int64)
        for first in range(0, P, BLOCK_P):
            offs, mask = _block_of_parts(first, offs_t, mask_n, P, stride_part, BLOCK_P)  # pyright: ignore[reportGeneralTypeIssues]
            part_max = tl.load(part_max_ptr + offs, mask=mask, other=-float("inf"))
            offs, mask = _block_of_parts(first, offs_t, mask_n, P, T, BLOCK_P)  # pyright: ignore[reportGeneralTypeIssues]
            part_argmax = tl.load(part_argmax_ptr + offs, mask=mask, other=0).to(tl.int64)
            is_largest = mask & (part_max == maximum[:, None])
            smallest = tl.minimum(smallest, tl.where(is_largest, part_argmax, _NO_CLASS))
        argmax = tl.where(sum_exp == sum_exp, tl.min(smallest, axis=1), -1)  # noqa: PLR0124 (a NaN is not)
        tl.store(argmax_ptr + offs_t, argmax, mask=mask_n)
    num_bad = tl.zeros((), tl.int32)
    if target_ptr is not None:
        target_logit = _sum_of_parts(part_target_logit_ptr, offs_n, mask_n, P, stride_part, BLOCK_T, BLOCK_P)
        owners = _sum_of_parts(part_owners_ptr, offs_n, mask_n, P, stride_part, BLOCK_T, BLOCK_P)
        tl.store(target_logit_ptr + offs_n, target_logit, mask=mask_n)
        tl.store(owners_ptr + offs_n, owners, mask=mask_n)
        tl.store(difference_ptr + offs_n, _below_largest(target_logit, maximum), mask=mask_n)
        valid = mask_n & (tl.load(target_ptr + offs_n, mask=mask_n, other=0) != ignore_index)
        num_bad = tl.sum((valid & (owners != 1.0)).to(tl.int32))
    covered = num_bad == 0
    if sizes_ptr is not None:
        num_classes = _count_classes(sizes_ptr, N, stride_sizes)
        tl.store(num_classes_ptr, num_classes)
        covered &= num_classes == vocab_size
    tl.store(covered_ptr + tl.program_id(0), covered.to(tl.int32))


_launch_stats = Launcher(token_stats_kernel)


@triton.jit(
    do_not_specialize=_DO_NOT_SPECIALIZE,
    do_not_specialize_on_alignment=[*_PARTS, *_MERGED, *_OF_LOSS],
)
def token_loss_kernel(
    part_max_ptr,  # [P, T]
    part_sum_exp_ptr,  # [P, T]
    part_target_logit_ptr,  # [P, T]
    part_owners_ptr,  # [P, T]
    sizes_ptr,  # [N, 4] as `stats.count_classes` takes them, or None
    target_ptr,  # [T] int64
    max_ptr,  # [T] out
    sum_exp_ptr,  # [T] out
    target_logit_ptr,  # [T] out
    owners_ptr,  # [T] out
    loss_ptr,  # [T] out, or None: reduce
    total_ptr,  # [] out, or None if the loss is there
    num_valid_ptr,  # [] out
    covered_ptr,  # [] int32 out: 1 if every valid target has one owner, and the parts have all classes
    num_classes_ptr,  # [] int64 out, or None if there are no sizes
    sums_ptr,  # [3, programs] scratch: loss, valid and badly owned tokens of each, or None if there is one program
    counter_ptr,  # [] int32, 0: programs that have left their sums, or None
    P,
    T,
    stride_part,
    N,
    stride_sizes,
    vocab_size,
    ignore_index,
    MEAN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    pid_t = tl.program_id(0)
    num_programs = tl.num_programs(0)
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    valid = mask_t & (tl.load(target_ptr + offs_t, mask=mask_t, other=0) != ignore_index)
    maximum, sum_exp, _, _ = _merge_parts(  # pyright: ignore[reportGeneralTypeIssues]
        part_max_ptr,
        part_sum_exp_ptr,
        None,
        None,
        None,
        offs_t,
        mask_t,
        P,
        stride_part,
        BLOCK_T,
        BLOCK_P,
    )
    target_logit = _sum_of_parts(part_target_logit_ptr, offs_t, mask_t, P, stride_part, BLOCK_T, BLOCK_P)
    owners = _sum_of_parts(part_owners_ptr, offs_t, mask_t, P, stride_part, BLOCK_T, BLOCK_P)
    tl.store(max_ptr + offs_t, maximum, mask=mask_t)
    tl.store(sum_exp_ptr + offs_t, sum_exp, mask=mask_t)
    tl.store(target_logit_ptr + offs_t, target_logit, mask=mask_t)
    tl.store(owners_ptr + offs_t, owners, mask=mask_t)
    loss = tl.where(valid, tl.log(tl.where(valid, sum_exp, 1.0)) - _below_largest(target_logit, maximum), 0.0)
    if loss_ptr is not None:
        tl.store(loss_ptr + offs_t, loss, mask=mask_t)

    total = tl.sum(loss)
    num_valid = tl.sum(valid.to(tl.float32))
    num_bad = tl.sum((valid & (owners != 1.0)).to(tl.float32))
    is_last = True
    if counter_ptr is not None:
        tl.store(sums_ptr + pid_t, total)
        tl.store(sums_ptr + num_programs + pid_t, num_valid)
        tl.store(sums_ptr + 2 * num_programs + pid_t, num_bad)
        # All threads have stored before one says so.
        tl.debug_barrier()
        is_last = tl.atomic_add(counter_ptr, 1) == num_programs - 1
    if is_last:
        if counter_ptr is not None:
            # In the order of the programs, whichever came last.
            total = _sum_of_programs(sums_ptr, num_programs)
            num_valid = _sum_of_programs(sums_ptr + num_programs, num_programs)
            num_bad = _sum_of_programs(sums_ptr + 2 * num_programs, num_programs)
        count = tl.maximum(num_valid, 1.0)
        if total_ptr is not None:
            tl.store(total_ptr, tl.div_rn(total, count) if MEAN else total)
        tl.store(num_valid_ptr, count)
        covered = num_bad == 0
        if sizes_ptr is not None:
            num_classes = _count_classes(sizes_ptr, N, stride_sizes)
            tl.store(num_classes_ptr, num_classes)
            covered &= num_classes == vocab_size
        tl.store(covered_ptr, covered.to(tl.int32))


_launch_loss = Launcher(token_loss_kernel)


@triton.jit
def _merge_parts(
    max_ptr,
    sum_exp_ptr,
    class_sum_ptr,
    logit_sum_ptr,
    sum_exp_logit_ptr,
    offs_t,
    mask_t,
    P,
    stride_part,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """`stats.merge_stats`, [BLOCK_T] each: maximum, sum_exp, logit_sum, sum_exp_logit; 0 for the latter if None."""
    # Blocks of parts are added up element by element, and what they leave in the end.
    largest = tl.full((BLOCK_T, BLOCK_P), -float("inf"), tl.float32)
    for first in range(0, P, BLOCK_P):
        offs, mask = _block_of_parts(first, offs_t, mask_t, P, stride_part, BLOCK_P)  # pyright: ignore[reportGeneralTypeIssues]
        largest = _larger(largest, tl.load(max_ptr + offs, mask=mask, other=-float("inf")))
    maximum = tl.reduce(largest, 1, _larger)
    # Where every class is −inf, −inf − −inf would make a NaN.
    finite = tl.where(maximum == -float("inf"), 0.0, maximum)
    sum_exp = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    logit_sum = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    sum_exp_logit = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    for first in range(0, P, BLOCK_P):
        offs, mask = _block_of_parts(first, offs_t, mask_t, P, stride_part, BLOCK_P)  # pyright: ignore[reportGeneralTypeIssues]
        shift = tl.load(max_ptr + offs, mask=mask, other=-float("inf")) - finite[:, None]
        scale = tl.exp(shift)
        part_sum_exp = tl.load(sum_exp_ptr + offs, mask=mask, other=0.0) * scale
        sum_exp += part_sum_exp
        if logit_sum_ptr is not None:
            # In an empty part, or one of −inf alone, nothing is left to shift.
            class_sum = tl.load(class_sum_ptr + offs, mask=mask, other=0.0)
            logit_sum += tl.load(logit_sum_ptr + offs, mask=mask, other=0.0)
            logit_sum += class_sum * tl.where(shift == -float("inf"), 0.0, shift)
        if sum_exp_logit_ptr is not None:
            sum_exp_logit += tl.load(sum_exp_logit_ptr + offs, mask=mask, other=0.0) * scale
            sum_exp_logit += part_sum_exp * tl.maximum(shift, -128.0)
    return maximum, tl.sum(sum_exp, axis=1), tl.sum(logit_sum, axis=1), tl.sum(sum_exp_logit, axis=1)


@triton.jit
def _sum_of_parts(ptr, offs_n, mask_n, P, stride_part, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr):
    """[BLOCK_T]"""
    total = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    for first in range(0, P, BLOCK_P):
        offs, mask = _block_of_parts(first, offs_n, mask_n, P, stride_part, BLOCK_P)  # pyright: ignore[reportGeneralTypeIssues]
        total += tl.load(ptr + offs, mask=mask, other=0.0)
    return tl.sum(total, axis=1)


@triton.jit
def _block_of_parts(first, offs_n, mask_n, P, stride_part, BLOCK_P: tl.constexpr):
    """Where [BLOCK_T, BLOCK_P] numbers lie, and which of them are there."""
    parts = first + tl.arange(0, BLOCK_P).to(tl.int64)
    return offs_n[:, None] + parts[None, :] * stride_part, mask_n[:, None] & (parts < P)[None, :]


@triton.jit
def _below_largest(target_logit, maximum):
    """The difference; another order of products may have rounded the target above the largest logit."""
    return tl.minimum(target_logit - maximum, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _count_classes(sizes_ptr, N, stride_sizes):
    """`stats.count_classes`."""
    num_classes = tl.zeros((), dtype=tl.int64)
    num_others = tl.zeros((), dtype=tl.int32)
    high, low = tl.load(sizes_ptr + 2), tl.load(sizes_ptr + 3)
    for n in range(N):
        size_ptr = sizes_ptr + n * stride_sizes
        num_classes += tl.load(size_ptr).to(tl.int64) * _DIGIT + tl.load(size_ptr + 1).to(tl.int64)
        num_others += (tl.load(size_ptr + 2) != high) | (tl.load(size_ptr + 3) != low)
    return tl.where(num_others > 0, -1 - num_classes, num_classes)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _sum_of_programs(ptr, num_programs):
    total = tl.zeros((_BLOCK_SUMS,), dtype=tl.float32)
    for first in range(0, num_programs, _BLOCK_SUMS):
        offs = first + tl.arange(0, _BLOCK_SUMS)
        # From where the other programs' stores are seen.
        total += tl.load(ptr + offs, mask=offs < num_programs, other=0.0, cache_modifier=".cg")
    return tl.sum(total)


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=_OF_GRADS)
def token_loss_grads_kernel(
    grad_ptr,  # [T], or [] with stride 0
    sum_exp_ptr,  # [T]
    target_ptr,  # [T] int64
    num_valid_ptr,  # [] or None: 1
    level_ptr,  # [T] out
    grad_target_logit_ptr,  # [T] out
    T,
    ignore_index,
    stride_grad_t,
    BLOCK_T: tl.constexpr,
):
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    valid = mask_t & (tl.load(target_ptr + offs_t, mask=mask_t, other=0) != ignore_index)
    grad = tl.load(grad_ptr + offs_t * stride_grad_t, mask=valid, other=0.0)
    if num_valid_ptr is not None:
        grad = tl.div_rn(grad, tl.load(num_valid_ptr))
    sum_exp = tl.load(sum_exp_ptr + offs_t, mask=valid, other=1.0)
    tl.store(level_ptr + offs_t, tl.div_rn(grad, sum_exp), mask=mask_t)
    tl.store(grad_target_logit_ptr + offs_t, -grad, mask=mask_t)


_launch_grads = Launcher(token_loss_grads_kernel)


def token_stats(
    parts: PartStats, sizes: Tensor | None, target: Tensor, vocab_size: int, ignore_index: int
) -> MergedStats:
    """As ``eager.token_stats``."""
    T, num_targets = target.shape
    num_numbers = T * max(1, num_targets)
    launch = token_launch(num_numbers)
    num_programs = max(1, -(-num_numbers // launch["BLOCK_T"]))

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return target.new_empty(shape, dtype=dtype)

    max_logit, sum_exp, lse = empty(T), empty(T), empty(T)
    target_logit, owners, difference = (empty(T, num_targets) for _ in range(3))
    logit_sum = None if parts.logit_sum is None else empty(T)
    sum_exp_logit, expected_logit = (None, None) if parts.sum_exp_logit is None else (empty(T), empty(T))
    argmax = None if parts.argmax is None else empty(T, dtype=torch.int64)
    covered = empty(num_programs, dtype=torch.int32)
    num_classes = None if sizes is None else empty(dtype=torch.int64)
    of_targets = {
        "part_target_logit_ptr": parts.target_logit,
        "part_owners_ptr": parts.owners,
        "target_ptr": target,
        "target_logit_ptr": target_logit,
        "owners_ptr": owners,
        "difference_ptr": difference,
    }
    arguments = {
        **(of_targets if num_targets > 0 else dict.fromkeys(of_targets)),
        **_of_parts(parts, sizes, vocab_size, ignore_index),
        "part_class_sum_ptr": parts.class_sum,
        "part_logit_sum_ptr": parts.logit_sum,
        "part_sum_exp_logit_ptr": parts.sum_exp_logit,
        "part_argmax_ptr": parts.argmax,
        "max_ptr": max_logit,
        "sum_exp_ptr": sum_exp,
        "logit_sum_ptr": logit_sum,
        "sum_exp_logit_ptr": sum_exp_logit,
        "lse_ptr": lse,
        "expected_logit_ptr": expected_logit,
        "argmax_ptr": argmax,
        "covered_ptr": covered,
        "num_classes_ptr": num_classes,
        "K": max(1, num_targets),
        **launch,
    }
    _launch_stats(num_programs, target.device, arguments)
    whole = PartStats(max_logit, sum_exp, target_logit, owners, None, logit_sum, sum_exp_logit)
    stats = TokenStats(max_logit, lse, difference, logit_sum, expected_logit, argmax)
    return MergedStats(whole, stats, covered if num_programs == 1 else covered.all(), num_classes)


def _of_parts(parts: PartStats, sizes: Tensor | None, vocab_size: int, ignore_index: int) -> dict[str, Any]:
    """Arguments of both kernels that merge."""
    P, T = parts.max_logit.shape
    return {
        "part_max_ptr": parts.max_logit,
        "part_sum_exp_ptr": parts.sum_exp,
        "sizes_ptr": sizes,
        "P": P,
        "T": T,
        # Of several parts all fields are in the same message.
        "stride_part": parts.max_logit.stride(0),
        "N": 0 if sizes is None else sizes.shape[0],
        "stride_sizes": 0 if sizes is None else sizes.stride(0),
        "vocab_size": vocab_size,
        "ignore_index": ignore_index,
    }


def token_loss(
    parts: PartStats, sizes: Tensor | None, target: Tensor, vocab_size: int, ignore_index: int, reduction: str
) -> TokenLoss:
    """As ``eager.token_loss``."""
    T = target.shape[0]
    loss = target.new_empty(T if reduction == "none" else (), dtype=torch.float32)
    # Not parts of one tensor, of which the backward would hold all.
    max_logit, sum_exp = loss.new_empty(T), loss.new_empty(T)
    target_logit, owners = loss.new_empty(T, 1), loss.new_empty(T, 1)
    num_valid, covered = loss.new_empty(()), loss.new_empty((), dtype=torch.int32)
    num_classes = None if sizes is None else loss.new_empty((), dtype=torch.int64)
    launch = token_launch(T)
    num_programs = -(-T // launch["BLOCK_T"])
    sums = counter = None
    if num_programs > 1:
        sums = loss.new_empty(3, num_programs)
        counter = torch.zeros((), dtype=torch.int32, device=loss.device)
    arguments = {
        **_of_parts(parts, sizes, vocab_size, ignore_index),
        "part_target_logit_ptr": parts.target_logit,
        "part_owners_ptr": parts.owners,
        "target_ptr": target,
        "max_ptr": max_logit,
        "sum_exp_ptr": sum_exp,
        "target_logit_ptr": target_logit,
        "owners_ptr": owners,
        "loss_ptr": loss if reduction == "none" else None,
        "total_ptr": None if reduction == "none" else loss,
        "num_valid_ptr": num_valid,
        "covered_ptr": covered,
        "num_classes_ptr": num_classes,
        "sums_ptr": sums,
        "counter_ptr": counter,
        "MEAN": reduction == "mean",
        **launch,
    }
    _launch_loss(max(1, num_programs), loss.device, arguments)
    return TokenLoss(loss, max_logit, sum_exp, target_logit, owners, num_valid, covered, num_classes)


def token_launch(num_numbers: int) -> dict[str, Any]:
    """How the kernels that merge are launched on so many tokens, or targets."""
    for block_t in _FEW_TOKENS:
        if num_numbers <= block_t:
            return _LAUNCH | {"BLOCK_T": block_t, "BLOCK_P": _FEW_TOKENS_NUMBERS // block_t}
    return _LAUNCH


def token_loss_grads(
    grad: Tensor, sum_exp: Tensor, target: Tensor, num_valid: Tensor | None, ignore_index: int
) -> DlogitsCoefficients:
    """As ``eager.token_loss_grads``."""
    T = target.shape[0]
    level, grad_target_logit = torch.empty_like(sum_exp), torch.empty_like(target, dtype=sum_exp.dtype)
    arguments = {
        "grad_ptr": grad,
        "sum_exp_ptr": sum_exp,
        "target_ptr": target,
        "num_valid_ptr": num_valid,
        "level_ptr": level,
        "grad_target_logit_ptr": grad_target_logit,
        "T": T,
        "ignore_index": ignore_index,
        "stride_grad_t": grad.stride(0) if grad.ndim > 0 else 0,
        **_GRADS_LAUNCH,
    }
    _launch_grads(-(-T // _GRADS_LAUNCH["BLOCK_T"]), target.device, arguments)
    return DlogitsCoefficients(level, None, None, grad_target_logit)

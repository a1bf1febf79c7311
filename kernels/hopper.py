"""Tiles of logits on Hopper, with loads, products and what follows them each in warps of their own.

A kernel of Triton's has one program per tile, and an SM has room for one program: while it takes exponentials, or
waits for its first loads, the matrix units stand still. Here one program stays on each SM and walks over the tiles. One
warp loads, ahead into the next tile; two groups of four warps take half of each tile's tokens each, and while one of
them is busy with its exponentials the other may still multiply. Written in Gluon, the language beneath Triton, for fp16
and bf16.

``full[s]`` completes when the operands of stage ``s`` have arrived, ``empty[s]`` when both groups have read them. Use
``n`` of a stage is phase ``n`` of ``full``, so its reader waits for parity ``n % 2``. The loader waits until use
``n − 1`` is over: parity ``1 − n % 2``, which of a fresh barrier counts as complete.

The one kernel has the epilogues of ``forward.partial_stats_kernel``, but for the sum of the logits and the argument of
the largest, and of ``backward.dlogits_kernel``, but for that sum's gradient. An output or operand that is None is not
wanted. The statistics of a strip of tiles merge in registers, so that the partials of any vocabulary fit one launch.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Annotations of Gluon's constants are for its compiler.

import functools
from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from vocab_parallel_fused.kernels.tiles import (
    LEAST_LOG2,
    LN2,
    LOG2E,
    log2_from,
    num_processors,
    tile_position,
    times_derivative,
    transform_kwargs,
    transform_logits,
)
from vocab_parallel_fused.transform import Operands

BLOCK_T, BLOCK_V = 128, 256
STORE_V = 64  # columns of a store: 128 bytes, the widest swizzle
# Eight short stages, not four long ones, so that less of a tile's first product waits for its operands.
_LAUNCH: dict[str, Any] = {"BLOCK_H": 32, "STAGES": 8, "GROUP_T": 16, "num_warps": 4}
_LONGEST_STRIP = 8
# Kernels may read globals that are constexpr.
_BLOCK_T = gl.constexpr(BLOCK_T)
_HALF_T = gl.constexpr(BLOCK_T // 2)
_BLOCK_V = gl.constexpr(BLOCK_V)
_STORE_V = gl.constexpr(STORE_V)
_STORE_BUFFERS = gl.constexpr(2)

# Triton 3.9 renamed these two.
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def _next_stage(stage, phase, STAGES: gl.constexpr):
    stage += 1
    wrapped = stage == STAGES
    return gl.where(wrapped, 0, stage), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def _load_tiles(
    hidden, weight, hidden_smem, weight_smem, full, empty, T, V, H, strip, BLOCK_H: gl.constexpr,
    STAGES: gl.constexpr, GROUP_T: gl.constexpr,
):  # fmt: skip
    """The loader's walk. What lies past the ends arrives as zeros."""
    num_t, num_v = gl.cdiv(T, _BLOCK_T), gl.cdiv(V, _BLOCK_V)
    num_strips = gl.cdiv(num_v, strip)
    stage, phase = gl.to_tensor(0), gl.to_tensor(1)
    for index in range(gl.program_id(0), num_t * num_strips, gl.num_programs(0)):
        pid_t, pid_strip = tile_position(index, num_t, num_strips, GROUP_T)
        for pid_v in range(pid_strip * strip, gl.minimum((pid_strip + 1) * strip, num_v)):
            for off_h in range(0, H, BLOCK_H):
                arrived = full.index(stage)
                mbarrier.wait(empty.index(stage), phase)
                mbarrier.expect(arrived, (_BLOCK_T + _BLOCK_V) * BLOCK_H * 2)
                for half in gl.static_range(2):
                    off_t = pid_t * _BLOCK_T + half * _HALF_T
                    _load(hidden, [off_t, off_h], arrived, hidden_smem.index(2 * stage + half))
                _load(weight, [pid_v * _BLOCK_V, off_h], arrived, weight_smem.index(stage))
                stage, phase = _next_stage(stage, phase, STAGES)


@gluon.jit
def _product(hidden_smem, weight_smem, full, empty, stage, phase, H, HALF: gl.constexpr, BLOCK_H: gl.constexpr,
             STAGES: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """x · w [_HALF_T, _BLOCK_V] in fp32, and the next stage. A stage is let go once the product after it has begun."""
    mbarrier.wait(full.index(stage), phase)
    z = gl.zeros([_HALF_T, _BLOCK_V], gl.float32, layout)
    z = warpgroup_mma(hidden_smem.index(2 * stage + HALF), weight_smem.index(stage).permute([1, 0]), z, is_async=True)
    z = warpgroup_mma_wait(1, deps=[z])
    before = stage
    stage, phase = _next_stage(stage, phase, STAGES)
    for _ in range(BLOCK_H, H, BLOCK_H):
        mbarrier.wait(full.index(stage), phase)
        x, w = hidden_smem.index(2 * stage + HALF), weight_smem.index(stage)
        z = warpgroup_mma(x, w.permute([1, 0]), z, is_async=True)
        z = warpgroup_mma_wait(1, deps=[z])
        mbarrier.arrive(empty.index(before), count=1)
        before = stage
        stage, phase = _next_stage(stage, phase, STAGES)
    z = warpgroup_mma_wait(0, deps=[z])
    mbarrier.arrive(empty.index(before), count=1)
    return z, stage, phase


@gluon.jit
def _store_columns(out, values, out_smem, off_t, off_v, layout: gl.constexpr, COLUMNS: gl.constexpr):
    """values [_HALF_T, COLUMNS] in pieces that take turns in the buffers."""
    if COLUMNS > _STORE_V:
        left, right = values.reshape([_HALF_T, 2, COLUMNS // 2]).permute(0, 2, 1).split()
        _store_columns(out, left, out_smem, off_t, off_v, layout, COLUMNS // 2)
        _store_columns(out, right, out_smem, off_t, off_v + COLUMNS // 2, layout, COLUMNS // 2)
    else:
        piece: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _STORE_V, 16])
        buffer = out_smem.index((off_v // _STORE_V) % _STORE_BUFFERS)
        # All but the latest stores have read their buffers.
        tma.store_wait(_STORE_BUFFERS - 1)
        buffer.store(gl.convert_layout(values.to(out.dtype), piece, assert_trivial=True))
        fence_async_shared()
        _store(out, [off_t, off_v], buffer)


@gluon.jit
def _merge(maximum, sum_exp, sum_exp_logit, tile_max, tile_sum_exp, tile_sum_exp_logit):
    """Two parts of a token's classes, as in `forward.merge_partials_kernel`."""
    new_max = gl.maximum(maximum, tile_max)
    finite = gl.where(new_max == -float("inf"), 0.0, new_max)
    shift, tile_shift = maximum - finite, tile_max - finite
    scale, tile_scale = gl.exp2(shift * LOG2E), gl.exp2(tile_shift * LOG2E)
    tile_sum_exp_logit += tile_sum_exp * gl.maximum(tile_shift, -128.0)
    sum_exp_logit += sum_exp * gl.maximum(shift, -128.0)
    return (
        new_max,
        sum_exp * scale + tile_sum_exp * tile_scale,
        sum_exp_logit * scale + tile_sum_exp_logit * tile_scale,
    )


@gluon.jit
def _reduce_tiles(
    bias_ptr, out, out_smem, partial_max_ptr, partial_sum_exp_ptr, partial_sum_exp_logit_ptr, reference_ptr, max_ptr,
    level_ptr, slope_ptr, hidden_smem, weight_smem, full, empty, T, V, H, strip, inner, outer, HALF: gl.constexpr,
    BLOCK_H: gl.constexpr, STAGES: gl.constexpr, GROUP_T: gl.constexpr, TRANSFORM: gl.constexpr,
):  # fmt: skip
    """The walk of the group that has this half of each tile's tokens."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _BLOCK_V, 16])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    columns: gl.constexpr = gl.SliceLayout(0, layout)
    num_t, num_v = gl.cdiv(T, _BLOCK_T), gl.cdiv(V, _BLOCK_V)
    num_strips = gl.cdiv(num_v, strip)
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    for index in range(gl.program_id(0), num_t * num_strips, gl.num_programs(0)):
        pid_t, pid_strip = tile_position(index, num_t, num_strips, GROUP_T)
        off_t = pid_t * _BLOCK_T + HALF * _HALF_T
        offs_t = off_t + gl.arange(0, _HALF_T, rows)
        mask_t = offs_t < T
        # Read before the product, which hides the wait for them.
        if reference_ptr is not None:
            reference = gl.load(reference_ptr + offs_t, mask=mask_t, other=0.0)
        if level_ptr is not None:
            finite = gl.load(max_ptr + offs_t, mask=mask_t, other=0.0)
            level = gl.load(level_ptr + offs_t, mask=mask_t, other=0.0)
        if slope_ptr is not None:
            slope = gl.load(slope_ptr + offs_t, mask=mask_t, other=0.0)
        maximum = gl.full([_HALF_T], -float("inf"), gl.float32, rows)
        sum_exp = gl.zeros([_HALF_T], gl.float32, rows)
        sum_exp_logit = sum_exp

        for pid_v in range(pid_strip * strip, gl.minimum((pid_strip + 1) * strip, num_v)):
            z, stage, phase = _product(
                hidden_smem, weight_smem, full, empty, stage, phase, H, HALF, BLOCK_H, STAGES, layout
            )
            off_v = pid_v * _BLOCK_V
            offs_v = off_v + gl.arange(0, _BLOCK_V, columns)
            if bias_ptr is not None:
                z += gl.load(bias_ptr + offs_v, mask=offs_v < V, other=0.0).to(gl.float32)[None, :]
            z = transform_logits(z, inner, outer, TRANSFORM)
            if level_ptr is None:
                if off_v + _BLOCK_V > V:
                    z = gl.where((offs_v < V)[None, :], z, -float("inf"))
                tile_max = gl.max(z, axis=1)
                # A bias may be −inf for a whole tile.
                finite = gl.where(tile_max == -float("inf"), 0.0, tile_max)
            shifted, rounding = log2_from(z, finite)
            largest = gl.exp2(rounding)
            exps = gl.exp2(shifted)
            if level_ptr is None:
                # Rounded correctly, since a sum that falls below 1 would make a positive log-probability.
                tile_sum_exp = gl.div_rn(gl.sum(exps, axis=1), largest)
                tile_sum_exp_logit = tile_sum_exp
                if partial_sum_exp_logit_ptr is not None:
                    terms = exps * gl.maximum(shifted - rounding[:, None], LEAST_LOG2)
                    tile_sum_exp_logit = gl.sum(terms, axis=1) * (LN2 / largest)
                maximum, sum_exp, sum_exp_logit = _merge(
                    maximum, sum_exp, sum_exp_logit, tile_max, tile_sum_exp, tile_sum_exp_logit
                )
                if reference_ptr is not None:
                    exps *= (gl.exp2((finite - reference) * LOG2E) / largest)[:, None]
            elif slope_ptr is not None:
                differences = gl.maximum(shifted - rounding[:, None], LEAST_LOG2)
                exps *= (level / largest)[:, None] + (slope * (LN2 / largest))[:, None] * differences
            else:
                exps *= (level / largest)[:, None]
            if out is not None:
                values = times_derivative(exps, z, inner, outer, TRANSFORM)
                _store_columns(out, values, out_smem, off_t, off_v, layout, _BLOCK_V)

        offs = pid_strip.to(gl.int64) * T + offs_t
        if partial_max_ptr is not None:
            gl.store(partial_max_ptr + offs, maximum, mask=mask_t)
            gl.store(partial_sum_exp_ptr + offs, sum_exp, mask=mask_t)
        if partial_sum_exp_logit_ptr is not None:
            gl.store(partial_sum_exp_logit_ptr + offs, sum_exp_logit, mask=mask_t)
    if out is not None:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "V", "H", "strip"])
def tiles_kernel(
    hidden,  # [T, H] descriptor of [_HALF_T, BLOCK_H] blocks
    weight,  # [V, H] descriptor of [_BLOCK_V, BLOCK_H] blocks
    bias_ptr,  # [V] or None
    out,  # [T, V] descriptor of [_HALF_T, _STORE_V] blocks, out, or None: kept exponentials, or dlogits
    partial_max_ptr,  # [num_strips, T] out, or None: write dlogits
    partial_sum_exp_ptr,  # [num_strips, T] out, or None
    partial_sum_exp_logit_ptr,  # [num_strips, T] out, or None
    reference_ptr,  # [T] or None: keep no exponentials
    max_ptr,  # [T] or None
    level_ptr,  # [T] or None: write statistics
    slope_ptr,  # [T] or None
    T,
    V,
    H,
    strip,  # tiles of the same tokens that leave one partial
    inner,
    outer,
    BLOCK_H: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_T: gl.constexpr,
    TRANSFORM: gl.constexpr,
):
    operand: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * BLOCK_H, element_bitwidth=16, rank=2)
    hidden_smem = gl.allocate_shared_memory(hidden.dtype, [2 * STAGES, _HALF_T, BLOCK_H], operand)
    weight_smem = gl.allocate_shared_memory(hidden.dtype, [STAGES, _BLOCK_V, BLOCK_H], operand)
    out_smem_0 = hidden_smem
    out_smem_1 = hidden_smem
    if out is not None:
        stored: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        out_smem_0 = gl.allocate_shared_memory(hidden.dtype, [_STORE_BUFFERS, _HALF_T, _STORE_V], stored)
        out_smem_1 = gl.allocate_shared_memory(hidden.dtype, [_STORE_BUFFERS, _HALF_T, _STORE_V], stored)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _reduce_tiles,
                (
                    bias_ptr, out, out_smem_0, partial_max_ptr, partial_sum_exp_ptr, partial_sum_exp_logit_ptr,
                    reference_ptr, max_ptr, level_ptr, slope_ptr, hidden_smem, weight_smem, full, empty, T, V, H,
                    strip, inner, outer, 0, BLOCK_H, STAGES, GROUP_T, TRANSFORM,
                ),
            ),
            (
                _reduce_tiles,
                (
                    bias_ptr, out, out_smem_1, partial_max_ptr, partial_sum_exp_ptr, partial_sum_exp_logit_ptr,
                    reference_ptr, max_ptr, level_ptr, slope_ptr, hidden_smem, weight_smem, full, empty, T, V, H,
                    strip, inner, outer, 1, BLOCK_H, STAGES, GROUP_T, TRANSFORM,
                ),
            ),
            (
                _load_tiles,
                (hidden, weight, hidden_smem, weight_smem, full, empty, T, V, H, strip, BLOCK_H, STAGES, GROUP_T),
            ),
        ],
        [4, 1],  # warps of the second group and of the loader
        [240, 24],  # and their registers per thread
    )  # fmt: skip


def takes(hidden: Tensor, arch: str) -> bool:
    """Whether this kernel computes the tiles of these tokens: on Hopper, in 16 bits, if they are more than half a tile.
    The operands must be aligned."""
    return arch == "sm_90" and hidden.dtype.itemsize == 2 and hidden.shape[0] > BLOCK_T // 2


def tokens_per_launch(num_rows: int, bytes_per_token: int, partial_bytes: int) -> int:
    """How many tokens to take at a time so that strips stay short, as programs that drift apart share no loads.

    Args:
        num_rows: ``V``.
        bytes_per_token: of one partial.
        partial_bytes: memory for the partials of a launch.
    """
    partials = -(-num_rows // (_LONGEST_STRIP * BLOCK_V))
    group = _LAUNCH["GROUP_T"] * BLOCK_T
    return max(1, partial_bytes // (bytes_per_token * partials * group)) * group


def launch_tiles(head: Operands, out: Tensor | None, *, strip: int = 1, **pointers: Tensor | None) -> None:
    """Launch the kernel on one block of rows.

    Args:
        head: its tokens and rows.
        out: ``[T, V]`` in the inputs' dtype, or None. Up to 7 elements past the end of each row are overwritten.
        strip: how many tiles of the same tokens leave one partial.
        **pointers: of the kernel's arguments; None is not wanted, and as good as left out.
    """
    hidden, weight, bias, transform = head
    T, V = hidden.shape[0], weight.shape[0]
    num_strips = -(-T // BLOCK_T) * -(-V // (strip * BLOCK_V))
    every = dict.fromkeys(name for name in tiles_kernel.arg_names if name.endswith("_ptr"))
    wanted = {name: pointer for name, pointer in pointers.items() if pointer is not None}
    block_h = _LAUNCH["BLOCK_H"]
    tiles_kernel[(min(num_strips, num_processors(hidden.device)),)](
        hidden=_descriptor(hidden, BLOCK_T // 2, block_h),
        weight=_descriptor(weight, BLOCK_V, block_h),
        out=None if out is None else _descriptor(out, BLOCK_T // 2, STORE_V),
        T=T,
        V=V,
        H=min(hidden.shape[1], weight.shape[1]),
        strip=strip,
        **(every | wanted | {"bias_ptr": bias}),
        **transform_kwargs(transform),
        **_LAUNCH,
    )


def _descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, [rows, columns], _swizzled(columns))


@functools.cache
def _swizzled(columns: int) -> Any:
    """The layout in shared memory of rows of so many 16-bit numbers."""
    return gl.NVMMASharedLayout(swizzle_byte_width=2 * columns, element_bitwidth=16, rank=2)

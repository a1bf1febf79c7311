"""Tiles of logits on Hopper: statistics, kept exponentials and gradients of the logits from one kernel.

It has the results of ``forward.partial_stats_kernel``, but for the sum of the logits and the argument of the largest,
and of ``backward.dlogits_kernel``, but for that sum's gradient. An output or operand that is None is not wanted. The
statistics of a strip of tiles merge in registers, so that the partials of any vocabulary fit one launch. How tiles are
loaded and multiplied: ``hopper.py``.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from vocab_parallel_fused.kernels.configs import TileConfig
from vocab_parallel_fused.kernels.hopper import (
    BLOCK_M,
    BLOCK_N,
    HALF_M,
    LAUNCH,
    REGISTERS,
    TILE_M,
    TILE_N,
    WARPS,
    allocate,
    allocate_stores,
    load_tiles,
    next_number,
    operand_descriptors,
    product,
    programs,
    store_columns,
    store_descriptor,
)
from vocab_parallel_fused.kernels.launcher import Launcher
from vocab_parallel_fused.kernels.tiles import (
    LEAST_LOG2,
    LN2,
    LOG2E,
    log2_from,
    tile_position,
    times_derivative,
    transform_kwargs,
    transform_logits,
)
from vocab_parallel_fused.transform import Operands

BLOCK_T, BLOCK_V = BLOCK_M, BLOCK_N
_LONGEST_STRIP = 8


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
    bias_ptr, out, out_smem, target_row_ptr, partial_max_ptr, partial_sum_exp_ptr, partial_target_logit_ptr,
    partial_owners_ptr, partial_sum_exp_logit_ptr, reference_ptr, max_ptr, level_ptr, slope_ptr, hidden_smem,
    weight_smem, numbers, full, empty, T, V, H, strip, stride_partial, inner, outer,
    HALF: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr, TRANSFORM: gl.constexpr,
):  # fmt: skip
    """The walk of the group that has this half of each tile's tokens."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_N, 16])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    columns: gl.constexpr = gl.SliceLayout(0, layout)
    num_t, num_v = gl.cdiv(T, TILE_M), gl.cdiv(V, TILE_N)
    num_strips = gl.cdiv(num_v, strip)
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    number = next_number(numbers, full, stage, phase)
    while number >= 0:
        pid_t, pid_strip = tile_position(number, num_t, num_strips, GROUP_M)
        off_t = pid_t * TILE_M + HALF * HALF_M
        offs_t = off_t + gl.arange(0, HALF_M, rows)
        mask_t = offs_t < T
        # Read before the product, which hides the wait for them.
        if reference_ptr is not None:
            reference = gl.load(reference_ptr + offs_t, mask=mask_t, other=0.0)
        if level_ptr is not None:
            finite = gl.load(max_ptr + offs_t, mask=mask_t, other=0.0)
            level = gl.load(level_ptr + offs_t, mask=mask_t, other=0.0)
        if slope_ptr is not None:
            slope = gl.load(slope_ptr + offs_t, mask=mask_t, other=0.0)
        if target_row_ptr is not None:
            target_row = gl.load(target_row_ptr + offs_t, mask=mask_t, other=-1)
            first_row, end = pid_strip * strip * TILE_N, gl.minimum((pid_strip + 1) * strip * TILE_N, V)
            owned = (target_row >= first_row) & (target_row < end)
            # As numbers of 32 bits; −1 is no row.
            target_row = gl.where(owned, target_row, -1).to(gl.int32)
            target_logit = gl.zeros([HALF_M], gl.float32, rows)
        maximum = gl.full([HALF_M], -float("inf"), gl.float32, rows)
        sum_exp = gl.zeros([HALF_M], gl.float32, rows)
        sum_exp_logit = sum_exp

        for pid_v in range(pid_strip * strip, gl.minimum((pid_strip + 1) * strip, num_v)):
            z, stage, phase = product(
                hidden_smem, weight_smem, full, empty, stage, phase, H, HALF, BLOCK_K, STAGES, False, False, layout
            )
            off_v = pid_v * TILE_N
            offs_v = off_v + gl.arange(0, TILE_N, columns)
            if bias_ptr is not None:
                z += gl.load(bias_ptr + offs_v, mask=offs_v < V, other=0.0).to(gl.float32)[None, :]
            z = transform_logits(z, inner, outer, TRANSFORM)
            if level_ptr is None:
                if off_v + TILE_N > V:
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
                if target_row_ptr is not None:
                    target_logit += gl.sum(gl.where(offs_v[None, :] == target_row[:, None], z, 0.0), axis=1)
                if reference_ptr is not None:
                    exps *= (gl.exp2((tile_max - reference) * LOG2E) / largest)[:, None]
            elif slope_ptr is not None:
                differences = gl.maximum(shifted - rounding[:, None], LEAST_LOG2)
                exps *= (level / largest)[:, None] + (slope * (LN2 / largest))[:, None] * differences
            else:
                exps *= (level / largest)[:, None]
            if out is not None:
                values = times_derivative(exps, z, inner, outer, TRANSFORM)
                store_columns(out, values, out_smem, off_t, off_v, layout, TILE_N)

        offs = pid_strip.to(gl.int64) * stride_partial + offs_t
        if partial_max_ptr is not None:
            gl.store(partial_max_ptr + offs, maximum, mask=mask_t)
            gl.store(partial_sum_exp_ptr + offs, sum_exp, mask=mask_t)
        if target_row_ptr is not None:
            gl.store(partial_target_logit_ptr + offs, target_logit, mask=mask_t)
            gl.store(partial_owners_ptr + offs, owned.to(gl.float32), mask=mask_t)
        if partial_sum_exp_logit_ptr is not None:
            gl.store(partial_sum_exp_logit_ptr + offs, sum_exp_logit, mask=mask_t)
        number = next_number(numbers, full, stage, phase)
    if out is not None:
        tma.store_wait(0)


# Numbers of tokens, of which each thread has a few that do not lie beside each other.
_OF_TOKENS = [f"partial_{name}_ptr" for name in ("max", "sum_exp", "target_logit", "owners", "sum_exp_logit")]
_OF_TOKENS += [f"{name}_ptr" for name in ("target_row", "reference", "max", "level", "slope", "counter")]


@gluon.jit(
    do_not_specialize=["T", "V", "H", "strip", "stride_partial", "inner", "outer"],
    do_not_specialize_on_alignment=_OF_TOKENS,
)
def tiles_kernel(
    hidden,  # [T, H] descriptor
    weight,  # [V, H] descriptor
    bias_ptr,  # [V] or None
    out,  # [T, V] descriptor, out, or None: kept exponentials, or dlogits
    target_row_ptr,  # [T] int64, or None: not looked for
    partial_max_ptr,  # [num_strips, T] out, or None: write dlogits
    partial_sum_exp_ptr,  # [num_strips, T] out, or None
    partial_target_logit_ptr,  # [num_strips, T] out, 0 where the target is not in the strip, or None
    partial_owners_ptr,  # [num_strips, T] out, 1 or 0, or None
    partial_sum_exp_logit_ptr,  # [num_strips, T] out, or None
    reference_ptr,  # [T] or None: keep no exponentials
    max_ptr,  # [T] or None
    level_ptr,  # [T] or None: write statistics
    slope_ptr,  # [T] or None
    counter_ptr,  # [1] int32, 0, or None
    T,
    V,
    H,
    strip,  # tiles of the same tokens that leave one partial
    stride_partial,  # at least T: other launches may have their tokens beside these
    inner,
    outer,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    TRANSFORM: gl.constexpr,
):
    hidden_smem, weight_smem, numbers, full, empty = allocate(hidden, weight, STAGES)
    out_smem_0 = hidden_smem
    out_smem_1 = hidden_smem
    if out is not None:
        out_smem_0, out_smem_1 = allocate_stores(out), allocate_stores(out)
    gl.warp_specialize(
        [
            (
                _reduce_tiles,
                (
                    bias_ptr, out, out_smem_0, target_row_ptr, partial_max_ptr, partial_sum_exp_ptr,
                    partial_target_logit_ptr, partial_owners_ptr, partial_sum_exp_logit_ptr, reference_ptr, max_ptr,
                    level_ptr, slope_ptr, hidden_smem, weight_smem, numbers, full, empty, T, V, H, strip,
                    stride_partial, inner, outer, 0, BLOCK_K, STAGES, GROUP_M, TRANSFORM,
                ),
            ),
            (
                _reduce_tiles,
                (
                    bias_ptr, out, out_smem_1, target_row_ptr, partial_max_ptr, partial_sum_exp_ptr,
                    partial_target_logit_ptr, partial_owners_ptr, partial_sum_exp_logit_ptr, reference_ptr, max_ptr,
                    level_ptr, slope_ptr, hidden_smem, weight_smem, numbers, full, empty, T, V, H, strip,
                    stride_partial, inner, outer, 1, BLOCK_K, STAGES, GROUP_M, TRANSFORM,
                ),
            ),
            (
                load_tiles,
                (
                    hidden, weight, hidden_smem, weight_smem, numbers, full, empty, counter_ptr, T, V, H, strip,
                    BLOCK_K, STAGES, GROUP_M, False, False,
                ),
            ),
        ],
        WARPS,
        REGISTERS,
    )  # fmt: skip


_launch = Launcher(tiles_kernel)
_NO_POINTERS = dict.fromkeys(name for name in tiles_kernel.arg_names if name.endswith("_ptr"))


def takes(hidden: Tensor, arch: str) -> bool:
    """Whether this kernel computes the tiles of these tokens: on Hopper, in 16 bits, if they are more than half a tile.
    The operands must be aligned."""
    return arch == "sm_90" and hidden.dtype.itemsize == 2 and hidden.shape[0] > BLOCK_T // 2


def tile_shape(on_hopper: bool, tile: TileConfig) -> tuple[int, int]:
    """Tokens and rows of a tile, of this kernel's or of Triton's."""
    return (BLOCK_T, BLOCK_V) if on_hopper else (tile.block_t, tile.block_v)


def tokens_per_launch(num_rows: int, bytes_per_token: int, partial_bytes: int) -> int:
    """How many tokens to take at a time so that strips stay short, as programs that drift apart share no loads.

    Args:
        num_rows: ``V``.
        bytes_per_token: of one partial.
        partial_bytes: memory for the partials of a launch.
    """
    partials = -(-num_rows // (_LONGEST_STRIP * BLOCK_V))
    group = LAUNCH["GROUP_M"] * BLOCK_T
    return max(1, partial_bytes // (bytes_per_token * partials * group)) * group


def launch_tiles(
    head: Operands,
    out: Tensor | None,
    counter: Tensor | None,
    strip: int = 1,
    stride_partial: int = 0,
    *,
    leave_room: bool = False,
    **pointers: Tensor | None,
) -> None:
    """Launch the kernel on one block of rows.

    Args:
        head: its tokens and rows.
        out: ``[T, V]`` in the inputs' dtype, or None. Up to 7 elements past the end of each row are overwritten.
        counter: one of :func:`new_counters`; None: tiles are dealt to programs in turn.
        strip: how many tiles of the same tokens leave one partial.
        stride_partial: from one partial of a token to its next.
        leave_room: see :func:`~vocab_parallel_fused.kernels.hopper.programs`.
        **pointers: others of the kernel's arguments; None is not wanted, whether the kernel has it or not.
    """
    hidden, weight, bias, transform = head
    T, V = hidden.shape[0], weight.shape[0]
    hidden_descriptor, weight_descriptor = operand_descriptors(hidden, weight)
    arguments = {
        **_NO_POINTERS,
        **{name: pointer for name, pointer in pointers.items() if pointer is not None},
        "hidden": hidden_descriptor,
        "weight": weight_descriptor,
        "bias_ptr": bias,
        "out": None if out is None else store_descriptor(out),
        "counter_ptr": counter,
        "T": T,
        "V": V,
        "H": min(hidden.shape[1], weight.shape[1]),
        "strip": strip,
        "stride_partial": stride_partial,
        **transform_kwargs(transform),
        **LAUNCH,
    }
    num_programs = programs(T, V, hidden.device, width=strip * BLOCK_V, leave_room=leave_room)
    _launch(num_programs, hidden.device, arguments)

"""Products of whole matrices on Hopper, where their rows are to be scaled, or a message shares the device.

cuBLAS is as fast with the device to itself. It deals its tiles out in advance, so that beside a message, whose kernel
holds some of the SMs, it takes longer by about as long as the message; and it cannot scale rows.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from vocab_parallel_fused.kernels.configs import is_describable
from vocab_parallel_fused.kernels.hopper import (
    BLOCK_M,
    BLOCK_N,
    HALF_M,
    LAUNCH,
    REGISTERS,
    TILE_M,
    WARPS,
    allocate,
    allocate_stores,
    load_tiles,
    new_counters,
    next_number,
    operand_descriptors,
    product,
    programs,
    store_columns,
    store_descriptor,
)
from vocab_parallel_fused.kernels.plan import ceil_div
from vocab_parallel_fused.kernels.streams import Fork
from vocab_parallel_fused.kernels.sweep import matmul_into
from vocab_parallel_fused.kernels.tiles import current_arch, num_processors, tile_position

# Where the last wave leaves so many processors idle, cuBLAS has a tile that fits better.
_LEAST_FILLED = 0.9
_NARROW = BLOCK_N // 4
# What a message keeps processors from for each byte that is sent, counted in operations of the matrix units: on an H200
# NCCL holds 24 SMs for 0.17 ms to send 32 MiB.
_FLOPS_PER_BYTE_SENT = 760


@gluon.jit
def _store_tiles(
    out, out_smem, scale_ptr, x_smem, w_smem, numbers, full, empty, M, N, K, HALF: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr, X_TRANSPOSED: gl.constexpr,
    W_TRANSPOSED: gl.constexpr,
):  # fmt: skip
    """The walk of the group that has this half of each tile's rows."""
    WIDTH: gl.constexpr = w_smem.shape[2 if W_TRANSPOSED else 1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    num_m, num_n = gl.cdiv(M, TILE_M), gl.cdiv(N, WIDTH)
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    number = next_number(numbers, full, stage, phase)
    while number >= 0:
        pid_m, pid_n = tile_position(number, num_m, num_n, GROUP_M)
        off_m = pid_m * TILE_M + HALF * HALF_M
        if scale_ptr is not None:
            offs_m = off_m + gl.arange(0, HALF_M, gl.SliceLayout(1, layout))
            scale = gl.load(scale_ptr + offs_m, mask=offs_m < M, other=0.0)
        z, stage, phase = product(
            x_smem, w_smem, full, empty, stage, phase, K, HALF, BLOCK_K, STAGES, X_TRANSPOSED, W_TRANSPOSED, layout
        )
        if scale_ptr is not None:
            z *= scale[:, None]
        store_columns(out, z, out_smem, off_m, pid_n * WIDTH, layout, WIDTH)
        number = next_number(numbers, full, stage, phase)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "K"])
def matmul_kernel(
    x,  # [M, K] or, transposed, [K, M] descriptor
    w,  # [N, K] or, transposed, [K, N] descriptor
    out,  # [M, N] descriptor, out
    scale_ptr,  # [M] or None: 1
    counter_ptr,  # [1] int32, 0
    M,
    N,
    K,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    X_TRANSPOSED: gl.constexpr,
    W_TRANSPOSED: gl.constexpr,
):
    x_smem, w_smem, numbers, full, empty = allocate(x, w, STAGES)
    out_smem_0, out_smem_1 = allocate_stores(out), allocate_stores(out)
    gl.warp_specialize(
        [
            (
                _store_tiles,
                (
                    out, out_smem_0, scale_ptr, x_smem, w_smem, numbers, full, empty, M, N, K, 0, BLOCK_K, STAGES,
                    GROUP_M, X_TRANSPOSED, W_TRANSPOSED,
                ),
            ),
            (
                _store_tiles,
                (
                    out, out_smem_1, scale_ptr, x_smem, w_smem, numbers, full, empty, M, N, K, 1, BLOCK_K, STAGES,
                    GROUP_M, X_TRANSPOSED, W_TRANSPOSED,
                ),
            ),
            (
                load_tiles,
                (
                    x, w, x_smem, w_smem, numbers, full, empty, counter_ptr, M, N, K, 1, BLOCK_K, STAGES, GROUP_M,
                    X_TRANSPOSED, W_TRANSPOSED,
                ),
            ),
        ],
        WARPS,
        REGISTERS,
    )  # fmt: skip


def takes(out: Tensor, a: Tensor, b: Tensor, *, beside: bool = False) -> bool:
    """Whether this kernel computes ``out = a @ b``: on Hopper, of 16 bits, aligned, and with nearly whole waves."""
    if current_arch() != "sm_90" or a.dtype != b.dtype or a.dtype.itemsize != 2:
        return False
    if out.dtype not in (a.dtype, torch.float32) or not all(map(is_describable, (out, _stored(a), _stored(b)))):
        return False
    (M, N), processors = out.shape, num_processors(out.device)
    # Beside a message, where cuBLAS takes longer, half of the last wave may be idle.
    parts = 2 if beside else 1
    waves = ceil_div(ceil_div(M, BLOCK_M) * ceil_div(N, BLOCK_N) * parts, processors) / parts
    filled = M * N / (waves * processors * BLOCK_M * BLOCK_N) if waves else 0.0
    # The copy engine stores whole groups of 8 columns.
    return a.shape[1] > 0 and N % 8 == 0 and filled >= _LEAST_FILLED


def matmul(out: Tensor, a: Tensor, b: Tensor, row_scale: Tensor | None = None, message_bytes: int = 0) -> None:
    """``out = row_scale[:, None] · (a @ b)``, rounded once.

    Args:
        out: ``[M, N]`` in the operands' dtype or fp32.
        a, b: ``[M, K]`` and ``[K, N]``, either a transpose or not.
        row_scale: ``[M]`` fp32; None: 1.
        message_bytes: of a message that shares the device.
    """
    counters = new_counters(out.device, 2)
    wide = out.shape[0] - _narrow_rows(out, a.shape[1], message_bytes)
    with Fork(out.device) as fork:
        _launch(out[:wide], a[:wide], b, None if row_scale is None else row_scale[:wide], counters[0], BLOCK_N)
        if wide < out.shape[0]:
            with fork.aside():
                _launch(out[wide:], a[wide:], b, None if row_scale is None else row_scale[wide:], counters[1], _NARROW)


def _launch(out: Tensor, a: Tensor, b: Tensor, row_scale: Tensor | None, counter: Tensor, width: int) -> None:
    x_transposed, w_transposed = _stored(a) is not a, _stored(b) is b
    x, w = operand_descriptors(
        _stored(a), _stored(b), x_transposed=x_transposed, w_transposed=w_transposed, width=width
    )
    matmul_kernel[(programs(*out.shape, out.device, width=width),)](
        x=x,
        w=w,
        out=store_descriptor(out),
        scale_ptr=row_scale,
        counter_ptr=counter,
        M=out.shape[0],
        N=out.shape[1],
        K=a.shape[1],
        X_TRANSPOSED=x_transposed,
        W_TRANSPOSED=w_transposed,
        **LAUNCH,
    )


def _narrow_rows(out: Tensor, K: int, message_bytes: int) -> int:
    """How many of the last rows to take in narrow tiles: a third of a wave, which spread over a last one that is not
    full, if a message makes a wave more."""
    (M, N), processors = out.shape, num_processors(out.device)
    blocks_m, blocks_n = ceil_div(M, BLOCK_M), ceil_div(N, BLOCK_N)
    tiles = blocks_m * blocks_n
    tiles_of_message = ceil_div(_FLOPS_PER_BYTE_SENT * message_bytes, 2 * BLOCK_M * BLOCK_N * K)
    if ceil_div(tiles + tiles_of_message, processors) == ceil_div(tiles, processors):
        return 0
    narrow = min(ceil_div(processors, 3 * blocks_n), blocks_m // 2)
    return max(0, M - (blocks_m - narrow) * BLOCK_M)


def matmul_beside(out: Tensor, a: Tensor, b: Tensor, *, message_bytes: int) -> None:
    """As :func:`matmul_into`, for a product beside a message."""
    if takes(out, a, b, beside=True):
        matmul(out, a, b, message_bytes=message_bytes)
    else:
        matmul_into(out, a, b)


def _stored(matrix: Tensor) -> Tensor:
    """It or its transpose, whichever has contiguous rows."""
    return matrix if matrix.stride(1) == 1 else matrix.t()

"""Hopper's products: loads, multiplications and what follows them each in warps of their own.

A kernel of Triton's has one program per tile, and an SM has room for one program: while it takes exponentials, stores,
or waits for its first loads, the matrix units stand still. Here one program stays on each SM and walks over tiles
``[BLOCK_M, WIDTH]`` of a product ``x @ w``. One warp loads, ahead into the next tile; two groups of four warps take
half of each tile's rows each, and while one of them is busy with what becomes of its half the other may still multiply.
Written in Gluon, the language beneath Triton, for fp16 and bf16. ``hopper_tiles.py`` makes statistics and gradients of
logits of it, ``hopper_matmul.py`` a matrix.

``full[s]`` completes when the operands of stage ``s`` have arrived, ``empty[s]`` when both groups have read them. Use
``n`` of a stage is phase ``n`` of ``full``, so its reader waits for parity ``n % 2``. The loader waits until use
``n − 1`` is over: parity ``1 − n % 2``, which of a fresh barrier counts as complete.

All tiles but a program's first are drawn from a counter, so that whoever is free takes the next: where a message's
kernel holds some of the SMs for a while, the programs that come late to them find less to do. Without a counter they
are dealt in turn. The loader leaves a tile's number with its first operands: ``numbers[s]`` is to be read once
``full[s]`` is complete, and below 0 there are no more. Which program computes a tile changes no bit of it. ``strip``
tiles of the same rows go together.

Operands lie in memory as ``x`` ``[M, K]`` and ``w`` ``[N, K]``, or the other way round where called transposed.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Annotations of Gluon's constants are for its compiler.

import functools
from typing import Any

import torch
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

from vocab_parallel_fused.kernels.tiles import num_processors, tile_position

BLOCK_M, BLOCK_N = 128, 256
# Eight short stages, not four long ones, so that less of a tile's first product waits for its operands.
LAUNCH: dict[str, Any] = {"BLOCK_K": 32, "STAGES": 8, "GROUP_M": 16, "num_warps": 4}
_WIDEST_SWIZZLE = 128  # bytes
# Kernels may read globals that are constexpr.
TILE_M, HALF_M, TILE_N = gl.constexpr(BLOCK_M), gl.constexpr(BLOCK_M // 2), gl.constexpr(BLOCK_N)
# Warps of the second group and of the loader, and their registers per thread.
WARPS, REGISTERS = gl.constexpr([4, 1]), gl.constexpr([240, 24])
_STORE_BUFFERS = gl.constexpr(2)
# SMs that NCCL holds on an H200 while it sends over NVLink.
_MESSAGE_PROCESSORS = 24

# Triton 3.9 renamed these two.
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def allocate(x, w, STAGES: gl.constexpr):
    """Shared memory of the stages, for descriptors as :func:`operand_descriptors` makes."""
    x_smem = gl.allocate_shared_memory(x.dtype, [2 * STAGES] + x.block_type.shape, x.layout)
    w_smem = gl.allocate_shared_memory(w.dtype, [STAGES] + w.block_type.shape, w.layout)
    numbers = gl.allocate_shared_memory(gl.int32, [STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    return x_smem, w_smem, numbers, full, empty


@gluon.jit
def allocate_stores(out):
    """Shared memory for what is on its way to a descriptor as :func:`store_descriptor` makes."""
    return gl.allocate_shared_memory(out.dtype, [_STORE_BUFFERS] + out.block_type.shape, out.layout)


@gluon.jit
def _next_stage(stage, phase, STAGES: gl.constexpr):
    stage += 1
    wrapped = stage == STAGES
    return gl.where(wrapped, 0, stage), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def load_tiles(
    x, w, x_smem, w_smem, numbers, full, empty, counter_ptr, M, N, K, strip, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, GROUP_M: gl.constexpr, X_TRANSPOSED: gl.constexpr, W_TRANSPOSED: gl.constexpr,
):  # fmt: skip
    """The loader's walk. What lies past the ends arrives as zeros."""
    scalar: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    WIDTH: gl.constexpr = w.block_type.shape[1 if W_TRANSPOSED else 0]
    num_m, num_n = gl.cdiv(M, TILE_M), gl.cdiv(N, WIDTH)
    num_strips = gl.cdiv(num_n, strip)
    stage, phase = gl.to_tensor(0), gl.to_tensor(1)
    number = gl.program_id(0)
    while number < num_m * num_strips:
        pid_m, pid_strip = tile_position(number, num_m, num_strips, GROUP_M)
        mbarrier.wait(empty.index(stage), phase)
        numbers.index(stage).store(gl.full([1], number, gl.int32, scalar))
        for pid_n in range(pid_strip * strip, gl.minimum((pid_strip + 1) * strip, num_n)):
            for off_k in range(0, K, BLOCK_K):
                arrived = full.index(stage)
                mbarrier.wait(empty.index(stage), phase)
                mbarrier.expect(arrived, (TILE_M + WIDTH) * BLOCK_K * 2)
                for half in gl.static_range(2):
                    off_m = pid_m * TILE_M + half * HALF_M
                    _load_block(x, off_m, off_k, arrived, x_smem.index(2 * stage + half), X_TRANSPOSED)
                _load_block(w, pid_n * WIDTH, off_k, arrived, w_smem.index(stage), W_TRANSPOSED)
                stage, phase = _next_stage(stage, phase, STAGES)
        if counter_ptr is not None:
            number = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1, sem="relaxed")
        else:
            number += gl.num_programs(0)
    mbarrier.wait(empty.index(stage), phase)
    numbers.index(stage).store(gl.full([1], -1, gl.int32, scalar))
    mbarrier.arrive(full.index(stage), count=1)


@gluon.jit
def _load_block(matrix, off_row, off_k, arrived, smem, TRANSPOSED: gl.constexpr):
    if TRANSPOSED:
        _load(matrix, [off_k, off_row], arrived, smem)
    else:
        _load(matrix, [off_row, off_k], arrived, smem)


@gluon.jit
def next_number(numbers, full, stage, phase):
    """The number of the strip whose first operands come next; below 0 there is none."""
    scalar: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.wait(full.index(stage), phase)
    return gl.max(numbers.index(stage).load(scalar), axis=0)


@gluon.jit
def product(
    x_smem, w_smem, full, empty, stage, phase, K, HALF: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    X_TRANSPOSED: gl.constexpr, W_TRANSPOSED: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """x @ w [HALF_M, WIDTH] in fp32, and the next stage. A stage is let go once the product after it has begun."""
    WIDTH: gl.constexpr = w_smem.shape[2 if W_TRANSPOSED else 1]
    mbarrier.wait(full.index(stage), phase)
    z = gl.zeros([HALF_M, WIDTH], gl.float32, layout)
    x, w = _operands(x_smem, w_smem, stage, HALF, X_TRANSPOSED, W_TRANSPOSED)
    z = warpgroup_mma(x, w, z, is_async=True)
    z = warpgroup_mma_wait(1, deps=[z])
    before = stage
    stage, phase = _next_stage(stage, phase, STAGES)
    for _ in range(BLOCK_K, K, BLOCK_K):
        mbarrier.wait(full.index(stage), phase)
        x, w = _operands(x_smem, w_smem, stage, HALF, X_TRANSPOSED, W_TRANSPOSED)
        z = warpgroup_mma(x, w, z, is_async=True)
        z = warpgroup_mma_wait(1, deps=[z])
        mbarrier.arrive(empty.index(before), count=1)
        before = stage
        stage, phase = _next_stage(stage, phase, STAGES)
    z = warpgroup_mma_wait(0, deps=[z])
    mbarrier.arrive(empty.index(before), count=1)
    return z, stage, phase


@gluon.jit
def _operands(x_smem, w_smem, stage, HALF: gl.constexpr, X_TRANSPOSED: gl.constexpr, W_TRANSPOSED: gl.constexpr):
    """x [HALF_M, BLOCK_K] and w [BLOCK_K, WIDTH] of a stage."""
    x, w = x_smem.index(2 * stage + HALF), w_smem.index(stage)
    if X_TRANSPOSED:
        x = x.permute([1, 0])
    if not W_TRANSPOSED:
        w = w.permute([1, 0])
    return x, w


@gluon.jit
def store_columns(out, values, out_smem, off_m, off_n, layout: gl.constexpr, COLUMNS: gl.constexpr):
    """values [HALF_M, COLUMNS] in pieces that take turns in the buffers."""
    WIDTH: gl.constexpr = out.block_type.shape[1]
    if COLUMNS > WIDTH:
        left, right = values.reshape([HALF_M, 2, COLUMNS // 2]).permute(0, 2, 1).split()
        store_columns(out, left, out_smem, off_m, off_n, layout, COLUMNS // 2)
        store_columns(out, right, out_smem, off_m, off_n + COLUMNS // 2, layout, COLUMNS // 2)
    else:
        piece: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
        buffer = out_smem.index((off_n // WIDTH) % _STORE_BUFFERS)
        # All but the latest stores have read their buffers.
        tma.store_wait(_STORE_BUFFERS - 1)
        buffer.store(gl.convert_layout(values.to(out.dtype), piece, assert_trivial=True))
        fence_async_shared()
        _store(out, [off_m, off_n], buffer)


def operand_descriptors(
    x: Tensor, w: Tensor, *, x_transposed: bool = False, w_transposed: bool = False, width: int = BLOCK_N
) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Of matrices as they lie in memory, for tiles ``[BLOCK_M, width]``."""
    return _operand_descriptor(x, BLOCK_M // 2, x_transposed), _operand_descriptor(w, width, w_transposed)


def _operand_descriptor(matrix: Tensor, rows: int, transposed: bool) -> TensorDescriptor:
    return _descriptor(matrix, *operand_box(rows, transposed=transposed))


def operand_box(rows: int, *, transposed: bool) -> tuple[int, int, int]:
    """The shape of so many rows or, transposed, columns in a stage, and the bytes of its swizzle."""
    block_k = LAUNCH["BLOCK_K"]
    return (block_k, rows, _WIDEST_SWIZZLE) if transposed else (rows, block_k, 2 * block_k)


def store_descriptor(out: Tensor) -> TensorDescriptor:
    return _descriptor(out, *store_box(out.element_size()))


def store_box(itemsize: int) -> tuple[int, int, int]:
    """The shape of what is stored at a time, and the bytes of its swizzle."""
    return BLOCK_M // 2, _WIDEST_SWIZZLE // itemsize, _WIDEST_SWIZZLE


def _descriptor(matrix: Tensor, rows: int, columns: int, swizzle_bytes: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, [rows, columns], swizzled(swizzle_bytes, 8 * matrix.element_size()))


@functools.cache
def swizzled(swizzle_bytes: int, bits: int) -> Any:
    """The layout in shared memory of rows of numbers of so many bits."""
    return gl.NVMMASharedLayout(swizzle_byte_width=swizzle_bytes, element_bitwidth=bits, rank=2)


def programs(M: int, N: int, device: torch.device, *, width: int = BLOCK_N, leave_room: bool = False) -> int:
    """How many a launch has: a program on each SM, but no more than there are blocks ``[BLOCK_M, width]``.

    Args:
        leave_room: of some SMs, for a message and what is launched after it.
    """
    processors = num_processors(device)
    if leave_room:
        processors = max(processors // 2, processors - _MESSAGE_PROCESSORS)
    return min(-(-M // BLOCK_M) * -(-N // width), processors)


def new_counters(device: torch.device, launches: int = 1) -> tuple[Tensor, ...]:
    """From each of which the programs of one launch draw their tiles; 16 bytes apart, as kernels are compiled for."""
    return torch.zeros(launches, 4, dtype=torch.int32, device=device).unbind()

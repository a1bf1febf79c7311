"""What the Triton kernels share: where a tile is, how its logits are computed, and how its operands are passed."""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from vocab_parallel_fused.arrival import Arrival
from vocab_parallel_fused.kernels.configs import TileConfig, has_tensor_descriptors, is_describable
from vocab_parallel_fused.transform import LogitTransform, Operands

INTERPRETED: bool = knobs.runtime.interpret
# Rows are copied so many bytes at a time, in whole tiles; the copies' columns are a multiple of the third number.
_COPY_BYTES = 32 * 2**20
_COPY_ROWS, _COPY_COLUMNS = 256, 64
# Kernels may read globals that are constexpr.
_INTERPRETED = tl.constexpr(INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# fp32 holds no number within 64 of this one, and exp2(−64) is nothing beside 1.
_LARGEST_SCALED = tl.constexpr(2.0**30)
# 2⁻¹⁶⁰ is 0 in fp32: where a logit is −inf, 0 · 160 stands for 0 · ∞.
LEAST_LOG2 = tl.constexpr(-160.0)


@triton.jit
def tile_position(pid, num_t, num_v, GROUP_T: tl.constexpr):
    """Map a program to (token block, row block), walking groups of GROUP_T token blocks, tokens fastest."""
    group_size = GROUP_T * num_v
    first_t = pid // group_size * GROUP_T
    rows_t = tl.minimum(num_t - first_t, GROUP_T)
    in_group = pid % group_size
    return first_t + in_group % rows_t, in_group // rows_t


@triton.jit
def logits_tile(
    hidden,  # [T, H] tensor descriptor or pointer
    weight,  # [V, H] tensor descriptor or pointer
    bias_ptr,  # [V] or None
    off_t,
    off_v,
    T,
    V,
    H,
    stride_hidden_t,
    stride_hidden_h,
    stride_weight_v,
    stride_weight_h,
    inner,
    outer,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    TRANSFORM: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """z [BLOCK_T, BLOCK_V] in fp32. Rows past T and columns past V hold anything."""
    offs_v = off_v + tl.arange(0, BLOCK_V)
    if USE_DESCRIPTORS:
        z = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
        for off_h in range(0, H, BLOCK_H):
            z = _dot(hidden.load([off_t, off_h]), weight.load([off_v, off_h]), z, PRECISION)
    else:
        # Clamped rather than masked: what a row or column past the end computes is never used.
        z = rows_product(
            hidden,
            weight,
            tl.minimum(off_t + tl.arange(0, BLOCK_T), T - 1),
            tl.minimum(offs_v, V - 1),
            H,
            stride_hidden_t,
            stride_hidden_h,
            stride_weight_v,
            stride_weight_h,
            BLOCK_T,
            BLOCK_V,
            BLOCK_H,
            PRECISION,
            1,
        )
    if bias_ptr is not None:
        z += tl.load(bias_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)[None, :]
    return transform_logits(z, inner, outer, TRANSFORM)


@triton.jit
def transform_logits(raw, inner, outer, TRANSFORM: tl.constexpr):
    """z = outer · tanh(inner · a) with a soft cap, outer · a with a scale: `LogitTransform` in fp32."""
    if TRANSFORM == "softcap":
        # tanh x = 1 − 2 / (1 + exp 2x): off by some 2⁻²², and right for any x, as exp may overflow.
        return outer * (1 - 2 / (1 + tl.exp2(raw * (2 * LOG2E * inner))))
    if TRANSFORM == "scale":
        return outer * raw
    return raw


@triton.jit
def log2_from(z, maximum):
    """(z − maximum) · log2(e), but for a number per row that the second result holds and that has to be taken off.

    One fused multiply-add per logit. The product with the maximum is rounded, which moves all logits of a row alike;
    without the rounding, the maximum itself comes out as exactly 0. The fusion is spelled out: of `z · log2(e) −
    reference` the compiler may fuse either product, and of `z − maximum` one that z itself is.

    Of a huge maximum, as of classes that a bias masks, that number would leave the range of exp2, and the product
    fp32's. There z − maximum is 0 or so far from it that its exponential is 0 to any base.
    """
    scale = tl.where(tl.abs(maximum) < _LARGEST_SCALED, LOG2E, 1.0)
    reference = maximum * scale
    rounding = tl.fma(maximum, scale, -reference)
    return tl.fma(z, scale[:, None], -reference[:, None]), rounding


@triton.jit
def times_derivative(dlogits, z, inner, outer, TRANSFORM: tl.constexpr):
    """dz · ∂z/∂a, with tanh = z / outer."""
    if TRANSFORM == "softcap":
        tanh = z * (1 / outer)
        return dlogits * (inner * outer) * (1 - tanh * tanh)
    if TRANSFORM == "scale":
        return dlogits * outer
    return dlogits


@triton.jit
def rows_product(
    hidden_ptr,  # [T, H]
    weight_ptr,  # [V, H]
    rows_t,  # [BLOCK_T] rows of hidden
    rows_v,  # [BLOCK_V] rows of weight
    H,
    stride_hidden_t,
    stride_hidden_h,
    stride_weight_v,
    stride_weight_h,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """x_t · w_v [BLOCK_T, BLOCK_V] in fp32 for any rows, each product summed over H in the order of `logits_tile`."""
    # The compiler sees what divides these numbers, and loads so many elements at a time.
    H = H // ALIGNMENT * ALIGNMENT
    stride_hidden_t = stride_hidden_t // ALIGNMENT * ALIGNMENT
    stride_weight_v = stride_weight_v // ALIGNMENT * ALIGNMENT
    z = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
    offs_h = tl.arange(0, BLOCK_H)
    hidden_ptrs = hidden_ptr + rows_t.to(tl.int64)[:, None] * stride_hidden_t + offs_h[None, :] * stride_hidden_h
    weight_ptrs = weight_ptr + rows_v.to(tl.int64)[:, None] * stride_weight_v + offs_h[None, :] * stride_weight_h
    for off_h in range(0, H, BLOCK_H):
        mask_h = (offs_h < H - off_h)[None, :]
        x = tl.load(hidden_ptrs, mask=mask_h, other=0.0)
        w = tl.load(weight_ptrs, mask=mask_h, other=0.0)
        z = _dot(x, w, z, PRECISION)
        hidden_ptrs += BLOCK_H * stride_hidden_h
        weight_ptrs += BLOCK_H * stride_weight_h
    return z


@triton.jit
def _dot(x, w, z, PRECISION: tl.constexpr):
    if _INTERPRETED:  # the interpreter multiplies bf16 bit patterns as integers
        x = x.to(tl.float32)
        w = w.to(tl.float32)
    return tl.dot(x, w.T, z, input_precision=PRECISION)


def current_arch() -> str:
    """``"sm_90"``, ``"gfx942"`` or the like of the current device; ``"interpreter"`` without one."""
    if INTERPRETED:
        return "interpreter"
    target: Any = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch).split(":", maxsplit=1)[0]


@functools.cache
def num_processors(device: torch.device) -> int:
    """How many tiles run at a time; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.lru_cache(maxsize=1024)
def whole_waves(total: int, most: int, width: int, processors: int) -> int:
    """Into how large chunks, of at most ``most``, to cut ``total`` columns of ``width`` tiles: those which leave the
    fewest processors idle in the last wave of each chunk."""
    if most >= total:
        return total

    def waves(chunk: int) -> int:
        return total // chunk * -(-chunk * width // processors) - (-(total % chunk) * width // processors)

    return min(range(most, most // 2, -1), key=waves)


def is_aligned(matrix: Tensor) -> bool:
    """Whether its rows start where loads are fast: at a whole number of 32 bytes from each other."""
    return is_describable(matrix) and matrix.stride(0) * matrix.element_size() % 32 == 0


def aligned(matrix: Tensor) -> Tensor:
    """The matrix, or where it is not aligned, as a transpose or one of an odd hidden size, a copy with zeros in further
    columns."""
    if is_aligned(matrix):
        return matrix
    rows, columns = matrix.shape
    copy = matrix.new_empty(rows, _copied_columns(columns))
    copy[:, columns:].zero_()
    copy[:, :columns] = matrix
    return copy


def aligned_hidden(hidden: Tensor, arrival: Arrival | None) -> tuple[Tensor, Arrival | None]:
    """Gathered hidden states, aligned, and what may be read of them when: a copy can be made of all or nothing."""
    if arrival is not None and not is_aligned(hidden):
        arrival.wait()
        arrival = None
    return aligned(hidden), arrival


def rows_per_copy(weight: Tensor) -> int:
    """How many rows to take at a time where each block is to be :func:`aligned`."""
    rows, columns = weight.shape
    if is_aligned(weight):
        return rows
    row_bytes = _copied_columns(columns) * weight.element_size()
    return max(1, _COPY_BYTES // (row_bytes * _COPY_ROWS)) * _COPY_ROWS


def _copied_columns(columns: int) -> int:
    return -(-columns // _COPY_COLUMNS) * _COPY_COLUMNS


def operand_kwargs(head: Operands, arch: str, tile: TileConfig) -> dict[str, Any]:
    """The arguments of a launch that `logits_tile` needs, tile sizes included."""
    hidden, weight, bias, transform = head
    use_descriptors = has_tensor_descriptors(arch) and is_describable(hidden) and is_describable(weight)
    return {
        "hidden": TensorDescriptor.from_tensor(hidden, [tile.block_t, tile.block_h]) if use_descriptors else hidden,
        "weight": TensorDescriptor.from_tensor(weight, [tile.block_v, tile.block_h]) if use_descriptors else weight,
        "bias_ptr": bias,
        "T": hidden.shape[0],
        "V": weight.shape[0],
        "H": min(hidden.shape[1], weight.shape[1]),
        "stride_hidden_t": hidden.stride(0),
        "stride_hidden_h": hidden.stride(1),
        "stride_weight_v": weight.stride(0),
        "stride_weight_h": weight.stride(1),
        "USE_DESCRIPTORS": use_descriptors,
        "PRECISION": product_precision(hidden.dtype, arch),
        **transform_kwargs(transform),
        **tile.launch_kwargs(),
    }


def transform_kwargs(transform: LogitTransform) -> dict[str, Any]:
    """The arguments of a launch that `transform_logits` needs."""
    kind = "softcap" if transform.logit_softcap is not None else "identity" if transform.outer == 1.0 else "scale"
    return {"inner": transform.inner, "outer": transform.outer, "TRANSFORM": kind}


def product_precision(dtype: torch.dtype, arch: str) -> str:
    """Products of fp32 matrices follow torch's own setting, as the GEMMs of the backward do; others have no choice.

    On CUDA devices an fp32 product is three tf32 products of the operands' upper and lower halves: what they leave out
    is below fp32's own rounding. On an H200 that is six times as fast as Triton's product without tensor cores, and no
    less precise.
    """
    if dtype != torch.float32:
        return "ieee"
    is_cuda = arch.startswith("sm_")
    # Reading the older `allow_tf32` raises where the newer has been set. Of AMD's GPUs Triton has tf32 on one alone.
    if torch.backends.cuda.matmul.fp32_precision == "tf32" and (is_cuda or arch == "gfx942"):
        return "tf32"
    return "tf32x3" if is_cuda else "ieee"

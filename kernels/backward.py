"""Local gradients: recompute a block of logits, turn it into logit gradients, and let two GEMMs of torch take it on.

    dz_tj = exp(u_tj) · (level_t + slope_t · u_tj) + grad_logit_sum_t · c_j + Σ_k [j = y_tk] · grad_target_tk
    da_tj = dz_tj · ∂z/∂a,    u_tj = z_tj − m_t

``dlogits_kernel`` writes da without the last term for one block of rows into the fixed workspace, in the inputs'
dtype; ``target_dlogits_kernel`` overwrites the targets' entries with all terms, which are added in fp32 before that
rounding. ``sweep.py`` walks the blocks. ``T`` tokens, ``V`` rows of the block, ``H`` hidden size, ``K`` targets a
token. A pointer that is None is a term that is zero.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vocab_parallel_fused.arrival import Arrival
from vocab_parallel_fused.exp_cache import ExpCache
from vocab_parallel_fused.kernels import hopper_tiles
from vocab_parallel_fused.kernels.configs import TileConfig, tile_config
from vocab_parallel_fused.kernels.hopper import new_counters
from vocab_parallel_fused.kernels.hopper_matmul import matmul_beside
from vocab_parallel_fused.kernels.kept import kept_dlogits, rewrite_product, rewrite_rows, scale_rows, scaled_matmul
from vocab_parallel_fused.kernels.launcher import Launcher
from vocab_parallel_fused.kernels.plan import ceil_div, slices
from vocab_parallel_fused.kernels.streams import Fork, in_order_of_arrival
from vocab_parallel_fused.kernels.sweep import GradBuffers, KeptDlogits, scale_into_fp16, sweep_grads
from vocab_parallel_fused.kernels.tiles import (
    LEAST_LOG2,
    LN2,
    aligned,
    aligned_hidden,
    current_arch,
    log2_from,
    logits_tile,
    num_processors,
    operand_kwargs,
    rows_per_copy,
    tile_position,
    times_derivative,
    transform_kwargs,
)
from vocab_parallel_fused.stats import DlogitsCoefficients
from vocab_parallel_fused.transform import Operands, part_of

_TARGET_LAUNCH: dict[str, Any] = {"BLOCK_N": 128}
# A number for each token or target, but for the class weights, of which a few are read.
_OF_TARGETS = ["target_row", "target_logit", "class_weight", "max", "level", "slope", "grad_logit_sum"]
_OF_TARGETS += ["grad_target_logit", "scale"]


@triton.jit(
    do_not_specialize=["T", "inner", "outer"],
    # A number for each token.
    do_not_specialize_on_alignment=["max_ptr", "level_ptr", "slope_ptr", "grad_logit_sum_ptr"],
)
def dlogits_kernel(
    hidden,  # [T, H] descriptor or pointer
    weight,  # [V, H] descriptor or pointer
    bias_ptr,  # [V] or None
    class_weight_ptr,  # [V] or None: all 1
    max_ptr,  # [T]
    level_ptr,  # [T]
    slope_ptr,  # [T] or None
    grad_logit_sum_ptr,  # [T] or None
    dlogits_ptr,  # [T, V] out
    T,
    V,
    H,
    stride_hidden_t,
    stride_hidden_h,
    stride_weight_v,
    stride_weight_h,
    stride_dlogits_t,
    inner,
    outer,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP_T: tl.constexpr,
    TRANSFORM: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid_t, pid_v = tile_position(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.cdiv(V, BLOCK_V), GROUP_T)  # pyright: ignore[reportGeneralTypeIssues]
    off_t = pid_t * BLOCK_T
    off_v = pid_v * BLOCK_V
    offs_t = off_t + tl.arange(0, BLOCK_T)
    offs_v = off_v + tl.arange(0, BLOCK_V)
    mask_t = offs_t < T
    # Read before the product, which hides the wait for them.
    maximum = tl.load(max_ptr + offs_t, mask=mask_t, other=0.0)
    level = tl.load(level_ptr + offs_t, mask=mask_t, other=0.0)
    z = logits_tile(
        hidden,
        weight,
        bias_ptr,
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
        BLOCK_T,
        BLOCK_V,
        BLOCK_H,
        TRANSFORM,
        USE_DESCRIPTORS,
        PRECISION,
    )
    shifted, rounding = log2_from(z, maximum)
    largest = tl.exp2(rounding)
    exps = tl.exp2(shifted)
    if slope_ptr is not None:
        slope = tl.load(slope_ptr + offs_t, mask=mask_t, other=0.0)
        differences = tl.maximum(shifted - rounding[:, None], LEAST_LOG2)
        dlogits = exps * ((level / largest)[:, None] + (slope * (LN2 / largest))[:, None] * differences)
    else:
        dlogits = exps * (level / largest)[:, None]
    if grad_logit_sum_ptr is not None:
        grad_logit_sum = tl.load(grad_logit_sum_ptr + offs_t, mask=mask_t, other=0.0)
        if class_weight_ptr is not None:
            class_weight = tl.load(class_weight_ptr + offs_v, mask=offs_v < V, other=0.0)
            dlogits += grad_logit_sum[:, None] * class_weight[None, :]
        else:
            dlogits += grad_logit_sum[:, None]
    dlogits = times_derivative(dlogits, z, inner, outer, TRANSFORM)
    tl.store(
        dlogits_ptr + offs_t.to(tl.int64)[:, None] * stride_dlogits_t + offs_v[None, :],
        dlogits.to(dlogits_ptr.dtype.element_ty),
        mask=mask_t[:, None] & (offs_v < V)[None, :],
    )


_launch_dlogits = Launcher(dlogits_kernel)


@triton.jit(
    do_not_specialize=["T", "V", "first_row", "stride_dlogits_t", "inner", "outer"],
    do_not_specialize_on_alignment=[f"{name}_ptr" for name in _OF_TARGETS],
)
def target_dlogits_kernel(
    target_row_ptr,  # [T, K] int64, out of any block's rows: not in this shard
    target_logit_ptr,  # [T, K]
    class_weight_ptr,  # [rows of the shard] or None: all 1
    max_ptr,  # [T]
    level_ptr,  # [T]
    slope_ptr,  # [T] or None
    grad_logit_sum_ptr,  # [T] or None
    grad_target_logit_ptr,  # [T, K], the same for the same class of a token
    scale_ptr,  # [T] of kept dlogits, or None: 1
    dlogits_ptr,  # [T, V] out, written at the targets
    T,
    V,
    K,
    first_row,  # number of the block's first row in the shard, as target_row counts
    stride_dlogits_t,
    inner,
    outer,
    BLOCK_N: tl.constexpr,
    TRANSFORM: tl.constexpr,
):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_t = offs_n // K
    target_row = tl.load(target_row_ptr + offs_n, mask=offs_n < T * K, other=-1)
    column = target_row - first_row
    owned = (column >= 0) & (column < V)
    z = tl.load(target_logit_ptr + offs_n, mask=owned, other=0.0)
    difference = z - tl.load(max_ptr + rows_t, mask=owned, other=0.0)
    # Another order of products may have rounded the target above the largest logit.
    difference = tl.minimum(difference, 0.0, propagate_nan=tl.PropagateNan.ALL)
    coefficient = tl.load(level_ptr + rows_t, mask=owned, other=0.0)
    if slope_ptr is not None:
        coefficient += tl.load(slope_ptr + rows_t, mask=owned, other=0.0) * tl.maximum(difference, -128.0)
    dlogit = tl.exp(difference) * coefficient
    if grad_logit_sum_ptr is not None:
        grad_logit_sum = tl.load(grad_logit_sum_ptr + rows_t, mask=owned, other=0.0)
        if class_weight_ptr is not None:
            grad_logit_sum *= tl.load(class_weight_ptr + target_row, mask=owned, other=0.0)
        dlogit += grad_logit_sum
    dlogit += tl.load(grad_target_logit_ptr + offs_n, mask=owned, other=0.0)
    dlogit = times_derivative(dlogit, z, inner, outer, TRANSFORM)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + rows_t, mask=owned, other=1.0)
        dlogit = tl.where(scale == 0, 0.0, dlogit / scale)
    tl.store(
        dlogits_ptr + rows_t.to(tl.int64) * stride_dlogits_t + column,
        dlogit.to(dlogits_ptr.dtype.element_ty),
        mask=owned,
    )


_launch_targets = Launcher(target_dlogits_kernel)


@triton.jit
def add_repeated_kernel(
    target_row_ptr,  # [T, K] int64
    grad_target_logit_ptr,  # [T, K]
    sum_ptr,  # [T, K] out
    T,
    K,
    BLOCK_N: tl.constexpr,
):
    """Each target's gradient added over the times that its token has the same target."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < T * K
    first_of_token = offs_n // K * K
    target_row = tl.load(target_row_ptr + offs_n, mask=mask_n, other=-1)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for k in range(K):
        same = target_row == tl.load(target_row_ptr + first_of_token + k, mask=mask_n, other=-1)
        grad = tl.load(grad_target_logit_ptr + first_of_token + k, mask=mask_n, other=0.0)
        total += tl.where(same, grad, 0.0)
    tl.store(sum_ptr + offs_n, total, mask=mask_n)


@dataclass(frozen=True, slots=True)
class _LogitGrads:
    """What gradients of the logits are made of, and the launches that write a block of them."""

    head: Operands  # hidden aligned
    target_row: Tensor
    target_logit: Tensor
    class_weight: Tensor | None
    max_logit: Tensor
    coefficients: DlogitsCoefficients
    arch: str
    tile: TileConfig

    @property
    def on_hopper(self) -> bool:
        return hopper_tiles.takes(self.head.hidden, self.arch) and self.coefficients.grad_logit_sum is None

    @property
    def block(self) -> tuple[int, int]:
        """Tokens and rows of a tile."""
        return hopper_tiles.tile_shape(self.on_hopper, self.tile)

    def write(self, tokens: slice, rows: slice, out: Tensor, arrival: Arrival | None) -> None:
        """Fill ``out`` ``[tokens, rows]``; all hidden states have then arrived."""

        def write_tiles(arrived: slice, hidden: Tensor, leave_room: bool) -> None:
            here = slice(arrived.start - tokens.start, arrived.stop - tokens.start)
            head = self.head._replace(hidden=hidden)
            self._write_tiles(head, arrived, rows, out[here], leave_room=leave_room)

        if arrival is None:
            write_tiles(tokens, part_of(self.head.hidden, tokens), False)
        else:
            with Fork(out.device) as fork:
                in_order_of_arrival(write_tiles, fork, self.head.hidden, tokens, arrival, self.block[0])
        self.write_targets(tokens, rows.start, out)

    def _write_tiles(self, head: Operands, tokens: slice, rows: slice, out: Tensor, *, leave_room: bool) -> None:
        level, slope, grad_logit_sum, _ = self.coefficients.of(tokens)
        of_tokens = {"max_ptr": part_of(self.max_logit, tokens), "level_ptr": level, "slope_ptr": slope}
        for part in slices(rows.stop, rows_per_copy(head.weight), rows.start):
            block = head.block(slice(None), part)
            block = block._replace(weight=aligned(block.weight))
            out_part = out[:, part.start - rows.start : part.stop - rows.start]
            if self.on_hopper:
                counter = new_counters(out.device)[0]
                hopper_tiles.launch_tiles(block, out_part, counter, leave_room=leave_room, **of_tokens)
            else:
                tiles_t = ceil_div(out_part.shape[0], self.tile.block_t)
                arguments = {
                    "class_weight_ptr": None if self.class_weight is None else self.class_weight[part],
                    "grad_logit_sum_ptr": grad_logit_sum,
                    "dlogits_ptr": out_part,
                    "stride_dlogits_t": out.stride(0),
                    **of_tokens,
                    **operand_kwargs(block, self.arch, self.tile),
                }
                num_tiles = tiles_t * ceil_div(out_part.shape[1], self.tile.block_v)
                _launch_dlogits(num_tiles, out.device, arguments)

    def write_targets(self, tokens: slice, first_row: int, out: Tensor, scale: Tensor | None = None) -> None:
        """Overwrite the targets' entries, over ``scale`` ``[tokens]``."""
        num_targets = self.target_row.shape[1]
        if num_targets == 0:
            return
        level, slope, grad_logit_sum, grad_target_logit = self.coefficients.of(tokens)
        arguments = {
            "target_row_ptr": part_of(self.target_row, tokens),
            "target_logit_ptr": part_of(self.target_logit, tokens),
            "class_weight_ptr": self.class_weight,
            "max_ptr": part_of(self.max_logit, tokens),
            "level_ptr": level,
            "slope_ptr": slope,
            "grad_logit_sum_ptr": grad_logit_sum,
            "grad_target_logit_ptr": grad_target_logit,
            "scale_ptr": scale,
            "dlogits_ptr": out,
            "T": out.shape[0],
            "V": out.shape[1],
            "K": num_targets,
            "first_row": first_row,
            "stride_dlogits_t": out.stride(0),
            **transform_kwargs(self.head.transform),
            **_TARGET_LAUNCH,
        }
        num_programs = ceil_div(out.shape[0] * num_targets, _TARGET_LAUNCH["BLOCK_N"])
        _launch_targets(num_programs, out.device, arguments)

    def of_kept(self, cache: ExpCache, arrival: Arrival | None) -> KeptDlogits:
        """Of the rows whose exponentials were kept. Tokens whose are out of range are computed anew, by ``complete`` if
        hidden states are on their way."""
        head = self.head.block(slice(None), slice(0, cache.exps.shape[1]))
        of_tokens = (self.target_row, self.target_logit, self.max_logit, self.coefficients)
        values, scale = kept_dlogits(*of_tokens, cache, head.transform)

        def rewrite() -> None:
            rewrite_rows(head, self.max_logit, self.coefficients.level, cache)
            self.write_targets(slice(None), 0, values, scale)

        def complete(dhidden: Tensor | None) -> None:
            if arrival is not None:
                arrival.wait()
                rewrite()
                if dhidden is not None:
                    rewrite_product(dhidden, head.weight, cache)

        if arrival is None:
            rewrite()
        else:
            self.write_targets(slice(None), 0, values, scale)
        message_bytes = 0 if arrival is None else head.hidden.nbytes - arrival.hidden.nbytes
        matmul = functools.partial(scaled_matmul, message_bytes=message_bytes)
        return KeptDlogits(values, scale, scale_rows, matmul, complete)


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
    """As ``eager.local_grads``."""
    hidden, weight, _, transform = head
    arch = current_arch()
    unscale = None
    if hidden.dtype == torch.float16 and hidden.shape[0] > 0 and weight.shape[0] > 0:
        bound = coefficients.bound(class_weight) * abs(transform.inner * transform.outer)
        scale, unscale = scale_into_fp16(bound)
        coefficients = coefficients.times(scale)
    # Losses may leave gradients of any stride, 0 among them.
    coefficients = coefficients._make(None if field is None else field.contiguous() for field in coefficients)

    num_targets = target_row.shape[1]
    if num_targets > 1:
        # Every one of them writes the same dlogit.
        total = torch.empty_like(coefficients.grad_target_logit)
        add_repeated_kernel[(ceil_div(total.numel(), _TARGET_LAUNCH["BLOCK_N"]),)](
            target_row, coefficients.grad_target_logit, total, total.shape[0], num_targets, **_TARGET_LAUNCH
        )
        coefficients = coefficients._replace(grad_target_logit=total)

    tiles_hidden, arrival = aligned_hidden(hidden, arrival)
    dlogits = _LogitGrads(
        head._replace(hidden=tiles_hidden),
        target_row,
        target_logit,
        class_weight,
        max_logit,
        coefficients,
        arch,
        tile_config(arch, hidden.dtype, hidden.shape[0]),
    )
    first_token = 0 if arrival is None else arrival.own.start
    kept = None
    if cache is not None:
        # These come first: by then all have arrived.
        kept, arrival = dlogits.of_kept(cache, arrival), None

    def write_dlogits(tokens: slice, rows: slice, out: Tensor) -> None:
        nonlocal arrival
        dlogits.write(tokens, rows, out, arrival)
        arrival = None

    sweep_grads(
        write_dlogits,
        head,
        buffers,
        dlogits_dtype=hidden.dtype,
        unscale=unscale,
        bytes_per_logit=hidden.element_size(),
        workspace_bytes=workspace_bytes,
        tile=dlogits.block,
        largest=(hidden.shape[0], weight.shape[0]),
        processors=num_processors(hidden.device),
        kept=kept,
        matmul_beside=functools.partial(matmul_beside, message_bytes=buffers.message_bytes),
        first_token=first_token,
    )

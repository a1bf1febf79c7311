"""The backward's walk over blocks: what it plans, in which order it works, and what it needs for that."""

from itertools import product
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from vocab_parallel_fused.kernels import sweep
from vocab_parallel_fused.kernels.sweep import GradBuffers, plan_blocks, sweep_grads
from vocab_parallel_fused.transform import LogitTransform, Operands

MIB = 2**20


def plan(T: int, H: int, V: int, *, main_grad: bool, workspace_bytes: int = 128 * MIB) -> sweep.Blocks:
    """Of bf16 gradients on 132 processors, as for an H200."""
    return plan_blocks(
        T,
        H,
        V,
        bytes_per_logit=2,
        dhidden_sum_bytes=4,
        dweight_sum_bytes=0 if main_grad else 4,
        dhidden_takes_product=V % 8 == 0,
        dweight_takes_product=not main_grad,
        dweight_takes_sums=main_grad,
        workspace_bytes=workspace_bytes,
        tile=(128, 256),
        largest=(T, V),
        processors=132,
    )


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError(), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")],
    ids=["torch", "cuBLAS"],
)
def test_no_memory_for_asking_is_no_answer(error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept for one, it would make all later products many times slower."""
    sweep._has_mixed_gemm.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "addmm", Mock(side_effect=[error, None]))
        with pytest.raises(type(error)):
            sweep._has_mixed_gemm(torch.device("cpu"), torch.bfloat16)
        assert sweep._has_mixed_gemm(torch.device("cpu"), torch.bfloat16)
    sweep._has_mixed_gemm.cache_clear()


@pytest.mark.parametrize("main_grad", [False, True])
@pytest.mark.parametrize("V", [1000, 16032, 16033, 128256])
def test_blocks_fit_the_workspace(main_grad: bool, V: int) -> None:
    """With an fp32 main_grad the sum of dhidden is in it too, so that memory stops growing with tokens."""
    for T, H in product((1, 1000, 8192, 131072), (2304, 8192)):
        blocks = plan(T, H, V, main_grad=main_grad)
        needed = 2 * min(blocks.block_t, T) * min(blocks.block_v, V)
        takes_product = blocks.block_v >= V and V % 8 == 0
        if main_grad and not takes_product:
            needed += 4 * H * min(blocks.group_t, T)
        assert needed <= 128 * MIB, (T, H, V, blocks)
        assert blocks.block_t % 128 == blocks.block_v % 256 == blocks.group_t % 128 == 0
        assert blocks.block_t <= blocks.group_t or blocks.block_t >= T


def test_blocks_fill_waves() -> None:
    """22 tiles of rows are 10.7 waves for 64 blocks of tokens, 31 tiles 15.03: the plan must not leave a wave empty."""
    for T, V in ((8192, 256000), (16384, 38016), (4096, 128256)):
        blocks = plan(T, 2304, V, main_grad=False)
        tiles = -(-blocks.block_t // 128) * (blocks.block_v // 256)
        assert tiles / 132 / -(-tiles // 132) > 0.95, (T, V, blocks)


def test_products_fill_waves() -> None:
    """At H = 3584 a product for 4096 rows of dweight is 3.4 waves of tiles, or 4.6 of narrower ones, one for 3584 rows
    2.97. At H = 2304 one for 8192 rows is 4.4 or 5.8: nothing to gain."""
    assert plan(16384, 3584, 38016, main_grad=False).block_v == 3584
    assert plan(8192, 2304, 256000, main_grad=False).block_v == 8192


def test_a_workspace_too_small_for_anything() -> None:
    assert plan(100_000, 4096, 5000, main_grad=False, workspace_bytes=1) == (100_096, 128, 256)


def logged_sweep(monkeypatch: pytest.MonkeyPatch, V: int) -> list[str]:
    """What happens, in order: products for dhidden and dweight, beside the message or not, and the call that says
    dhidden is complete."""
    T, H = 40, 16
    hidden, weight = torch.randn(T, H), torch.randn(V, H)
    log = []
    matmul = sweep.matmul_into

    def logged(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
        log.append("dhidden" if a.shape[0] == T else f"dweight of {a.shape[0]} rows")
        matmul(out, a, b, accumulate=accumulate)

    def beside(out: Tensor, a: Tensor, b: Tensor) -> None:
        log.append(f"dweight of {a.shape[0]} rows beside")
        matmul(out, a, b)

    def write_ones(_tokens: slice, _rows: slice, out: Tensor) -> None:
        out.fill_(1.0)

    monkeypatch.setattr(sweep, "matmul_into", logged)
    dhidden, dweight = torch.empty(T, H), torch.empty(V, H)
    buffers = GradBuffers(dhidden, dweight, None, accumulate_dweight=False, dhidden_ready=lambda: log.append("ready"))
    sweep_grads(
        write_ones,
        Operands(hidden, weight, None, LogitTransform()),
        buffers,
        dlogits_dtype=torch.float32,
        bytes_per_logit=4,
        workspace_bytes=4 * T * 32,
        tile=(16, 32),
        largest=(T, V),
        matmul_beside=beside,
    )
    torch.testing.assert_close(dhidden, weight.sum(0).expand(T, H))
    torch.testing.assert_close(dweight, hidden.sum(0).expand(V, H))
    return log


@pytest.mark.parametrize(
    ("V", "blocks"), [(96, [32, 32]), (99, [32, 32, 3]), (115, [32, 32, 16, 3]), (51, [16, 3]), (35, [3]), (32, [])]
)
def test_dhidden_is_ready_before_a_full_block(V: int, blocks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """So that its reduction over the ranks has a product to hide behind, and not that of what is left over. Where there
    are two, a full block comes first too, as that runs beside the gather of hidden states."""
    log = logged_sweep(monkeypatch, V)
    before = [event for rows in blocks for event in ("dhidden", f"dweight of {rows} rows")]
    assert log == [*before, "dhidden", "ready", "dweight of 32 rows beside"]


@pytest.mark.parametrize(("first_token", "order"), [(0, [0, 16, 32]), (16, [0, 16, 32]), (37, [32, 0, 16])])
def test_groups_begin_with_any_token(first_token: int, order: list[int]) -> None:
    """With the group that has it, and round from there: a rank's own tokens are here before the others."""
    T, H, V = 40, 16, 96
    hidden, weight = torch.randn(T, H), torch.randn(V, H)
    dlogits = torch.randn(T, V)
    visited: list[int] = []
    events: list[str] = []

    def write(tokens: slice, rows: slice, out: Tensor) -> None:
        if rows.start == 0:
            visited.append(tokens.start)
        out.copy_(dlogits[tokens, rows])

    dhidden, dweight = torch.full((T, H), torch.nan, dtype=torch.bfloat16), torch.full((V, H), torch.nan)
    buffers = GradBuffers(dhidden, dweight, None, False, lambda: events.append(f"ready {dhidden.isnan().any()}"))
    sweep_grads(
        write,
        Operands(hidden, weight, None, LogitTransform()),
        buffers,
        dlogits_dtype=torch.float32,
        bytes_per_logit=4,
        workspace_bytes=4 * 16 * 32,
        tile=(16, 32),
        largest=(T, V),
        matmul_beside=sweep.matmul_into,  # which overwrites
        first_token=first_token,
    )
    assert visited == order  # groups of 32
    assert events == ["ready False"]
    torch.testing.assert_close(dhidden.float(), dlogits @ weight, rtol=2**-7, atol=1e-5)
    torch.testing.assert_close(dweight, dlogits.t() @ hidden)


def test_kept_rows_come_last_if_little_else_is_left() -> None:
    """Only a tail is recomputed, which is no product for dhidden's message to hide behind."""
    T, H, V = 40, 16, 35
    hidden, weight, dlogits, scale = torch.randn(T, H), torch.randn(V, H), torch.randn(T, V), torch.rand(T)
    log = []

    def scale_rows(matrix: Tensor, scale: Tensor, out: Tensor) -> None:
        log.append("kept dweight")
        torch.mul(matrix, scale[:, None], out=out)

    def scaled_matmul(out: Tensor, values: Tensor, matrix: Tensor, scale: Tensor) -> None:
        log.append("kept dhidden")
        torch.mul(values @ matrix, scale[:, None], out=out)

    def write(tokens: slice, rows: slice, out: Tensor) -> None:
        out.copy_(scale[tokens, None] * dlogits[tokens, rows])

    kept = sweep.KeptDlogits(dlogits[:, :32], scale, scale_rows, scaled_matmul, lambda _: log.append("complete"))
    dhidden, dweight = torch.full((T, H), torch.nan), torch.full((V, H), torch.nan)
    sweep_grads(
        write,
        Operands(hidden, weight, None, LogitTransform()),
        GradBuffers(dhidden, dweight, None, False, lambda: log.append(f"ready {dhidden.isnan().any()}")),
        dlogits_dtype=torch.float32,
        bytes_per_logit=4,
        workspace_bytes=4 * T * 32,
        tile=(16, 32),
        largest=(T, V),
        kept=kept,
    )
    assert log == ["kept dhidden", "complete", "ready False", "kept dweight"]
    dlogits *= scale[:, None]
    torch.testing.assert_close(dhidden, dlogits @ weight)
    torch.testing.assert_close(dweight, dlogits.t() @ hidden)

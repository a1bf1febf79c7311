"""The backward's walk over blocks: in which order it works, and what it needs for that."""

from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from vocab_parallel_fused.kernels import sweep
from vocab_parallel_fused.kernels.sweep import GradBuffers, sweep_grads
from vocab_parallel_fused.testing import PeakBytes
from vocab_parallel_fused.transform import LogitTransform, Operands


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


@pytest.mark.parametrize("first_token", [0, 16, 37, 64, 99, 150, 300])
def test_groups_begin_with_any_token(first_token: int) -> None:
    """With the group that has it, and round from there: a rank's own tokens are here before the others. Sums lie in
    dhidden, over rows of their own group or of later ones, of which none must be lost for it."""
    T, H, V = 200, 16, 96
    # Whole numbers, whose sums are exact in fp32 in any order.
    hidden, weight, dlogits = (torch.randint(-9, 10, shape).float() for shape in ((T, H), (V, H), (T, V)))
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
        workspace_bytes=4 * 64 * 32,
        tile=(16, 32),
        largest=(T, V),
        matmul_beside=sweep.matmul_into,  # which overwrites
        first_token=first_token,
    )
    wrap = visited.index(0)
    assert len(visited) > 2
    assert visited[wrap:] + visited[:wrap] == sorted(visited)
    assert visited[0] == max(start for start in visited if start <= first_token)
    assert events == ["ready False"]
    assert torch.equal(dhidden, (dlogits @ weight).bfloat16())
    assert torch.equal(dweight, dlogits.t() @ hidden)


def test_sums_of_groups_need_no_memory_of_their_own() -> None:
    """Those of 64 tokens are twice as large as the workspace, and lie in dhidden; that of the last group is in it."""
    T, H, V, workspace_bytes = 200, 64, 96, 4 * 64 * 32
    hidden, weight, dlogits = torch.randn(T, H), torch.randn(V, H), torch.randn(T, V)
    dhidden, dweight = torch.empty(T, H, dtype=torch.bfloat16), torch.empty(V, H)
    visited: list[tuple[int, int]] = []

    def write(tokens: slice, rows: slice, out: Tensor) -> None:
        visited.append((tokens.start, rows.start))
        out.copy_(dlogits[tokens, rows])

    with PeakBytes() as peak:
        sweep_grads(
            write,
            Operands(hidden, weight, None, LogitTransform()),
            GradBuffers(dhidden, dweight, None, accumulate_dweight=False),
            dlogits_dtype=torch.float32,
            bytes_per_logit=4,
            workspace_bytes=workspace_bytes,
            tile=(16, 32),
            largest=(T, V),
        )
    assert {(0, 0), (64, 0)} <= set(visited)
    assert peak.bytes <= workspace_bytes + 16 * H * 2  # rows that are rounded aside


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 31, 32, 33, 200])
def test_a_sum_is_rounded_where_it_lies(rows: int) -> None:
    total = torch.randn(rows, 6)
    memory = torch.full((2 * rows, 6), torch.nan, dtype=torch.bfloat16)
    lying = memory.view(-1).view(torch.float32).view(rows, 6)
    lying.copy_(total)
    sweep._round_into(memory[:rows], lying)
    assert torch.equal(memory[:rows], total.bfloat16())


def kept_rows(dlogits: Tensor, scale: Tensor, log: list[str]) -> sweep.KeptDlogits:
    """Of dlogits over their scale, with a log of what is asked of them."""

    def scale_rows(matrix: Tensor, scale: Tensor, out: Tensor) -> None:
        log.append("kept dweight")
        torch.mul(matrix, scale[:, None], out=out)

    def scaled_matmul(out: Tensor, values: Tensor, matrix: Tensor, scale: Tensor) -> None:
        log.append("kept dhidden")
        torch.mul(values.float() @ matrix.float(), scale[:, None], out=out)

    return sweep.KeptDlogits(dlogits, scale, scale_rows, scaled_matmul, lambda _: log.append("complete"))


def test_kept_rows_come_last_if_little_else_is_left() -> None:
    """Only a tail is recomputed, which is no product for dhidden's message to hide behind."""
    T, H, V = 40, 16, 35
    hidden, weight, dlogits, scale = torch.randn(T, H), torch.randn(V, H), torch.randn(T, V), torch.rand(T)
    log: list[str] = []

    def write(tokens: slice, rows: slice, out: Tensor) -> None:
        out.copy_(scale[tokens, None] * dlogits[tokens, rows])

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
        kept=kept_rows(dlogits[:, :32], scale, log),
    )
    assert log == ["kept dhidden", "complete", "ready False", "kept dweight"]
    dlogits *= scale[:, None]
    torch.testing.assert_close(dhidden, dlogits @ weight)
    torch.testing.assert_close(dweight, dlogits.t() @ hidden)


@pytest.mark.parametrize("frozen", ["nothing", "weight", "hidden"])
@pytest.mark.parametrize("num_kept", [32, 64])
@pytest.mark.parametrize("several_ranks", [False, True])
def test_kept_rows_of_groups(num_kept: int, several_ranks: bool, frozen: str) -> None:
    """The operand of the kept rows' dweight lies in dhidden, and must be done with before a group's sum does."""
    T, H, V = 200, 16, 96
    # Whole numbers, exact in bf16, whose sums are exact in fp32 in any order.
    hidden, weight, dlogits = (torch.randint(-9, 10, shape).bfloat16() for shape in ((T, H), (V, H), (T, V)))
    scale = torch.randint(1, 4, (T,)).bfloat16()
    scaled = dlogits * scale[:, None]
    visited: set[int] = set()

    def write(tokens: slice, rows: slice, out: Tensor) -> None:
        visited.add(tokens.start)
        out.copy_(scaled[tokens, rows])

    dhidden, dweight = torch.full((T, H), torch.nan, dtype=torch.bfloat16), torch.full((V, H), torch.nan)
    ready: list[bool] = []
    sweep_grads(
        write,
        Operands(hidden, weight, None, LogitTransform()),
        GradBuffers(
            None if frozen == "hidden" else dhidden,
            None if frozen == "weight" else dweight,
            None,
            False,
            (lambda: ready.append(not dhidden.isnan().any())) if several_ranks else None,
        ),
        dlogits_dtype=torch.bfloat16,
        bytes_per_logit=2,
        workspace_bytes=2 * 64 * 32,
        tile=(16, 32),
        largest=(T, V),
        kept=kept_rows(dlogits[:, :num_kept], scale, []),
        matmul_beside=sweep.matmul_into,  # which overwrites
    )
    if frozen != "hidden":
        assert len(visited) > 2
        assert torch.equal(dhidden, (scaled.float() @ weight.float()).bfloat16())
        assert ready == [True] * several_ranks
    if frozen != "weight":
        assert torch.equal(dweight, scaled.float().t() @ hidden.float())

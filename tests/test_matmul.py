"""Hopper's product of matrices, on the GPU that has it; when it is taken, anywhere."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from vocab_parallel_fused.kernels import hopper, hopper_matmul, kept, sweep  # noqa: E402
from vocab_parallel_fused.kernels.hopper_matmul import matmul, matmul_beside, takes  # noqa: E402

on_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not on_hopper, reason="needs a Hopper GPU")


def stored(rows: int, columns: int, *, transposed: bool, dtype: torch.dtype, pad: int = 0) -> Tensor:
    """A random matrix whose rows or, transposed, columns are contiguous, with `pad` NaNs between them."""
    if transposed:
        return stored(columns, rows, transposed=False, dtype=dtype, pad=pad).t()
    matrix = torch.full((rows, columns + pad), torch.nan, dtype=dtype, device="cuda")
    matrix[:, :columns].normal_()
    return matrix[:, :columns]


@needs_hopper
@pytest.mark.parametrize("out_dtype", ["operands", torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize(
    ("M", "N", "K"), [(8192, 4096, 16032), (1000, 2312, 1037), (130, 264, 8), (1, 8, 1), (64, 256, 33)]
)
def test_product(M: int, N: int, K: int, transposed: tuple[bool, bool], dtype: torch.dtype, out_dtype: Any) -> None:
    """Tails everywhere, and more tiles than programs; whole matrices beside theirs stay as they are."""
    out_dtype = dtype if out_dtype == "operands" else out_dtype
    a = stored(M, K, transposed=transposed[0], dtype=dtype, pad=-(M if transposed[0] else K) % 8 + 8)
    b = stored(K, N, transposed=not transposed[1], dtype=dtype, pad=-(K if not transposed[1] else N) % 8 + 8)
    scale = torch.rand(M, device="cuda") * 2 - 1
    around = torch.full((M + 2, N + 8), 7.0, dtype=out_dtype, device="cuda")
    out = around[1:-1, :N]
    for row_scale, message_bytes in product((None, scale), (0, 2**40)):
        out.fill_(torch.nan)
        matmul(out, a, b, row_scale, message_bytes)
        expected = a.double() @ b.double()
        size = a.double().abs() @ b.double().abs()
        if row_scale is not None:
            expected, size = expected * row_scale[:, None], size * row_scale[:, None].abs()
        # A sum in fp32, of the matrix units' own precision, and one rounding.
        budget = 2**-13 * size + torch.finfo(out_dtype).eps * expected.abs() + torch.finfo(out_dtype).tiny
        assert ((out.double() - expected).abs() <= budget).all()
    assert (around[0] == 7).all()
    assert (around[-1] == 7).all()
    assert (around[:, N:] == 7).all()


@needs_hopper
def test_same_bits_as_cublas_beside_another_kernel() -> None:
    """Whoever draws a tile: with other work on the device, and in every run."""
    a = stored(8192, 4096, transposed=False, dtype=torch.bfloat16)
    b = stored(4096, 4096, transposed=False, dtype=torch.bfloat16)
    expected = a @ b
    other = torch.randn(64, 4096, 4096, device="cuda")
    side = torch.cuda.Stream()
    for message_bytes in (0, 2**40) * 4:
        out = torch.empty_like(expected)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            other.mul_(1.5).sin_()
        matmul(out, a, b, message_bytes=message_bytes)
        torch.cuda.synchronize()
        assert torch.equal(out, expected)


def test_takes_what_fills_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_matmul, "current_arch", lambda: "sm_90")
    monkeypatch.setattr(hopper_matmul, "num_processors", lambda _: 132)

    def operands(M: int, N: int, K: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
        return (
            torch.empty(M, N, dtype=dtype, device="meta"),
            torch.empty(M, K, dtype=dtype, device="meta"),
            torch.empty(K, N, dtype=dtype, device="meta"),
        )

    out, a, b = operands(8192, 4096, 16032)
    assert takes(out, a, b)
    assert takes(out.float(), a, b)
    assert not takes(out.half(), a, b)
    assert not takes(out, a[:, 1:], b[1:])
    assert not takes(out, a[:, ::2], b[::2])
    assert not takes(*operands(8192, 4096, 16032, torch.float32))
    assert not takes(*operands(8192, 2304, 4096))  # five waves, of which the last is a third
    assert takes(*operands(8192, 2304, 4096), beside=True)
    assert not takes(*operands(4096, 2304, 4096), beside=True)  # 2.2 waves, of which half a one is mostly idle
    assert not takes(*operands(0, 4096, 64))
    assert not takes(*operands(8192, 4096, 0))


@pytest.mark.parametrize(
    ("M", "K", "sent_mib", "narrow"),
    [
        (8192, 16032, 0, 0),
        (8192, 16032, 32, 0),  # 7.76 waves of long tiles and a message of 0.18
        (8192, 8016, 32, 384),  # 0.37 of shorter ones
        (8016, 8192, 32, 0),
        (7840, 8192, 32, 0),
        (7840, 8192, 64, 288),
        (16032, 8192, 32, 0),
        (100, 8192, 2**20, 0),  # one block
    ],
)
def test_narrow_tiles_where_a_message_makes_a_wave_more(
    M: int, K: int, sent_mib: int, narrow: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hopper_matmul, "num_processors", lambda _: 132)
    assert hopper_matmul._narrow_rows(torch.empty(M, 4096, device="meta"), K, sent_mib * 2**20) == narrow


@pytest.mark.parametrize(
    ("processors", "tiles", "leave_room", "programs"),
    [(132, 1000, False, 132), (132, 1000, True, 108), (132, 100, True, 100), (132, 1, True, 1), (16, 1000, True, 8)],
)
def test_room_for_a_message(
    processors: int, tiles: int, leave_room: bool, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a part of a GPU, which has fewer processors than a message takes."""
    monkeypatch.setattr(hopper, "num_processors", lambda _: processors)
    assert hopper.programs(tiles * 128, 256, torch.device("meta"), leave_room=leave_room) == programs


def test_elsewhere_the_product_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_matmul, "current_arch", lambda: "sm_80")
    a, b, scale = torch.randn(5, 7), torch.randn(7, 3), torch.randn(5)
    out = torch.empty(5, 3)
    matmul_beside(out, a, b, message_bytes=2**40)
    assert torch.equal(out, a @ b)
    monkeypatch.setattr(kept, "scale_rows", lambda matrix, scale, out: torch.mul(matrix, scale[:, None], out=out))
    kept.scaled_matmul(out, a, b, scale)
    torch.testing.assert_close(out, scale[:, None] * (a @ b))
    assert sweep.matmul_into is hopper_matmul.matmul_into

"""Hidden states on their way from other ranks: what needs them waits for them, and all comes out as without."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor

from vocab_parallel_fused.arrival import Arrival
from vocab_parallel_fused.dispatch import select_kernels
from vocab_parallel_fused.exp_cache import ExpCache
from vocab_parallel_fused.kernels.sweep import GradBuffers
from vocab_parallel_fused.options import Impl
from vocab_parallel_fused.stats import DlogitsCoefficients, PartStats, Wanted
from vocab_parallel_fused.transform import LogitTransform, Operands

tiles = pytest.importorskip("vocab_parallel_fused.kernels.tiles")
in_order_of_arrival = tiles.in_order_of_arrival

T, H, V = 96, 32, 104
RANKS_TOKENS = [slice(0, 32), slice(32, 64), slice(64, 96), slice(0, 5), slice(90, 96)]


class Gathered:
    """Hidden states of which those of other tokens are NaN until somebody waits."""

    def __init__(self, hidden: Tensor, own: slice) -> None:
        self.hidden, self.buffer, self.waits = hidden, torch.full_like(hidden, torch.nan), 0
        self.arrival = Arrival(own, hidden[own].clone(), self.beside, self.wait)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """On the CPU what is launched inside runs at once, so all must have arrived."""
        self.buffer.copy_(self.hidden)
        yield
        self.buffer.fill_(torch.nan)

    def wait(self) -> None:
        self.buffer.copy_(self.hidden)
        self.waits += 1


def problem(device: torch.device, dtype: torch.dtype, *, size: float = 1.0) -> tuple[Operands, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, H, generator=generator).mul(size).to(device, dtype)
    weight = torch.randn(V, H, generator=generator).to(device, dtype)
    target_row = torch.randint(-V, V, (T, 1), generator=generator).to(device)
    return Operands(hidden, weight, None, LogitTransform()), target_row


def grads(
    impl: Impl, head: Operands, target_row: Tensor, stats: PartStats, cache: ExpCache | None, arrival: Arrival | None
) -> tuple[Tensor, Tensor, list[bool]]:
    """dhidden, dweight, and whether dhidden held a NaN when it was said to be complete."""
    hidden, weight, *_ = head
    level = torch.linspace(0.5, 2, T, device=hidden.device) / stats.sum_exp
    coefficients = DlogitsCoefficients(level, None, None, -stats.owners * 0.7)
    dhidden = torch.full(hidden.shape, torch.nan, dtype=hidden.dtype, device=hidden.device)
    dweight = torch.full_like(weight, torch.nan)
    said = []
    buffers = GradBuffers(dhidden, dweight, None, False, lambda: said.append(bool(dhidden.isnan().any())))
    if cache is not None:
        cache = ExpCache(*(tensor.clone() for tensor in cache))
    of_tokens = (target_row, stats.target_logit, None, stats.max_logit, coefficients, cache)
    select_kernels(impl, hidden).local_grads(head, *of_tokens, buffers, 2**14, arrival)
    return dhidden, dweight, said


def test_order_of_arrival() -> None:
    """This rank's tokens first, unless launches of their own would take many more waves."""
    hidden = torch.randn(T, H)

    def order(own: slice, tokens: slice, block_t: int) -> list[str]:
        steps = []
        arrival = Arrival(own, hidden[own], nullcontext, lambda: steps.append("wait"))
        prepared = []
        of_tiles = (block_t, 3, lambda tokens, hidden: prepared.append((tokens, hidden)))
        for part, part_hidden in in_order_of_arrival(hidden, tokens, arrival, *of_tiles):
            assert any(tokens == part and torch.equal(x, part_hidden) for tokens, x in prepared)
            assert torch.equal(part_hidden, hidden[part])
            steps.append(f"{part.start}:{part.stop}")
        return steps

    assert order(slice(32, 64), slice(0, 96), 16) == ["32:64", "wait", "0:32", "64:96"]
    assert order(slice(0, 32), slice(0, 96), 16) == ["0:32", "wait", "32:96"]
    assert order(slice(64, 96), slice(48, 80), 16) == ["64:80", "wait", "48:64"]
    assert order(slice(32, 64), slice(32, 48), 16) == ["32:48", "wait"]
    assert order(slice(32, 64), slice(64, 96), 16) == ["wait", "64:96"]
    assert order(slice(5, 37), slice(0, 96), 16) == ["wait", "0:96"]  # 1 + 2 + 4 blocks in place of 6
    assert order(slice(32, 64), slice(0, 96), 64) == ["wait", "0:96"]


@pytest.mark.parametrize("own", RANKS_TOKENS)
def test_statistics(impl: Impl, own: slice, device: torch.device) -> None:
    head, target_row = problem(device, torch.float32)
    local_stats = select_kernels(impl, head.hidden).local_stats
    expected, _ = local_stats(head, target_row, None, Wanted(True, True, True), 0, None)
    gathered = Gathered(head.hidden, own)
    arrived = head._replace(hidden=gathered.buffer)
    actual, _ = local_stats(arrived, target_row, None, Wanted(True, True, True), 0, gathered.arrival)
    assert gathered.waits > 0
    for name, field, value in zip(PartStats._fields, actual, expected, strict=True):
        # On the CPU a product's sums may run in another order beside other rows.
        torch.testing.assert_close(field, value, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("own", RANKS_TOKENS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kept", "size"), [(0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (1.0, 60.0)])
def test_gradients(impl: Impl, own: slice, kept: float, size: float, dtype: torch.dtype, device: torch.device) -> None:
    """Recomputed, half kept, kept, and kept where many a row's exponentials are out of range, so that it is computed
    anew: also in a second backward."""
    head, target_row = problem(device, dtype, size=size)
    budget = int(kept * T * V * dtype.itemsize)
    stats, cache = select_kernels(impl, head.hidden).local_stats(head, target_row, None, Wanted(), budget, None)
    if cache is not None and size > 1:
        far = (cache.max_logit - cache.reference).abs() > 40
        assert 0 < far.sum() < T
    expected = grads(impl, head, target_row, stats, cache, None)
    for _ in range(2):
        gathered = Gathered(head.hidden, own)
        arrived = head._replace(hidden=gathered.buffer)
        actual = grads(impl, arrived, target_row, stats, cache, gathered.arrival)
        assert gathered.waits > 0
        assert actual[2] == expected[2] == [False]
        assert torch.equal(actual[1], expected[1])
        # The rows that are computed anew take another product.
        tolerance = 0.0 if size == 1 else 4 * torch.finfo(dtype).eps * expected[0].abs().max().item()
        torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=tolerance)


def test_own_tokens_are_aligned() -> None:
    """They are the caller's own memory, where the gathered ones are fresh: a part of a flat buffer, for one."""
    own = slice(32, 64)
    misaligned = torch.randn(32 * H + 1)[1:].view(32, H)
    assert not tiles.is_aligned(misaligned)
    arrival = Arrival(own, misaligned, nullcontext, lambda: None)
    arrivals = in_order_of_arrival(torch.randn(T, H), slice(0, T), arrival, 16, 3)
    parts = {part.start: hidden for part, hidden in arrivals}
    assert parts.keys() == {32, 0, 64}
    assert all(map(tiles.is_aligned, parts.values()))
    assert torch.equal(parts[32][:, :H], misaligned)
    assert not parts[32][:, H:].any()

"""Hidden states on their way from other ranks: what needs them waits for them, and all comes out as without."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vocab_parallel_fused import (
    ComputeOptions,
    autograd,
    collectives,
    linear_cross_entropy,
    linear_distillation,
    linear_top_k,
)
from vocab_parallel_fused.arrival import Arrival
from vocab_parallel_fused.dispatch import select_kernels
from vocab_parallel_fused.exp_cache import ExpCache
from vocab_parallel_fused.kernels.sweep import GradBuffers
from vocab_parallel_fused.options import Impl
from vocab_parallel_fused.stats import DlogitsCoefficients, PartStats, Wanted, empty_stats, merge_stats
from vocab_parallel_fused.transform import LogitTransform, Operands

tiles = pytest.importorskip("vocab_parallel_fused.kernels.tiles")
streams = pytest.importorskip("vocab_parallel_fused.kernels.streams")
in_order_of_arrival = streams.in_order_of_arrival

T, H, V = 96, 32, 104
RANKS_TOKENS = [slice(0, 32), slice(32, 64), slice(64, 96), slice(0, 5), slice(90, 96)]


class Gathered:
    """Hidden states of which those of other tokens are NaN until somebody waits."""

    def __init__(self, hidden: Tensor, own: slice) -> None:
        self.hidden, self.buffer, self.waits = hidden, torch.full_like(hidden, torch.nan), 0
        self.arrival = Arrival(own, hidden[own].clone(), self.wait)

    def wait(self) -> None:
        self.buffer.copy_(self.hidden)
        self.waits += 1


def problem(
    device: torch.device, dtype: torch.dtype, *, size: float = 1.0, hidden_size: int = H
) -> tuple[Operands, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, hidden_size, generator=generator).mul(size).to(device, dtype)
    weight = torch.randn(V, hidden_size, generator=generator).to(device, dtype)
    target_row = torch.randint(-V, V, (T, 1), generator=generator).to(device)
    return Operands(hidden, weight, None, LogitTransform()), target_row


def grads(
    impl: Impl,
    head: Operands,
    target_row: Tensor,
    stats: PartStats,
    cache: ExpCache | None,
    arrival: Arrival | None,
    *,
    workspace_bytes: int = 2**14,
    main_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[bool]]:
    """dhidden, dweight, and whether dhidden held a NaN when it was said to be complete."""
    hidden, weight, *_ = head
    stats = merge_stats(stats)
    level = torch.linspace(0.5, 2, len(hidden), device=hidden.device) / stats.sum_exp
    coefficients = DlogitsCoefficients(level, None, None, -stats.owners * 0.7)
    dhidden = torch.full(hidden.shape, torch.nan, dtype=hidden.dtype, device=hidden.device)
    dweight = torch.full_like(weight, torch.nan) if main_grad is None else main_grad.clone()
    said = []
    buffers = GradBuffers(
        dhidden, dweight, None, main_grad is not None, lambda: said.append(bool(dhidden.isnan().any()))
    )
    if cache is not None:
        cache = ExpCache(*(tensor.clone() for tensor in cache))
    of_tokens = (target_row, stats.target_logit, None, stats.max_logit, coefficients, cache)
    select_kernels(impl, hidden).local_grads(head, *of_tokens, buffers, workspace_bytes, arrival)
    return dhidden, dweight, said


def test_order_of_arrival() -> None:
    """This rank's tokens first, unless launches of their own would take many more tiles. They leave room for others,
    if there are."""
    hidden = torch.randn(T, H)

    def order(own: slice, tokens: slice, block_t: int) -> list[str]:
        steps = []

        def launch(part: slice, part_hidden: Tensor, leave_room: bool) -> None:
            assert torch.equal(part_hidden, hidden[part])
            steps.append(f"{part.start}:{part.stop}{' with room' if leave_room else ''}")

        arrival = Arrival(own, hidden[own], lambda: steps.append("wait"))
        in_order_of_arrival(launch, streams.Fork(hidden.device), hidden, tokens, arrival, block_t)
        return steps

    assert order(slice(32, 64), slice(0, 96), 16) == ["32:64 with room", "wait", "0:32", "64:96"]
    assert order(slice(0, 32), slice(0, 96), 16) == ["0:32 with room", "wait", "32:96"]
    assert order(slice(64, 96), slice(48, 80), 16) == ["64:80 with room", "wait", "48:64"]
    assert order(slice(32, 64), slice(48, 96), 16) == ["48:64 with room", "wait", "64:96"]
    assert order(slice(32, 64), slice(32, 48), 16) == ["32:48", "wait"]
    assert order(slice(32, 64), slice(64, 96), 16) == ["wait", "64:96"]
    assert order(slice(5, 37), slice(0, 96), 16) == ["wait", "0:96"]  # 1 + 2 + 4 blocks in place of 6
    assert order(slice(32, 64), slice(0, 96), 64) == ["wait", "0:96"]


def test_launches_of_statistics() -> None:
    """On Hopper one launch takes all rows, whatever their number, of as many tokens as its partials have memory for;
    those that are launched with this rank's come first."""
    forward = importlib.import_module("vocab_parallel_fused.kernels.forward")
    configs = importlib.import_module("vocab_parallel_fused.kernels.configs")

    def launches(tokens: int, rows: int, first_token: int) -> list[tuple[int, ...]]:
        hidden, weight = torch.empty(tokens, H, device="meta"), torch.empty(rows, H, device="meta")
        target_row = torch.empty(tokens, 1, device="meta")
        statistics = forward._Statistics(
            head=Operands(hidden.bfloat16(), weight.bfloat16(), None, LogitTransform()),
            target_row=target_row,
            class_weight=None,
            stats=empty_stats(target_row, torch.float32, Wanted()),
            cache=None,
            tiles=forward._Tiles("sm_90", configs.tile_config("sm_90", torch.bfloat16, tokens), on_hopper=True),
        )
        return [(t.start, t.stop, r.start, r.stop, strip) for t, r, strip in statistics.launches(first_token)]

    assert launches(8192, 16032, 4096) == [(0, 8192, 0, 16032, 1)]
    assert launches(300, 1, 0) == [(0, 300, 0, 1, 1)]
    several = launches(2**17, 128256, 2**16)
    assert [rows for *_, rows, _ in several] == [128256] * len(several)
    starts = [start for start, *_ in several]
    assert starts[0] <= 2**16 < several[0][1]
    assert len(starts) > 2
    assert sorted(starts) == sorted({0, *(stop for _, stop, *_ in several)} - {2**17})


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
def test_what_is_kept(own: slice, device: torch.device) -> None:
    """Exponentials of half the rows, and what they are measured from."""
    if device.type == "cuda":
        pytest.skip("tiles are too large there for half of these rows")
    head, target_row = problem(device, torch.float32)
    local_stats, budget = select_kernels("triton", head.hidden).local_stats, T * V * 4 // 2
    _, expected = local_stats(head, target_row, None, Wanted(), budget, None)
    gathered = Gathered(head.hidden, own)
    arrived = head._replace(hidden=gathered.buffer)
    _, actual = local_stats(arrived, target_row, None, Wanted(), budget, gathered.arrival)
    assert expected is not None
    assert actual is not None
    # Which logits are in a token's sample depends on the tokens beside it.
    distance = (actual.reference[:, None] - head.hidden @ head.weight.t()).abs().amin(dim=1)
    assert (distance < 1e-4).all()
    for cache in (actual, expected):
        cache.exps.mul_(torch.exp(cache.reference - cache.max_logit)[:, None])
    torch.testing.assert_close(actual.exps, expected.exps, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("own", RANKS_TOKENS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kept", "size"), [(0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (0.5, 60.0), (1.0, 60.0)])
def test_gradients(impl: Impl, own: slice, kept: float, size: float, dtype: torch.dtype, device: torch.device) -> None:
    """Recomputed, half kept, kept, and either where many a row's exponentials are out of range, so that it is computed
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
        assert gathered.waits == 1
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
    arrival = Arrival(own, misaligned, lambda: None)
    parts: dict[int, Tensor] = {}

    def launch(part: slice, part_hidden: Tensor, _leave_room: bool) -> None:
        parts[part.start] = part_hidden

    in_order_of_arrival(launch, streams.Fork(torch.device("cpu")), torch.randn(T, H), slice(0, T), arrival, 16)
    assert parts.keys() == {32, 0, 64}
    assert all(map(tiles.is_aligned, parts.values()))
    assert torch.equal(parts[32][:, :H], misaligned)
    assert not parts[32][:, H:].any()


@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_hidden_states_that_are_copied(impl: Impl, kept: float, device: torch.device) -> None:
    """Where their rows do not start where loads are fast they are copied: all of them, so all must be here."""
    head, target_row = problem(device, torch.float32, hidden_size=H - 2)
    budget = int(kept * T * V * 4)
    local_stats = select_kernels(impl, head.hidden).local_stats
    stats, cache = local_stats(head, target_row, None, Wanted(), budget, None)
    gathered = Gathered(head.hidden, slice(32, 64))
    actual, _ = local_stats(head._replace(hidden=gathered.buffer), target_row, None, Wanted(), budget, gathered.arrival)
    torch.testing.assert_close(actual, stats, rtol=1e-6, atol=1e-6)
    expected = grads(impl, head, target_row, stats, cache, None)
    gathered = Gathered(head.hidden, slice(32, 64))
    arrived = head._replace(hidden=gathered.buffer)
    for grad, value in zip(
        grads(impl, arrived, target_row, stats, cache, gathered.arrival)[:2], expected[:2], strict=True
    ):
        assert torch.equal(grad, value)


@pytest.mark.parametrize("own", [slice(0, 32), slice(64, 96)])
@pytest.mark.parametrize(("kept", "size"), [(0.0, 1.0), (0.5, 1.0), (0.5, 60.0)])
def test_several_groups_of_tokens(
    own: slice, kept: float, size: float, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an fp32 main_grad allows. The group that has this rank's tokens comes first, and these before the others
    unless rows that were kept need all."""
    if device.type == "cuda":
        pytest.skip("tiles are too large there for several groups of these tokens")
    head, target_row = problem(device, torch.bfloat16, size=size)
    budget = int(kept * T * V * 2)
    stats, cache = select_kernels("triton", head.hidden).local_stats(head, target_row, None, Wanted(), budget, None)
    assert (cache is not None) == (kept > 0)
    backward = importlib.import_module("vocab_parallel_fused.kernels.backward")
    visited: list[tuple[int, int]] = []
    gathered = Gathered(head.hidden, own)

    write_tiles = backward._LogitGrads._write_tiles

    def logged(self: Any, head: Operands, tokens: slice, *others: Any, **options: Any) -> None:
        visited.append((tokens.start, gathered.waits))
        write_tiles(self, head, tokens, *others, **options)

    main_grad = torch.ones(V, H, device=device)
    memory: Any = {"workspace_bytes": 2**12, "main_grad": main_grad}
    expected = grads("triton", head, target_row, stats, cache, None, **memory)
    monkeypatch.setattr(backward._LogitGrads, "_write_tiles", logged)
    arrived = head._replace(hidden=gathered.buffer)
    actual = grads("triton", arrived, target_row, stats, cache, gathered.arrival, **memory)
    assert gathered.waits == 1
    assert visited[0] == (own.start, int(cache is not None))
    assert len({start for start, _ in visited}) > 2
    assert actual[2] == expected[2] == [False]
    for grad, value in zip(actual[:2], expected[:2], strict=True):
        # Groups of another order are added up in another.
        tolerance = 4 * torch.finfo(grad.dtype).eps * value.abs().max().item()
        torch.testing.assert_close(grad, value, rtol=0, atol=tolerance)


def test_who_leaves_room(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of this rank's tokens, in the forward and in the first block of the backward."""
    if device.type == "cuda":
        pytest.skip("tiles are too large there for parts of these tokens")
    head, target_row = problem(device, torch.float32)
    launched: list[tuple[int, bool]] = []
    forward = importlib.import_module("vocab_parallel_fused.kernels.forward")
    backward = importlib.import_module("vocab_parallel_fused.kernels.backward")
    of_stats, of_dlogits = forward._Tiles.launch, backward._LogitGrads._write_tiles

    def log_stats(self: Any, *others: Any, leave_room: bool, **options: Any) -> None:
        *_, pointers = others
        launched.append((pointers["partial_max_ptr"].storage_offset(), leave_room))  # of the tokens' partials
        of_stats(self, *others, leave_room=leave_room, **options)

    def log_dlogits(self: Any, head: Operands, tokens: slice, *others: Any, leave_room: bool) -> None:
        launched.append((tokens.start, leave_room))
        of_dlogits(self, head, tokens, *others, leave_room=leave_room)

    monkeypatch.setattr(forward._Tiles, "launch", log_stats)
    monkeypatch.setattr(backward._LogitGrads, "_write_tiles", log_dlogits)
    gathered = Gathered(head.hidden, slice(32, 64))
    arrived = head._replace(hidden=gathered.buffer)
    stats, _ = select_kernels("triton", head.hidden).local_stats(
        arrived, target_row, None, Wanted(), 0, gathered.arrival
    )
    in_parts = [(32, True), (0, False), (64, False)]
    assert launched == in_parts
    launched.clear()
    gathered = Gathered(head.hidden, slice(32, 64))
    grads("triton", head._replace(hidden=gathered.buffer), target_row, stats, None, gathered.arrival)
    assert launched[:3] == in_parts
    assert not any(leave_room for _, leave_room in launched[3:])


@pytest.mark.parametrize(("tokens", "hidden_size", "rows"), [(37, 40, 21), (16, 32, 16), (1, 1, 3)])
@pytest.mark.parametrize("transposed", [False, True])
def test_product_of_rewritten_rows(
    tokens: int, hidden_size: int, rows: int, transposed: bool, device: torch.device
) -> None:
    """With tails of every size, in matrices that are parts of others: what is not marked, or beside, stays as it is."""
    kept = importlib.import_module("vocab_parallel_fused.kernels.kept")
    exps = torch.randn(tokens, rows + 3, device=device)[:, :rows]
    weight = (
        torch.randn(hidden_size, rows, device=device).t() if transposed else torch.randn(rows, hidden_size).to(exps)
    )
    marked = torch.arange(tokens, device=device) % 3 == 0
    reference = torch.where(marked, torch.inf, 0.0)
    around = torch.full((tokens + 1, hidden_size + 5), 7.0, device=device)
    expected = around.clone()
    expected[:tokens, :hidden_size][marked] = (exps @ weight)[marked]
    kept.rewrite_product(around[:tokens, :hidden_size], weight, ExpCache(exps, reference, reference))
    torch.testing.assert_close(around, expected)


class Late:
    """In place of a gather: hidden states that are NaN until somebody waits, half of them of other ranks."""

    def __init__(self) -> None:
        self.gathered: list[Gathered] = []

    def __call__(self, hidden: Tensor, _group: object) -> tuple[Tensor, Arrival]:
        gathered = Gathered(hidden.detach(), slice(0, len(hidden) // 2))
        self.gathered.append(gathered)
        return gathered.buffer, gathered.arrival


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Late:
    late = Late()
    monkeypatch.setattr(autograd, "gather_hidden_beside", late)
    monkeypatch.setattr(collectives, "gather_hidden_beside", late)
    return late


def cross_entropy(hidden: Tensor, weight: Tensor, options: ComputeOptions) -> Tensor:
    target = torch.arange(len(hidden), device=hidden.device)
    return linear_cross_entropy(hidden, weight, target, sequence_parallel=True, options=options, reduction="none")


def distillation(hidden: Tensor, weight: Tensor, options: ComputeOptions) -> Tensor:
    teacher = (hidden.detach() + 1, weight.detach() * 0.9)
    return linear_distillation(hidden, weight, *teacher, sequence_parallel=True, options=options, reduction="none")


def top_k(hidden: Tensor, weight: Tensor, options: ComputeOptions) -> Tensor:
    top = linear_top_k(hidden, weight, 3, sequence_parallel=True, options=options)
    return top.log_prob.sum(dim=1)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(("loss", "forward", "backward"), [(cross_entropy, 1, 1), (distillation, 2, 2), (top_k, 2, 1)])
def test_everybody_waits(
    loss: Callable[..., Tensor],
    forward: int,
    backward: int,
    keep: bool,
    impl: Impl,
    device: torch.device,
    request: pytest.FixtureRequest,
) -> None:
    """Whoever asks for hidden states of all ranks, in the forward and, unless they are kept, in the backward."""
    head, _ = problem(device, torch.float32)

    def results() -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (head.hidden, head.weight)]
        losses = loss(*leaves, ComputeOptions(impl=impl, keep_gathered_hidden=keep))
        return [losses.detach(), *torch.autograd.grad(losses.sum(), leaves)]

    expected = results()
    late = request.getfixturevalue("late")
    # On the CPU a product's sums may run in another order beside other rows.
    torch.testing.assert_close(results(), expected, rtol=1e-5, atol=1e-4)
    assert len(late.gathered) == forward + backward * (not keep)
    assert all(gathered.waits > 0 for gathered in late.gathered)


@pytest.mark.parametrize("step", ["local_stats", "local_grads"])
def test_an_error_waits(step: str, late: Late, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is raised frees the memory into which the hidden states are still being written."""
    head, _ = problem(device, torch.float32)
    eager = importlib.import_module("vocab_parallel_fused.kernels.eager")

    def fail(*_: object, **_options: object) -> None:
        raise MemoryError(step)

    monkeypatch.setattr(eager, step, fail)
    with pytest.raises(MemoryError, match=step):
        cross_entropy(head.hidden.requires_grad_(), head.weight, ComputeOptions(impl="eager")).sum().backward()
    assert late.gathered[-1].waits == 1


@pytest.mark.gpu
@pytest.mark.parametrize("own", [slice(0, 512), slice(256, 768), slice(896, 1024)])
@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
def test_streams(own: slice, kept: float) -> None:
    """The states of the others arrive late on a stream of their own. What is launched there waits for them, and for
    what was launched before on the current stream: that may still be using the memory which is written here."""
    device, T, H, V = torch.device("cuda"), 1024, 256, 2048
    hidden = torch.randn(T, H, device=device, dtype=torch.bfloat16)
    head = Operands(hidden, torch.randn(V, H, device=device, dtype=torch.bfloat16), None, LogitTransform())
    target_row = torch.randint(-V, V, (T, 1), device=device)
    kernels, budget = select_kernels("triton", hidden), int(kept * T * V * 2)
    side, sleep = torch.cuda.Stream(priority=-1), 20_000_000  # cycles, some 10 ms

    def arriving() -> tuple[Operands, Arrival]:
        buffer = torch.full_like(hidden, torch.nan)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(sleep)
            buffer.copy_(hidden)
        wait = lambda: torch.cuda.current_stream().wait_stream(side)  # noqa: E731
        return head._replace(hidden=buffer), Arrival(own, hidden[own].clone(), wait, side)

    def leave_late_writes() -> None:
        """Memory that is free for the host, and on the device soon full of NaN."""
        sizes = [T] * 12 + [T * V, T * V // 2, T * 256]
        torch.cuda._sleep(3 * sleep)
        for size in sizes:
            torch.full((size,), torch.nan, device=device)

    expected, expected_cache = kernels.local_stats(head, target_row, None, Wanted(), budget, None)
    arrived, arrival = arriving()
    leave_late_writes()
    stats, cache = kernels.local_stats(arrived, target_row, None, Wanted(), budget, arrival)
    assert torch.equal(stats.max_logit, expected.max_logit)
    torch.testing.assert_close(stats, expected, rtol=1e-6, atol=1e-6)
    assert (cache is None) == (expected_cache is None) == (kept == 0)
    if cache is not None and expected_cache is not None:
        # Which logits are in a token's sample depends on the tokens beside it.
        actual_exps, expected_exps = (
            c.exps.float() * torch.exp(c.reference - c.max_logit)[:, None] for c in (cache, expected_cache)
        )
        torch.testing.assert_close(actual_exps, expected_exps, rtol=2**-6, atol=1e-30)

    expected_grads = grads("triton", head, target_row, expected, expected_cache, None, workspace_bytes=2**20)
    arrived, arrival = arriving()
    leave_late_writes()
    actual = grads("triton", arrived, target_row, expected, expected_cache, arrival, workspace_bytes=2**20)
    assert torch.equal(actual[0], expected_grads[0])
    assert torch.equal(actual[1], expected_grads[1])

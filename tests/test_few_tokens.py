"""So few tokens that one tile has them all: each tile is a part of the vocabulary that holds its own targets."""

from typing import Any, get_args

import pytest
import torch
from torch.distributed import ProcessGroup

from vocab_parallel_fused import ComputeOptions, VocabShard, linear_cross_entropy, linear_token_stats
from vocab_parallel_fused.kernels import eager
from vocab_parallel_fused.options import Combine
from vocab_parallel_fused.stats import PartStats, TokenStats, Wanted, merge_stats, whole_stats
from vocab_parallel_fused.testing import full_logits_results, make_problem, run_on_ranks
from vocab_parallel_fused.transform import LogitTransform, Operands

forward = pytest.importorskip("vocab_parallel_fused.kernels.forward")
launcher = pytest.importorskip("vocab_parallel_fused.kernels.launcher")
tokens = pytest.importorskip("vocab_parallel_fused.kernels.tokens")

H = 40
PLAIN, EVERYTHING = Wanted(), Wanted(logit_sum=True, expected_logit=True, argmax=True)
# On Hopper up to 64 tokens are one kernel's, up to 128 another's; the interpreter's tiles have 16.
NUMBERS_OF_TOKENS = [1, 7, 16, *(pytest.param(T, marks=pytest.mark.gpu) for T in (64, 100, 128))]


def problem(
    T: int, V: int, device: torch.device, dtype: torch.dtype = torch.float32, transform: LogitTransform | None = None
) -> tuple[Operands, torch.Tensor, torch.Tensor]:
    """A head with a bias, targets that are rows of the shard or none, and class weights."""
    generator = torch.Generator().manual_seed(T + V)
    hidden, weight, bias, class_weight = (
        torch.randn(shape, generator=generator).to(device) for shape in ((T, H), (V, H), (V,), (V,))
    )
    target_row = torch.randint(V, (T, 1), generator=generator)
    ends = torch.tensor([0, V - 1, V, -1, 2**40, -(2**62)])[:T, None]
    target_row[: len(ends)] = ends
    transform = LogitTransform() if transform is None else transform
    return Operands(hidden.to(dtype), weight.to(dtype), bias, transform), target_row.to(device), class_weight


def assert_same(actual: PartStats | TokenStats, expected: PartStats | TokenStats, num_rows: int = 0) -> None:
    """Up to the rounding of fp32, where a sum of logits has the error of as many terms of size 10."""
    for name, mine, theirs in zip(expected._fields, actual, expected, strict=True):
        atol = 2e-5 + (num_rows * 1e-6 if name in {"logit_sum", "class_sum"} else 0)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("wanted", [PLAIN, Wanted(expected_logit=True), EVERYTHING])
@pytest.mark.parametrize("V", [1, 33, 256, 257])
@pytest.mark.parametrize("T", NUMBERS_OF_TOKENS)
def test_parts_of_a_shard(T: int, V: int, wanted: Wanted, device: torch.device) -> None:
    """They merge into what the specification says of all rows, by torch or by either kernel."""
    head, target_row, class_weight = problem(T, V, device, torch.bfloat16, LogitTransform(0.7, 9.0, 1.3))
    for targets in (target_row, target_row[:, :0]):
        arguments = (head, targets, class_weight if wanted.logit_sum else None, wanted, 0, None)
        expected = merge_stats(eager.local_stats(*arguments)[0])
        several, cache = forward.local_stats(*arguments, one_part=False)
        one, _ = forward.local_stats(*arguments)
        assert cache is None
        assert len(one.max_logit) == 1
        assert_same(merge_stats(one), expected, V)
        assert_same(tokens.token_stats(several, None, targets, V, -100).stats, whole_stats(expected), V)
        if several.argmax is not None:
            several = several._replace(argmax=several.argmax.long())
        assert_same(merge_stats(several), expected, V)


@pytest.mark.parametrize("T", NUMBERS_OF_TOKENS)
def test_each_target_in_one_part(T: int, device: torch.device) -> None:
    """Its logit is there, to the bit, what the tile has found: it is never above the largest."""
    V = 1000
    head, target_row, _ = problem(T, V, device)
    parts, _ = forward.local_stats(head, target_row, None, PLAIN, 0, None, one_part=False)
    in_shard = (target_row >= 0) & (target_row < V)
    assert torch.equal(parts.owners.sum(dim=0), in_shard.float())
    assert ((parts.owners == 0) | (parts.owners == 1)).all()
    assert not parts.target_logit[parts.owners == 0].any()
    largest = parts.max_logit[..., None]
    assert (parts.target_logit <= largest)[parts.owners == 1].all()
    # The target that is a token's largest logit is exactly that.
    logits = torch.nn.functional.linear(head.hidden, head.weight, head.bias)
    best = torch.where(in_shard, logits.argmax(dim=1, keepdim=True), target_row)
    parts, _ = forward.local_stats(head, best, None, PLAIN, 0, None, one_part=False)
    whole = merge_stats(parts)
    assert torch.equal(whole.target_logit[in_shard], whole.max_logit[:, None][in_shard])


@pytest.mark.parametrize("T", NUMBERS_OF_TOKENS)
def test_logits_without_a_number(T: int, device: torch.device) -> None:
    """Tiles that a bias masks, with a target among them, and a token whose logits are NaN."""
    V = 600
    head, target_row, _ = problem(T, V, device)
    assert head.bias is not None
    head.bias[:300] = -torch.inf
    head.hidden[0] = torch.nan
    if T > 1:
        target_row[1] = 5
    expected = merge_stats(eager.local_stats(head, target_row, None, PLAIN, 0, None)[0])
    for one_part in (True, False):
        actual = merge_stats(forward.local_stats(head, target_row, None, PLAIN, 0, None, one_part=one_part)[0])
        assert actual.sum_exp[0].isnan()
        assert_same(PartStats(*(field[1:] for field in actual[:4])), PartStats(*(field[1:] for field in expected[:4])))


def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what is launched from now on."""
    log: list[str] = []

    def logged(name: str, call: Any) -> Any:
        def wrapper(*arguments: Any, **keywords: Any) -> Any:
            log.append(name)
            return call(*arguments, **keywords)

        return wrapper

    for owner, name in (
        (forward._Tiles, "launch"),
        (forward, "_target_logits"),
        (forward, "_merge_partials"),
        (tokens, "_launch_loss"),
        (tokens, "_launch_stats"),
    ):
        monkeypatch.setattr(owner, name, logged(name, getattr(owner, name)))
    return log


def test_launches(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss takes two, and so do statistics; what keeps exponentials needs the targets first."""
    head, target_row, _ = problem(16, 304, device)
    target = target_row.clamp(0, 303)[:, 0]
    log = launches(monkeypatch)
    options = ComputeOptions(impl="triton")
    linear_cross_entropy(head.hidden, head.weight, target, options=options)
    assert log == ["launch", "_launch_loss"]
    log.clear()
    linear_token_stats(head.hidden, head.weight, target, outputs=["log_prob"], options=options)
    assert log == ["launch", "_launch_loss"]
    log.clear()
    for outputs in (["log_prob", "entropy"], ["argmax"]):
        linear_token_stats(head.hidden, head.weight, target, outputs=outputs, options=options)
        assert log == ["launch", "_launch_stats"]
        log.clear()
    keeping = ComputeOptions(impl="triton", exp_cache_bytes=2**20)
    linear_cross_entropy(head.hidden.requires_grad_(), head.weight, target, options=keeping)
    assert log == ["_target_logits", "launch", "_merge_partials", "_launch_loss"]
    log.clear()
    many, targets = head.hidden.detach().repeat(13, 1), target.repeat(13)
    linear_cross_entropy(many, head.weight, targets, options=options)
    assert log == ["launch", "_target_logits", "_merge_partials", "_launch_loss"]


def test_more_than_one_launch_takes(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose partials do not fit the memory for them, and rows that are copied block by block to be aligned."""
    head, target_row, _ = problem(16, 300, device)
    expected = merge_stats(eager.local_stats(head, target_row, None, PLAIN, 0, None)[0])
    monkeypatch.setattr(forward, "_PARTIAL_BYTES", 1024)
    parts, _ = forward.local_stats(head, target_row, None, PLAIN, 0, None, one_part=False)
    assert len(parts.max_logit) == 1
    assert_same(merge_stats(parts), expected)
    monkeypatch.undo()
    odd = head._replace(hidden=head.hidden[:, :39], weight=head.weight[:, :39])
    expected = merge_stats(eager.local_stats(odd, target_row, None, PLAIN, 0, None)[0])
    for one_part in (True, False):
        parts, _ = forward.local_stats(odd, target_row, None, PLAIN, 0, None, one_part=one_part)
        assert_same(merge_stats(parts), expected)


def few_tokens_on_rank(group: ProcessGroup, combine: Combine) -> None:
    """The first rank holds 70 of the classes and the second 30; each merges its tiles before its numbers travel."""
    everything = make_problem(16, H, 100)
    start, stop = ((0, 70), (70, 100))[group.rank()]
    shard = VocabShard(start, stop, 100)
    assert everything.bias is not None
    hidden, weight, bias = (
        tensor.detach().clone().requires_grad_()
        for tensor in (everything.hidden, everything.weight[start:stop], everything.bias[start:stop])
    )
    arguments: dict[str, Any] = {"linear_bias": bias, "group": group, "shard": shard}
    arguments["options"] = ComputeOptions(impl="triton", combine=combine)
    exact = full_logits_results(everything.to(torch.float64))
    loss = linear_cross_entropy(hidden, weight, everything.target, reduction="none", **arguments)
    torch.testing.assert_close(loss.double(), exact.loss, rtol=1e-5, atol=1e-5)
    loss.backward(everything.upstream)
    assert hidden.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(hidden.grad.double(), exact.dhidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), exact.dweight[start:stop], rtol=1e-4, atol=1e-5)
    stats = linear_token_stats(hidden, weight, everything.target, outputs=["log_prob", "argmax"], **arguments)
    assert stats.log_prob is not None
    assert stats.argmax is not None
    torch.testing.assert_close(stats.log_prob.double(), -exact.loss, rtol=1e-5, atol=1e-5)
    logits = torch.nn.functional.linear(everything.hidden, everything.weight, everything.bias)
    assert torch.equal(stats.argmax, logits.argmax(dim=1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="these ranks compute on the CPU, where Triton is interpreted")
@pytest.mark.parametrize("combine", get_args(Combine))
def test_over_ranks(combine: Combine) -> None:
    run_on_ranks(few_tokens_on_rank, 2, combine)


@pytest.mark.parametrize("num_parts", [1, 2, 700])
@pytest.mark.parametrize("T", [1, 17, 128])
def test_loss_of_many_parts(T: int, num_parts: int, device: torch.device) -> None:
    """Some of them empty, all of one token's, and one token holds a NaN."""
    generator = torch.Generator().manual_seed(0)
    max_logit, sum_exp = 10 * torch.randn(num_parts, T, generator=generator), 1 + torch.rand(num_parts, T)
    owner = torch.randint(num_parts, (T,), generator=generator)
    target_logit, owners = torch.zeros(2, num_parts, T)
    target_logit[owner, torch.arange(T)] = max_logit.amax(dim=0) - torch.rand(T, generator=generator)
    owners[owner, torch.arange(T)] = 1
    max_logit[1::5], sum_exp[1::5] = -torch.inf, 0
    if T > 1:
        max_logit[:, 1], sum_exp[:, 1] = -torch.inf, 0
        max_logit[num_parts // 2, 2] = sum_exp[num_parts // 2, 2] = torch.nan
    fields = [field.to(device) for field in (max_logit, sum_exp, target_logit[..., None], owners[..., None])]
    parts, target = PartStats(*fields), torch.zeros(T, 1, dtype=torch.int64, device=device)
    target[5:7] = -100
    for reduction in ("none", "mean"):
        expected = eager.token_loss(parts, None, target, 9, -100, reduction)
        actual = tokens.token_loss(parts, None, target, 9, -100, reduction)
        for mine, theirs in zip(actual[:-1], expected[:-1], strict=True):
            torch.testing.assert_close(mine.float(), theirs.float(), rtol=2e-6, atol=4e-6, equal_nan=True)
    parts.owners[:, 0] = 0
    assert not tokens.token_loss(parts, None, target, 9, -100, "mean").covered


class Kernel:
    """In place of a compiled one: counts how often it is compiled, and logs with what it is launched."""

    def __init__(self, kernel: Any) -> None:
        self.params, self.arg_names = kernel.params, kernel.arg_names
        self.compiled, self.log = 0, []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_and_launch(**_arguments: Any) -> Any:
            self.compiled += 1
            return {(programs, 1, 1): self.launch(programs) for programs in range(1, 9)}

        assert len(grid) == 1
        return compile_and_launch

    def launch(self, programs: int) -> Any:
        return lambda *arguments: self.log.append((programs, dict(zip(self.arg_names, arguments, strict=True))))


def jit(source: Any, **options: Any) -> Any:
    """Parameters as Triton reads them, interpreted or not."""
    from triton.runtime.jit import JITFunction

    return JITFunction(source, **options)


def add(x_ptr, y_ptr, number, size, factor, BLOCK):  # pyright: ignore[reportMissingParameterType]
    pass


def test_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles for what a kernel specialises, and for nothing else."""
    monkeypatch.setattr(launcher, "INTERPRETED", False)
    kernel = Kernel(jit(add, do_not_specialize=["number"], do_not_specialize_on_alignment=["y_ptr"]))
    launch = launcher.Launcher(kernel)
    numbers, device = torch.zeros(64), torch.device("cpu")
    usual = {"x_ptr": numbers, "y_ptr": None, "number": 3, "size": 16, "factor": "a", "BLOCK": 32, "num_warps": 4}
    launch(2, device, usual)
    assert kernel.compiled == 1
    assert not kernel.log
    launch(5, device, usual | {"number": 16, "x_ptr": numbers[4:]})
    assert kernel.compiled == 1
    ((programs, arguments),) = kernel.log
    assert (programs, arguments["number"], arguments["x_ptr"].data_ptr()) == (5, 16, numbers[4:].data_ptr())
    others = [
        {"x_ptr": numbers[1:]},
        {"x_ptr": numbers.half()},
        {"x_ptr": None},
        {"y_ptr": numbers},
        {"size": 17},
        {"size": None},
        {"factor": "b"},
        {"BLOCK": 64},
        {"num_warps": 8},
        {"num_stages": 2},
    ]
    for count, change in enumerate(others, start=2):
        for _ in range(2):
            launch(1, device, usual | change)
        assert kernel.compiled == count, change
    before = kernel.compiled
    launch(1, device, usual | {"y_ptr": numbers[1:]})
    assert kernel.compiled == before
    launch(1, torch.device("meta"), usual)
    assert kernel.compiled == before + 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_launches_of_other_kinds(dtype: torch.dtype) -> None:
    """In turn, so that each finds what the others compiled: other tiles, transforms, alignments and strides."""
    device = torch.device("cuda")
    for _ in range(2):
        for T in (1, 16, 33, 100, 200):
            head, target_row, class_weight = problem(T, 1000, device, dtype)
            longer = torch.cat([target_row, target_row])
            wide = torch.cat([head.hidden, head.hidden], dim=1)
            assert head.bias is not None
            shifted = torch.cat([head.bias[:1], head.bias])[1:]
            for changed, targets in (
                (head, target_row),
                (head._replace(bias=None), target_row),
                (head._replace(bias=head.bias.to(dtype)), target_row),
                (head._replace(bias=shifted), target_row),
                (head._replace(hidden=wide[:, :H]), longer[T:]),
                (head._replace(transform=LogitTransform(2.0, None, 1.0)), target_row),
                (head._replace(transform=LogitTransform(1.0, 5.0, 0.9)), target_row),
            ):
                for wanted in (PLAIN, EVERYTHING):
                    arguments = (changed, targets, class_weight if wanted.logit_sum else None, wanted, 0, None)
                    expected = merge_stats(eager.local_stats(*arguments)[0])
                    assert_same(merge_stats(forward.local_stats(*arguments)[0]), expected, 1000)

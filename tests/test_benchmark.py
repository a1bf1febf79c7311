"""launch/benchmark.py without a clock: what it runs, what it makes of failures, how it judges and what it writes."""

import contextlib
import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import benchmark
import benchmark_measure
import benchmark_methods
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from benchmark_measure import Gradients, Workload, fp32_gradients, make_problem, measure, relative_errors
from benchmark_methods import METHODS, Loss, Method, Problem, cache_name
from benchmark_pictures import draw_pictures
from benchmark_report import Measurement, Report, ShapeResult, make_table
from bootstrap import Context
from rich.console import Console
from torch import Tensor
from torch.distributed import ProcessGroup

import vocab_parallel_fused as vpf
from vocab_parallel_fused.testing import run_on_ranks

CPU = torch.device("cpu")
ALONE = Context(rank=0, world_size=1, local_rank=0, device=CPU, group=None)
SMALL = Workload("small", T=12, H=16, V=37)
# fp32 sums over 16 and 37 numbers, against float64 or one another.
FP32 = 1e-5


def measurement(method: str, **fields: Any) -> Measurement:
    numbers: dict[str, Any] = {
        "cache_fraction": None,
        "forward_ms": 3.0,
        "step_ms": 12.0,
        "forward_extra_bytes": 2**20,
        "step_extra_bytes": 200 * 2**20,
        "loss_error": 1e-6,
        "dhidden_error": 2e-3,
        "dweight_error": 3e-3,
    }
    package = METHODS[method].package if method in METHODS else benchmark_methods.OURS
    return Measurement(method, package, **numbers | fields)


def make_report(**fields: Any) -> Report:
    rows = [
        measurement("recompute", cache_fraction=0.0, step_ms=12.0),
        measurement("cache-0.25", cache_fraction=0.25, step_ms=11.25, step_extra_bytes=300 * 2**20),
        measurement("cache", cache_fraction=1.0, step_ms=9.0, step_extra_bytes=600 * 2**20),
        measurement("cce", step_ms=24.0, step_extra_bytes=0),
    ]
    numbers: dict[str, Any] = {
        "T": 4096,
        "H": 512,
        "V_local": 1000,
        "logits_bytes": 4096 * 1000 * 2,
        "logits_ms": 2.0,
        "dhidden_ms": 3.0,
        "dweight_ms": 4.0,
    }
    shape = ShapeResult("llama-8b", **numbers, measurements=rows, failures={"verl": "ImportError: no ray"})
    setting: dict[str, Any] = {
        "command": "c",
        "device": "GPU",
        "versions": {"torch": "2.11.0", "triton": "3.6.0"},
        "ranks": 1,
        "sequence_parallel": False,
        "dtype": "bfloat16",
        "rounds": 20,
        "shapes": [shape],
    }
    return Report(**setting | fields)


def make_sweep(size: str = "T") -> Report:
    shape = make_report().shapes[0]
    rows = [measurement("recompute", cache_fraction=0.0, graph_ms=1.0), measurement("eager")]
    return make_report(shapes=[replace(shape, **{size: n}, measurements=rows, logits_ms=n / 10) for n in (128, 1, 16)])


def test_json_holds_everything(tmp_path: Path) -> None:
    """If a number were lost, results could not be drawn or checked on another machine."""
    for report in (make_report(), make_sweep(), make_report(ranks=2)):
        report.save(tmp_path / "folder" / "out.json")
        assert Report.load(tmp_path / "folder" / "out.json") == report


def table_rows(report: Report) -> tuple[str, dict[str, list[str]]]:
    console = Console(width=170, record=True, file=io.StringIO())
    console.print(make_table(report.shapes[0], report))
    text = console.export_text()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    return text, {row[0]: row[1:] for row in rows}


def test_table() -> None:
    """Ratios are to the products of their own shape, and a failure is a row with its reason."""
    text, rows = table_rows(make_report())
    # forward 3 ms of G = 2; 12 ms of 3G = 9 and of 4G = 11
    assert rows["recompute"][:3] == ["3.000", "1.50", "1"]
    assert rows["recompute"][3:7] == ["12.000", "1.33", "1.09", "200"]
    assert rows["recompute"][7:] == ["1.0e-06", "2.0e-03", "3.0e-03"]
    assert rows["verl"][0] == "failed"
    assert "verl: ImportError: no ray" in text
    assert "logits 8 MiB" in text
    assert "graph ms" not in text
    assert "exposed ms" not in text


def test_table_of_several_ranks_and_of_graphs() -> None:
    """What ranks add is a step less the same step alone; a column appears where there is something to put in it."""
    shape = make_report().shapes[0]
    rows = [measurement("recompute", step_ms=12.5, alone_ms=12.0, graph_ms=0.5), measurement("megatron")]
    _, table = table_rows(make_report(ranks=2, shapes=[replace(shape, measurements=rows)]))
    columns = table["method"]
    assert table["recompute"][columns.index("exposed ms")] == "0.500"
    assert table["megatron"][columns.index("exposed ms")] == "–"
    assert table["recompute"][columns.index("graph ms")] == "0.500"


def test_pictures(tmp_path: Path) -> None:
    """matplotlib writes each piece of text into a comment of the SVG."""
    (memory,) = draw_pictures(make_report(), tmp_path)
    assert memory.name == "memory-llama-8b.svg"
    text = memory.read_text(encoding="utf-8")
    for label in ("3G", "4G", "cache 0%", "cache 100%", "cce", "size of the logits"):
        assert f"<!-- {label} -->" in text
    assert "<!-- verl -->" not in text
    for size, kind, label in (
        ("T", "tokens", "number of tokens · H 512, V 1000"),
        ("V_local", "vocabulary", "size of the vocabulary · H 512, T 4096"),
    ):
        (sizes,) = draw_pictures(make_sweep(size), tmp_path)
        assert sizes.name == f"{kind}-llama-8b.svg"
        text = sizes.read_text(encoding="utf-8")
        for text_label in (label, "recompute", "recompute, CUDA graph", "eager", "128"):
            assert f"<!-- {text_label} -->" in text
    again = draw_pictures(make_sweep("V_local"), tmp_path / "again")[0]
    assert again.read_text(encoding="utf-8") == text


def test_pictures_of_nothing(tmp_path: Path) -> None:
    """A run in which every method failed has something to show still: why."""
    shape = replace(make_report().shapes[0], measurements=[])
    draw_pictures(make_report(shapes=[shape]), tmp_path)
    draw_pictures(make_report(shapes=[shape, replace(shape, T=1)]), tmp_path)


def test_replot_needs_no_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    make_report().save(tmp_path / "out.json")
    benchmark.main(["--replot", str(tmp_path / "out.json"), "--plot", str(tmp_path / "pictures")])
    assert "verl: ImportError: no ray" in capsys.readouterr().out
    assert (tmp_path / "pictures" / "memory-llama-8b.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs a CUDA device"),
        (["--tokens", "16"], "--tokens needs one shape, got 8"),
        (["--shapes", "odd", "--tokens", "0"], "must be at least 1, got 0"),
        (["--vocab-sizes", "16"], "--vocab-sizes needs one shape, got 8"),
        (["--shapes", "llama-8b-tp8", "--vocab-sizes", "16", "7"], "at least the 8 ranks of the shape, got 7"),
        (["--shapes", "odd", "--vocab-sizes", "16", "--tokens", "16"], "not allowed with argument"),
        (["--rounds", "0"], "must be at least 1, got 0"),
        (["--cache-fractions", "1.5"], "must be between 0 and 1, got 1.5"),
        (["--methods", "cec"], "invalid choice: 'cec'"),
        (["--shapes", "llama"], "invalid choice: 'llama'"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit_code:
        benchmark.main(arguments)
    assert exit_code.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ranks", "arguments", "message"),
    [
        (1, ["--sequence-parallel"], "needs several ranks"),
        (2, ["--sequence-parallel"], "got 8191 of odd"),
        (2, ["--vocab-sizes", "16", "1"], "at least the 2 ranks, got 1"),
    ],
)
def test_workloads_that_ranks_cannot_share(
    ranks: int, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = benchmark.make_parser()
    args = parser.parse_args(["--shapes", "odd", *arguments])
    workloads = benchmark.make_workloads(args, ranks)
    with pytest.raises(SystemExit):
        benchmark.check_workloads(workloads, ranks, parser, sequence_parallel=args.sequence_parallel)
    assert message in capsys.readouterr().err


def test_a_run_that_ends_early_has_shown_its_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hours of measuring must not be lost to the one shape for which memory did not suffice."""
    args = benchmark.make_parser().parse_args(["--shapes", "odd", "llava-7b", "--json", str(tmp_path / "out.json")])
    report, workloads = make_report(shapes=[]), benchmark.make_workloads(args, ranks=1)
    measured = Mock(side_effect=[make_report().shapes[0], RuntimeError("CUDA error")])
    monkeypatch.setattr(benchmark, "measure", measured)
    with pytest.raises(RuntimeError):
        benchmark.run(args, workloads, ALONE, report)
    assert "verl: ImportError: no ray" in capsys.readouterr().out
    assert Report.load(tmp_path / "out.json") == report


@pytest.mark.parametrize("content", [None, "", "{}", "[1]"])
def test_replot_of_something_else(content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit):
        benchmark.main(["--replot", str(path)])
    assert f"--replot must be a file that --json has written, got {path}" in capsys.readouterr().err


def test_workloads() -> None:
    """One GPU takes the shard of one rank; several share the whole vocabulary, however many a model is meant for."""
    args = benchmark.make_parser().parse_args(["--shapes", "qwen-7b-tp4"])
    assert benchmark.make_workloads(args, ranks=1) == [Workload("qwen-7b-tp4", 16384, 3584, 38016)]
    assert benchmark.make_workloads(args, ranks=2) == [Workload("qwen-7b-tp4", 16384, 3584, 152064)]
    args = benchmark.make_parser().parse_args(["--shapes", "odd", "--tokens", "1", "16", "1"])
    assert [workload.T for workload in benchmark.make_workloads(args, ranks=1)] == [1, 16]
    args = benchmark.make_parser().parse_args(["--shapes", "llama-8b-tp8", "--vocab-sizes", "32064", "262144"])
    assert [workload.V for workload in benchmark.make_workloads(args, ranks=1)] == [4008, 32768]
    assert [workload.V for workload in benchmark.make_workloads(args, ranks=2)] == [32064, 262144]


def test_methods_are_chosen_once_each() -> None:
    assert list(benchmark.choose_methods(["cce", "recompute"], [], ranks=1)) == ["recompute", "cce"]
    curve = benchmark.choose_methods(["cache"], [1, 0.25, 0], ranks=1)
    assert [(name, method.cache_fraction) for name, method in curve.items()] == [
        ("recompute", 0.0),
        ("cache-0.25", 0.25),
        ("cache", 1.0),
    ]
    one, several = (set(benchmark.choose_methods(["all"], [], ranks)) for ranks in (1, 2))
    assert one ^ several >= {"eager", "liger-tp", "megatron"}
    assert one & several >= {"recompute", "cache", "main-grad", "verl"}
    assert cache_name(0.5) == "cache-half"


def test_a_run_that_is_cut_short_keeps_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hours on a machine must not be lost to the last shape."""
    shape = make_report().shapes[0]

    def breaks_at_the_second(workload: Workload, methods: dict[str, Method], context: Context, **_: Any) -> ShapeResult:
        assert (list(methods), context) == (["recompute", "cache-half", "cache"], ALONE)
        if workload.T == 16:
            raise RuntimeError("illegal memory access")
        return replace(shape, T=workload.T)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setattr(benchmark, "distributed", lambda: contextlib.nullcontext(ALONE))
    monkeypatch.setattr(benchmark, "measure", breaks_at_the_second)
    path = tmp_path / "out.json"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        benchmark.main(["--shapes", "odd", "--tokens", "8", "16", "32", "--json", str(path)])
    report = Report.load(path)
    assert [shape.T for shape in report.shapes] == [8]
    assert report.versions["torch"] == version("torch")
    assert "T 8, H 512" in capsys.readouterr().out


def test_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call takes its turn in every round, in changing orders, and the first rounds do not count."""
    now = 0.0
    made: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time = now

        def elapsed_time(self, end: "Event") -> float:
            return end.time - self.time

    def takes(name: str, milliseconds: float) -> None:
        nonlocal now
        made.append(name)
        warming_up = made.count(name) <= 3
        now += 1000 if warming_up else milliseconds * made.count(name)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls = {name: partial(takes, name, milliseconds) for name, milliseconds in (("a", 1.0), ("b", 10.0))}
    # The calls that count are the fourth to the eighth.
    assert benchmark_measure.interleaved_ms(calls, rounds=5) == {"a": 6.0, "b": 60.0}
    rounds = [tuple(made[i : i + 2]) for i in range(0, len(made), 2)]
    assert len(rounds) == 8
    assert set(rounds) == {("a", "b"), ("b", "a")}


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_clock(monkeypatch.setattr)


def replace_clock(put: Callable[..., None]) -> None:
    """Calls are made, but nothing is measured, as a CPU has neither events nor a count of its memory."""
    put(benchmark_measure, "extra_bytes", lambda call, parameters=(): (call(), len(parameters))[1])
    put(benchmark_measure, "interleaved_ms", lambda calls, *_: {key: (call(), 1.0)[1] for key, call in calls.items()})
    put(benchmark_measure, "replayed", lambda call: call)


def measure_small(
    methods: dict[str, Method], context: Context = ALONE, workload: Workload = SMALL, *, sequence_parallel: bool = False
) -> ShapeResult:
    keywords: dict[str, Any] = {"dtype": torch.float32, "rounds": 1, "sequence_parallel": sequence_parallel}
    return measure(workload, methods, context, keep_gathered_hidden=False, **keywords, progress=lambda _: None)


def errors(row: Measurement) -> list[float]:
    return [row.loss_error, row.dhidden_error, row.dweight_error]


@pytest.mark.usefixtures("untimed")
def test_measures_what_works_and_says_why_the_rest_does_not() -> None:
    """Exact methods are near fp32, and neither a missing package nor a refusal ends the run."""

    def refuses(_: Problem) -> Loss:
        raise NotImplementedError("V must be a multiple of 256\nand more")

    def runs_out_of_memory(_: Problem) -> Loss:
        def loss(*_: Tensor) -> Tensor:
            raise torch.OutOfMemoryError

        return loss

    def forgets_the_weight(problem: Problem) -> Loss:
        return lambda hidden, weight: F.cross_entropy(F.linear(hidden, weight.detach()), problem.target)

    exact = ["recompute", "main-grad", "eager"]
    if hasattr(F, "linear_cross_entropy"):  # from torch 2.13
        exact += ["torch", "torch-chunked"]
    failing = {
        "refuses": Method(refuses),
        "out-of-memory": Method(runs_out_of_memory),
        "no-dweight": Method(forgets_the_weight),
        "megatron": METHODS["megatron"],
        "missing": Method(lambda _: __import__("no_such_package")),
    }
    result = measure_small({"refuses": failing["refuses"], **{name: METHODS[name] for name in exact}, **failing})
    assert [row.method for row in result.measurements] == exact
    for row in result.measurements:
        assert max(errors(row)) < FP32, row
        assert (row.forward_extra_bytes, row.step_extra_bytes) == (0, 2)
        assert (row.graph_ms is not None) == METHODS[row.method].captures
        assert row.alone_ms is None
    assert result.failures == {
        "refuses": "NotImplementedError: V must be a multiple of 256",
        "out-of-memory": "OutOfMemoryError: raise torch.OutOfMemoryError",
        "no-dweight": "RuntimeError: left a gradient out",
        "megatron": "ValueError: needs several ranks",
        "missing": "ModuleNotFoundError: No module named 'no_such_package'",
    }
    assert (result.T, result.H, result.V_local, result.logits_bytes) == (12, 16, 37, 12 * 37 * 4)


@pytest.mark.usefixtures("untimed")
def test_errors_show_wrong_results() -> None:
    """If a method that is off by a tenth looked exact, so would anything."""

    def off_by_a_tenth(problem: Problem) -> Loss:
        return lambda hidden, weight: 1.1 * F.cross_entropy(F.linear(hidden, weight), problem.target)

    (row,) = measure_small({"wrong": Method(off_by_a_tenth)}).measurements
    assert errors(row) == pytest.approx([0.1, 0.1, 0.1], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_cache_has_room_for_its_part_of_the_shard(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The curve is drawn against these fractions."""
    given: list[vpf.ComputeOptions] = []
    monkeypatch.setattr(benchmark_methods, "_with_options", lambda _problem, options: given.append(options))
    problem, hidden = make_problem(SMALL, ALONE, dtype, sequence_parallel=False)
    for name in ("recompute", "cache-half", "cache"):
        METHODS[name].prepare(problem)
    logits_bytes = F.linear(hidden, problem.weight).nbytes
    assert given == [vpf.ComputeOptions(exp_cache_bytes=size) for size in (0, logits_bytes // 2, logits_bytes)]


def test_gradients_in_fp32_are_those_of_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """All errors are relative to these; a chunk of 5 tokens leaves a remainder."""
    monkeypatch.setattr(benchmark_measure, "_REFERENCE_LOGITS_BYTES", 5 * 37 * 4)
    problem, hidden = make_problem(SMALL, ALONE, torch.float32, sequence_parallel=False)
    actual = fp32_gradients(problem, hidden, scale=3.0)
    x, w = (tensor.detach().double().requires_grad_() for tensor in (problem.hidden, problem.weight))
    loss = F.cross_entropy(x @ w.t(), problem.target)
    expected = Gradients(loss.detach(), *torch.autograd.grad(3 * loss, (x, w)))
    assert max(relative_errors(actual, expected, group=None)) < FP32


def context_of(group: ProcessGroup) -> Context:
    return Context(group.rank(), group.size(), group.rank(), CPU, group)


class PartialCrossEntropy(torch.autograd.Function):
    """Negative log-probabilities ``[T]`` whose gradient of ``hidden`` is this rank's share of the sum."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, group: ProcessGroup) -> Tensor:
        start = group.rank() * len(weight)
        logits = hidden @ weight.t()
        sums = logits.exp().sum(dim=1)
        dist.all_reduce(sums, group=group)
        mine = F.one_hot(target, start + len(weight) * (group.size() - group.rank()))[:, start : start + len(weight)]
        target_logit = (mine * logits).sum(dim=1)
        dist.all_reduce(target_logit, group=group)
        ctx.save_for_backward(hidden, weight, logits.exp() / sums[:, None] - mine)
        return sums.log() - target_logit

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, dlogits = ctx.saved_tensors
        dlogits = grads[0][:, None] * dlogits
        return dlogits @ weight, dlogits.t() @ hidden, None, None


class SummingCrossEntropy(PartialCrossEntropy):
    """The same, with the sum taken inside."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return PartialCrossEntropy.forward(ctx, hidden, weight, target, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dhidden, dweight, *_ = PartialCrossEntropy.backward(ctx, *grads)
        dist.all_reduce(dhidden, group=ctx.group)
        return dhidden, dweight, None, None


def stand_ins() -> dict[str, ModuleType]:
    """Packages of the names of two peers, one of each kind: it leaves dhidden to its caller, or sums it."""
    verl, liger = ModuleType("verl.utils.kernel.linear_cross_entropy"), ModuleType("liger_kernel.ops")

    def verl_function(
        hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, reduction: str, group: Any
    ) -> Any:
        assert (temperature, reduction) == (1.0, "none")
        if group is None:
            return (-F.cross_entropy(hidden @ weight.t(), labels, reduction="none"),)
        loss = PartialCrossEntropy.apply(hidden, weight, labels, group)
        assert isinstance(loss, Tensor)
        return (-loss,)

    verl.__dict__["linear_cross_entropy"] = verl_function
    liger.__dict__["LigerFusedLinearScaledCrossEntropyTPFunction"] = SummingCrossEntropy
    return {module.__name__: module for module in (verl, liger)}


def measure_on_rank(group: ProcessGroup, workload: Workload, sequence_parallel: bool) -> ShapeResult:
    replace_clock(setattr)
    sys.modules.update(stand_ins())

    def fails(_: Problem) -> Loss:
        raise MemoryError(f"of rank {group.rank()}")

    methods = {name: METHODS[name] for name in ("recompute", "main-grad", "verl", "liger-tp", "eager")}
    methods["fails"] = Method(fails, several_ranks=True)
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        result = measure_small(methods, context_of(group), workload, sequence_parallel=sequence_parallel)
    assert f"rank {group.rank()}: fails: MemoryError: of rank {group.rank()}\n" in stderr.getvalue()
    return result


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_ranks_share_a_vocabulary(sequence_parallel: bool) -> None:
    """Each adapter adds the messages that its implementation leaves out: none is missing, and none is there twice."""
    results = run_on_ranks(measure_on_rank, 2, replace(SMALL, V=38), sequence_parallel)
    for result in results:
        assert [row.method for row in result.measurements] == ["recompute", "main-grad", "verl", "liger-tp"]
        for row in result.measurements:
            assert max(errors(row)) < FP32, row
            assert (row.alone_ms is not None) == METHODS[row.method].one_rank
        assert result.failures == {"eager": "ValueError: works on one rank only", "fails": "MemoryError: of rank 0"}
        assert result.V_local == 19


def test_uneven_shards() -> None:
    """They are measured, but not with an implementation that would take a wrong first class for granted."""
    results = run_on_ranks(measure_on_rank, 2, SMALL, False)
    assert [result.V_local for result in results] == [19, 18]
    for result in results:
        assert [row.method for row in result.measurements] == ["recompute", "main-grad"]
        assert max(errors(result.measurements[0])) < FP32
        assert result.failures["verl"] == "ValueError: needs equal shards, got 37 classes on 2 ranks"


@pytest.mark.gpu
def test_runs(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    arguments = ["--shapes", "llama-8b-tp8", "--tokens", "64", "--rounds", "2", "--methods", "recompute", "eager"]
    benchmark.main([*arguments, "--json", str(path), "--plot", str(tmp_path)])
    assert json.loads(path.read_text(encoding="utf-8"))["device"] == torch.cuda.get_device_name()
    (shape,) = Report.load(path).shapes
    assert not shape.failures
    assert shape.logits_ms > 0
    for row in shape.measurements:
        assert row.graph_ms is not None
        assert min(row.graph_ms, row.forward_ms, row.step_ms) > 0
        assert row.step_extra_bytes > 0
        assert max(errors(row)) < 2e-2

"""Time this package and other implementations of the same loss against the matrix products it cannot do without.

    python launch/benchmark.py                                         # all named shapes, one GPU
    python launch/benchmark.py --methods all --shapes llama-8b-tp8 --json out.json --plot pictures
    python launch/benchmark.py --shapes llama-8b --cache-fractions 0 0.25 0.5 0.75 1
    python launch/benchmark.py --shapes llama-8b --tokens 1 16 128 1024 8192
    python launch/benchmark.py --shapes llama-8b --vocab-sizes 32768 65536 131072 262144
    torchrun --standalone --nproc-per-node 2 launch/benchmark.py --methods all --shapes llama-8b-8k
    python launch/benchmark.py --replot out.json --plot pictures       # needs no GPU

``G`` is the time of cuBLAS for the logits, ``2·T·V·H`` operations, which a forward needs. ``3G`` adds the two products
of the backward, which is what a method that stores logits needs; ``4G`` adds the logits once more, which is what one
that does not needs. One GPU runs one rank's shard as a whole vocabulary; several share the whole vocabulary of a shape.
How each number is taken is in docs/benchmarks.md.
"""

import argparse
import contextlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from benchmark_measure import Workload, measure
from benchmark_methods import METHODS, OURS, Method, cache, cache_name
from benchmark_pictures import draw_pictures
from benchmark_report import Report, ShapeResult, make_table
from bootstrap import Context, distributed
from command_line import output_file, output_folder, positive
from rich.console import Console
from rich.progress import Progress

import vocab_parallel_fused


@dataclass(frozen=True)
class Shape:
    """The output layer of a model as it is trained."""

    model: str
    H: int
    V: int
    """Rows of the whole vocabulary."""
    tokens: int
    """Of one forward."""
    tp: int = 1
    """Ranks that share the vocabulary."""


SHAPES = {
    "llama-8b": Shape("Llama 3 8B", 4096, 128256, tokens=4096),
    "llava-7b": Shape("LLaVA 1.5 7B", 4096, 32064, tokens=8192),
    "llama-8b-8k": Shape("Llama 3 8B", 4096, 128256, tokens=8192),
    "llama-8b-tp8": Shape("Llama 3 8B", 4096, 128256, tokens=8192, tp=8),
    "llama-70b-tp8": Shape("Llama 3 70B", 8192, 128256, tokens=8192, tp=8),
    "qwen-7b-tp4": Shape("Qwen2.5 7B", 3584, 152064, tokens=16384, tp=4),
    "gemma-2b": Shape("Gemma 2 2B", 2304, 256000, tokens=8192),
    "odd": Shape("none: odd numbers of tokens and rows", 4096, 16033, tokens=8191),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.replot is not None:
        try:
            report = Report.load(args.replot)
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"--replot must be a file that --json has written, got {args.replot}: {error!r}")
        print_heading(report)
        for shape in report.shapes:
            print_table(shape, report)
        draw(report, args.plot)
        return
    check_arguments(args, parser)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device; without one, --replot PATH shows the results of an earlier run")
    with distributed() as context:
        workloads = make_workloads(args, context.world_size)
        check_workloads(workloads, context.world_size, parser, sequence_parallel=args.sequence_parallel)
        report = empty_report(args, context)
        if context.rank == 0:
            print_heading(report)
        try:
            run(args, workloads, context, report)
        finally:  # a run that is cut short has results, too
            if context.rank == 0:
                draw(report, args.plot)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: all of them")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--tokens", nargs="+", type=positive, metavar="T", help="in place of one shape's own number")
    sizes.add_argument(
        "--vocab-sizes", nargs="+", type=positive, metavar="V", help="in place of one shape's own, of all its ranks"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=["all", *METHODS],
        default=["recompute", "cache-half", "cache"],
        help="all: those that work on this number of ranks (default: %(default)s)",
    )
    parser.add_argument(
        "--cache-fractions",
        nargs="+",
        type=fraction,
        default=[],
        metavar="F",
        help="further modes of this package: memory for this part of the shard's exponentials",
    )
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="(default: %(default)s)"
    )
    parser.add_argument("--rounds", type=positive, default=20, help="timed rounds per shape (default: %(default)s)")
    parser.add_argument("--sequence-parallel", action="store_true", help="every rank holds a part of the tokens")
    parser.add_argument(
        "--keep-gathered-hidden",
        action="store_true",
        help="with --sequence-parallel: keep what the forward gathers for the backward (this package)",
    )
    parser.add_argument("--json", type=output_file, metavar="PATH", help="write all numbers there, after every shape")
    parser.add_argument("--plot", type=output_folder, metavar="DIR", help="draw pictures into this folder")
    parser.add_argument("--replot", type=Path, metavar="PATH", help="measure nothing; show what --json has written")
    return parser


def fraction(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {number:g}")
    return number


def check_arguments(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.keep_gathered_hidden and not args.sequence_parallel:
        parser.error("--keep-gathered-hidden needs --sequence-parallel")
    for option, sizes in (("--tokens", args.tokens), ("--vocab-sizes", args.vocab_sizes)):
        if sizes is not None and len(args.shapes) != 1:
            parser.error(f"{option} needs one shape, got {len(args.shapes)}: name it with --shapes")
    if args.vocab_sizes is not None and min(args.vocab_sizes) < (ranks := SHAPES[args.shapes[0]].tp):
        parser.error(f"--vocab-sizes must be at least the {ranks} ranks of the shape, got {min(args.vocab_sizes)}")


def check_workloads(
    workloads: Sequence[Workload], ranks: int, parser: argparse.ArgumentParser, *, sequence_parallel: bool
) -> None:
    if sequence_parallel and ranks == 1:
        parser.error("--sequence-parallel needs several ranks: start them with torchrun, mpirun or srun")
    for workload in workloads:
        if ranks > workload.V:
            parser.error(f"--vocab-sizes must be at least the {ranks} ranks, got {workload.V}")
        if sequence_parallel and workload.T % ranks:
            parser.error(
                f"--sequence-parallel needs a number of tokens that {ranks} ranks divide, got {workload.T} of "
                f"{workload.name}"
            )


def make_workloads(args: argparse.Namespace, ranks: int) -> list[Workload]:
    """One rank takes a rank's shard, several the whole vocabulary."""
    shapes = {name: SHAPES[name] for name in args.shapes}
    return [
        Workload(name, tokens, shape.H, vocab_size // shape.tp if ranks == 1 else vocab_size)
        for name, shape in shapes.items()
        for tokens in dict.fromkeys(args.tokens or [shape.tokens])
        for vocab_size in dict.fromkeys(args.vocab_sizes or [shape.V])
    ]


def choose_methods(names: Sequence[str], cache_fractions: Sequence[float], ranks: int) -> dict[str, Method]:
    """Those asked for, each once: cache fractions by their size, then the others in the order of ``METHODS``."""
    chosen = {cache_name(f): METHODS.get(cache_name(f), cache(f)) for f in sorted(cache_fractions)}
    for name, method in METHODS.items():
        works = method.one_rank if ranks == 1 else method.several_ranks
        if name in names or ("all" in names and works):
            chosen.setdefault(name, method)
    return chosen


def empty_report(args: argparse.Namespace, context: Context) -> Report:
    return Report(
        command=shlex.join(["launch/benchmark.py", *sys.argv[1:]]),
        device=torch.cuda.get_device_name(),
        versions=find_versions(),
        ranks=context.world_size,
        sequence_parallel=args.sequence_parallel,
        dtype=args.dtype,
        rounds=args.rounds,
        shapes=[],
        keep_gathered_hidden=args.keep_gathered_hidden,
    )


def run(args: argparse.Namespace, workloads: Sequence[Workload], context: Context, report: Report) -> None:
    """Measure each shape and add it to the report."""
    methods = choose_methods(args.methods, args.cache_fractions, context.world_size)
    console = Console(stderr=True, quiet=context.rank != 0)
    with Progress(console=console) as bar:
        steps = len(workloads) * (len(methods) + 2)
        task = bar.add_task("", total=steps)
        for workload in workloads:

            def progress(what: str, name: str = f"{workload.name}, T {workload.T}, V {workload.V}") -> None:
                bar.update(task, advance=1, description=f"{name}: {what}")

            torch.compiler.reset()  # each function may be compiled for a limited number of shapes
            shape = measure(
                workload,
                methods,
                context,
                dtype=getattr(torch, args.dtype),
                rounds=args.rounds,
                sequence_parallel=args.sequence_parallel,
                keep_gathered_hidden=args.keep_gathered_hidden,
                progress=progress,
            )
            report.shapes.append(shape)
            if context.rank == 0:
                bar.stop()  # or it would draw over the table
                print_table(shape, report)
                bar.start()
                if args.json is not None:
                    report.save(args.json)


def find_versions() -> dict[str, str]:
    """Of everything installed that a time may depend on."""
    versions = {OURS: vocab_parallel_fused.__version__, "CUDA": str(torch.version.cuda)}
    for package in {"torch", "triton", "nvidia-cutlass-dsl", *(method.package for method in METHODS.values())} - {OURS}:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return dict(sorted(versions.items()))


def print_heading(report: Report) -> None:
    print(f"{report.setting}; medians of {report.rounds} rounds\n{report.command}", flush=True)


def print_table(shape: ShapeResult, report: Report) -> None:
    Console(width=160).print(make_table(shape, report))
    sys.stdout.flush()  # whatever becomes of the shapes to come


def draw(report: Report, folder: Path | None) -> None:
    if folder is not None:
        for path in draw_pictures(report, folder):
            print(f"wrote {path}")


if __name__ == "__main__":
    main()

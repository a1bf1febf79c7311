"""Time the op on one GPU against the matrix products that it cannot do without.

    python launch/benchmark.py                     # all named shapes
    python launch/benchmark.py --shapes llama-8b-tp8 --dtype float16

``G`` is the time of cuBLAS for the logits, ``2·T·V·H`` operations, which the forward needs. ``4G`` is its time for the
four products of forward + backward when no logits are kept: the logits twice, dhidden and dweight. Every round times
each method once, in an order of its own, so that all see the same clocks and temperature and follow one another alike;
the table shows medians. "Extra" is the peak of allocated memory above the inputs and the two gradients.
"""

import argparse
import random
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import vocab_parallel_fused as vpf


class Shape(NamedTuple):
    T: int
    H: int
    V: int


SHAPES = {
    "llama-8b": Shape(4096, 4096, 128256),
    "llama-8b-tp8": Shape(8192, 4096, 16032),
    "llama-70b-tp8": Shape(8192, 8192, 16032),
    "qwen-7b-tp4": Shape(16384, 3584, 38016),
    "gemma-2b": Shape(8192, 2304, 256000),
    "odd": Shape(8191, 4096, 16033),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="named (T, H, V_local)")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds per shape (default: %(default)s)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")

    columns = ["shape", "T", "H", "V", "G ms", "forward ms", "/ G", "fwd + bwd ms", "/ 4G", "extra MiB"]
    table = Table(*columns, title=f"{torch.cuda.get_device_name()}, {arguments.dtype}, torch {torch.__version__}")
    for name in track(arguments.shapes, console=Console(stderr=True)):
        shape = SHAPES[name]
        table.add_row(name, *map(str, shape), *measure(shape, getattr(torch, arguments.dtype), arguments.rounds))
    Console(width=120).print(table)


def measure(shape: Shape, dtype: torch.dtype, rounds: int) -> list[str]:
    T, H, V = shape
    hidden = torch.randn(T, H, device="cuda", dtype=dtype).requires_grad_()
    weight = (torch.randn(V, H, device="cuda") / H**0.5).to(dtype).requires_grad_()
    target = torch.randint(V, (T,), device="cuda")

    def forward() -> None:
        with torch.no_grad():
            vpf.linear_cross_entropy(hidden, weight, target)

    def forward_backward() -> None:
        hidden.grad = weight.grad = None
        vpf.linear_cross_entropy(hidden, weight, target).backward()

    extra = extra_bytes(forward_backward, outputs=hidden.nbytes + weight.nbytes)
    hidden.grad = weight.grad = None
    # Logits and the three products on them, as a method that stores logits runs them.
    x, w = hidden.detach(), weight.detach()
    logits = torch.empty(T, V, device="cuda", dtype=dtype)
    dhidden, dweight = torch.empty_like(x), torch.empty_like(w)
    products = [
        lambda: torch.mm(x, w.t(), out=logits),
        lambda: torch.mm(logits, w, out=dhidden),
        lambda: torch.mm(logits.t(), x, out=dweight),
    ]
    logits_ms, dhidden_ms, dweight_ms, forward_ms, step_ms = interleaved_ms(
        [*products, forward, forward_backward], rounds
    )
    recompute_ms = 2 * logits_ms + dhidden_ms + dweight_ms
    return [
        f"{logits_ms:.2f}",
        f"{forward_ms:.2f}",
        f"{forward_ms / logits_ms:.3f}",
        f"{step_ms:.2f}",
        f"{step_ms / recompute_ms:.3f}",
        f"{extra / 2**20:.0f}",
    ]


def extra_bytes(step: Callable[[], None], outputs: int) -> int:
    """Peak of allocated memory during a step, above what is alive before it and the outputs that it leaves."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() - outputs  # the gradients of the first call
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - outputs


def interleaved_ms(methods: list[Callable[[], object]], rounds: int, warmup: int = 3) -> list[float]:
    """Median time of each method over rounds in which all take their turn, in a random order."""
    order = random.Random(0)
    turns = [order.sample(range(len(methods)), len(methods)) for _ in range(warmup + rounds)]
    marks = []
    for turn in turns:
        for index in turn:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            methods[index]()
            end.record()
            marks.append((index, start, end))
    torch.cuda.synchronize()
    times = [[] for _ in methods]
    for index, start, end in marks[warmup * len(methods) :]:
        times[index].append(start.elapsed_time(end))
    return [statistics.median(of_method) for of_method in times]


if __name__ == "__main__":
    main()

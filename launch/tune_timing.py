"""Compile and time the two kernels that compute tiles of logits, with any tile."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
from benchmark_measure import interleaved_ms
from torch import Tensor
from tune_choice import Device, Timing

from vocab_parallel_fused.kernels import forward
from vocab_parallel_fused.kernels.backward import dlogits_kernel
from vocab_parallel_fused.kernels.configs import TileConfig
from vocab_parallel_fused.kernels.forward import partial_stats_kernel
from vocab_parallel_fused.kernels.tiles import current_arch, operand_kwargs
from vocab_parallel_fused.stats import PartStats, Wanted, empty_stats
from vocab_parallel_fused.transform import LogitTransform, Operands

# Tiles this much slower than the fastest in a few rounds are left out of all others.
NEAR = 1.25
FEW_ROUNDS = 3
NARROWEST_TILE = 16


class Problem(NamedTuple):
    """Operands, and memory for what the kernels write."""

    head: Operands
    max_logit: Tensor  # [T]
    level: Tensor  # [T]
    target_row: Tensor  # [T, 1]
    stats: PartStats  # [T]
    partial_max: Tensor  # [most tiles, T]
    partial_sum_exp: Tensor  # [most tiles, T]
    dlogits: Tensor  # [T, V]


class Launch(NamedTuple):
    """A kernel, its grid and all its arguments."""

    kernel: Any
    grid: tuple[int]
    arguments: dict[str, Any]

    def compile(self) -> None:
        self.kernel.warmup(grid=self.grid, **self.arguments)

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments)


class Measurement(NamedTuple):
    """What was measured for one number of tokens."""

    recorded: TileConfig
    timings: dict[TileConfig, Timing]
    """Of those near the fastest, and of the recorded one if it runs."""
    failures: dict[TileConfig, str]
    product_ms: float
    """Torch's product for the logits."""


def current_device() -> Device:
    """What the current device has room for."""
    driver: Any = triton.runtime.driver.active
    properties = driver.utils.get_device_properties(torch.cuda.current_device())
    return Device(current_arch(), properties["max_shared_mem"], driver.get_current_target().warp_size)


def make_problem(num_tokens: int, weight: Tensor) -> Problem:
    """Random hidden states for a weight ``[V, H]``."""
    V, H = weight.shape
    hidden = torch.randn(num_tokens, H, device=weight.device).to(weight.dtype)
    target_row = torch.randint(V, (num_tokens, 1), device=weight.device)
    numbers = hidden.new_empty(2, num_tokens, dtype=torch.float32)
    partials = hidden.new_empty(2, -(-V // NARROWEST_TILE), num_tokens, dtype=torch.float32)
    return Problem(
        Operands(hidden, weight, None, LogitTransform()),
        max_logit=numbers[0].fill_(5.0),  # near the largest of some thousand normal numbers
        level=numbers[1].fill_(1.0),
        target_row=target_row,
        stats=empty_stats(target_row, torch.float32, Wanted()),
        partial_max=partials[0],
        partial_sum_exp=partials[1],
        dlogits=hidden.new_empty(num_tokens, V),
    )


def launches(problem: Problem, tile: TileConfig) -> tuple[Launch, Launch]:
    """The forward's kernel and the backward's on all rows at once, for the plain cross-entropy."""
    T, V = problem.dlogits.shape
    grid = (-(-T // tile.block_t) * -(-V // tile.block_v),)
    operands = operand_kwargs(problem.head, current_arch(), tile)

    def launch(kernel: Any, **arguments: Any) -> Launch:
        unwanted = dict.fromkeys(name for name in kernel.arg_names if name.endswith("_ptr"))
        return Launch(kernel, grid, unwanted | operands | arguments)

    return (
        launch(
            partial_stats_kernel,
            partial_max_ptr=problem.partial_max,
            partial_sum_exp_ptr=problem.partial_sum_exp,
            first_row=0,
            stride_exps_t=0,
            stride_partial=problem.partial_max.stride(0),
        ),
        launch(
            dlogits_kernel,
            max_ptr=problem.max_logit,
            level_ptr=problem.level,
            dlogits_ptr=problem.dlogits,
            stride_dlogits_t=problem.dlogits.stride(0),
        ),
    )


def compile_all(every: Iterable[Launch]) -> None:
    """Compile kernels in threads, as the compiler holds no lock. Kernels that it refuses say so when they are run."""
    with ThreadPoolExecutor() as executor, triton.AsyncCompileMode(executor, ignore_errors=True):
        for launch in every:
            launch.compile()


def time_tiles(problem: Problem, tiles: Iterable[TileConfig], recorded: TileConfig, rounds: int) -> Measurement:
    """Time the kernels with each tile that runs, and torch's product for the logits.

    Args:
        problem: what to run on.
        tiles: any that the device may or may not run, compiled or not.
        recorded: one of them, timed in all rounds however slow it is.
        rounds: in which the tiles near the fastest take their turn.

    Raises:
        RuntimeError: if no tile runs.
    """
    replays: dict[TileConfig, list[Callable[[], object]]] = {}
    failures: dict[TileConfig, str] = {}
    for tile in tiles:
        try:
            # The kernel of the targets' logits takes its depth from the tile.
            targets = (problem.target_row, problem.stats.target_logit, problem.stats.owners)
            forward._target_logits(problem.head, *targets, None, current_arch(), tile)
            replays[tile] = [captured(launch.run) for launch in launches(problem, tile)]
        except Exception as error:  # whatever the compiler or the driver raises
            failures[tile] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if not replays:
        raise RuntimeError(f"no tile runs with {problem.dlogits.shape[0]} tokens: {failures}")
    hidden, weight, *_ = problem.head
    product = captured(lambda: torch.mm(hidden, weight.t(), out=problem.dlogits))

    def timed(tiles: Iterable[TileConfig], rounds: int) -> tuple[float, dict[TileConfig, Timing]]:
        tiles = list(tiles)
        calls = [product, *(replay for tile in tiles for replay in replays[tile])]
        product_ms, *times = interleaved_ms(dict(enumerate(calls)), rounds).values()
        return product_ms, dict(zip(tiles, map(Timing, times[::2], times[1::2]), strict=True))

    _, quick = timed(replays, FEW_ROUNDS)
    longest = NEAR * min(timing.total_ms for timing in quick.values())
    near = [tile for tile, timing in quick.items() if timing.total_ms <= longest or tile == recorded]
    product_ms, timings = timed(near, rounds)
    return Measurement(recorded, timings, failures, product_ms)


def captured(launch: Callable[[], object]) -> Callable[[], None]:
    """The launch as a CUDA graph, after a first run: Python takes longer to launch a kernel than a small one runs."""
    launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph.replay

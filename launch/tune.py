"""Find the fastest tiles of the Triton kernels on the GPU at hand, and record them for its architecture.

    python launch/tune.py                                       # look
    python launch/tune.py --write                               # and record in kernels/tiles.json
    python launch/tune.py --dtype float32 --tokens 16 1024      # one dtype, other numbers of tokens

For each dtype and number of tokens a few dozen tiles are compiled, and the kernels of the forward and of the backward,
``partial_stats_kernel`` and ``dlogits_kernel``, run with each. Those near the fastest are timed again, in rounds in
which all take their turn, in a random order. The tile with the least sum of both medians is chosen for this number of
tokens and all above the next smaller one; at the largest number, for any more too. ``--write`` replaces the whole entry
of a dtype, so its numbers of tokens should reach from 1 to some thousands.

The table shows the medians of the chosen tile, their sum relative to that of the recorded tile (below 1: faster), and
the forward relative to torch's product for the logits alone. float16 uses bfloat16's tiles. On sm_90 a Gluon kernel
(``kernels/hopper_tiles.py``) computes 16-bit tiles of more than 64 tokens; the chosen ones then serve label smoothing,
the argmax, the top k and distillation.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from command_line import positive
from files import replacing
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tune_choice import Device, candidates, choose

from vocab_parallel_fused.kernels.configs import TILES_PATH, TileConfig, TokenRange, read_tiles, tile_config, tile_for

if TYPE_CHECKING:
    from tune_timing import Measurement


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    import tune_timing

    device = tune_timing.current_device()
    measured = {name: measure(name, device, args) for name in args.dtype}
    chosen = {name: choose({T: by_tokens[T].timings for T in by_tokens}) for name, by_tokens in measured.items()}

    console = Console(width=140)
    title = f"{torch.cuda.get_device_name()} ({device.arch}), H {args.hidden_size}, V {args.classes}"
    columns = ["dtype", "tokens", "tile: T × V × H", "forward ms", "backward ms", "/ recorded", "forward / torch"]
    table = Table(*columns, title=f"{title}, torch {torch.__version__}")
    failures = Table("dtype", "tokens", "tile: T × V × H", "reason", title="Tiles that did not run")
    for name, by_tokens in measured.items():
        for T, of_tokens in by_tokens.items():
            table.add_row(name, str(T), *report(of_tokens, tile_for(chosen[name], T)))
            for tile, reason in of_tokens.failures.items():
                failures.add_row(name, str(T), describe(tile), reason)
    console.print(table)
    if failures.row_count > 0:
        console.print(failures)
    if args.write is not None:
        record(args.write, device, {getattr(torch, name).itemsize: ranges for name, ranges in chosen.items()})
        console.print(f"Recorded in {args.write}", soft_wrap=True)


def measure(name: str, device: Device, args: argparse.Namespace) -> dict[int, Measurement]:
    """Compile and time all tiles for one dtype, by number of tokens."""
    import tune_timing

    dtype = getattr(torch, name)
    weight = (torch.randn(args.classes, args.hidden_size, device="cuda") / args.hidden_size**0.5).to(dtype)
    problems = {T: tune_timing.make_problem(T, weight) for T in args.tokens}
    recorded = {T: tile_config(device.arch, dtype, T) for T in args.tokens}
    tiles = {T: list(dict.fromkeys([recorded[T], *candidates(T, dtype.itemsize, device)])) for T in args.tokens}
    launches = [launch for T in args.tokens for tile in tiles[T] for launch in tune_timing.launches(problems[T], tile)]
    console = Console(stderr=True)
    with console.status(f"{name}: compiling for {len(launches)} launches"):
        tune_timing.compile_all(launches)
    return {
        T: tune_timing.time_tiles(problems[T], tiles[T], recorded[T], args.rounds)
        for T in track(args.tokens, f"{name}: timing", console=console, transient=True)
    }


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    dtypes = ["bfloat16", "float32"]
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=dtypes, help="default: both")
    tokens = [1, 16, 64, 128, 1024, 8192]
    parser.add_argument("--tokens", nargs="+", type=positive, default=tokens, help="numbers to tune for (%(default)s)")
    parser.add_argument("--hidden-size", type=positive, default=4096, help="H (default: %(default)s)")
    parser.add_argument("--classes", type=positive, default=32768, help="rows of one rank (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=20, help="timed rounds (default: %(default)s)")
    parser.add_argument(
        "--write", nargs="?", type=Path, const=TILES_PATH, metavar="PATH", help="record in this table (the package's)"
    )
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA or ROCm device, and torch finds none")
    if args.write is not None:
        try:
            read_tiles(args.write)
        except (OSError, ValueError) as error:
            parser.error(f"--write: {error}")
    args.dtype, args.tokens = list(dict.fromkeys(args.dtype)), sorted(set(args.tokens))
    return args


def report(measured: Measurement, tile: TileConfig) -> list[str]:
    """The table's cells for one number of tokens and the tile chosen for it."""
    timing, before = measured.timings[tile], measured.timings.get(measured.recorded)
    return [
        describe(tile),
        f"{timing.stats_ms:.3f}",
        f"{timing.dlogits_ms:.3f}",
        "did not run" if before is None else f"{timing.total_ms / before.total_ms:.3f}",
        f"{timing.stats_ms / measured.product_ms:.3f}",
    ]


def describe(tile: TileConfig) -> str:
    blocks = f"{tile.block_t} × {tile.block_v} × {tile.block_h}"
    return f"{blocks}, group {tile.group_t}, {tile.num_warps} warps, {tile.num_stages} stages"


def record(path: Path, device: Device, chosen: Mapping[int, Sequence[TokenRange]]) -> None:
    """Replace the tiles of one architecture in a table.

    Args:
        path: the table; its other entries stay the same to the byte.
        device: whose tiles they are.
        chosen: by bytes per element; those that are not there stay as they are.
    """
    table = json.loads(path.read_text())
    tiles = table[device.arch]["tiles_by_itemsize"] if device.arch in table else {}
    for itemsize, ranges in chosen.items():
        tiles[str(itemsize)] = [{"most_tokens": most, **dataclasses.asdict(tile)} for most, tile in ranges]
    table[device.arch] = {
        "shared_memory_bytes": device.shared_memory_bytes,
        "tiles_by_itemsize": dict(sorted(tiles.items())),
    }
    with replacing(path) as unfinished:
        unfinished.write_text(to_text(table))


def to_text(table: dict[str, Any]) -> str:
    """The table as JSON in the order of its architectures, one tile per line."""
    text = json.dumps(dict(sorted(table.items())), indent=2)
    return re.sub(r"\{[^{}]*\}", lambda tile: " ".join(tile[0].split()), text) + "\n"


if __name__ == "__main__":
    main()

"""Tile sizes by architecture: what ``tiles.json`` holds, which ``launch/tune.py`` measures and writes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

TILES_PATH = Path(__file__).with_name("tiles.json")
# Architectures without an entry of their own use their backend's. The interpreter's tiles are small, so that small
# shapes cover several of them and every tail.
_BACKENDS = ("cuda", "hip", "interpreter")
_ITEMSIZES = (2, 4)
# The smallest rows, columns and depth of a product on tensor cores.
_LEAST_BLOCK = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TileConfig:
    """How one kernel launch cuts ``[T, V]`` logits into tiles, each a product over ``H`` in steps of ``block_h``."""

    block_t: int
    block_v: int
    block_h: int
    group_t: int
    """Tiles of this many token blocks run side by side, so that they find the rows they share in the L2 cache."""
    num_warps: int
    num_stages: int

    def launch_kwargs(self) -> dict[str, Any]:
        return {
            "BLOCK_T": self.block_t,
            "BLOCK_V": self.block_v,
            "BLOCK_H": self.block_h,
            "GROUP_T": self.group_t,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


class TokenRange(NamedTuple):
    """A tile, and the most tokens that it is for; None: any number."""

    most_tokens: int | None
    tile: TileConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchTiles:
    """The entry of one architecture, or of a backend for all its architectures that have none."""

    shared_memory_bytes: int | None
    """The most that one program may use; of a backend, the least of its devices'; None: no limit."""
    tiles_by_itemsize: dict[int, tuple[TokenRange, ...]]
    """For operands of so many bytes per element: ranges of ascending numbers of tokens, the last for any number."""


def tile_problem(tile: TileConfig, itemsize: int, shared_memory_bytes: int | None) -> str | None:
    """Why a device cannot run the tile, or None if it can.

    Args:
        tile: any numbers.
        itemsize: bytes per element of the operands.
        shared_memory_bytes: the most that one program may use; None: no limit.
    """
    sizes = dataclasses.asdict(tile)
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            return f"{name} must be a positive int, got {size!r}"
    for name in ("block_t", "block_v", "block_h", "num_warps"):
        if sizes[name].bit_count() != 1:
            return f"{name} must be a power of two, got {sizes[name]}"
        if name.startswith("block") and sizes[name] < _LEAST_BLOCK:
            return f"{name} must be at least {_LEAST_BLOCK}, got {sizes[name]}"
    # Of every stage, a block of hidden states and one of weights. Some products do with a stage less.
    needed = tile.num_stages * (tile.block_t + tile.block_v) * tile.block_h * itemsize
    if shared_memory_bytes is not None and needed > shared_memory_bytes:
        return (
            f"num_stages must fit {shared_memory_bytes} bytes of shared memory, got {tile.num_stages}: {needed} bytes"
        )
    return None


def read_tiles(path: Path) -> dict[str, ArchTiles]:
    """The table in a file, by architecture or backend.

    Raises:
        ValueError: if the table is malformed or a tile cannot run; it names file, entry and problem.
    """
    try:
        table = json.loads(path.read_text())
        if not isinstance(table, dict):
            raise ValueError(f"must hold an object, got {table!r}")
        entries = {arch: _parse_arch(entry, arch) for arch, entry in table.items()}
        for backend in _BACKENDS:
            for itemsize in _ITEMSIZES:
                if backend not in entries or itemsize not in entries[backend].tiles_by_itemsize:
                    raise ValueError(f"{backend} must have tiles for {itemsize} bytes per element")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return entries


def _parse_arch(entry: Any, arch: str) -> ArchTiles:
    shared_memory_bytes, by_itemsize = _fields(entry, [field.name for field in dataclasses.fields(ArchTiles)], arch)
    if shared_memory_bytes is not None and (type(shared_memory_bytes) is not int or shared_memory_bytes < 1):
        raise ValueError(f"{arch}: shared_memory_bytes must be a positive int or null, got {shared_memory_bytes!r}")
    if not isinstance(by_itemsize, dict) or not by_itemsize.keys() <= set(map(str, _ITEMSIZES)):
        raise ValueError(f"{arch}: tiles_by_itemsize must be an object of some of {_ITEMSIZES}, got {by_itemsize!r}")
    tiles = {
        int(itemsize): _parse_ranges(ranges, f"{arch}, {itemsize} bytes", int(itemsize), shared_memory_bytes)
        for itemsize, ranges in by_itemsize.items()
    }
    return ArchTiles(shared_memory_bytes=shared_memory_bytes, tiles_by_itemsize=tiles)


def _parse_ranges(entries: Any, where: str, itemsize: int, shared_memory_bytes: int | None) -> tuple[TokenRange, ...]:
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{where}: must be a list of tiles, got {entries!r}")
    sizes = [field.name for field in dataclasses.fields(TileConfig)]
    ranges: list[TokenRange] = []
    before = 0
    for number, entry in enumerate(entries, start=1):
        here = f"{where}, entry {number}"
        most_tokens, *values = _fields(entry, ["most_tokens", *sizes], here)
        tile = TileConfig(**dict(zip(sizes, values, strict=True)))
        problem = tile_problem(tile, itemsize, shared_memory_bytes)
        if problem is not None:
            raise ValueError(f"{here}: {problem}")
        if number == len(entries):
            if most_tokens is not None:
                raise ValueError(f"{here}: most_tokens must be null in the last entry, got {most_tokens!r}")
        elif type(most_tokens) is not int or most_tokens <= before:
            raise ValueError(f"{here}: most_tokens must be an int above {before}, got {most_tokens!r}")
        else:
            before = most_tokens
        ranges.append(TokenRange(most_tokens, tile))
    return tuple(ranges)


def _fields(entry: Any, names: list[str], where: str) -> list[Any]:
    """The values of a JSON object that must have exactly these names."""
    if not isinstance(entry, dict) or entry.keys() != set(names):
        raise ValueError(f"{where}: must be an object of {', '.join(names)}, got {entry!r}")
    return [entry[name] for name in names]


_TABLE = read_tiles(TILES_PATH)


def tile_config(arch: str, dtype: torch.dtype, num_tokens: int) -> TileConfig:
    """Tile sizes for operands of ``dtype`` on ``arch``: ``"sm_90"``, ``"gfx942"``, ``"interpreter"``."""
    backend = "cuda" if arch.startswith("sm_") else "hip" if arch.startswith("gfx") else arch
    own = _TABLE[arch].tiles_by_itemsize if arch in _TABLE else {}
    return tile_for(own.get(dtype.itemsize) or _TABLE[backend].tiles_by_itemsize[dtype.itemsize], num_tokens)


def tile_for(ranges: Iterable[TokenRange], num_tokens: int) -> TileConfig:
    """The tile of the first range that so many tokens are in."""
    return next(tile for most_tokens, tile in ranges if most_tokens is None or num_tokens <= most_tokens)


def has_tensor_descriptors(arch: str) -> bool:
    """Whether tiles can be loaded through tensor descriptors, which the copy engine of Hopper and later serves."""
    return arch == "interpreter" or (arch.startswith("sm_") and int(arch[3:]) >= 90)


def is_describable(matrix: torch.Tensor) -> bool:
    """Whether the copy engine can read it: contiguous rows whose starts, and strides, are multiples of 16 bytes."""
    stride_bytes = matrix.stride(0) * matrix.element_size()
    return matrix.stride(1) == 1 and stride_bytes > 0 and stride_bytes % 16 == 0 and matrix.data_ptr() % 16 == 0

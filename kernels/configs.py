"""Tile sizes by architecture, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


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


# Small tiles let the interpreter's tests cover several tiles and every tail at small shapes.
_INTERPRETER = TileConfig(block_t=16, block_v=32, block_h=16, group_t=2, num_warps=4, num_stages=1)

# Keyed by (architecture, bytes per element). Products of fp32 run outside the tensor cores unless tf32 is allowed.
_TILES = {
    ("sm_90", 2): TileConfig(block_t=128, block_v=256, block_h=64, group_t=16, num_warps=8, num_stages=3),
    ("sm_100", 2): TileConfig(block_t=128, block_v=256, block_h=64, group_t=16, num_warps=8, num_stages=3),
    ("cuda", 2): TileConfig(block_t=128, block_v=128, block_h=32, group_t=16, num_warps=8, num_stages=3),
    ("cuda", 4): TileConfig(block_t=64, block_v=64, block_h=32, group_t=16, num_warps=4, num_stages=2),
    ("hip", 2): TileConfig(block_t=128, block_v=128, block_h=64, group_t=16, num_warps=8, num_stages=2),
    ("hip", 4): TileConfig(block_t=64, block_v=64, block_h=32, group_t=16, num_warps=4, num_stages=2),
    ("interpreter", 2): _INTERPRETER,
    ("interpreter", 4): _INTERPRETER,
}


def tile_config(arch: str, dtype: torch.dtype) -> TileConfig:
    """Tile sizes for operands of ``dtype`` on ``arch``: ``"sm_90"``, ``"gfx942"``, ``"interpreter"``."""
    backend = "cuda" if arch.startswith("sm_") else "hip" if arch.startswith("gfx") else arch
    return _TILES.get((arch, dtype.itemsize)) or _TILES[backend, dtype.itemsize]


def has_tensor_descriptors(arch: str) -> bool:
    """Whether tiles can be loaded through tensor descriptors, which the copy engine of Hopper and later serves."""
    return arch == "interpreter" or (arch.startswith("sm_") and int(arch[3:]) >= 90)

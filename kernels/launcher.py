"""Launches that take the host less time than Triton's own."""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from vocab_parallel_fused.kernels.tiles import INTERPRETED

# Kinds of their own.
_PLAIN = {bool, int, str, type(None)}


class Launcher:
    """Launches one kernel, as compiled before for arguments of the same kinds.

    To look at all arguments and find what it compiled for them takes Triton some 20 µs: with few tokens, longer than
    most kernels run. Here the kernel says what matters. Numbers that it does not specialise do not, and of a pointer
    whose alignment it does not specialise only whether it is None: each must have the same dtype in all launches.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[Hashable, Any] = {}
        if INTERPRETED:
            return
        others = [param for param in kernel.params if not param.do_not_specialize]
        self._optional = [param.name for param in others if param.do_not_specialize_on_alignment]
        self._special = [param.name for param in others if not param.do_not_specialize_on_alignment]

    def __call__(self, programs: int, device: torch.device, arguments: dict[str, Any]) -> None:
        """``kernel[(programs,)](**arguments)``, options included, on a device that is the current one."""
        if INTERPRETED:
            self._kernel[(programs,)](**arguments)
            return
        options = arguments.get("num_warps"), arguments.get("num_stages")
        optional = [arguments[name] is None for name in self._optional]
        special = [value if type(value) in _PLAIN else _kind(value) for value in map(arguments.get, self._special)]
        key = (device, *options, *optional, *special)
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compiled[key] = self._kernel[(programs,)](**arguments)
        else:
            compiled[programs, 1, 1](*map(arguments.get, self._kernel.arg_names))


def _kind(value: Any) -> Hashable:
    """All that a kernel is compiled for."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    # A tensor descriptor. One of Gluon has the layout that belongs to its block.
    return value.base.dtype, *value.block_shape

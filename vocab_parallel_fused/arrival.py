"""Hidden states gathered from all ranks, while those of the others are on their way."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Arrival(NamedTuple):
    """What may be read of gathered hidden states ``[T, H]``, and when."""

    own: slice
    """This rank's tokens. Their rows of the gathered states are on their way too."""

    hidden: Tensor
    """[T / R, H] their hidden states, which are here."""

    wait: Callable[[], None]
    """Lets the current stream wait until all have arrived. May be called again."""

    stream: torch.cuda.Stream | None = None
    """On which those of the others arrive; None: the current one."""

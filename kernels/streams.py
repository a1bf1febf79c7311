"""Launches that run at a time with others, to use the processors that a kernel's last tiles leave idle."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType

import torch
from torch import Tensor

from vocab_parallel_fused.arrival import Arrival
from vocab_parallel_fused.kernels.tiles import aligned
from vocab_parallel_fused.transform import part_of

# Of tokens that are launched in order of arrival: this rank's, and those before and after.
MOST_PARTS = 3
# Beyond so many times the tiles, tokens are better waited for than taken as they arrive.
_MOST_SPLIT = 1.125


class Fork:
    """A point of the current stream, from which launches go on in other streams as well, until its block ends.

    What they share with the current stream must have been allocated before; what is allocated among them stays theirs.
    They are best launched before anything waits for an earlier kernel: with ``CUDA_DEVICE_MAX_CONNECTIONS=1`` the
    device takes launches in their order.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._begin = None if self._stream is None else self._stream.record_event()
        self._ends: list[torch.cuda.Event] = []

    def __enter__(self) -> Fork:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for end in self._ends:  # after an error too: until then memory is being written
            end.wait(self._stream)

    @contextmanager
    def on(self, stream: torch.cuda.Stream | None) -> Iterator[None]:
        """What is launched inside runs on a stream, after what came before the fork; None: on the current one."""
        if stream is None:
            yield
            return
        assert self._begin is not None
        with torch.cuda.stream(stream):
            self._begin.wait(stream)
            try:
                yield
            finally:
                end = torch.cuda.Event()
                end.record(stream)
                self._ends.append(end)

    def aside(self) -> AbstractContextManager[None]:
        """What is launched inside runs on a second stream, on processors that what was launched before leaves idle."""
        return self.on(None if self._stream is None else _stream_aside(self._stream.device))


@functools.cache
def _stream_aside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def in_order_of_arrival(
    launch: Callable[[slice, Tensor, bool], None],
    fork: Fork,
    hidden: Tensor,
    tokens: slice,
    arrival: Arrival | None,
    block_t: int,
) -> None:
    """Launch work on some tokens, on this rank's first if that takes few tiles more. Once the fork has ended, all have
    arrived.

    Args:
        launch: called up to ``MOST_PARTS`` times, with some of the tokens, their hidden states, and whether to leave
            room for the message that brings the others, and then for these.
        fork: from which the launches go on.
        hidden: ``[T, H]`` of all tokens.
        tokens: some of them.
        arrival: None: all are here.
        block_t: tokens of a tile.
    """
    if arrival is None:
        launch(tokens, part_of(hidden, tokens), False)
        return
    own = slice(max(tokens.start, arrival.own.start), min(tokens.stop, arrival.own.stop))
    others = (slice(tokens.start, min(tokens.stop, own.start)), slice(max(tokens.start, own.stop), tokens.stop))
    others = [part for part in others if part.start < part.stop]

    def tiles(part: slice) -> int:
        return -(-(part.stop - part.start) // block_t)

    if own.start >= own.stop or sum(map(tiles, (own, *others))) > _MOST_SPLIT * tiles(tokens):
        arrival.wait()
        launch(tokens, hidden[tokens], False)
        return
    launch(own, aligned(arrival.hidden[own.start - arrival.own.start : own.stop - arrival.own.start]), len(others) > 0)
    # Where they arrive, so that their tiles begin as soon as this rank's leave processors idle.
    with fork.on(arrival.stream):
        arrival.wait()
        for part in others:
            launch(part, hidden[part], False)

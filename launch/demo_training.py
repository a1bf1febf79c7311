"""What the demonstrations share: text, a small GPT, its training loop, and the memory of its head and loss."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from bootstrap import Context
from demo_model import GPT
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from text import Text, load_text
from torch import Tensor, nn

from vocab_parallel_fused.testing import PeakBytes

HIDDEN_SIZE = 128
BATCH_SIZE = 16
LENGTH = 64
_NUM_LAYERS = 2
_NUM_HEADS = 2
_LEARNING_RATE = 2e-3
_WARMUP_STEPS = 10

R = TypeVar("R")


@dataclass(frozen=True)
class Training:
    """What a training left beside the weights."""

    losses: list[float]
    """One per step."""
    tokens_per_second: float
    """Of whole steps."""


def new_body(vocab_size: int) -> GPT:
    """Token ids ``[B, LENGTH]`` to hidden states ``[B, LENGTH, HIDDEN_SIZE]``."""
    return GPT(vocab_size, HIDDEN_SIZE, _NUM_LAYERS, _NUM_HEADS, LENGTH)


def read_text(vocab_size: int, context: Context, console: Console, held_out: Path | None = None) -> Text:
    """As ``text.load_text``, of which one process of each machine makes what the others then only read."""
    with console.status("Reading Python's standard library, training a tokenizer on it"), context.first_on_machine():
        return load_text(vocab_size, held_out)


def draw_batches(
    tokens: Tensor, steps: int, seed: int, *, batch_size: int = BATCH_SIZE, length: int = LENGTH
) -> Tensor:
    """``[steps, B, L + 1]`` int64, random windows of the text: all tokens but the last are inputs, all but the first
    targets."""
    if length >= len(tokens):
        raise ValueError(f"length must be below the {len(tokens):,} tokens of the text, got {length:,}")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - length, (steps, batch_size), generator=generator)
    return tokens.unfold(0, length + 1, 1)[starts].long()


def training_progress(console: Console) -> Progress:
    """One line for each training."""
    return Progress(
        TextColumn("{task.description:20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        console=console,
    )


def train(name: str, body: nn.Module, head: nn.Module, batches: Tensor, progress: Progress) -> Training:
    """Train ``body`` and ``head`` in place, one step of AdamW per batch.

    Args:
        name: of the progress bar.
        body: token ids ``[B, L]`` to hidden states ``[B, L, H]``.
        head: hidden states and targets ``[B, L]`` to the mean loss.
        batches: ``[steps, B, L + 1]`` token ids: all but the last of a window are inputs, all but the first targets.
    """
    optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=_LEARNING_RATE)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / _WARMUP_STEPS))
    task = progress.add_task(name, total=len(batches), loss=float("nan"))
    losses, times = [], []
    for windows in batches:
        loss = head(body(windows[:, :-1]), windows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warmup.step()
        losses.append(loss.item())  # on a GPU, waits for the step to end
        times.append(time.perf_counter())
        progress.update(task, advance=1, loss=losses[-1])
    optimizer.zero_grad()
    # The first step also compiles kernels and touches memory for the first time.
    tokens_per_second = batches[1:, :, 1:].numel() / (times[-1] - times[0])
    return Training(losses, tokens_per_second)


def peak_bytes_of_loss(body: nn.Module, head: nn.Module, windows: Tensor) -> int:
    """Bytes alive at the worst moment of the forward and backward of head and loss, beyond those alive before.

    These include the gradients of the hidden states and of the head's weight.
    """
    with torch.no_grad():
        hidden = body(windows[:, :-1])
    hidden.requires_grad_()
    target = windows[:, 1:]
    return with_peak_bytes(lambda: head(hidden, target).backward(), hidden.device)[1]


def with_peak_bytes(call: Callable[[], R], device: torch.device) -> tuple[R, int]:
    """What a call returns, and the bytes alive on ``device`` at its worst moment, beyond those alive before it."""
    if device.type == "cpu":
        with PeakBytes() as peak:
            result = call()
        return result, peak.bytes
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    return result, torch.cuda.max_memory_allocated() - before

"""Train a small language model with an ordinary head and with its vocabulary sharded over the ranks, and compare.

    torchrun --standalone --nproc-per-node 2 launch/demo.py

The text is Python's own standard library. Both models start from the same weights, see the same batches and differ in
nothing but the head: the ordinary one holds the whole matrix on every rank and stores all logits; the sharded one holds
a part of its rows on each rank and stores no logits. The body is replicated, and all ranks see the same tokens: tensor
parallelism of the head alone. Everything is fp32. The exit code is 0 if the loss curves agree.
"""

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from bootstrap import Context, distributed
from demo_model import GPT, FullLogitsCrossEntropy
from demo_report import TOLERANCE, Comparison, Run, draw_picture, make_table
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from text import CACHE, load_text
from torch import Tensor

from vocab_parallel_fused import VocabParallelLinearCrossEntropy
from vocab_parallel_fused.testing import PeakBytes

HIDDEN_SIZE = 128
NUM_LAYERS = 2
NUM_HEADS = 2
BATCH_SIZE = 16
LENGTH = 64
LEARNING_RATE = 2e-3
WARMUP_STEPS = 10

Head = FullLogitsCrossEntropy | VocabParallelLinearCrossEntropy
R = TypeVar("R")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    with distributed() as context:
        console = Console(quiet=context.rank != 0)
        comparison = train_both(args, context, console)
    # All ranks have the same losses, so the first one speaks for all, and none ends the job before it has spoken.
    if context.rank == 0:
        report(comparison, args.output, console)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train with a vocabulary-parallel head and with an ordinary one.")
    parser.add_argument(
        "--steps", type=int, default=80, help="training steps of each of the two (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    # 2, 3 and 4 ranks get uneven shards of this.
    parser.add_argument("--vocab-size", type=int, default=16_385, help="of the tokenizer (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=CACHE / "demo.png", help="the picture (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error(f"--steps must be at least 2, since the first is not timed; got {args.steps}")
    return args


def train_both(args: argparse.Namespace, context: Context, console: Console) -> Comparison:
    """Train the model with the ordinary head, then the same model with the sharded one."""
    with console.status("Reading Python's standard library, training a tokenizer on it"), context.first_on_machine():
        tokens = load_text(args.vocab_size).tokens
    console.print(f"{len(tokens):,} tokens of Python's standard library")
    batches = draw_batches(tokens, args.steps, args.seed).to(context.device)

    torch.manual_seed(args.seed)
    body = GPT(args.vocab_size, HIDDEN_SIZE, NUM_LAYERS, NUM_HEADS, LENGTH).to(context.device)
    full_head = FullLogitsCrossEntropy(HIDDEN_SIZE, args.vocab_size).to(context.device)
    sharded_head = VocabParallelLinearCrossEntropy(
        HIDDEN_SIZE, args.vocab_size, group=context.group, device=context.device
    )
    sharded_head.load_state_dict(full_head.state_dict())  # keeps this rank's rows

    with training_progress(console) as progress:
        full = train("full logits", copy.deepcopy(body), full_head, batches, progress)
        sharded = train("vocabulary-parallel", body, sharded_head, batches, progress)
    ranks = "1 rank" if context.world_size == 1 else f"{context.world_size} ranks"
    return Comparison(f"vocabulary {args.vocab_size:,} on {ranks}, {context.device.type}", full, sharded)


def draw_batches(tokens: Tensor, steps: int, seed: int) -> Tensor:
    """``[steps, B, L + 1]`` int64, random windows of the text: all tokens but the last are inputs, all but the first
    targets."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - LENGTH, (steps, BATCH_SIZE), generator=generator)
    return tokens.unfold(0, LENGTH + 1, 1)[starts].long()


def training_progress(console: Console) -> Progress:
    """Bars for tasks with a field ``loss``."""
    return Progress(
        TextColumn("{task.description:20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        console=console,
    )


def train(name: str, body: GPT, head: Head, batches: Tensor, progress: Progress) -> Run:
    """Train ``body`` and ``head`` in place, one step of AdamW per batch."""
    optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=LEARNING_RATE)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS))
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
    num_tokens = BATCH_SIZE * LENGTH
    return Run(
        name=name,
        losses=losses,
        num_tokens=num_tokens,
        # The first step also compiles kernels and touches memory for the first time.
        tokens_per_second=num_tokens * (len(times) - 1) / (times[-1] - times[0]),
        vocab_rows=len(head.weight),
        peak_bytes=peak_bytes_of_loss(body, head, batches[-1]),
    )


def peak_bytes_of_loss(body: GPT, head: Head, windows: Tensor) -> int:
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


def report(comparison: Comparison, picture: Path, console: Console) -> None:
    """Print the table and draw the picture.

    Raises:
        SystemExit: the loss curves part.
    """
    console.print(make_table(comparison))
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw_picture(comparison, picture)
    console.print(f"picture: {picture}", soft_wrap=True)
    if not comparison.curves_agree:
        raise SystemExit(
            f"The loss curves part: {comparison.largest_difference:.1e} is more than the {TOLERANCE:.0e} that "
            f"{comparison.compared_steps} steps of rounding explain."
        )


if __name__ == "__main__":
    main()

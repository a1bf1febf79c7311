"""Train a small language model with an ordinary head and with its vocabulary sharded over the ranks, and compare.

    torchrun --standalone --nproc-per-node 2 launch/demo.py

The text is Python's own standard library. Both models start from the same weights, see the same batches and differ in
nothing but the head: the ordinary one holds the whole matrix on every rank and stores all logits; the sharded one holds
a part of its rows on each rank and stores no logits. The body is replicated, and all ranks see the same tokens: tensor
parallelism of the head alone. Everything is fp32. The exit code is 0 if the loss curves agree.
"""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from bootstrap import Context, distributed
from command_line import picture_file, positive, seed
from demo_model import GPT, FullLogitsCrossEntropy
from demo_report import TOLERANCE, Comparison, Run, draw_picture, make_table
from demo_training import (
    BATCH_SIZE,
    HIDDEN_SIZE,
    LENGTH,
    draw_batches,
    new_body,
    peak_bytes_of_loss,
    read_text,
    train,
    training_progress,
)
from rich.console import Console
from rich.progress import Progress
from text import CACHE
from torch import Tensor

from vocab_parallel_fused import VocabParallelLinearCrossEntropy

Head = FullLogitsCrossEntropy | VocabParallelLinearCrossEntropy


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
    parser.add_argument("--seed", type=seed, default=0, help="of weights and batches (default: %(default)s)")
    # 2, 3 and 4 ranks get uneven shards of this.
    parser.add_argument("--vocab-size", type=positive, default=16_385, help="of the tokenizer (default: %(default)s)")
    parser.add_argument(
        "--output", type=picture_file, default=CACHE / "demo.png", help="the picture (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error(f"--steps must be at least 2, since the first is not timed; got {args.steps}")
    return args


def train_both(args: argparse.Namespace, context: Context, console: Console) -> Comparison:
    """Train the model with the ordinary head, then the same model with the sharded one."""
    tokens = read_text(args.vocab_size, context, console).tokens
    console.print(f"{len(tokens):,} tokens of Python's standard library")
    batches = draw_batches(tokens, args.steps, args.seed).to(context.device)

    torch.manual_seed(args.seed)
    body = new_body(args.vocab_size).to(context.device)
    full_head = FullLogitsCrossEntropy(HIDDEN_SIZE, args.vocab_size).to(context.device)
    sharded_head = VocabParallelLinearCrossEntropy(
        HIDDEN_SIZE, args.vocab_size, group=context.group, device=context.device
    )
    sharded_head.load_state_dict(full_head.state_dict())  # keeps this rank's rows

    with training_progress(console) as progress:
        full = run("full logits", copy.deepcopy(body), full_head, batches, progress)
        sharded = run("vocabulary-parallel", body, sharded_head, batches, progress)
    return Comparison(f"vocabulary {args.vocab_size:,} on {context.ranks}, {context.device.type}", full, sharded)


def run(name: str, body: GPT, head: Head, batches: Tensor, progress: Progress) -> Run:
    """Train ``body`` and ``head`` in place, and measure."""
    training = train(name, body, head, batches, progress)
    return Run(
        name=name,
        losses=training.losses,
        num_tokens=BATCH_SIZE * LENGTH,
        tokens_per_second=training.tokens_per_second,
        vocab_rows=len(head.weight),
        peak_bytes=peak_bytes_of_loss(body, head, batches[-1]),
    )


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

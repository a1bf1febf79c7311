"""Train a small language model whose tokens have a row each, and with heads whose tokens share rows, and compare.

    python launch/vq_demo.py
    torchrun --standalone --nproc-per-node 2 launch/vq_demo.py

The text is Python's own standard library, in shuffled windows: the first are held out, the others make batches, and
none is seen twice. One model trains with a row per token up to the fork. There k-means makes VQ heads of its rows, and
these weigh by the frequency of their tokens so far, or all alike. From then on a copy of the model trains with each
head, the old one included, on the same batches and with a new optimizer. So all models see the same tokens in the same
number of steps, and differ in nothing but their heads since the fork. All heads are computed by this package, in fp32.
"""

import argparse
import copy
import math
import statistics
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

import torch
from bootstrap import Context, distributed
from command_line import positive, seed
from demo_model import GPT
from demo_training import (
    BATCH_SIZE,
    HIDDEN_SIZE,
    LENGTH,
    new_body,
    peak_bytes_of_loss,
    read_text,
    train,
    training_progress,
)
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.benchmark import Timer

from vocab_parallel_fused import VocabParallelLinearCrossEntropy, VQLinearCrossEntropy

HELD_OUT_BATCHES = 32
TIMED_CALLS = 25

Head = VocabParallelLinearCrossEntropy | VQLinearCrossEntropy


class Row(NamedTuple):
    """One head after its training."""

    name: str
    num_parameters: int  # over all ranks
    loss: float  # of the held-out text, nats per token
    share: float  # of this, what is due to tokens with shares of a code: the mean of log n
    milliseconds: float  # of the forward and backward of the loss
    peak_bytes: int  # of the same, on this rank


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    with distributed() as context:
        console = Console(quiet=context.rank != 0, width=110)  # the table does not fit into 80 columns
        console.print(make_table(args, context, train_all(args, context, console)))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare a head with a row per token and VQ heads.")
    parser.add_argument("--steps", type=int, default=300, help="training steps of each model (default: %(default)s)")
    parser.add_argument(
        "--fork", type=int, default=100, help="step at which the VQ heads are made (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens-per-code", type=positive, nargs="+", default=[16, 64], help="V / K (default: %(default)s)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of weights, batches and k-means (default: %(default)s)")
    parser.add_argument("--vocab-size", type=positive, default=16_385, help="of the tokenizer (default: %(default)s)")
    args = parser.parse_args(argv)
    if not 2 <= args.fork <= args.steps - 2:
        parser.error(f"--fork must be in [2, steps - 2], at least 2 steps from either end; got {args.fork}")
    if find_spec("sklearn") is None:
        parser.error("k-means needs scikit-learn: pip install '.[launch,vq]'")
    return args


def train_all(args: argparse.Namespace, context: Context, console: Console) -> list[Row]:
    """Train up to the fork, then once for each head."""
    tokens = read_text(args.vocab_size, context, console).tokens
    batches = draw_once(tokens, HELD_OUT_BATCHES + args.steps, args.seed).to(context.device)
    held_out, before, after = batches.split([HELD_OUT_BATCHES, args.fork, args.steps - args.fork])

    torch.manual_seed(args.seed)
    body = new_body(args.vocab_size).to(context.device)
    head = VocabParallelLinearCrossEntropy(HIDDEN_SIZE, args.vocab_size, group=context.group, device=context.device)
    with training_progress(console) as progress:
        train("until the fork", body, head, before, progress)
        heads = {"a row per token": head, **cluster(head, before, args)}
        bodies = [copy.deepcopy(body) for _ in heads]
        for name, body in zip(heads, bodies, strict=True):
            train(name, body, heads[name], after, progress)
    return [measure(name, body, heads[name], held_out) for name, body in zip(heads, bodies, strict=True)]


def draw_once(tokens: Tensor, num_batches: int, seed: int) -> Tensor:
    """``[num_batches, B, L + 1]`` int64, windows of the text in random order, none of them twice.

    Raises:
        SystemExit: the text is too short.
    """
    windows = tokens[: len(tokens) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    needed = num_batches * BATCH_SIZE
    if needed > len(windows):
        raise SystemExit(
            f"{num_batches} batches need {needed:,} windows, but the text has {len(windows):,}: use fewer steps"
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:needed]].long().view(num_batches, BATCH_SIZE, LENGTH + 1)


def cluster(
    head: VocabParallelLinearCrossEntropy, seen: Tensor, args: argparse.Namespace
) -> dict[str, VQLinearCrossEntropy]:
    """VQ heads of each size, with rows weighted by how often their token was seen, and all alike."""
    counts = torch.bincount(seen.flatten(), minlength=args.vocab_size)
    sizes = dict.fromkeys(max(1, args.vocab_size // tokens) for tokens in args.tokens_per_code)
    heads = {}
    for num_codes in sizes:
        for weights, row_weight in (("by frequency", counts + 1), ("all alike", None)):
            heads[f"{num_codes:,} codes, {weights}"] = VQLinearCrossEntropy.from_linear(
                head, num_codes, row_weight=row_weight, seed=args.seed
            )
    return heads


def measure(name: str, body: GPT, head: Head, held_out: Tensor) -> Row:
    """What a trained head is good for, and what its loss costs."""
    with torch.no_grad():
        losses = [head(body(windows[:, :-1]), windows[:, 1:]).item() for windows in held_out]
        hidden = body(held_out[0, :, :-1])
    num_rows, share = head.vocab_size, 0.0
    if isinstance(head, VQLinearCrossEntropy):
        num_rows = head.num_codes
        share = head.log_count[head.token_to_code[held_out[:, :, 1:]]].mean().item()
    hidden.requires_grad_()

    def step() -> None:
        head(hidden, held_out[0, :, 1:]).backward()

    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    return Row(
        name=name,
        num_parameters=num_rows * HIDDEN_SIZE,
        loss=statistics.fmean(losses),
        share=share,
        milliseconds=1e3 * min(timer.timeit(1).mean for _ in range(TIMED_CALLS)),
        peak_bytes=peak_bytes_of_loss(body, head, held_out[0]),
    )


def make_table(args: argparse.Namespace, context: Context, rows: list[Row]) -> Table:
    table = Table(
        box=box.ROUNDED,
        title=f"vocabulary {args.vocab_size:,}, {args.steps} steps of {BATCH_SIZE * LENGTH:,} tokens, forked at step "
        f"{args.fork}; {context.ranks}, {context.device.type}",
        caption=(
            f"Loss and perplexity: of {HELD_OUT_BATCHES * BATCH_SIZE * LENGTH:,} held-out tokens. Log n: the part of "
            "the loss that the map fixes, as a token has one of n equal shares of its code. Time and memory: of the "
            f"forward and backward of head and loss for {BATCH_SIZE * LENGTH:,} tokens, the fastest of {TIMED_CALLS} "
            "calls, and the bytes alive at the worst moment, gradients included, beyond those alive before, per rank."
        ),
    )
    table.add_column("head")
    for name in ("parameters", "loss", "of it log n", "perplexity", "time", "peak memory"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.num_parameters:,}",
            f"{row.loss:.3f}",
            f"{row.share:.3f}",
            f"{math.exp(row.loss):,.1f}",
            f"{row.milliseconds:,.1f} ms",
            f"{row.peak_bytes / 2**20:,.1f} MiB",
        )
    return table


if __name__ == "__main__":
    main()

"""The perplexity of a long document, in memory that grows neither with its length nor with tokens × vocabulary.

    torchrun --standalone --nproc-per-node 2 launch/perplexity.py --check

A small GPT, the demo's, is trained on Python's standard library except for one file, and then meets that file
(``--document``: another text). It sees a limited number of tokens at a time, so the document passes in overlapping
windows: every token is scored once, after at least ``--context`` tokens, or all there are at the beginning. Of a
document of ``num_bytes`` bytes in UTF-8 that make ``N`` tokens, the output states

    nats/token = −1/N · Σ_i log p(token_i | context),    perplexity = exp(nats/token),
    bits/byte = N · nats/token / (num_bytes · log 2)

The vocabulary of the head is sharded over the ranks; the body is replicated, and all ranks read the same document.
``--check`` does it again with full logits, and the exit code is 0 if the two agree to 1e-5 nats/token.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from bootstrap import Context, distributed
from command_line import output_file, positive, seed
from demo_model import GPT
from demo_training import (
    HIDDEN_SIZE,
    LENGTH,
    draw_batches,
    new_body,
    read_text,
    train,
    training_progress,
    with_peak_bytes,
)
from files import replacing
from rich import box
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from text import END_OF_TEXT, STANDARD_LIBRARY, read_tokens
from tokenizers import Tokenizer
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from vocab_parallel_fused import VocabParallelLinearCrossEntropy, linear_cross_entropy

HELD_OUT = STANDARD_LIBRARY / "_pydecimal.py"
WINDOWS_PER_BATCH = 32
# Nats per token. The two sum over the vocabulary in different orders, which moves a token's loss by some 1e-6, up or
# down, and their mean by 1e-7. One column too many in the softmax moves the mean by 1e-4.
TOLERANCE = 1e-5

TokenLosses = Callable[[Tensor, Tensor], Tensor]
"""From hidden states ``[B, L, H]`` and targets ``[B, L]`` to nats ``[B, L]``."""


@dataclass(frozen=True)
class LanguageModel:
    tokenizer: Tokenizer
    body: GPT
    head: VocabParallelLinearCrossEntropy


class Windows(NamedTuple):
    tokens: Tensor
    """``[B, l + 1]`` int64: all but the last are inputs, all but the first may be targets."""
    num_scored: int
    """How many targets at the end of each window no earlier window has scored."""


@dataclass(frozen=True)
class Evaluation:
    """What one way to compute the loss found, seen from one rank."""

    name: str
    num_tokens: int
    num_bytes: int
    """Of the document, in UTF-8."""
    nats: float
    """Summed over the tokens."""
    seconds: float
    """From opening the document to the last token's loss."""
    peak_bytes: int
    """Of head and loss, in the batch that needed most."""

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.num_bytes


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    with distributed() as context:
        console = Console(quiet=context.rank != 0)
        model = load_or_train(args, context, console)
        with evaluation_progress(console) as progress:
            score = partial(evaluate, model, document=args.document, context=args.context, progress=progress)
            try:
                sharded = score("vocabulary-parallel", partial(sharded_losses, model.head))
            except UnicodeDecodeError as error:
                raise ValueError(f"--document must be a UTF-8 text, got {args.document}") from error
            full = score("full logits", partial(full_losses, gather_weight(model.head))) if args.check else None
    # All ranks have the same losses, so the first one speaks for all, and none ends the job before it has spoken.
    if context.rank == 0:
        setting = (
            f"{args.document.name}, vocabulary {model.head.vocab_size:,} on {context.ranks}, {context.device.type}"
        )
        report(setting, sharded, full, console)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The perplexity of a long document, without its logits.")
    parser.add_argument(
        "--document", type=Path, default=HELD_OUT, help="a UTF-8 text, the same on every rank (default: %(default)s)"
    )
    parser.add_argument(
        "--context",
        type=int,
        default=LENGTH // 2,
        help=f"the fewest tokens, 1 to {LENGTH}, that a token is predicted from, the document's first ones aside; more "
        "take more windows (default: %(default)s)",
    )
    parser.add_argument("--check", action="store_true", help="compare with full logits, computed by every rank")
    parser.add_argument(
        "--checkpoint",
        type=output_file,
        help="load the model from this file, on every rank; if there is none, train and save it there",
    )
    training = parser.add_argument_group("training, where no checkpoint is loaded")
    training.add_argument("--steps", type=int, default=200, help="of the optimizer (default: %(default)s)")
    training.add_argument("--seed", type=seed, default=0, help="of weights and batches (default: %(default)s)")
    # 2, 3 and 4 ranks get uneven shards of this.
    training.add_argument("--vocab-size", type=positive, default=16_385, help="of the tokenizer (default: %(default)s)")
    args = parser.parse_args(argv)
    if not args.document.is_file() or args.document.stat().st_size == 0:
        parser.error(f"--document must be a file with text in it, got {args.document}")
    if not 1 <= args.context <= LENGTH:
        parser.error(f"--context must be 1 to {LENGTH}, the most tokens that the model sees; got {args.context}")
    if args.steps < 2:
        parser.error(f"--steps must be at least 2, since the first is not timed; got {args.steps}")
    return args


def load_or_train(args: argparse.Namespace, context: Context, console: Console) -> LanguageModel:
    """The model of the checkpoint; without one, a model trained now and saved where the checkpoint should be."""
    if args.checkpoint is not None and is_on_all_ranks(args.checkpoint, context):
        saved = torch.load(args.checkpoint, map_location=context.device)
        if sorted(saved) != ["body", "head", "tokenizer"]:
            raise ValueError(f"--checkpoint must be a file that this script saved, got one of {sorted(saved)}")
        model = make_model(Tokenizer.from_str(saved["tokenizer"]), context)
        model.body.load_state_dict(saved["body"])
        model.head.load_state_dict(saved["head"])  # keeps this rank's rows
        return model
    text = read_text(args.vocab_size, context, console, held_out=HELD_OUT)
    batches = draw_batches(text.tokens, args.steps, args.seed).to(context.device)
    torch.manual_seed(args.seed)
    model = make_model(text.tokenizer, context)
    with training_progress(console) as progress:
        train("training", model.body, model.head, batches, progress)
    if args.checkpoint is not None:
        saved = {
            "tokenizer": model.tokenizer.to_str(),
            "body": model.body.state_dict(),
            "head": {"weight": gather_weight(model.head)},
        }
        if context.rank == 0:
            with replacing(args.checkpoint) as unfinished:
                torch.save(saved, unfinished)
    return model


def is_on_all_ranks(path: Path, context: Context) -> bool:
    """Whether there is such a file.

    Communicates: one flag of each rank.

    Raises:
        ValueError: some ranks have it and others do not.
    """
    exists = [path.exists()] * context.world_size
    if context.group is not None:
        dist.all_gather_object(exists, exists[0], context.group)
    if len(set(exists)) > 1:
        missing = [rank for rank, there in enumerate(exists) if not there]
        raise ValueError(f"--checkpoint must be there on every rank or on none; {path} is missing on ranks {missing}")
    return exists[0]


def make_model(tokenizer: Tokenizer, context: Context) -> LanguageModel:
    vocab_size = tokenizer.get_vocab_size()
    return LanguageModel(
        tokenizer,
        new_body(vocab_size).to(context.device),
        VocabParallelLinearCrossEntropy(HIDDEN_SIZE, vocab_size, group=context.group, device=context.device),
    )


def gather_weight(head: VocabParallelLinearCrossEntropy) -> Tensor:
    """The rows of all ranks, ``[V, H]``, on every rank."""
    weight = head.weight.detach()
    if head.group is None:
        return weight
    mesh = DeviceMesh.from_group(head.group, weight.device.type)
    shape = torch.Size((head.vocab_size, head.in_features))
    return DTensor.from_local(weight, mesh, [Shard(0)], shape=shape, stride=(head.in_features, 1)).full_tensor()


def sharded_losses(head: VocabParallelLinearCrossEntropy, hidden: Tensor, target: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, head.weight, target, reduction="none", group=head.group, shard=head.shard)


def full_losses(weight: Tensor, hidden: Tensor, target: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)  # [B, L, V]
    return F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none").view(target.shape)


def evaluation_progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:20}"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[loss]:.3f} nats/token"),
        TimeElapsedColumn(),
        console=console,
    )


@torch.inference_mode()
def evaluate(
    model: LanguageModel, name: str, token_losses: TokenLosses, document: Path, context: int, progress: Progress
) -> Evaluation:
    """Score every token of ``document`` once, after at least ``context`` tokens, or all where there are fewer.

    The first of these is :data:`~text.END_OF_TEXT`, which also separates the files of the training text; it is not
    scored itself.

    Communicates: whatever ``token_losses`` does, once per batch; the number of batches depends on the document alone.
    """
    device = model.head.weight.device
    length = model.body.position_embedding.num_embeddings

    def hidden_and_target(windows: Windows) -> tuple[Tensor, Tensor]:
        tokens = windows.tokens.to(device)
        return model.body(tokens[:, :-1])[:, -windows.num_scored :], tokens[:, -windows.num_scored :]

    # The first call also compiles kernels and touches memory for the first time.
    untimed = torch.zeros(WINDOWS_PER_BATCH, length + 1, dtype=torch.int64)
    token_losses(*hidden_and_target(Windows(untimed, length + 1 - context)))
    task = progress.add_task(name, total=None, loss=math.nan)
    num_tokens, nats, peak_bytes, largest_batch = 0, 0.0, 0, 0
    start = time.perf_counter()
    # Without newline="" Python would turn "\\r\\n" into "\\n", and the bytes would be others than the file's.
    with progress.open(document, "r", encoding="utf-8", newline="", task_id=task) as text:
        tokens = chain(model.tokenizer.encode(END_OF_TEXT).ids, read_tokens(text, model.tokenizer))
        for windows in cut_windows(tokens, length, context, WINDOWS_PER_BATCH):
            hidden, target = hidden_and_target(windows)
            if target.numel() > largest_batch:  # measuring takes time, and memory is a matter of shapes
                largest_batch = target.numel()
                losses, peak_bytes = with_peak_bytes(partial(token_losses, hidden, target), device)
            else:
                losses = token_losses(hidden, target)
            num_tokens += losses.numel()
            nats += losses.sum(dtype=torch.float64).item()
            progress.update(task, loss=nats / num_tokens)
    seconds = time.perf_counter() - start
    return Evaluation(name, num_tokens, document.stat().st_size, nats, seconds, peak_bytes)


def cut_windows(tokens: Iterable[int], length: int, context: int, batch_size: int) -> Iterator[Windows]:
    """Overlapping windows over a stream of tokens, of which no more than a batch is held.

    The first window scores all its targets. Every further one repeats the last ``context`` tokens of the one before it
    and scores those that it adds, ``length + 1 − context``, or what is left at the end.

    Args:
        tokens: ids.
        length: the most inputs of a window.
        context: 1 to ``length``, the fewest inputs up to and including the one that a token is predicted from, except
            in the first window, where the beginning of the stream has fewer.
        batch_size: the most windows of a batch; all windows of a batch have one shape.
    """
    stream = iter(tokens)
    num_added = length + 1 - context
    held = list(islice(stream, length + 1))
    yield Windows(torch.tensor([held]), len(held) - 1)
    while added := list(islice(stream, batch_size * num_added)):
        held = held[-context:] + added
        num_full, num_left = divmod(len(added), num_added)
        if num_full:
            full = torch.tensor(held[: context + num_full * num_added])
            yield Windows(full.unfold(0, context + num_added, num_added), num_added)
        if num_left:
            yield Windows(torch.tensor([held[-context - num_left :]]), num_left)


def report(setting: str, sharded: Evaluation, full: Evaluation | None, console: Console) -> None:
    """Print the table.

    Raises:
        SystemExit: there is an evaluation with full logits, and it found another loss.
    """
    evaluations = [sharded] if full is None else [full, sharded]
    table = Table(
        box=box.ROUNDED,
        title=setting,
        caption=(
            "Speed: of the whole evaluation, from opening the document on; every rank sees all tokens. Peak memory: of "
            "each rank, bytes alive at the worst moment of head and loss, beyond those alive before."
        ),
    )
    rows: dict[str, Callable[[Evaluation], str]] = {
        "document": lambda e: f"{e.num_bytes:,} bytes",
        "scored, once each": lambda e: f"{e.num_tokens:,} tokens",
        "mean loss": lambda e: f"{e.nats_per_token:.6f} nats/token",
        "perplexity": lambda e: f"{e.perplexity:,.2f} per token",
        "information": lambda e: f"{e.bits_per_byte:.4f} bits/byte",
        "speed": lambda e: f"{e.num_tokens / e.seconds:,.0f} tokens/s",
        "peak memory of head": lambda e: f"{e.peak_bytes / 2**20:,.1f} MiB",
    }
    table.add_column()
    for evaluation in evaluations:
        table.add_column(evaluation.name, justify="right", style="bold" if evaluation is sharded else "")
    for label, cell in rows.items():
        table.add_row(label, *map(cell, evaluations))
    if full is None:
        console.print(table)
        return
    difference = abs(sharded.nats_per_token - full.nats_per_token)
    agree = difference <= TOLERANCE  # False for NaN
    table.add_section()
    table.add_row(
        "difference",
        f"allowed: {TOLERANCE:.0e} nats/token",
        f"{difference:.1e} nats/token",
        style="green" if agree else "red",
    )
    console.print(table)
    if not agree:
        raise SystemExit(
            f"The mean losses part: by {difference:.1e} nats per token, where rounding explains {TOLERANCE:.0e}."
        )


if __name__ == "__main__":
    main()

"""Train a GPT of Megatron-Core as it is, and converted to the loss without logits, and compare.

    torchrun --standalone --nproc-per-node 2 launch/megatron_train.py

The text is Python's own standard library. All runs start from the same weights and see the same batches:

- ``stock``: Megatron-Core's own loss of stored logits.
- ``stock-split``: the same, one sequence at a time: equal but for the order of its sums. How far its loss is from the
  first one's is what rounding alone does in such a training.
- ``stock-fused``: with Megatron-Core's ``cross_entropy_loss_fusion``.
- ``recompute``: converted, no logits.
- ``cache``: converted, with memory for the exponentials of all logits in the model's dtype, which makes it faster.

Tensor parallelism with sequence parallelism, fp32 gradients that are accumulated in ``main_grad``, Megatron-Core's data
parallelism over the ranks that are left, and its distributed optimizer. Results are written after each run.
"""

import argparse
import functools
import gc
import os
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import megatron_wgrad  # noqa: F401  before Megatron-Core, which looks for Apex while it is imported
import torch
import torch.distributed as dist
from bootstrap import Context, distributed
from command_line import output_file, picture_file, positive, seed
from demo_training import draw_batches, read_text, training_progress, with_peak_bytes
from megatron_report import NOISE, REFERENCE, Memory, Report, Run, draw_picture, make_table
from rich.console import Console
from rich.progress import Progress
from text import CACHE
from torch import Tensor, nn

from vocab_parallel_fused import ComputeOptions

try:
    import megatron.core
    from megatron.core import parallel_state
    from megatron_model import Architecture, Trainer, model_parallel

    from vocab_parallel_fused.megatron import convert
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("megatron"):
        raise
    raise SystemExit("launch/megatron_train.py needs Megatron-Core: pip install '.[launch,megatron]'") from error

MODES = (REFERENCE, NOISE, "stock-fused", "recompute", "cache")
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_LEARNING_RATE = 1e-4
_WARMUP_STEPS = 20
_UNTIMED_STEPS = 5
"""The first ones also compile kernels and touch memory for the first time."""


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    # Megatron-Core overlaps collectives with products by the order in which it issues them.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with distributed() as context, model_parallel(context, args.tensor_parallel_size or context.world_size):
        console = Console(quiet=context.rank != 0)
        train_all(args, context, console)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = functools.partial(parser.add_argument, help="(default: %(default)s)")
    add("--modes", nargs="+", choices=MODES, default=MODES, help="(default: all)")
    add("--steps", type=positive, default=200)
    add("--layers", type=positive, default=2)
    add("--hidden-size", type=positive, default=4096)
    add("--vocab-size", type=positive, default=128_256, help="rows of embedding and head (default: %(default)s)")
    add("--tokenizer-size", type=positive, default=32_768, help="of which the text uses these (default: %(default)s)")
    add("--seq-length", type=positive, default=4096)
    add("--micro-batch-size", type=positive, default=2, help="sequences (default: %(default)s)")
    add("--micro-batches", type=positive, default=2, help="per step and data-parallel rank (default: %(default)s)")
    add("--dtype", choices=_DTYPES, default="bfloat16")
    add("--tensor-parallel-size", type=positive, help="(default: all ranks)")
    add("--seed", type=seed, default=0, help="of weights and batches (default: %(default)s)")
    add("--json", type=output_file, default=CACHE / "megatron.json", help="all numbers (default: %(default)s)")
    add("--plot", type=picture_file, default=CACHE / "megatron.png", help="the picture (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.steps <= _UNTIMED_STEPS + 1:
        parser.error(
            f"--steps must be more than {_UNTIMED_STEPS + 1}, since the first ones and the last are not timed; "
            f"got {args.steps}"
        )
    if NOISE in args.modes and args.micro_batch_size == 1:
        parser.error(f"--micro-batch-size must be at least 2 for {NOISE} to take one sequence at a time; got 1")
    if args.tokenizer_size > args.vocab_size:
        parser.error(f"--tokenizer-size must be at most --vocab-size {args.vocab_size}, got {args.tokenizer_size}")
    return args


def train_all(args: argparse.Namespace, context: Context, console: Console) -> None:
    """Train in each mode, and write what is known after each."""
    tokens = read_text(args.tokenizer_size, context, console).tokens
    console.print(f"{len(tokens):,} tokens of Python's standard library")
    data_parallel_size = parallel_state.get_data_parallel_world_size()
    batches = draw_batches(
        tokens,
        args.steps,
        args.seed,
        batch_size=args.micro_batches * args.micro_batch_size * data_parallel_size,
        length=args.seq_length,
    )
    own = batches.chunk(data_parallel_size, dim=1)[parallel_state.get_data_parallel_rank()].to(context.device)
    report = Report(title_of(args, context), setting_of(args, context), [])
    with training_progress(console) as progress:
        for mode in args.modes:
            run = train(mode, args, own, context, progress)
            # Hooks of data parallelism hold the model in cycles; the next one needs its memory.
            gc.collect()
            torch.cuda.empty_cache()
            report.runs.append(run)
            if context.rank == 0:
                report.save(args.json)
                draw_picture(report, args.plot)
                console.print(
                    f"{mode}: loss {run.losses[-1]:.4f}, {run.median_ms:.1f} ms per step, "
                    f"peak {run.largest.compute_peak / 2**30:.2f} GiB"
                )
    console.print(make_table(report))
    console.print(f"picture: {args.plot}\nnumbers: {args.json}", soft_wrap=True)


def title_of(args: argparse.Namespace, context: Context) -> str:
    """The setting in words."""
    return (
        f"H {args.hidden_size:,}, V {args.vocab_size:,}, {args.layers} layers, s {args.seq_length:,}, "
        f"{args.micro_batches} × {args.micro_batch_size} sequences, {args.dtype}, {context.ranks}"
    )


def setting_of(args: argparse.Namespace, context: Context) -> dict[str, Any]:
    """The arguments, and what else a reader needs to repeat the run."""
    device = torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else "cpu"
    return {
        **{name: value for name, value in vars(args).items() if name not in ("modes", "json", "plot")},
        "world_size": context.world_size,
        "tensor_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "learning_rate": _LEARNING_RATE,
        "warmup_steps": _WARMUP_STEPS,
        "device": device,
        "torch": torch.__version__,
        "megatron_core": megatron.core.__version__,
    }


def train(mode: str, args: argparse.Namespace, batches: Tensor, context: Context, progress: Progress) -> Run:
    """Train a new model in this mode.

    Args:
        mode: one of :data:`MODES`.
        batches: ``[steps, B, L + 1]`` token ids of this rank.
    """
    architecture = Architecture(
        num_layers=args.layers,
        hidden_size=args.hidden_size,
        vocab_size=args.vocab_size,
        sequence_length=args.seq_length,
        dtype=_DTYPES[args.dtype],
    )
    trainer = Trainer(
        architecture,
        seed=args.seed,
        device=context.device,
        fused_loss=mode == "stock-fused",
        plug_in=plug_in_of(mode, args),
    )
    micro_batch_size = 1 if mode == NOISE else args.micro_batch_size
    task = progress.add_task(mode, total=len(batches), loss=float("nan"))
    losses, times = [], []
    memory = None
    for number, windows in enumerate(batches, start=1):
        compute = functools.partial(trainer.compute_gradients, windows, micro_batch_size)
        update = functools.partial(trainer.update_parameters, _LEARNING_RATE * min(1.0, number / _WARMUP_STEPS))
        if number < len(batches):
            loss = compute()
            update()
        else:
            loss, memory = measure(trainer, compute, update, context.device)
        losses.append(loss.item())  # on a GPU, waits for the step to end
        times.append(time.perf_counter())
        progress.update(task, advance=1, loss=losses[-1])
    # Without the last one: on the CPU, to measure memory takes time.
    step_ms = [1000 * (end - start) for start, end in pairwise(times[_UNTIMED_STEPS - 1 : -1])]
    of_ranks: list[Any] = [None] * context.world_size
    dist.all_gather_object(of_ranks, memory)
    return Run(
        mode=mode,
        losses=mean_over_data_parallel_ranks(losses, context.device),
        step_ms=step_ms,
        num_tokens=batches[0, :, 1:].numel() * parallel_state.get_data_parallel_world_size(),
        memory=of_ranks,
    )


def plug_in_of(mode: str, args: argparse.Namespace) -> Callable[[nn.Module], object] | None:
    """What a mode changes in a model."""
    if mode.startswith(REFERENCE):
        return None
    tokens = args.micro_batch_size * args.seq_length
    all_exponentials = tokens * args.vocab_size * _DTYPES[args.dtype].itemsize  # more than any shard's
    return functools.partial(
        convert, options=ComputeOptions(exp_cache_bytes=all_exponentials if mode == "cache" else 0)
    )


def measure(
    trainer: Trainer, compute: Callable[[], Tensor], update: Callable[[], None], device: torch.device
) -> tuple[Tensor, Memory]:
    """The loss of a step, and this rank's memory in it."""
    state = trainer.state_bytes()
    resting = torch.cuda.memory_allocated() if device.type == "cuda" else sum(state.values())
    loss, of_compute = with_peak_bytes(compute, device)
    _, of_update = with_peak_bytes(update, device)
    return loss, Memory(**state, resting=resting, compute_peak=resting + of_compute, update_peak=resting + of_update)


def mean_over_data_parallel_ranks(losses: list[float], device: torch.device) -> list[float]:
    """The losses of all sequences of a step, from those of this rank's."""
    total = torch.tensor(losses, dtype=torch.float64, device=device)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return (total / parallel_state.get_data_parallel_world_size()).tolist()


if __name__ == "__main__":
    main()

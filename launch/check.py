"""Compare every implementation with float64 full logits on the hardware at hand, and print errors against budgets.

    python launch/check.py                                           # one rank
    torchrun --standalone --nproc-per-node 4 launch/check.py         # gloo without GPUs, NCCL with one GPU each

Every row is one loss per token, forward and backward, with a random upstream gradient: the cross-entropy in every way
that ranks can share it, and what else a loss may be made of, each once per implementation. An error is the largest
difference from float64 as a fraction of the largest value, the worst over all ranks; its budget comes from what plain
PyTorch of the same dtype loses (``vocab_parallel_fused.testing.check_error_budget``). Each call is made twice: ranks
and runs must agree to the bit. The exit code is 0 if every row passes.
"""

import argparse
import hashlib
import sys
from itertools import product
from typing import NamedTuple

import torch
import torch.distributed as dist
from bootstrap import Context, distributed
from check_features import make_features
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vocab_parallel_fused import ComputeOptions, VocabShard
from vocab_parallel_fused.options import Combine, Impl
from vocab_parallel_fused.testing import (
    Check,
    Results,
    check_error_budget,
    full_logits_results,
    local_part,
    make_problem,
    sharded_results,
)


class Shape(NamedTuple):
    T: int
    H: int
    V: int  # over all ranks


# No multiple of anything; fewer rows than a tile, and a vocabulary that leaves some of four ranks empty.
SMALL = (Shape(132, 72, 1003), Shape(12, 40, 5), Shape(4, 9, 129))
# Llama on 8 ranks, Gemma, logits past 2³¹ elements, and an odd tail everywhere.
REAL = (Shape(8192, 4096, 16032), Shape(4096, 2304, 256000), Shape(16384, 1024, 151936), Shape(4100, 4090, 18993))


# Full logits of all but the cross-entropy take several times their memory in float64.
FEATURE_SHAPES = (*SMALL, REAL[0], REAL[3])
# The soft cap allows logits of 29: 29 times a tanh that is off by up to 1.6 units of fp32, then rounded by up to 8.
FEATURE_LOGIT_UNITS = 60


class Case(NamedTuple):
    loss: str
    dtype: torch.dtype
    impl: Impl
    combine: Combine
    sequence_parallel: bool
    kept: bool
    """With all exponentials kept for the backward."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=["small", "real", "all"], help="default: all on GPUs, small on the CPU")
    arguments = parser.parse_args()
    with distributed() as context:
        on_gpu = context.device.type == "cuda"
        chosen = arguments.shapes or ("all" if on_gpu else "small")
        shapes = {"small": SMALL, "real": REAL, "all": SMALL + REAL}[chosen]
        console = Console(width=180, quiet=context.rank != 0)
        device = torch.cuda.get_device_name() if on_gpu else "CPU"
        console.print(f"{context.world_size} rank(s), {device}, torch {torch.__version__}; error / budget")
        rows = failures = 0
        # A shape at a time, so that what was found outlives a job that is ended.
        for shape in track(shapes, console=Console(stderr=True), disable=context.rank != 0):
            results = check_shape(shape, context)
            console.print(make_table(shape, results))
            rows += len(results)
            failures += sum(not has_passed(checks, same_bits) for _, checks, same_bits in results)
        console.print(f"{failures} of {rows} rows failed" if failures else f"{rows} rows passed")
    return 1 if failures else 0


def make_table(shape: Shape, results: list[tuple[Case, list[Check], bool]]) -> Table:
    columns = ["loss", "dtype", "impl", "combine", "seq. par.", "cache", *Results._fields, "same bits", ""]
    table = Table(*columns, title="{} tokens, hidden size {}, {} classes".format(*shape))
    for case, checks, same_bits in results:
        table.add_row(
            case.loss,
            str(case.dtype).removeprefix("torch."),
            case.impl,
            case.combine,
            str(case.sequence_parallel),
            str(case.kept),
            *(f"{check.error:.1e} / {check.budget:.1e}" for check in checks),
            str(same_bits),
            "ok" if has_passed(checks, same_bits) else "FAILED",
        )
    return table


def has_passed(checks: list[Check], same_bits: bool) -> bool:
    return same_bits and all(check.passed for check in checks)


def check_shape(shape: Shape, context: Context) -> list[tuple[Case, list[Check], bool]]:
    on_gpu = context.device.type == "cuda"
    several = context.group is not None
    impls: list[Impl] = ["eager", "triton"] if on_gpu else ["eager"]
    combines: list[Combine] = ["all_gather", "all_reduce"] if several else ["all_gather"]
    can_shard_tokens = several and shape.T % context.world_size == 0
    shard = VocabShard.even(shape.V, context.group)
    rows = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        problem = make_problem(*shape, dtype=dtype, device=context.device)
        features = make_features(problem, context.group, shard) if shape in FEATURE_SHAPES else {}
        for name, feature in (("cross-entropy", None), *features.items()):
            of_logits = None if feature is None else feature.of_logits
            reference = full_logits_results(problem.to(torch.float64), loss=of_logits)
            same_dtype = full_logits_results(problem, loss=of_logits)
            tokens_sharded = [False, True][: 1 + can_shard_tokens]
            keeping: list[Impl] = ["triton"] if on_gpu and dtype != torch.float16 else []
            ways = [
                *product(impls, combines, tokens_sharded, [False]),
                *product(keeping, combines[:1], tokens_sharded, [True]),
            ]
            if feature is not None:
                ways = list(product(impls, combines[:1], [can_shard_tokens], [False]))
            for impl, combine, sequence_parallel, kept in ways:
                case = Case(name, dtype, impl, combine, sequence_parallel, kept)
                expected, budget = (
                    local_part(results, context.group, shard, sequence_parallel=sequence_parallel)
                    for results in (reference, same_dtype)
                )
                first, second = (
                    sharded_results(
                        problem,
                        context.group,
                        shard,
                        sequence_parallel=sequence_parallel,
                        options=ComputeOptions(
                            impl=impl,
                            combine=combine,
                            exp_cache_bytes=2**40 if kept else 0,
                            keep_gathered_hidden=kept,
                        ),
                        loss=None if feature is None else feature.of_part,
                    )
                    for _ in range(2)
                )
                checks = check_error_budget(
                    first,
                    budget,
                    expected,
                    ranks=context.world_size,
                    logit_units=0 if feature is None else FEATURE_LOGIT_UNITS,
                    kept=kept,
                )
                same_runs = all(
                    torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None
                )
                rows.append((case, *_worst(checks, same_runs, first, sequence_parallel, context)))
    return rows


def _worst(
    checks: list[Check], same_runs: bool, results: Results, sequence_parallel: bool, context: Context
) -> tuple[list[Check], bool]:
    """The largest error of any rank relative to its budget, and whether runs and ranks agree to the bit."""
    digest = hashlib.sha256()
    # Without sequence parallelism every rank also has all of dhidden.
    for replicated in (results.loss, *(() if sequence_parallel else (results.dhidden,))):
        digest.update(replicated.detach().float().cpu().numpy().tobytes())
    digest = digest.hexdigest()
    answers = [(checks, same_runs, digest)]
    if context.group is not None:
        answers *= context.world_size
        dist.all_gather_object(answers, (checks, same_runs, digest), group=context.group)
    worst = [
        max(of_ranks, key=lambda check: (not check.passed, check.error / check.budget))
        for of_ranks in zip(*(answer[0] for answer in answers), strict=True)
    ]
    return worst, all(answer[1] for answer in answers) and len({answer[2] for answer in answers}) == 1


if __name__ == "__main__":
    sys.exit(main())

"""Every bad argument is refused with a message that names it, what was expected, and what came."""

import math
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from vocab_parallel_fused import (
    ComputeOptions,
    VocabParallelLinearCrossEntropy,
    VocabShard,
    linear_cross_entropy,
    linear_token_stats,
)
from vocab_parallel_fused.testing import run_on_ranks

HIDDEN, WEIGHT, TARGET = torch.randn(6, 8), torch.randn(10, 8), torch.arange(6)


ACCUMULATE = ComputeOptions(accumulate_main_grad=True)


def with_main_grad(weight: Any) -> torch.Tensor:
    """A weight whose main_grad has its own dtype."""
    weight.main_grad = torch.zeros_like(weight)
    return weight


def call(**changes: Any) -> None:
    linear_cross_entropy(**{"input": HIDDEN, "linear_weight": WEIGHT, "target": TARGET, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input": [1.0]}, TypeError, "input must be a tensor, got list"),
        ({"input": HIDDEN.long()}, TypeError, "input must be float16, bfloat16, float32 or float64, got torch.int64"),
        ({"input": torch.tensor(1.0)}, ValueError, r"input must have shape \(\*, H\) with H >= 1, got \(\)"),
        ({"linear_weight": WEIGHT[:, :5]}, ValueError, r"linear_weight must have shape \(V_local, 8\), got \(10, 5\)"),
        ({"linear_weight": WEIGHT[0]}, ValueError, r"linear_weight must have shape \(V_local, 8\), got \(8,\)"),
        (
            {"linear_weight": WEIGHT.half()},
            TypeError,
            r"linear_weight must have input's dtype torch.float32, got torch.float16",
        ),
        ({"linear_weight": WEIGHT.to("meta")}, ValueError, "linear_weight must be on input's device cpu, got meta"),
        ({"input": HIDDEN.to("meta")}, ValueError, "input must hold data, got a meta tensor"),
        ({"input": HIDDEN.to_sparse()}, TypeError, "input must be a strided tensor, got torch.sparse_coo"),
        (
            {"input": torch.nested.nested_tensor([HIDDEN], layout=torch.jagged)},
            TypeError,
            "input must be a strided tensor, got a nested one",
        ),
        ({"linear_weight": WEIGHT[:0]}, ValueError, "linear_weight has no rows; pass shard="),
        ({"target": TARGET.int()}, TypeError, "target must be int64 class ids, got torch.int32"),
        ({"target": TARGET[:5]}, ValueError, r"target must have shape \(6,\) for input of shape \(6, 8\), got \(5,\)"),
        ({"target": TARGET + 7}, ValueError, r"target must be in \[0, 10\) or ignore_index, got 10 at position 3"),
        ({"target": TARGET - 1}, ValueError, r"target must be in \[0, 10\) or ignore_index, got -1 at position 0"),
        ({"linear_bias": WEIGHT[:, :1]}, ValueError, r"linear_bias must have shape \(10,\), got \(10, 1\)"),
        (
            {"linear_bias": torch.zeros(10).double()},
            TypeError,
            "linear_bias must have input's dtype torch.float32, or fp32, got torch.float64",
        ),
        ({"reduction": "avg"}, ValueError, r"reduction must be one of \('none', 'mean', 'sum'\), got 'avg'"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an int, got None"),
        ({"weight": [1.0] * 10}, TypeError, "weight must be a tensor, got list"),
        ({"weight": torch.ones(9)}, ValueError, r"weight must have shape \(10,\), got \(9,\)"),
        (
            {"weight": torch.ones(10).long()},
            TypeError,
            "weight must be a constant floating-point tensor, got torch.int64",
        ),
        (
            {"weight": torch.ones(10, requires_grad=True)},
            TypeError,
            "weight must be a constant floating-point tensor, got torch.float32, which requires a gradient",
        ),
        ({"weight": torch.ones(10, device="meta")}, ValueError, "weight must be on input's device cpu, got meta"),
        ({"token_weight": 1.0}, TypeError, "token_weight must be a tensor, got float"),
        (
            {"token_weight": torch.ones(6, 1)},
            ValueError,
            r"token_weight must have target's shape \(6,\), got \(6, 1\)",
        ),
        ({"token_weight": TARGET}, TypeError, "token_weight must be a floating-point tensor, got torch.int64"),
        (
            {"token_weight": torch.ones(6, device="meta")},
            ValueError,
            "token_weight must be on input's device cpu, got meta",
        ),
        ({"label_smoothing": 1.1}, ValueError, r"label_smoothing must be in \[0, 1\.0\], got 1\.1"),
        ({"label_smoothing": -0.1}, ValueError, r"label_smoothing must be in \[0, 1\.0\], got -0\.1"),
        ({"label_smoothing": True}, TypeError, "label_smoothing must be a number, got bool"),
        ({"z_loss_weight": math.nan}, ValueError, r"z_loss_weight must be in \[0, inf\], got nan"),
        ({"z_loss_weight": math.inf}, ValueError, r"z_loss_weight must be in \[0, inf\], got inf"),
        ({"z_loss_weight": None}, TypeError, "z_loss_weight must be a number, got NoneType"),
        ({"logit_scale": math.inf}, ValueError, "logit_scale must be finite, got inf"),
        ({"logit_scale": torch.tensor(1.0)}, TypeError, "logit_scale must be a number, got Tensor"),
        ({"logit_softcap": 0.0}, ValueError, r"logit_softcap must be positive, got 0\.0"),
        ({"logit_softcap": True}, TypeError, "logit_softcap must be a number, got bool"),
        ({"temperature": 0}, ValueError, "temperature must be positive, got 0"),
        ({"temperature": -1.0}, ValueError, r"temperature must be positive, got -1\.0"),
        ({"temperature": None}, TypeError, "temperature must be a number, got NoneType"),
        ({"sequence_parallel": 1}, TypeError, "sequence_parallel must be a bool, got 1"),
        ({"group": "tp"}, TypeError, "group must be a ProcessGroup, a one-dimensional DeviceMesh or None, got str"),
        ({"shard": (0, 10)}, TypeError, "shard must be a VocabShard or None, got tuple"),
        ({"shard": VocabShard(0, 9, 9)}, ValueError, "linear_weight must have the 9 rows of VocabShard.*, got 10"),
        (
            {"shard": VocabShard(0, 10, 20)},
            ValueError,
            "shard must hold the whole vocabulary on a single rank, got VocabShard",
        ),
        (
            {"options": ACCUMULATE},
            ValueError,
            r"linear_weight\.main_grad must be a tensor \(10, 8\), torch.float32 on cpu .*, got NoneType",
        ),
        (
            {"linear_weight": with_main_grad(WEIGHT.half()), "input": HIDDEN.half(), "options": ACCUMULATE},
            ValueError,
            r"linear_weight\.main_grad must be a tensor \(10, 8\), .*, got \(10, 8\), torch.float16 on cpu",
        ),
        ({"options": {"impl": "eager"}}, TypeError, "options must be a ComputeOptions or None, got dict"),
        (
            {"input": HIDDEN.double(), "linear_weight": WEIGHT.double(), "options": ComputeOptions(impl="triton")},
            TypeError,
            "input must be float16, bfloat16 or float32 for impl='triton', got torch.float64",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"outputs": "entropy"}, TypeError, "outputs must be a collection of names, got 'entropy'"),
        ({"outputs": iter(["lse"])}, TypeError, "outputs must be a collection of names, got <list_iterator"),
        ({"outputs": ["perplexity"]}, ValueError, r"outputs must be among \('log_prob', .*, got 'perplexity'"),
        ({"outputs": [None]}, ValueError, "outputs must be among .*, got None"),
        (
            {"outputs": ["lse", "log_prob"], "target": None},
            ValueError,
            "target must be given for the output 'log_prob', got None",
        ),
        (
            {"target": TARGET[:5, None]},
            ValueError,
            r"target must have shape \(6,\) or \(6, 'K'\) for input of shape \(6, 8\), got \(5, 1\)",
        ),
        (
            {"target": torch.full((6, 3), 10)},
            ValueError,
            r"target must be in \[0, 10\) or ignore_index, got 10 at position 0",
        ),
        ({"target": TARGET.float()}, TypeError, "target must be int64 class ids, got torch.float32"),
        (
            {"target": torch.zeros(1, dtype=torch.int64).expand(6, 2**29)},
            ValueError,
            r"target must have fewer than 2\*\*31 entries, got \(6, 536870912\)",
        ),
        ({"ignore_index": 1.0}, TypeError, r"ignore_index must be an int, got 1\.0"),
        ({"temperature": 0.0}, ValueError, r"temperature must be positive, got 0\.0"),
        ({"weight": torch.ones(10)}, TypeError, "unexpected keyword argument 'weight'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_arguments_of_token_stats(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"input": HIDDEN, "linear_weight": WEIGHT, "target": TARGET, **changes}
    with pytest.raises(error, match=message):
        linear_token_stats(**arguments)


def test_triton_without_a_gpu_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("backward", "divergence", "selection"):  # with all that they import, interpreted or not
        pytest.importorskip(f"vocab_parallel_fused.kernels.{name}")
    monkeypatch.setattr("vocab_parallel_fused.kernels.tiles.INTERPRETED", False)
    with pytest.raises(ValueError, match="input must be on a CUDA or ROCm device for impl='triton', got cpu"):
        call(options=ComputeOptions(impl="triton"))


def test_triton_that_is_missing_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("backward", "forward", "tiles"):
        monkeypatch.setitem(__import__("sys").modules, f"vocab_parallel_fused.kernels.{name}", None)
        monkeypatch.delattr(f"vocab_parallel_fused.kernels.{name}", raising=False)
    with pytest.raises(ImportError, match="impl='triton' needs Triton, which cannot be imported here"):
        call(options=ComputeOptions(impl="triton"))
    call()  # "auto" on the CPU needs none


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"impl": "cuda"}, r"impl must be one of \('auto', 'triton', 'eager'\), got 'cuda'"),
        ({"combine": "ring"}, r"combine must be one of \('all_gather', 'all_reduce'\), got 'ring'"),
        ({"workspace_bytes": 0}, "workspace_bytes must be a positive int or None, got 0"),
        ({"workspace_bytes": 1.5}, r"workspace_bytes must be a positive int or None, got 1\.5"),
        ({"exp_cache_bytes": -1}, "exp_cache_bytes must be a non-negative int, got -1"),
        ({"exp_cache_bytes": True}, "exp_cache_bytes must be a non-negative int, got True"),
        ({"exp_cache_bytes": 1e6}, r"exp_cache_bytes must be a non-negative int, got 1000000\.0"),
        ({"accumulate_main_grad": 1}, "accumulate_main_grad must be a bool, got 1"),
        ({"keep_gathered_hidden": None}, "keep_gathered_hidden must be a bool, got None"),
        ({"workspace_bytes": True}, "workspace_bytes must be a positive int or None, got True"),
    ],
)
def test_bad_options(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ComputeOptions(**fields)


def test_options_are_frozen_and_keyword_only() -> None:
    with pytest.raises(AttributeError):
        ComputeOptions().impl = "eager"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        ComputeOptions("eager")  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((3, 2, 10), "shard must have 0 <= start <= stop, got start=3, stop=2"),
        ((-1, 2, 10), "shard must have 0 <= start <= stop, got start=-1, stop=2"),
        ((0, 2, 0), "shard.vocab_size must be at least 1, got 0"),
    ],
)
def test_bad_shards(bounds: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VocabShard(*bounds)


def test_bounds_of_a_shard_are_integers() -> None:
    with pytest.raises(TypeError, match=r"shard\.stop must be an int, got 5\.5"):
        VocabShard(0, 5.5, 10)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_features": 0, "vocab_size": 4}, ValueError, "in_features must be at least 1, got 0"),
        ({"in_features": 4, "vocab_size": 0}, ValueError, "vocab_size must be at least 1, got 0"),
        ({"in_features": "4", "vocab_size": 4}, TypeError, "in_features must be an int, got '4'"),
        ({"in_features": 4, "vocab_size": 4.0}, TypeError, r"^vocab_size must be an int, got 4\.0"),
        (
            {"in_features": 4, "vocab_size": 4, "shard": VocabShard(0, 4, 3)},
            ValueError,
            r"shard\.vocab_size must be vocab_size 4, got 3",
        ),
        (
            {"in_features": 4, "vocab_size": 4, "shard": (0, 4)},
            TypeError,
            "shard must be a VocabShard or None, got tuple",
        ),
        ({"in_features": 4, "vocab_size": 4, "label": 1}, TypeError, r"unexpected keyword arguments \['label'\]"),
    ],
)
def test_bad_module_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        VocabParallelLinearCrossEntropy(**arguments)


def pass_a_dtensor(group: Any) -> None:
    mesh = DeviceMesh("cpu", list(range(group.size())))
    arguments = {
        "input": HIDDEN,
        "linear_weight": WEIGHT,
        "linear_bias": torch.zeros(10),
        "target": TARGET,
        "weight": torch.ones(10),
        "token_weight": torch.ones(6),
    }
    for name, tensor in arguments.items():
        with pytest.raises(
            TypeError, match=rf"^{name} must be a plain tensor, got a DTensor of .*; pass its to_local\(\)"
        ):
            call(**{name: DTensor.from_local(tensor, mesh, [Replicate()])})


def test_dtensors_are_refused() -> None:
    run_on_ranks(pass_a_dtensor, 1)


def pass_a_mesh_of_others(group: Any) -> None:
    mesh = DeviceMesh("cpu", [0])
    if group.rank() == 1:
        with pytest.raises(ValueError, match="group does not contain this rank"):
            call(group=mesh)


def test_a_mesh_of_other_ranks_is_refused() -> None:
    run_on_ranks(pass_a_mesh_of_others, 2)

"""Any combination of options, drawn at random, against plain PyTorch on stored logits in float64.

A budget of error has three parts, none of them typed in:

- twice the error of plain PyTorch in fp32 on stored logits, given the same (perhaps 16-bit) numbers;
- what the exact result changes by if every input is off by `UNITS` units of fp32: the products and exponentials of any
  method are rounded, and this is how much such a rounding matters to the problem at hand;
- what the op rounds by design. To the inputs' dtype: gradients of hidden states (once a rank), weight and bias; with
  Triton also the gradient of each logit. In fp32: a logit that is computed twice, its sums perhaps in another order, in
  the statistics and again for the target or in the backward; its product with log2(e), which only a GPU fuses with the
  sum that follows; and the tanh from which a soft cap takes `1 − tanh²`.

(fp64 for fp64.) Errors are absolute and taken at their largest over a tensor.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed import ProcessGroup

from vocab_parallel_fused import ComputeOptions, VocabShard, linear_cross_entropy, linear_token_stats
from vocab_parallel_fused.options import Combine
from vocab_parallel_fused.testing import full_logits_cross_entropy, full_logits_token_stats, run_on_ranks

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
DIFFERENTIABLE = ("log_prob", "entropy", "lse", "target_logit")
OUTPUTS = (*DIFFERENTIABLE, "argmax", "argmax_logit", "target_is_argmax")
OF_TARGET = {"log_prob", "target_logit", "target_is_argmax"}
# Of the forward's tiles, and of the memory for what tiles leave: one launch for each 32 rows.
SMALL_BLOCKS = {"eager": {"eager._TILE_TOKENS": 16, "eager._TILE_ROWS": 32}, "triton": {"forward._PARTIAL_BYTES": 1}}
UNITS = 4  # two for a sum of up to 36 products, two for an exponential or a logarithm


def examples(number: int) -> settings:
    """The same examples in every run, or twenty times as many new ones with HYPOTHESIS_PROFILE=thorough."""
    return settings(
        max_examples=number * (20 if THOROUGH else 1),
        derandomize=not THOROUGH,
        database=None,
        deadline=None,
        phases=[Phase.generate],  # cases are small; to shrink one further takes minutes
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call, as numbers: ranks make the same tensors of it."""

    impl: Literal["eager", "triton"]
    dtype: torch.dtype
    shape: tuple[int, int, int]  # T, H, V
    num_targets: int | None  # K of a target [T, K]; None: a target [T]
    bias: float | None  # mean of the bias
    ignore_index: int
    outputs: frozenset[str] | None  # of linear_token_stats; None: linear_cross_entropy
    has_class_weight: bool
    has_token_weight: bool
    keywords: dict[str, Any]  # of linear_cross_entropy
    transform: dict[str, Any]
    workspace_bytes: int
    combine: Combine
    bounds: tuple[int, ...]  # of the ranks' rows
    sequence_parallel: bool
    small_blocks: bool  # so that several make up a small problem
    strided: bool  # every other element of a larger tensor, for all tensors
    seed: int


@st.composite
def cases(draw: Any, *, impl: Literal["eager", "triton"], world_size: int = 1) -> Case:
    """Sizes with tails on either side of a tile: 16 × 32 × 16 for the interpreter, 1024 × 1024 for eager."""
    T, H, V = draw(st.integers(1, 35)), draw(st.integers(1, 36)), draw(st.integers(2, 70))
    if impl == "eager" and draw(st.integers(0, 9)) == 0:
        large = draw(st.sampled_from([1023, 1024, 1025, 2049]))
        T, V = draw(st.sampled_from([(T, large), (large, V)]))
    T = -(-T // world_size) * world_size
    dtypes = [torch.float32, torch.float16, torch.bfloat16] + [torch.float64] * (impl == "eager")
    factor = st.one_of(st.just(1.0), st.integers(-10, 10).map(lambda tenths: 10 ** (tenths / 10)))
    asks_stats = draw(st.booleans())
    has_target = not asks_stats or draw(st.integers(0, 4)) > 0
    available = [name for name in OUTPUTS if has_target or name not in OF_TARGET]
    padding = draw(st.sampled_from([0, 0, 1, 40]))
    cuts = draw(st.lists(st.integers(0, V + padding), min_size=world_size - 1, max_size=world_size - 1))
    fraction = st.sampled_from([0.0, 0.1, 0.7, 1.0])
    return Case(
        impl=impl,
        dtype=draw(st.sampled_from(dtypes)),
        shape=(T, H, V),
        num_targets=draw(st.one_of(st.none(), st.integers(0, 4))) if asks_stats and has_target else None,
        bias=draw(st.one_of(st.none(), st.sampled_from([0.0, -200.0, 200.0]))),
        ignore_index=draw(st.sampled_from([-100, 0, V - 1, V + 3, -1])),
        outputs=frozenset(draw(st.sets(st.sampled_from(available), min_size=1))) if asks_stats else None,
        has_class_weight=not asks_stats and draw(st.booleans()),
        has_token_weight=not asks_stats and draw(st.booleans()),
        keywords={
            "reduction": draw(st.sampled_from(["none", "sum", "mean"])),
            "label_smoothing": draw(fraction),
            "z_loss_weight": draw(fraction),
        },
        transform={
            "logit_scale": draw(factor) * draw(st.sampled_from([1, 1, 1, -1])),
            "logit_softcap": draw(st.one_of(st.none(), factor)),
            "temperature": draw(factor),
        },
        workspace_bytes=draw(st.sampled_from([1, 3000, 20000, 2**22])),
        combine=draw(st.sampled_from(["all_gather", "all_reduce"])),
        bounds=(0, *sorted(cuts), V + padding),
        sequence_parallel=draw(st.booleans()),
        small_blocks=draw(st.booleans()),
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32)),
    )


def plain_dtype(case: Case) -> torch.dtype:
    """Of the losses, and of whatever is not rounded to 16 bits."""
    return torch.promote_types(case.dtype, torch.float32)


class Inputs(NamedTuple):
    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    token_weight: Tensor | None  # [T]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        return self._make(None if tensor is None else change(tensor) for tensor in self)


class Constants(NamedTuple):
    target: Tensor | None  # [T] or [T, K]
    class_weight: Tensor | None  # [V]
    upstream: dict[str, Tensor]  # a random gradient of each output


class Outcome(NamedTuple):
    values: dict[str, Tensor]
    grads: dict[str, Tensor]  # of the fields of Inputs


def make_inputs(case: Case) -> tuple[Inputs, Constants]:
    T, H, V = case.shape
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def weights(size: int) -> Tensor:
        """Half of them 0."""
        return torch.rand(size, generator=generator, dtype=plain_dtype(case)).sub(0.5).clamp(min=0)

    inputs = Inputs(
        normal(T, H).to(case.dtype),
        (3 / H**0.5 * normal(V, H)).to(case.dtype),
        None if case.bias is None else (case.bias + normal(V)).to(case.dtype),
        weights(T) if case.has_token_weight else None,
    )
    has_target = case.outputs is None or not case.outputs.isdisjoint(OF_TARGET)
    shape = (T,) if case.num_targets is None else (T, case.num_targets)
    target = torch.randint(V, shape, generator=generator)
    target[torch.rand(shape, generator=generator) < 0.2] = case.ignore_index
    names = ["loss"] if case.outputs is None else [name for name in DIFFERENTIABLE if name in case.outputs]
    upstream = {}
    for name in names:
        is_scalar = name == "loss" and case.keywords["reduction"] != "none"
        upstream[name] = normal(*(() if is_scalar else shape if name in {"loss", *OF_TARGET} else (T,)))
    return inputs, Constants(target if has_target else None, weights(V) if case.has_class_weight else None, upstream)


def keywords_of(case: Case, constants: Constants, token_weight: Tensor | None) -> dict[str, Any]:
    keywords = {"ignore_index": case.ignore_index, **case.transform}
    if case.outputs is None:
        keywords |= {"weight": constants.class_weight, "token_weight": token_weight, **case.keywords}
    return keywords


def outcome(values: dict[str, Tensor], inputs: Inputs, upstream: dict[str, Tensor]) -> Outcome:
    """Pair the values with the gradients of the inputs, each output having an upstream gradient of its own."""
    leaves = {name: tensor for name, tensor in inputs._asdict().items() if tensor is not None}
    total = [(values[name] * gradient.to(values[name])).sum() for name, gradient in upstream.items()]
    grads: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if total:
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    filled = {
        name: (torch.zeros_like(leaf) if grad is None else grad).cpu()
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }
    return Outcome({name: value.detach().cpu() for name, value in values.items()}, filled)


def oracle(case: Case, inputs: Inputs, constants: Constants, dtype: torch.dtype) -> Outcome:
    inputs = inputs.map(lambda tensor: tensor.detach().to(dtype).requires_grad_())
    hidden, weight, bias, token_weight = inputs
    if constants.class_weight is not None:
        constants = constants._replace(class_weight=constants.class_weight.to(dtype))
    keywords = keywords_of(case, constants, token_weight)
    if case.outputs is None:
        assert constants.target is not None
        values = {"loss": full_logits_cross_entropy(hidden, weight, constants.target, linear_bias=bias, **keywords)}
    else:
        stats = full_logits_token_stats(hidden, weight, constants.target, linear_bias=bias, **keywords)
        values = {name: value for name, value in stats._asdict().items() if name in case.outputs}
    return outcome(values, inputs, constants.upstream)


def logit_gradients(case: Case, raw: Tensor, token_weight: Tensor | None, constants: Constants) -> Tensor:
    """[T, V] of the oracle: raw logits are the hidden states of an identity layer."""
    layer = Inputs(raw, torch.eye(raw.shape[1], dtype=torch.float64), None, token_weight)
    return oracle(case, layer, constants, torch.float64).grads["hidden"]


def pull(case: Case, token_weight: Tensor | None, constants: Constants) -> Tensor:
    """[T] how strongly each token's logits are pulled where no class is certain and no cap saturates."""
    T, _, V = case.shape
    raw = torch.randn(T, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return logit_gradients(replace(case, transform={}), raw, token_weight, constants).abs().sum(dim=1)


def share(case: Case, token_weight: Tensor, constants: Constants) -> float:
    """How much of the loss a token of weight 1 can be."""
    assert constants.target is not None
    upstream = largest(constants.upstream["loss"])
    if case.keywords["reduction"] != "mean":
        return upstream
    valid = constants.target != case.ignore_index
    weights = token_weight[valid]
    if constants.class_weight is not None:
        weights = weights * constants.class_weight[constants.target[valid]]
    total = float(weights.sum()) or float(token_weight[valid].sum())
    return upstream / total if total > 0 else 0.0


def off_by_units(inputs: Inputs, eps: float, seed: int) -> Inputs:
    """Every number of the layer off by at most `UNITS` units, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def off(tensor: Tensor) -> Tensor:
        sign = torch.randint(2, tensor.shape, generator=generator).double() * 2 - 1
        return tensor.double() * (1 + UNITS * eps * sign)

    return inputs.map(off)


class Expected(NamedTuple):
    exact: Outcome
    values: dict[str, float]  # budgets: the largest absolute error
    grads: dict[str, float]


def expected_outcome(case: Case, inputs: Inputs, constants: Constants) -> Expected:
    world_size = len(case.bounds) - 1
    exact = oracle(case, inputs, constants, torch.float64)
    plain = oracle(case, inputs, constants, plain_dtype(case))
    eps = torch.finfo(plain_dtype(case)).eps
    nearby = [oracle(case, off_by_units(inputs, eps, seed), constants, torch.float64) for seed in range(3)]

    def conditioning(part: str, name: str) -> float:
        """Twice the plain error, and the change under perturbation."""
        of_exact, of_plain, *of_nearby = (getattr(result, part)[name].double() for result in (exact, plain, *nearby))
        return 2 * largest(of_plain - of_exact) + max(largest(result - of_exact) for result in of_nearby)

    hidden, weight, bias, token_weight = inputs.map(Tensor.double)
    offset = torch.zeros((), dtype=torch.float64) if bias is None else bias
    slope = abs(case.transform["logit_scale"]) / case.transform["temperature"]
    of_logit = UNITS * eps * slope * largest(hidden.abs() @ weight.abs().t() + offset.abs())

    values = {}
    for name, value in exact.values.items():
        if value.is_floating_point():
            values[name] = conditioning("values", name) + UNITS * eps * largest(value)
            if name in {"log_prob", "entropy"}:
                values[name] += of_logit
            if name == "loss":
                ones = constants._replace(upstream={name: torch.ones_like(value)})
                pulls = pull(case, token_weight, ones) * of_logit
                values[name] += largest(pulls if value.ndim else pulls.sum())

    terms = logit_gradients(case, hidden @ weight.t() + offset, token_weight, constants).abs()
    recomputed = pull(case, token_weight, constants) * slope * (of_logit + UNITS * eps)
    if case.keywords["z_loss_weight"] and case.outputs is None:
        lse = full_logits_token_stats(hidden, weight, linear_bias=bias, **case.transform).lse
        assert lse is not None
        recomputed *= 1 + largest(lse)
    of_terms = {
        "hidden": (terms @ weight.abs(), recomputed * largest(weight)),
        "weight": (terms.t() @ hidden.abs(), recomputed @ hidden.abs()),
        "bias": (terms.sum(dim=0), recomputed.sum()),
    }
    result_eps = torch.finfo(case.dtype).eps
    grads = {}
    for name in exact.grads:
        grads[name] = conditioning("grads", name) + torch.finfo(case.dtype).smallest_normal * result_eps
        if name == "token_weight":
            assert token_weight is not None
            # A mean's is a difference of a token's loss and the mean.
            of_loss = of_logit + UNITS * eps * largest(exact.values["loss"])
            grads[name] += UNITS * eps * largest(exact.grads[name]) + of_loss * share(case, token_weight, constants)
        else:
            # Roundings are half an eps; the interpreter's of bf16 a whole one.
            roundings = (world_size if name == "hidden" else 1) + (case.impl == "triton")
            of_term, of_recomputed = of_terms[name]
            grads[name] += roundings * result_eps * largest(of_term) + largest(of_recomputed)
            if largest(of_term) > torch.finfo(case.dtype).max:
                grads[name] = math.inf
    return Expected(exact, values, grads)


def largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() > 0 else 0.0


def run(
    case: Case, inputs: Inputs, constants: Constants, device: torch.device, group: ProcessGroup | None = None
) -> Outcome:
    """The op on this rank's part: padding rows hold NaN, so that they show if they take part."""
    rank, world_size = (0, 1) if group is None else (group.rank(), group.size())
    shard = VocabShard(case.bounds[rank], case.bounds[rank + 1], case.shape[2])

    def rows(full: Tensor) -> Tensor:
        real = full[shard.start : shard.start + shard.num_valid_rows]
        return torch.cat((real, full.new_full((shard.num_rows - len(real), *full.shape[1:]), torch.nan)))

    hidden = inputs.hidden.chunk(world_size)[rank] if case.sequence_parallel else inputs.hidden
    local = inputs._replace(
        hidden=hidden, weight=rows(inputs.weight), bias=None if inputs.bias is None else rows(inputs.bias)
    )

    def laid_out(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().to(device)
        return tensor.repeat_interleave(2, dim=-1)[..., ::2] if case.strided else tensor

    local = local.map(lambda tensor: laid_out(tensor).requires_grad_())
    target, class_weight = (None if tensor is None else laid_out(tensor) for tensor in constants[:2])
    constants = constants._replace(target=target, class_weight=class_weight)
    keywords = keywords_of(case, constants, local.token_weight) | {
        "linear_bias": local.bias,
        "group": group,
        "shard": shard,
        "sequence_parallel": case.sequence_parallel,
        "options": ComputeOptions(impl=case.impl, workspace_bytes=case.workspace_bytes, combine=case.combine),
    }
    if case.outputs is None:
        assert constants.target is not None
        values = {"loss": linear_cross_entropy(local.hidden, local.weight, constants.target, **keywords)}
    else:
        stats = linear_token_stats(
            local.hidden, local.weight, constants.target, outputs=case.outputs, **keywords
        )._asdict()
        assert {name for name, value in stats.items() if value is not None} == case.outputs
        values = {name: stats[name] for name in case.outputs}
    return outcome(values, local, constants.upstream)


def local_grads(case: Case, exact: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """This rank's part of the exact gradients, padding included."""
    world_size = len(case.bounds) - 1
    start, stop = case.bounds[rank], case.bounds[rank + 1]

    def rows(full: Tensor) -> Tensor:
        real = full[start:stop]
        return torch.cat((real, full.new_zeros(stop - start - len(real), *full.shape[1:])))

    hidden = exact["hidden"].chunk(world_size)[rank] if case.sequence_parallel else exact["hidden"]
    return exact | {"hidden": hidden} | {name: rows(exact[name]) for name in ("weight", "bias") if name in exact}


def check(case: Case, device: torch.device, group: ProcessGroup | None = None) -> Outcome:
    """Run it; assert that it agrees with the oracle within the budget, and two runs to the bit."""
    inputs, constants = make_inputs(case)
    with pytest.MonkeyPatch.context() as patch:
        for where, size in SMALL_BLOCKS[case.impl].items() if case.small_blocks else ():
            patch.setattr(f"vocab_parallel_fused.kernels.{where}", size)
        # The interpreter is slow.
        actual, *others = (run(case, inputs, constants, device, group) for _ in range(2 if case.impl == "eager" else 1))
    expected = expected_outcome(case, inputs, constants)
    rank = 0 if group is None else group.rank()
    for name, exact in expected.exact.values.items():
        value = actual.values[name]
        assert value.shape == exact.shape, name
        if name in expected.values:
            assert value.dtype == plain_dtype(case), name
            assert_within(name, value, exact, expected.values[name])
    for name, exact in local_grads(case, expected.exact.grads, rank).items():
        assert actual.grads[name].shape == exact.shape, name
        assert_within(f"gradient of {name}", actual.grads[name], exact, expected.grads[name])
    if "log_prob" in actual.values:
        assert (actual.values["log_prob"] <= 0).all()
    check_argmax(case, inputs, constants, actual)
    for again in others:
        assert_same_bits(actual.values, again.values, "two runs")
        assert_same_bits(actual.grads, again.grads, "two runs")
    return actual


def check_argmax(case: Case, inputs: Inputs, constants: Constants, actual: Outcome) -> None:
    """The class must be one of the largest logit; where two are as good as equal, it may be either."""
    if "argmax" not in actual.values:
        return
    T, _, V = case.shape
    logits = full_logits_token_stats(
        inputs.hidden.double(),
        inputs.weight.double(),
        torch.arange(V).expand(T, V),
        linear_bias=None if inputs.bias is None else inputs.bias.double(),
        **case.transform,
    ).target_logit
    assert logits is not None
    argmax = actual.values["argmax"]
    eps = torch.finfo(plain_dtype(case)).eps
    slack = 4 * UNITS * eps * largest(logits)
    of_argmax = logits.gather(1, argmax[:, None])[:, 0]
    assert (logits.amax(dim=1) - of_argmax <= slack).all(), "argmax"
    if "target_is_argmax" in actual.values:
        assert constants.target is not None
        ids = argmax.view(T, *[1] * (constants.target.ndim - 1))
        is_argmax = (constants.target == ids) & (constants.target != case.ignore_index)
        assert torch.equal(actual.values["target_is_argmax"], is_argmax)


def assert_within(name: str, actual: Tensor, exact: Tensor, budget: float) -> None:
    error = largest(actual.double() - exact)
    assert error <= budget, f"{name}: error {error:.2e} above its budget {budget:.2e}"


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor], who: str) -> None:
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name}: {who} differ"


@examples(400)
@given(case=cases(impl="eager"))
def test_eager(case: Case, device: torch.device) -> None:
    check(case, device)


@examples(60)
@given(case=cases(impl="triton"))
def test_triton(case: Case, device: torch.device) -> None:
    pytest.importorskip("triton")
    check(case, device)


def draw_cases(number: int, **keywords: Any) -> list[Case]:
    """Drawn here, since all ranks must compute the same."""
    drawn = []

    @examples(number)
    @given(case=cases(**keywords))
    def collect(case: Case) -> None:
        drawn.append(case)

    collect()
    return drawn


def check_on_rank(group: ProcessGroup, drawn: list[Case]) -> list[Outcome]:
    outcomes = []
    for case in drawn:
        try:
            outcomes.append(check(case, torch.device("cpu"), group))
        except Exception as error:
            raise AssertionError(f"{case}: {error}") from error
    return outcomes


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks(world_size: int) -> None:
    """Uneven, empty and padded shards, with everything else at once; all ranks must hold the same bits."""
    drawn = draw_cases(25, impl="eager", world_size=world_size)
    if not torch.cuda.is_available():  # these ranks compute on the CPU, where Triton needs its interpreter
        drawn += draw_cases(5, impl="triton", world_size=world_size)
    by_rank = run_on_ranks(check_on_rank, world_size, drawn, timeout=3000.0 if THOROUGH else 120.0)
    for case, first, *others in zip(drawn, *by_rank, strict=True):
        whole = {"token_weight"} if case.sequence_parallel else {"token_weight", "hidden"}
        for other in others:
            assert_same_bits(first.values, other.values, f"{case}: ranks")
            assert_same_bits(
                {name: first.grads[name] for name in whole & first.grads.keys()}, other.grads, f"{case}: ranks"
            )

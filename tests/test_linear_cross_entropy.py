"""The op on one rank, against torch's own cross-entropy in float64."""

import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from vocab_parallel_fused import ComputeOptions, linear_cross_entropy, linear_distillation, linear_token_stats
from vocab_parallel_fused.functional import Reduction
from vocab_parallel_fused.options import Impl
from vocab_parallel_fused.testing import (
    Problem,
    Results,
    assert_within_error_budget,
    full_logits_results,
    gradients,
    make_problem,
    max_error,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def per_token(problem: Problem, impl: Impl, **options: Any) -> torch.Tensor:
    return linear_cross_entropy(
        problem.hidden,
        problem.weight,
        problem.target,
        linear_bias=problem.bias,
        reduction="none",
        options=ComputeOptions(impl=impl, **options),
    )


def run(problem: Problem, impl: Impl, **options: Any) -> Results:
    return gradients(per_token(problem, impl, **options), problem)


def assert_matches_full_logits(problem: Problem, actual: Results) -> None:
    assert_within_error_budget(actual, full_logits_results(problem), full_logits_results(problem.to(torch.float64)))


# Tails in every dimension, below, at and above a tile; the vocabulary sizes at which phantom columns showed elsewhere.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 64, 129), (16, 16, 32), (17, 33, 65), (37, 40, 127), (5, 8, 1003), (70, 24, 5)]
)
def test_loss_and_gradients(impl: Impl, dtype: torch.dtype, shape: tuple[int, int, int], device: torch.device) -> None:
    problem = make_problem(*shape, dtype=dtype, device=device)
    assert_matches_full_logits(problem, run(problem, impl))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("workspace_bytes", [1, 3000, 20000])
def test_any_workspace(impl: Impl, dtype: torch.dtype, workspace_bytes: int, device: torch.device) -> None:
    """Blocks of tokens as well as of rows: sums over both must be accumulated, not overwritten."""
    problem = make_problem(75, 24, 131, dtype=dtype, device=device)
    assert_matches_full_logits(problem, run(problem, impl, workspace_bytes=workspace_bytes))


def test_the_gradient_of_hidden_is_accumulated_in_fp32(impl: Impl, device: torch.device) -> None:
    """Sixty-four blocks of rows added in bf16 would lose several units; a published implementation diverged from it."""
    problem = make_problem(4, 16, 2048, dtype=torch.bfloat16, bias=False, device=device)
    assert_matches_full_logits(problem, run(problem, impl, workspace_bytes=1))


def test_without_bias(impl: Impl, device: torch.device) -> None:
    problem = make_problem(20, 24, 70, bias=False, device=device)
    assert_matches_full_logits(problem, run(problem, impl))


@pytest.mark.parametrize("V", [1, 127, 129, 18992])
def test_log_probabilities_are_never_positive(impl: Impl, V: int, device: torch.device) -> None:
    """Columns past the vocabulary would add exp(0 − max) to the sum; rounding might lift a confident token above 0."""
    hidden = torch.zeros(8, 16, device=device)
    hidden[:, 0] = torch.linspace(-40, 40, 8, device=device)
    weight = torch.zeros(V, 16, device=device)
    weight[-1, 0] = 1.0
    target = torch.full((8,), V - 1, device=device)
    options = ComputeOptions(impl=impl)
    loss = linear_cross_entropy(hidden, weight, target, reduction="none", options=options)
    expected = F.cross_entropy((hidden @ weight.t()).double(), target, reduction="none")
    assert (loss >= 0).all()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_logits_far_from_zero(impl: Impl, shift: float, device: torch.device) -> None:
    """A running maximum that starts at 0 gives log 0 for a row of logits below −100; one at 1e4 overflows exp."""
    problem = make_problem(20, 16, 67, device=device)
    assert problem.bias is not None
    shifted = problem._replace(bias=(problem.bias.detach() + shift).requires_grad_())
    exact = full_logits_results(shifted.to(torch.float64))
    actual = run(shifted, impl)
    # A logit of 1e4 has a unit roundoff of 5e-4 in fp32, which is the loss's absolute error and p's relative one.
    assert (actual.loss - exact.loss).abs().max() < 2e-3
    assert max_error(actual.dhidden, exact.dhidden) < 2e-3


@pytest.fixture
def fused_multiply_add(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter rounds a multiply-add twice; a device does once, which shows what the product lost."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def create_fma(_: Any, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)


@pytest.mark.usefixtures("fused_multiply_add")
@pytest.mark.parametrize("mask", [-torch.inf, -1e10, torch.finfo(torch.float32).min])
def test_classes_masked_by_a_bias(impl: Impl, mask: float, device: torch.device) -> None:
    """Whole tiles of −inf: −inf − −inf must not make a NaN. Nor must what rounding leaves of a huge number, which is
    huge itself, or its product with log2(e), which overflows."""
    problem = make_problem(20, 16, 200, device=device)
    assert problem.bias is not None
    bias = problem.bias.detach().clone()
    bias[64:192] = mask
    target = torch.where((problem.target >= 64) & (problem.target < 192), 3, problem.target)
    masked = problem._replace(bias=bias.requires_grad_(), target=target)
    actual, exact = run(masked, impl), full_logits_results(masked.to(torch.float64))
    assert_within_error_budget(actual, full_logits_results(masked), exact)
    assert (actual.dweight[64:192] == 0).all()


@pytest.mark.usefixtures("fused_multiply_add")
@pytest.mark.parametrize("logit", [-1e10, torch.finfo(torch.float32).min, 1e10])
def test_nothing_but_huge_logits(impl: Impl, logit: float, device: torch.device) -> None:
    """Beside a huge bias all classes are alike."""
    problem = make_problem(6, 16, 67, device=device)
    bias = torch.full((67,), logit, device=device)
    options = ComputeOptions(impl=impl)
    loss = linear_cross_entropy(problem.hidden, problem.weight, problem.target, linear_bias=bias, options=options)
    torch.testing.assert_close(loss.item(), math.log(67))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_confident_tokens_keep_their_gradient(impl: Impl, dtype: torch.dtype, device: torch.device) -> None:
    """Rounding p = 0.999 to bf16 before 1 is subtracted gives 1, and no gradient at all."""
    hidden = torch.eye(4, 16, device=device, dtype=dtype).mul_(4).requires_grad_()
    weight = (torch.eye(40, 16, device=device, dtype=dtype) * 2.625).requires_grad_()  # p_y = 0.9989
    target = torch.arange(4, device=device)
    problem = Problem(hidden, weight, None, target, torch.ones(4, device=device))
    exact = full_logits_results(problem.to(torch.float64))
    actual = run(problem, impl)
    unit_roundoff = torch.finfo(dtype).eps / 2
    of_lse = 2**-24 * 10.5 / (1 - 0.9989)  # lse is held in fp32, and p − 1 is what it leaves of the target's logit
    for name in ("dhidden", "dweight"):
        assert max_error(getattr(actual, name), getattr(exact, name)) < 3 * unit_roundoff + 2 * of_lse, name


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6])
def test_fp16_gradients_of_any_size(impl: Impl, scale: float, device: torch.device) -> None:
    """Coefficients are scaled into fp16's range: p·1e-6 would vanish in it and p·1e6 overflow. The result may still."""
    problem = make_problem(20, 16, 67, dtype=torch.float16, device=device)
    small = problem._replace(weight=(problem.weight.detach() / scale**0.5).requires_grad_()) if scale > 1 else problem
    scaled = small._replace(upstream=small.upstream * scale)
    if scale > 1:  # a large upstream gradient on small weights, so that dhidden fits fp16
        scaled = scaled._replace(weight=(scaled.weight.detach() * 0.01).requires_grad_())
    exact = full_logits_results(scaled.to(torch.float64)).dhidden
    actual = run(scaled, impl).dhidden
    assert torch.isfinite(actual).all()
    # What fp16 can hold of the result: its relative roundoff, or half its smallest subnormal number.
    error = (actual.double() - exact).abs()
    assert (error <= 4 * 2**-11 * exact.abs().max() + 2**-25).all()


def test_fp16_gradients_of_scaled_logits(impl: Impl, device: torch.device) -> None:
    """The scale is in the gradient of a raw logit too, which without it fits fp16 and with it would be infinite."""
    scale = 1024.0
    problem = make_problem(20, 16, 67, dtype=torch.float16, bias=False, device=device)
    problem = problem._replace(weight=(problem.weight.detach() / scale).requires_grad_())
    options = ComputeOptions(impl=impl)
    loss = linear_cross_entropy(
        problem.hidden, problem.weight, problem.target, reduction="none", logit_scale=scale, options=options
    )
    actual = gradients(loss, problem)
    exact = problem.to(torch.float64)
    logits = scale * exact.hidden @ exact.weight.t()
    exact = gradients(F.cross_entropy(logits, exact.target, reduction="none"), exact)
    for name in ("dhidden", "dweight"):
        # Logits' gradients and results are rounded; twice that for terms that cancel.
        assert max_error(getattr(actual, name), getattr(exact, name)) <= 4 * 2**-11, name


def test_fp16_keeps_small_gradients_beside_large_ones(impl: Impl, device: torch.device) -> None:
    """One coefficient of 1e3 must not push the others' 1e-5 below what fp16 holds."""
    problem = make_problem(8, 16, 67, dtype=torch.float16, device=device)
    upstream = torch.full_like(problem.upstream, 1e-5)
    upstream[0] = 1e3
    problem = problem._replace(upstream=upstream)
    small = slice(1, None)
    actual, exact = run(problem, impl).dhidden[small], full_logits_results(problem.to(torch.float64)).dhidden[small]
    # Half the smallest subnormal number of the result itself, and 1e-3 for those of the logits' gradients.
    assert (actual.double() - exact).abs().max() <= 2**-25 + 1e-3 * exact.abs().max()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_reductions_and_shapes(impl: Impl, reduction: str, device: torch.device) -> None:
    problem = make_problem(24, 8, 40, device=device, ignore_index=7)
    hidden = problem.hidden.detach().view(2, 3, 4, 8).requires_grad_()
    target = problem.target.view(2, 3, 4)
    kwargs = {"reduction": reduction, "ignore_index": 7}
    loss = linear_cross_entropy(
        hidden, problem.weight, target, linear_bias=problem.bias, options=ComputeOptions(impl=impl), **kwargs
    )
    logits = F.linear(hidden, problem.weight, problem.bias)
    expected = F.cross_entropy(logits.movedim(-1, 1).double(), target, **kwargs)
    assert loss.shape == expected.shape
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(loss.shape, device=device)
    actual = torch.autograd.grad(loss, (hidden, problem.weight), upstream)
    exact = torch.autograd.grad(expected, (hidden, problem.weight), upstream.double())
    torch.testing.assert_close(actual, exact, rtol=1e-4, atol=1e-6)


def test_a_single_token(impl: Impl, device: torch.device) -> None:
    """(H,) and a target without dimensions, as torch takes them."""
    hidden, weight = torch.randn(8, device=device), torch.randn(5, 8, device=device)
    target = torch.tensor(3, device=device)
    options = ComputeOptions(impl=impl)
    loss = linear_cross_entropy(hidden, weight, target, reduction="none", options=options)
    assert loss.shape == ()
    torch.testing.assert_close(loss, F.cross_entropy(weight @ hidden, target))


def test_agrees_with_the_function_of_torch() -> None:
    """Same names, same order, same values as torch.nn.functional.linear_cross_entropy."""
    theirs = getattr(F, "linear_cross_entropy", None)
    if theirs is None:
        pytest.skip("this torch has no linear_cross_entropy")
    our_names = list(inspect.signature(linear_cross_entropy).parameters)
    shared = [name for name in inspect.signature(theirs).parameters if name in our_names]
    assert [name for name in our_names if name in shared] == shared
    assert {"input", "linear_weight", "target", "linear_bias", "reduction", "ignore_index", "options"} <= set(shared)
    problem = make_problem(30, 12, 50).to(torch.float64)
    for reduction in ("none", "mean", "sum"):
        kwargs = {"linear_bias": problem.bias, "reduction": reduction, "ignore_index": -100}
        torch.testing.assert_close(
            linear_cross_entropy(problem.hidden, problem.weight, problem.target, **kwargs),
            theirs(problem.hidden, problem.weight, problem.target, **kwargs),
        )


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("case", ["no tokens", "all ignored"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_nothing_to_learn_from(
    impl: Impl, reduction: Reduction, case: str, label_smoothing: float, device: torch.device
) -> None:
    """Loss 0 and gradients 0, where torch's mean is NaN."""
    T = 0 if case == "no tokens" else 6
    hidden = torch.randn(T, 8, device=device, requires_grad=True)
    weight = torch.randn(40, 8, device=device, requires_grad=True)
    target = torch.full((T,), -100, device=device)
    keywords: Any = {"reduction": reduction, "label_smoothing": label_smoothing}
    loss = linear_cross_entropy(hidden, weight, target, options=ComputeOptions(impl=impl), **keywords)
    assert (loss == 0).all()
    loss.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


def test_ignored_tokens_may_hold_anything(impl: Impl, device: torch.device) -> None:
    """Infinite logits of an ignored token must not reach the loss or the hidden states' gradient."""
    problem = make_problem(20, 16, 67, device=device)
    hidden = problem.hidden.detach().clone()
    hidden[3] = torch.inf
    loss = linear_cross_entropy(
        hidden.requires_grad_(),
        problem.weight.detach(),
        problem.target,
        options=ComputeOptions(impl=impl),
    )
    loss.backward()
    assert torch.isfinite(loss)
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad[problem.target != -100]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fp32_bias_of_16_bit_inputs(impl: Impl, dtype: torch.dtype, device: torch.device) -> None:
    """The bias was rounded to the inputs' dtype: an error of up to 2^-9 of it in the loss."""
    problem = make_problem(20, 16, 67, dtype=dtype, device=device)
    assert problem.bias is not None
    problem = problem._replace(bias=(problem.bias.detach().float() + 1e-3).requires_grad_())
    actual, exact = run(problem, impl), full_logits_results(problem.to(torch.float64))
    assert actual.dbias is not None
    assert exact.dbias is not None
    assert actual.dbias.dtype == torch.float32
    # Of unrounded logits; and of logits' gradients rounded to the inputs' dtype before they are summed.
    assert max_error(actual.loss, exact.loss) < 32 * torch.finfo(torch.float32).eps
    assert max_error(actual.dbias, exact.dbias) < torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "layout", ["transposed weight", "strided rows", "expanded hidden", "offset weight", "strided bias", "expanded bias"]
)
def test_layouts(impl: Impl, layout: str, device: torch.device) -> None:
    """Strides are read, not assumed; inputs are left as they were."""
    problem = make_problem(20, 24, 67, device=device)
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    assert problem.bias is not None
    bias = problem.bias.detach()
    if layout == "transposed weight":
        weight = weight.t().contiguous().t()
    elif layout == "strided rows":
        hidden, weight = hidden.repeat_interleave(2, 0)[::2], weight.repeat_interleave(3, 1)[:, ::3]
    elif layout == "expanded hidden":
        hidden = hidden[:1].expand(20, 24)
    elif layout == "strided bias":
        bias = bias.repeat_interleave(3)[::3]
    elif layout == "expanded bias":
        bias = bias[:1].expand(67)
    else:  # rows whose addresses are no multiple of 16 bytes
        weight = torch.cat((weight.new_zeros(1), weight.flatten()))[1:].view(67, 24)
    before = [t.clone() for t in (hidden, weight, bias, problem.target)]
    laid_out = problem._replace(
        hidden=hidden.requires_grad_(), weight=weight.requires_grad_(), bias=bias.requires_grad_()
    )
    assert_matches_full_logits(laid_out, run(laid_out, impl))
    assert all(torch.equal(a, b) for a, b in zip(before, (hidden, weight, bias, problem.target), strict=True))


@pytest.mark.parametrize(
    "wanted", [c for n in range(4) for c in itertools.combinations(("hidden", "weight", "bias"), n)]
)
def test_frozen_inputs(impl: Impl, wanted: tuple[str, ...], device: torch.device) -> None:
    problem = make_problem(20, 16, 67, device=device)
    for name in {"hidden", "weight", "bias"} - set(wanted):
        getattr(problem, name).requires_grad_(False)
    loss = per_token(problem, impl)
    assert loss.requires_grad == bool(wanted)
    exact = full_logits_results(make_problem(20, 16, 67, device=device).to(torch.float64))
    if wanted:
        loss.backward(problem.upstream)
    for name in ("hidden", "weight", "bias"):
        grad = getattr(problem, name).grad
        assert (grad is not None) == (name in wanted)
        if grad is not None:
            assert max_error(grad, getattr(exact, "d" + name)) < 1e-5


MAIN_GRADS = [(75, 1), (75, 20000), (200, 20000)]  # tokens and bytes of the workspace, for 131 rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "workspace_bytes"), MAIN_GRADS)
def test_accumulates_into_main_grad(
    impl: Impl, dtype: torch.dtype, tokens: int, workspace_bytes: int, device: torch.device
) -> None:
    check_main_grad(impl, dtype, tokens, workspace_bytes, device)


@pytest.mark.parametrize(("tokens", "workspace_bytes"), MAIN_GRADS)
def test_accumulates_float64_into_main_grad(tokens: int, workspace_bytes: int, device: torch.device) -> None:
    check_main_grad("eager", torch.float64, tokens, workspace_bytes, device)


def check_main_grad(impl: Impl, dtype: torch.dtype, tokens: int, workspace_bytes: int, device: torch.device) -> None:
    """Two micro-batches add up in fp32, with what was there before; the weight's own grad stays None. Also where tokens
    outnumber rows, so that a sum of dweight would do for dhidden's."""
    before = torch.randn(131, 24, generator=torch.Generator().manual_seed(7)).to(device)
    first, second = (make_problem(tokens, 24, 131, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    weight: Any = first.weight
    weight.main_grad = before.clone()
    options = ComputeOptions(impl=impl, workspace_bytes=workspace_bytes, accumulate_main_grad=True)
    exact = before.double()
    budget = 0.0
    for problem in (first, second._replace(weight=weight)):
        loss = linear_cross_entropy(
            problem.hidden, weight, problem.target, linear_bias=problem.bias, reduction="none", options=options
        )
        loss.backward(problem.upstream)
        of_problem = full_logits_results(problem.to(torch.float64))
        exact = exact + of_problem.dweight
        # Rounding the logits' gradients is the only rounding to the inputs' dtype, but for dhidden's own.
        budget += 2 * torch.finfo(dtype).eps / 2 * float(of_problem.dweight.abs().max()) + 16 * 2**-23
        assert problem.hidden.grad is not None
        error = (problem.hidden.grad.double() - of_problem.dhidden).abs().max()
        assert error <= 3 * torch.finfo(dtype).eps / 2 * float(of_problem.dhidden.abs().max()) + 16 * 2**-23
    assert weight.grad is None
    assert (weight.main_grad.double() - exact).abs().max() <= budget


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3, 1.0])
def test_class_weights_are_those_of_torch(
    impl: Impl, reduction: Reduction, label_smoothing: float, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean divides by the weights of the targets, also with smoothing. They may lie in memory in any way, and each
    block of rows has its own, as has each part of a block that is copied."""
    if impl == "triton":
        monkeypatch.setattr("vocab_parallel_fused.kernels.forward._PARTIAL_BYTES", 1)
        monkeypatch.setattr("vocab_parallel_fused.kernels.tiles._COPY_BYTES", 1)
        monkeypatch.setattr("vocab_parallel_fused.kernels.tiles._COPY_ROWS", 16)
    problem = make_problem(24, 17, 67, device=device, ignore_index=7)
    weight = torch.rand(2 * 67, generator=torch.Generator().manual_seed(0)).to(device)[::2]
    weight[5:20] = 0
    keywords: Any = {"weight": weight, "reduction": reduction, "label_smoothing": label_smoothing, "ignore_index": 7}
    options = ComputeOptions(impl=impl, workspace_bytes=1)
    loss = linear_cross_entropy(problem.hidden, problem.weight, problem.target, options=options, **keywords)
    logits = (problem.hidden @ problem.weight.t()).double()
    expected = F.cross_entropy(logits, problem.target, **(keywords | {"weight": weight.double()}))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1)).to(device)
    actual = torch.autograd.grad(loss, (problem.hidden, problem.weight), upstream)
    exact = torch.autograd.grad(expected, (problem.hidden, problem.weight), upstream.double())
    torch.testing.assert_close(actual, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("of", ["classes", "tokens"])
def test_weights_that_sum_to_zero(impl: Impl, of: str, device: torch.device) -> None:
    """A mean over tokens of no weight is 0 with zero gradients, where torch's is NaN, or infinite with smoothing."""
    problem = make_problem(12, 16, 40, device=device)
    target = problem.target % 20
    weights: Any = {"token_weight": torch.zeros(12, device=device)}
    if of == "classes":
        weights = {"weight": (torch.arange(40, device=device) >= 20).float()}
    for label_smoothing in (0.0, 0.2):
        loss = linear_cross_entropy(
            problem.hidden,
            problem.weight,
            target,
            label_smoothing=label_smoothing,
            options=ComputeOptions(impl=impl),
            **weights,
        )
        assert loss == 0
        for grad in torch.autograd.grad(loss, (problem.hidden, problem.weight)):
            assert (grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_token_weights_of_any_dtype(dtype: torch.dtype) -> None:
    """70000 ones summed in fp16 are infinite, and the mean is 0. The loss's dtype is not that of the weights."""
    T = 70000
    hidden, weight = torch.randn(T, 4), torch.randn(5, 4)
    target = torch.arange(T) % 5
    token_weight = torch.ones(T, dtype=dtype, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, target, token_weight=token_weight)
    torch.testing.assert_close(loss, linear_cross_entropy(hidden, weight, target))
    loss.backward()
    assert token_weight.grad is not None
    assert token_weight.grad.dtype == dtype


def test_the_z_loss_of_ignored_tokens(impl: Impl, device: torch.device) -> None:
    """Infinite, and of a weight that is NaN: neither may reach the loss, the weights or the other tokens."""
    problem = make_problem(20, 16, 67, device=device)
    hidden = problem.hidden.detach().clone()
    hidden[problem.target == -100] = torch.inf
    token_weight = torch.ones(20, device=device)
    token_weight[problem.target == -100] = torch.nan
    loss = linear_cross_entropy(
        hidden.requires_grad_(),
        problem.weight.detach(),
        problem.target,
        token_weight=token_weight.requires_grad_(),
        label_smoothing=0.1,
        z_loss_weight=0.5,
        options=ComputeOptions(impl=impl),
    )
    assert torch.isfinite(loss)
    dhidden, dtoken_weight = torch.autograd.grad(loss, (hidden, token_weight))
    assert torch.isfinite(dhidden[problem.target != -100]).all()
    assert torch.isfinite(dtoken_weight).all()


@pytest.mark.parametrize(("setting", "precision"), [("tf32", "tf32"), ("ieee", "tf32x3")])
def test_products_of_fp32_follow_torch(setting: str, precision: str, set_fp32_precision: Callable[[str], None]) -> None:
    """Also where it was set in torch's newer way, after which to read the older one raises."""
    tiles = pytest.importorskip("vocab_parallel_fused.kernels.tiles")
    set_fp32_precision(setting)
    assert tiles.product_precision(torch.float32, "sm_90") == precision
    assert tiles.product_precision(torch.float32, "gfx942") == ("tf32" if setting == "tf32" else "ieee")
    assert tiles.product_precision(torch.float32, "gfx950") == "ieee"  # Triton has no tf32 there
    assert tiles.product_precision(torch.bfloat16, "sm_90") == "ieee"


def test_backward_twice_gives_the_same_bits(impl: Impl, device: torch.device) -> None:
    problem = make_problem(50, 16, 131, dtype=torch.float16, device=device)
    first, second = run(problem, impl), run(problem, impl)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None)
    options = ComputeOptions(impl=impl)
    loss = linear_cross_entropy(problem.hidden, problem.weight, problem.target, options=options)
    once, twice = (torch.autograd.grad(loss, problem.weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, twice)


def test_a_second_derivative_is_refused() -> None:
    """Gradients that look constant would make a gradient penalty vanish in silence."""
    problem = make_problem(6, 5, 11)
    loss = linear_cross_entropy(problem.hidden, problem.weight, problem.target)
    with pytest.raises(RuntimeError, match="a fused loss has no second derivative"):
        torch.autograd.grad(loss, problem.hidden, create_graph=True)


@pytest.mark.parametrize("look", [torch.no_grad, torch.inference_mode])
def test_without_a_graph(look: Callable[[], Any], impl: Impl, device: torch.device) -> None:
    """The same bits, and nothing is kept."""
    problem = make_problem(50, 16, 131, device=device)
    options = ComputeOptions(impl=impl, exp_cache_bytes=2**20)
    head = (problem.hidden, problem.weight)

    def results() -> list[torch.Tensor]:
        loss = linear_cross_entropy(*head, problem.target, options=options)
        smoothed = linear_cross_entropy(*head, problem.target, label_smoothing=0.1, options=options)
        stats = linear_token_stats(*head, problem.target, options=options)
        divergence = linear_distillation(*head, problem.hidden.detach() + 1, problem.weight, options=options)
        return [loss, smoothed, *(value for value in stats if value is not None), divergence]

    expected = results()
    with look():
        actual = results()
    for mine, theirs in zip(actual, expected, strict=True):
        assert torch.equal(mine, theirs)
        assert not mine.requires_grad
        assert mine.grad_fn is None


@pytest.mark.parametrize("with_graph", [False, True])
def test_a_tangent_is_refused(with_graph: bool) -> None:
    """Forward-mode differentiation does not see what kernels compute, and no_grad does not end it."""
    problem = make_problem(6, 5, 11)
    with torch.set_grad_enabled(with_graph), forward_ad.dual_level():
        hidden = forward_ad.make_dual(problem.hidden.detach(), torch.ones_like(problem.hidden))
        with pytest.raises((RuntimeError, NotImplementedError), match="jvp"):
            linear_cross_entropy(hidden, problem.weight, problem.target)


@pytest.mark.parametrize("label_smoothing", [0.1, 0.5])
def test_label_smoothing_of_an_infinite_loss(impl: Impl, label_smoothing: float, device: torch.device) -> None:
    """+inf as in torch, whether the target or another class is impossible; torch.lerp would make a NaN of it."""
    problem = make_problem(6, 16, 67, device=device)
    bias = torch.zeros(67, device=device)
    bias[3] = -torch.inf
    target = torch.full_like(problem.target, 4).index_fill_(0, torch.tensor([0], device=device), 3)
    arguments: dict[str, Any] = {"label_smoothing": label_smoothing, "reduction": "none"}
    inputs = (problem.hidden, problem.weight, target)
    loss = linear_cross_entropy(*inputs, linear_bias=bias, options=ComputeOptions(impl=impl), **arguments)
    assert (loss == torch.inf).all()


def test_fp16_gradients_beside_a_broken_token(impl: Impl, device: torch.device) -> None:
    """Its bound is no number; those of the others must be scaled into range by their own."""
    problem = make_problem(6, 16, 67, dtype=torch.float16, bias=False, device=device)
    hidden = problem.hidden.detach().index_fill(0, torch.tensor([2], device=device), torch.nan).requires_grad_()
    target = problem.target.clamp(min=0).index_fill(0, torch.tensor([2], device=device), -100)
    arguments: dict[str, Any] = {"reduction": "none", "label_smoothing": 0.1, "options": ComputeOptions(impl=impl)}
    loss = linear_cross_entropy(hidden, problem.weight, target, **arguments)
    (dhidden,) = torch.autograd.grad(loss, hidden, torch.full_like(loss, 64))
    assert dhidden[target != -100].isfinite().all()


def test_smoothing_beside_masked_classes_of_no_weight(impl: Impl, device: torch.device) -> None:
    """The way to leave classes out of the smoothing, with a bias that torch's softmax is usually masked with."""
    problem = make_problem(6, 16, 67, device=device)
    bias, class_weight = torch.zeros(67, device=device), torch.ones(67, device=device)
    bias[5], class_weight[5] = torch.finfo(torch.float32).min, 0.0
    target = torch.where(problem.target == 5, 6, problem.target)
    keywords: dict[str, Any] = {"weight": class_weight, "label_smoothing": 0.1, "reduction": "none"}
    loss = linear_cross_entropy(
        problem.hidden, problem.weight, target, linear_bias=bias, options=ComputeOptions(impl=impl), **keywords
    )
    expected = F.cross_entropy(F.linear(problem.hidden, problem.weight, bias), target, **keywords)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_a_nan_is_not_hidden(impl: Impl, device: torch.device) -> None:
    """One broken row of the weight makes every probability NaN, as in torch: hardware maxima drop a NaN."""
    problem = make_problem(6, 16, 67, device=device)
    weight = problem.weight.detach().clone()
    weight[40, 3] = torch.nan
    options = ComputeOptions(impl=impl)
    loss = linear_cross_entropy(problem.hidden, weight, problem.target, reduction="none", options=options)
    assert loss[problem.target != -100].isnan().all()


def test_float64_gradients_by_finite_differences() -> None:
    problem = make_problem(6, 5, 11).to(torch.float64)

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(hidden, weight, problem.target, linear_bias=bias, reduction="none")

    assert problem.bias is not None
    assert torch.autograd.gradcheck(loss, (problem.hidden, problem.weight, problem.bias))


def test_autocast_computes_as_a_linear_layer_does(device: torch.device) -> None:
    """fp32 parameters meet bf16 hidden states, in the forward and in a backward that autocast still surrounds."""
    problem = make_problem(20, 16, 67, device=device)
    assert problem.bias is not None
    # The op does not round an fp32 bias, so here there is nothing to round.
    problem = problem._replace(bias=problem.bias.bfloat16().float())
    hidden = problem.hidden.detach().bfloat16().requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, problem.weight, problem.target, linear_bias=problem.bias, reduction="none")
        dhidden, dweight = torch.autograd.grad(loss, (hidden, problem.weight), problem.upstream)
    assert (loss.dtype, dhidden.dtype, dweight.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    rounded = problem.to(torch.bfloat16)
    exact = full_logits_results(rounded.to(torch.float64))
    actual = Results(loss.detach(), dhidden, dweight, None)
    same = full_logits_results(rounded)
    assert_within_error_budget(
        actual._replace(dweight=dweight.bfloat16()), same._replace(dbias=None), exact._replace(dbias=None)
    )


def test_inside_a_compiled_function(device: torch.device) -> None:
    """A published implementation loses ignore_index under torch.compile."""
    problem = make_problem(20, 16, 67, device=device, ignore_index=5)

    def loss(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(hidden * 2, weight, target, ignore_index=5) * 3

    expected = loss(problem.hidden, problem.weight, problem.target)
    actual = torch.compile(loss, backend="aot_eager")(problem.hidden, problem.weight, problem.target)
    torch.testing.assert_close(actual, expected)
    grads = [torch.autograd.grad(value, (problem.hidden, problem.weight)) for value in (actual, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rows_that_are_copied_in_several_parts(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hidden size that is no multiple of 16, and more rows than are brought into aligned memory at a time."""
    tiles = pytest.importorskip("vocab_parallel_fused.kernels.tiles")
    monkeypatch.setattr(tiles, "_COPY_BYTES", 1)
    problem = make_problem(40, 33, 2 * tiles._COPY_ROWS + 77, dtype=dtype, device=device)
    assert not tiles.is_aligned(problem.weight)
    assert_matches_full_logits(problem, run(problem, "triton"))


@pytest.mark.parametrize("H", [1, 65, 4100])
def test_copies_take_no_more_memory_than_they_may(H: int) -> None:
    """Columns of zeros count: of a small hidden size they are most of a copy."""
    tiles = pytest.importorskip("vocab_parallel_fused.kernels.tiles")
    weight = torch.empty(2**20, H, dtype=torch.bfloat16, device="meta")
    rows = weight[: tiles.rows_per_copy(weight)]
    assert tiles._COPY_BYTES / 2 < tiles.aligned(rows).nbytes <= tiles._COPY_BYTES


@pytest.mark.parametrize("H", [33, 48])
@pytest.mark.parametrize("layout", ["transposed weight", "rows of a wider matrix"])
@pytest.mark.parametrize("descriptors", [False, True])
def test_one_operand_is_copied(
    layout: str, H: int, descriptors: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy has more columns than the other operand, whose next row may hold anything."""
    tiles = pytest.importorskip("vocab_parallel_fused.kernels.tiles")
    monkeypatch.setattr(tiles, "has_tensor_descriptors", lambda _: descriptors)
    problem = make_problem(24, H, 67, device=device, bias=False)
    expected = run(problem, "eager")
    with torch.no_grad():
        if layout == "transposed weight":
            weight = problem.weight.t().contiguous().t()
        else:
            wide = torch.full((67, 64), torch.inf, device=device)
            wide[:, :H] = problem.weight
            weight = wide[:, :H]
    assert tiles.is_aligned(weight) == (layout != "transposed weight")
    assert tiles.is_aligned(problem.hidden) == (H == 48)
    actual = run(problem._replace(weight=weight.requires_grad_()), "triton")
    for one, other in zip(actual, expected, strict=True):
        if one is not None and other is not None:
            assert max_error(one, other) < 1e-5

"""Divergences of two heads over the full vocabulary, against full logits in float64."""

import math
from typing import Any, NamedTuple, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from vocab_parallel_fused import ComputeOptions, VocabShard, linear_distillation
from vocab_parallel_fused.divergence import Divergence
from vocab_parallel_fused.functional import Reduction
from vocab_parallel_fused.options import Combine, Impl
from vocab_parallel_fused.testing import max_error, run_on_ranks

DIVERGENCES = get_args(Divergence)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SOFTCAP, TEACHER_SCALE, TEMPERATURE = 6.0, 0.7, 0.8


class Heads(NamedTuple):
    """A student of hidden size 24 and a teacher of hidden size 40."""

    student: tuple[Tensor, Tensor, Tensor]  # [T, 24], [V, 24], [V]
    teacher: tuple[Tensor, Tensor, Tensor]  # [T, 40], [V, 40], [V]
    upstream: Tensor  # [T]


def make_heads(T: int, V: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Heads:
    generator = torch.Generator(device).manual_seed(0)

    def head(H: int) -> tuple[Tensor, Tensor, Tensor]:
        shapes = ((T, H), (V, H), (V,))
        hidden, weight, bias = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
        return hidden.to(dtype), (weight * 2 / H**0.5).to(dtype), bias.to(dtype)

    return Heads(head(24), head(40), torch.randn(T, generator=generator, device=device))


def full_logits(heads: Heads, divergence: Divergence, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Divergences ``[T]`` and the student's gradients, from stored logits, all in ``dtype``."""
    parameters = [tensor.to(dtype).requires_grad_() for tensor in heads.student]
    hidden, weight, bias = (tensor.to(dtype) for tensor in heads.teacher)
    # 16-bit logits upcast before the softmax, as models are usually trained.
    at_least_fp32 = torch.promote_types(dtype, torch.float32)
    student = SOFTCAP * torch.tanh(F.linear(*parameters).to(at_least_fp32) / SOFTCAP) / TEMPERATURE
    teacher = F.linear(hidden, weight, bias).to(at_least_fp32) * TEACHER_SCALE / TEMPERATURE
    log_p, log_q = student.log_softmax(1), teacher.log_softmax(1)
    mean = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
    loss = {
        "forward_kl": lambda: F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(1),
        "reverse_kl": lambda: F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1),
        "jensen_shannon": lambda: (
            F.kl_div(mean, torch.stack((log_p, log_q)), log_target=True, reduction="none").sum((0, 2)) / 2
        ),
    }[divergence]()
    grads = torch.autograd.grad(loss, parameters, heads.upstream.to(loss.dtype))
    return loss.detach(), list(grads)


def run(heads: Heads, divergence: Divergence, **arguments: Any) -> tuple[Tensor, list[Tensor]]:
    hidden, weight, bias = parameters = [tensor.detach().requires_grad_() for tensor in heads.student]
    transforms = {"logit_softcap": SOFTCAP, "teacher_logit_scale": TEACHER_SCALE, "temperature": TEMPERATURE}
    keywords: dict[str, Any] = transforms | arguments
    loss = linear_distillation(
        hidden,
        weight,
        heads.teacher[0],
        heads.teacher[1],
        divergence=divergence,
        linear_bias=bias,
        teacher_bias=heads.teacher[2],
        reduction="none",
        **keywords,
    )
    return loss.detach(), list(torch.autograd.grad(loss, parameters, heads.upstream))


def assert_matches(
    actual: tuple[Tensor, list[Tensor]],
    same_dtype: tuple[Tensor, list[Tensor]],
    exact: tuple[Tensor, list[Tensor]],
    ranks: int = 1,
) -> None:
    """A loss near 1 is a difference of sums near 10, each good to some units of fp32. Gradients are held as those of
    the cross-entropy are: to the error of plain PyTorch of the same dtype, or its unit roundoff if that is larger, once
    for rounding the logits' gradients, once for the result, and for dhidden once for each further rank's share."""
    loss, grads = actual
    assert (loss.double() - exact[0]).abs().max() < 64 * 2**-23
    for i, (grad, same, reference) in enumerate(zip(grads, same_dtype[1], exact[1], strict=True)):
        roundings = 1 + ranks if i == 0 else 2
        of_dtype = max(max_error(same, reference), torch.finfo(grad.dtype).eps / 2)
        assert max_error(grad, reference) <= roundings * of_dtype + 32 * 2**-23, (
            i,
            max_error(grad, reference),
            of_dtype,
        )


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_full_logits(impl: Impl, divergence: Divergence, dtype: torch.dtype, device: torch.device) -> None:
    heads = make_heads(37, 131, dtype, device)
    actual = run(heads, divergence, options=ComputeOptions(impl=impl, workspace_bytes=5000))
    exact = full_logits(heads, divergence, torch.float64)
    assert_matches(actual, full_logits(heads, divergence, dtype), exact)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_more_rows_than_a_buffer_of_partials(
    impl: Impl, divergence: Divergence, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if impl == "triton":
        from vocab_parallel_fused.kernels import divergence as kernels

        monkeypatch.setattr(kernels, "_PARTIAL_BYTES", 1)
    heads = make_heads(20, 131, torch.float32, device)
    actual = run(heads, divergence, options=ComputeOptions(impl=impl))
    exact = full_logits(heads, divergence, torch.float64)
    assert_matches(actual, full_logits(heads, divergence, torch.float32), exact)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_heads_have_no_divergence(impl: Impl, divergence: Divergence, device: torch.device) -> None:
    """Nor a gradient: a student that has learnt everything must not move."""
    hidden, weight, bias = make_heads(20, 67, torch.float32, device).student
    hidden = hidden.detach().requires_grad_()
    loss = linear_distillation(
        hidden,
        weight,
        hidden,
        weight,
        linear_bias=bias,
        teacher_bias=bias,
        divergence=divergence,
        reduction="none",
        options=ComputeOptions(impl=impl),
    )
    (grad,) = torch.autograd.grad(loss.sum(), hidden)
    assert loss.abs().max() < 1e-6
    assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_impossible_classes(impl: Impl, divergence: Divergence, device: torch.device) -> None:
    """Bias −inf over whole tiles in both heads, and over more of them where the divergence stays finite:
    0 · (−inf) must not make a NaN."""
    heads = make_heads(20, 200, torch.float32, device)
    biases = [heads.student[2].clone(), heads.teacher[2].clone()]
    for bias in biases:
        bias[32:96] = -torch.inf
    # Under forward KL the teacher may rule out what the student does not, under reverse KL the other way round.
    for bias in {"forward_kl": biases[1:], "reverse_kl": biases[:1], "jensen_shannon": biases}[divergence]:
        bias[128:193] = -torch.inf
    if divergence == "jensen_shannon":
        biases[0][[3, 100]] = biases[1][[5, 110]] = -torch.inf
    masked = Heads((*heads.student[:2], biases[0]), (*heads.teacher[:2], biases[1]), heads.upstream)
    arguments: dict[str, Any] = {"divergence": divergence, "reduction": "none", "options": ComputeOptions(impl=impl)}
    hidden = masked.student[0].detach().requires_grad_()
    loss = linear_distillation(
        hidden,
        masked.student[1],
        masked.teacher[0],
        masked.teacher[1],
        linear_bias=biases[0],
        teacher_bias=biases[1],
        **arguments,
    )
    (grad,) = torch.autograd.grad(loss, hidden, heads.upstream)
    hidden = masked.student[0].double()
    p = F.linear(hidden, masked.student[1].double(), biases[0].double()).softmax(1)
    q = F.linear(*(tensor.double() for tensor in masked.teacher)).softmax(1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (torch.special.xlogy(a, a) - torch.special.xlogy(a, b)).sum(1)

    m = (p + q) / 2
    expected = {"forward_kl": kl(q, p), "reverse_kl": kl(p, q), "jensen_shannon": (kl(p, m) + kl(q, m)) / 2}[divergence]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    if divergence == "forward_kl":  # dz = p − q; xlogy's own gradient has a 0 · ∞
        reference = (heads.upstream.double()[:, None] * (p - q)) @ masked.student[1].double()
        assert max_error(grad, reference) < 1e-5
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("broken", ["the student", "both"])
def test_a_nan_is_not_hidden(impl: Impl, divergence: Divergence, broken: str, device: torch.device) -> None:
    """A NaN compares as no probability; a diverged model would look perfect."""
    heads = make_heads(6, 70, torch.float32, device)
    for hidden, *_ in (heads.student, heads.teacher) if broken == "both" else (heads.student,):
        hidden[2, 3] = torch.nan
    loss, (dhidden, _, dbias) = run(heads, divergence, logit_softcap=None, options=ComputeOptions(impl=impl))
    of_token = torch.arange(6, device=device) == 2
    assert torch.equal(loss.isnan(), of_token)
    assert torch.equal(dhidden.isnan().any(dim=1), of_token)
    assert dbias.isnan().all()


def test_weights_and_reductions(device: torch.device) -> None:
    """A token of weight 0 is left out even if it holds infinities; the mean divides by the weights."""
    heads = make_heads(12, 67, torch.float32, device)
    hidden, weight, bias = heads.student
    losses, _ = full_logits(heads, "forward_kl", torch.float64)
    token_weight = torch.rand(3, 4, device=device)
    token_weight[1, 2] = 0
    hidden = hidden.view(3, 4, 24).clone()
    hidden[1, 2] = torch.inf
    hidden.requires_grad_()
    arguments: dict[str, Any] = {
        "linear_bias": bias,
        "teacher_bias": heads.teacher[2],
        "logit_softcap": SOFTCAP,
        "teacher_logit_scale": TEACHER_SCALE,
        "temperature": TEMPERATURE,
        "token_weight": token_weight,
    }
    teacher_input, teacher_weight = heads.teacher[0].view(3, 4, 40), heads.teacher[1]
    weighted = (losses * token_weight.flatten()).view(3, 4)
    results: list[tuple[Reduction, Tensor]] = [
        ("none", weighted),
        ("sum", weighted.sum()),
        ("mean", weighted.sum() / token_weight.sum()),
    ]
    for reduction, expected in results:
        loss = linear_distillation(hidden, weight, teacher_input, teacher_weight, reduction=reduction, **arguments)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    arguments["token_weight"] = torch.zeros_like(token_weight)
    nothing = linear_distillation(hidden, weight, teacher_input, teacher_weight, **arguments)
    assert nothing == 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_an_infinite_divergence_that_is_left_out(impl: Impl, divergence: Divergence, device: torch.device) -> None:
    """A class that the teacher rules out makes reverse KL infinite, and 0 times that no number."""
    heads = make_heads(6, 67, torch.float32, device)
    hidden, weight = (tensor.requires_grad_() for tensor in heads.student[:2])
    teacher_bias = torch.zeros(67, device=device)
    teacher_bias[3] = -torch.inf
    token_weight = torch.tensor([0.0] * 5 + [1.0], device=device)
    loss = linear_distillation(
        hidden,
        weight,
        *heads.teacher[:2],
        teacher_bias=teacher_bias,
        divergence=divergence,
        token_weight=token_weight,
        options=ComputeOptions(impl=impl),
    )
    (dhidden,) = torch.autograd.grad(loss, hidden)
    assert (dhidden[:5] == 0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_may_be_changed_in_place(divergence: Divergence, device: torch.device) -> None:
    """As a loss that is masked may be: the backward needs none of what was returned."""
    heads = make_heads(6, 20, torch.float32, device)
    hidden, weight = (tensor.requires_grad_() for tensor in heads.student[:2])
    grads = []
    for factor in (1, 2):
        loss = linear_distillation(hidden, weight, *heads.teacher[:2], divergence=divergence, reduction="none")
        loss *= factor
        grads.append(torch.autograd.grad(loss.sum(), hidden)[0])
    torch.testing.assert_close(grads[1], 2 * grads[0])


def test_the_teacher_is_a_constant(device: torch.device) -> None:
    heads = make_heads(6, 20, torch.float32, device)
    hidden, weight, _ = (tensor.requires_grad_() for tensor in heads.student)
    teacher_hidden, teacher_weight, teacher_bias = teacher = [tensor.requires_grad_() for tensor in heads.teacher]
    linear_distillation(hidden, weight, teacher_hidden, teacher_weight, teacher_bias=teacher_bias).backward()
    assert weight.grad is not None
    assert all(tensor.grad is None for tensor in teacher)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_tokens(impl: Impl, divergence: Divergence, device: torch.device) -> None:
    hidden = torch.zeros(0, 8, device=device, requires_grad=True)
    weight = torch.randn(40, 8, device=device, requires_grad=True)
    options = ComputeOptions(impl=impl)
    loss = linear_distillation(hidden, weight, hidden, weight, divergence=divergence, options=options)
    loss.backward()
    assert loss == 0
    assert weight.grad is not None
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float64_gradients_by_finite_differences(divergence: Divergence) -> None:
    hidden, weight, teacher_hidden, teacher_weight = (torch.randn(n, 5, dtype=torch.float64) for n in (4, 11, 4, 11))

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        arguments: Any = {"divergence": divergence, "logit_softcap": 3.0, "temperature": 0.6, "reduction": "none"}
        return linear_distillation(hidden, weight, teacher_hidden, teacher_weight, **arguments)

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), weight.requires_grad_()))


def on_rank(
    group: ProcessGroup, impl: Impl, combine: Combine, sequence_parallel: bool, dtype: torch.dtype
) -> list[Tensor]:
    """Uneven, empty and padded shards; padding rows hold large numbers, so that they show if they take part."""
    world_size = group.size()
    heads = make_heads(12 * world_size, 101, dtype)
    losses = []
    for bounds in ([0, 34, 68, 102], [0, 3, 3, 110]):
        shard = VocabShard(bounds[group.rank()], bounds[group.rank() + 1], 101)
        rows = slice(shard.start, shard.start + shard.num_valid_rows)

        def local(head: tuple[Tensor, Tensor, Tensor], shard: VocabShard = shard, rows: slice = rows) -> Any:
            hidden, *of_classes = head
            hidden = hidden.chunk(world_size)[group.rank()] if sequence_parallel else hidden
            padding = shard.num_rows - shard.num_valid_rows
            padded = [torch.cat((full[rows], full.new_full((padding, *full.shape[1:]), 1e3))) for full in of_classes]
            return hidden, *padded

        part = Heads(local(heads.student), local(heads.teacher), heads.upstream)
        for divergence in DIVERGENCES:
            loss, (dhidden, dweight, dbias) = run(
                part,
                divergence,
                group=group,
                shard=shard,
                sequence_parallel=sequence_parallel,
                options=ComputeOptions(
                    impl=impl, combine=combine, workspace_bytes=5000, keep_gathered_hidden=combine == "all_reduce"
                ),
            )
            exact, same = (full_logits(heads, divergence, d) for d in (torch.float64, dtype))
            for grads in (exact[1], same[1]):
                if sequence_parallel:
                    grads[0] = grads[0].chunk(world_size)[group.rank()]
                grads[1:] = [grad[rows] for grad in grads[1:]]
            if shard.num_valid_rows == 0:
                assert (dweight == 0).all()
                exact, same = ((results[0], results[1][:1]) for results in (exact, same))
                assert_matches((loss, [dhidden]), same, exact, world_size)
            else:
                valid = slice(shard.num_valid_rows)
                assert_matches((loss, [dhidden, dweight[valid], dbias[valid]]), same, exact, world_size)
                assert (dweight[shard.num_valid_rows :] == 0).all()
            losses.append(loss)
    return losses


@pytest.mark.parametrize(
    ("impl", "combine", "sequence_parallel", "dtype"),
    [
        ("eager", "all_gather", False, torch.float32),
        ("eager", "all_reduce", True, torch.float32),
        ("triton", "all_gather", True, torch.bfloat16),
    ],
)
def test_over_ranks(impl: Impl, combine: Combine, sequence_parallel: bool, dtype: torch.dtype) -> None:
    if impl == "triton" and torch.cuda.is_available():
        pytest.skip("these ranks compute on the CPU")
    first, *others = run_on_ranks(on_rank, 3, impl, combine, sequence_parallel, dtype)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True)), "ranks differ"


X, W = torch.ones(6, 8), torch.ones(11, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"divergence": "kl"}, ValueError, r"divergence must be one of \('forward_kl', .*\), got 'kl'"),
        ({"reduction": "max"}, ValueError, "reduction must be one of .* got 'max'"),
        ({"teacher_weight": W[:5]}, ValueError, "teacher_weight must have linear_weight's 11 rows, got 5"),
        ({"teacher_input": X[:5]}, ValueError, r"teacher_input must have shape \(6, 'H_teacher'\), got \(5, 8\)"),
        ({"teacher_weight": W[:, :5]}, ValueError, r"teacher_weight must have shape \(V_local, 8\), got \(11, 5\)"),
        (
            {"teacher_input": X.double(), "teacher_weight": W.double()},
            TypeError,
            "teacher_input must have input's dtype torch.float32, got torch.float64",
        ),
        ({"teacher_logit_scale": math.inf}, ValueError, "^teacher_logit_scale must be finite, got inf"),
        ({"teacher_logit_softcap": -1.0}, ValueError, "^teacher_logit_softcap must be positive, got -1.0"),
        ({"teacher_bias": torch.ones(3)}, ValueError, r"teacher_bias must have shape \(11,\), got \(3,\)"),
    ],
)
def test_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"input": X, "linear_weight": W, "teacher_input": X, "teacher_weight": W}
    with pytest.raises(error, match=message):
        linear_distillation(**given | arguments)

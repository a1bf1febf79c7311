"""The VQ head, against logits of all classes in float64."""

import copy
import math
import sys
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import vq_demo
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from vocab_parallel_fused import ComputeOptions, VocabParallelLinearCrossEntropy, VocabShard, VQLinearCrossEntropy
from vocab_parallel_fused.options import Impl
from vocab_parallel_fused.testing import max_error, run_on_ranks

H, V, K = 12, 90, 10  # ten codes are 5 + 5 on two ranks and 4 + 4 + 2 on three
EMPTY = [0, 4, 9]  # codes without classes, at the edges of the shards of 1, 2 and 3 ranks
T = (2, 7)
IGNORED = 3  # a class, whose number is also that of a code in use


class Case(NamedTuple):
    codebook: Tensor  # [K, H]
    token_to_code: Tensor  # [V]
    hidden: Tensor  # [2, 7, H]
    target: Tensor  # [2, 7], with two ignored
    upstream: Tensor  # [2, 7]


def make_case(dtype: torch.dtype = torch.float64) -> Case:
    """Codes of 1 to some twenty classes; targets on every code that has any."""
    generator = torch.Generator().manual_seed(0)
    used = torch.tensor([code for code in range(K) if code not in EMPTY])
    sizes = torch.tensor([1, 2, 3, 6, 12, 25, V - 49])
    token_to_code = used.repeat_interleave(sizes)[torch.randperm(V, generator=generator)]
    target = torch.randint(V, T, generator=generator)
    target.view(-1)[:7] = torch.stack([(token_to_code == code).nonzero()[0, 0] for code in used])
    target[0, 3] = target[1, 6] = IGNORED
    codebook = torch.randn(K, H, generator=generator).to(dtype)
    hidden = torch.randn(*T, H, generator=generator).to(dtype)
    return Case(codebook, token_to_code, hidden, target, torch.randn(T, generator=generator))


class Results(NamedTuple):
    loss: Tensor
    dhidden: Tensor
    dcodebook: Tensor


def differentiate(loss: Tensor, hidden: Tensor, codebook: Tensor, upstream: Tensor) -> Results:
    """Gradients of the loss for a random upstream gradient, of which a scalar loss takes one element."""
    upstream = (upstream if loss.ndim else upstream[0, 0]).to(loss.dtype)
    return Results(loss.detach(), *torch.autograd.grad(loss, (hidden, codebook), upstream))


def full_logits(case: Case, reduction: str) -> Results:
    """The oracle: every class gets its own copy of its code's row, so a code's gradient is the sum over its classes."""
    hidden, codebook = (tensor.double().requires_grad_() for tensor in (case.hidden, case.codebook))
    logits = hidden @ codebook[case.token_to_code].t()
    loss = F.cross_entropy(logits.flatten(0, 1), case.target.flatten(), ignore_index=IGNORED, reduction=reduction)
    return differentiate(loss.view(T) if reduction == "none" else loss, hidden, codebook, case.upstream)


def make_head(case: Case, group: ProcessGroup | None = None, **arguments: Any) -> VQLinearCrossEntropy:
    arguments = {"ignore_index": IGNORED, "dtype": case.codebook.dtype, **arguments}
    head = VQLinearCrossEntropy(H, V, case.token_to_code, num_codes=K, group=group, **arguments)
    head.codebook.load_state_dict({"weight": case.codebook})
    return head


def vq_results(case: Case, group: ProcessGroup | None = None, **arguments: Any) -> Results:
    head = make_head(case, group, **arguments)
    hidden = case.hidden.clone().requires_grad_()
    return differentiate(head(hidden, case.target), hidden, head.codebook.weight, case.upstream)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_loss_and_gradients(reduction: Any) -> None:
    """A class's share of its code is missing from the loss, or a code's gradient counts a class more or less than once.

    Float64 on both sides: what remains is the rounding of sums of a hundred terms.
    """
    case = make_case()
    for actual, expected in zip(vq_results(case, reduction=reduction), full_logits(case, reduction), strict=True):
        assert actual.shape == expected.shape
        assert max_error(actual, expected) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_share_of_a_class_is_exact_in_any_dtype(impl: Impl, dtype: torch.dtype) -> None:
    """log n was rounded to the inputs' dtype: in bfloat16 that alone moves a loss by up to 1 %.

    Inputs are rounded before, so the oracle has the same; the budget is fp32's rounding of sums over H and of lse.
    """
    case = make_case(dtype)
    actual, expected = vq_results(case, reduction="none", options=ComputeOptions(impl=impl)), full_logits(case, "none")
    assert actual.loss.dtype == torch.float32
    assert max_error(actual.loss, expected.loss) < 32 * torch.finfo(torch.float32).eps
    # Rounded in the logits' gradient, and in the result.
    for name in ("dhidden", "dcodebook"):
        assert max_error(getattr(actual, name), getattr(expected, name)) < 4 * torch.finfo(dtype).eps


def test_casting_the_module_keeps_the_shares() -> None:
    case = make_case(torch.float32)
    head = make_head(case, reduction="none").to(torch.bfloat16)
    rounded = case._replace(hidden=case.hidden.bfloat16(), codebook=case.codebook.bfloat16())
    loss = head(rounded.hidden, case.target)
    assert max_error(loss.detach(), full_logits(rounded, "none").loss) < 32 * torch.finfo(torch.float32).eps


def test_autocast_keeps_the_shares() -> None:
    case = make_case(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = make_head(case, reduction="none")(case.hidden, case.target)
    rounded = case._replace(hidden=case.hidden.bfloat16(), codebook=case.codebook.bfloat16())
    assert max_error(loss.detach(), full_logits(rounded, "none").loss) < 32 * torch.finfo(torch.float32).eps


def results_of_rank(group: ProcessGroup, case: Case, sequence_parallel: bool) -> tuple[Results, Tensor]:
    rank, world_size = group.rank(), group.size()
    if sequence_parallel:
        case = case._replace(hidden=case.hidden.chunk(world_size)[rank])
    results = vq_results(case, group, reduction="none", sequence_parallel=sequence_parallel)
    return results, make_head(case, group).full_log_probs(case.hidden)


@pytest.mark.parametrize(("world_size", "sequence_parallel"), [(1, False), (2, False), (3, False), (2, True)])
def test_ranks(world_size: int, sequence_parallel: bool) -> None:
    """The shares belong to other codes on some rank, or the gathered codebook is out of order."""
    case, expected = make_case(), full_logits(make_case(), "none")
    results, log_probs = zip(*run_on_ranks(results_of_rank, world_size, case, sequence_parallel), strict=True)
    dhidden = [result.dhidden for result in results]
    if sequence_parallel:
        dhidden, log_probs = [torch.cat(dhidden)], [torch.cat(log_probs)]
    for result in results:
        assert torch.equal(result.loss, results[0].loss)
        assert max_error(result.loss, expected.loss) < 1e-13
    assert all(max_error(grad, expected.dhidden) < 1e-13 for grad in dhidden)
    assert [len(result.dcodebook) for result in results] == {1: [10], 2: [5, 5], 3: [4, 4, 2]}[world_size]
    assert max_error(torch.cat([result.dcodebook for result in results]), expected.dcodebook) < 1e-13
    exact = torch.log_softmax(case.hidden @ case.codebook[case.token_to_code].t(), dim=-1)
    assert all(max_error(of_rank, exact) < 1e-13 for of_rank in log_probs)


def test_log_probabilities() -> None:
    case = make_case()
    head = make_head(case)
    hidden = case.hidden.clone().requires_grad_()
    log_prob = head.log_prob(hidden, case.target)
    expected = full_logits(case, "none")
    assert max_error(log_prob.detach(), -expected.loss) < 1e-13
    grad = torch.autograd.grad(log_prob, hidden, case.upstream.double())[0]
    assert max_error(grad, -expected.dhidden) < 1e-13
    everything = head.full_log_probs(hidden)
    assert everything.shape == (*T, V)
    assert not everything.requires_grad
    valid = case.target != IGNORED
    gathered = everything.gather(-1, case.target[..., None])[..., 0]
    torch.testing.assert_close(gathered[valid], log_prob[valid].detach(), rtol=0, atol=1e-13)
    # Probabilities of all classes add up to 1: empty codes have none.
    torch.testing.assert_close(everything.exp().sum(-1), torch.ones(T, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_nothing_to_learn_from(reduction: Any) -> None:
    case = make_case()
    for part in (
        case._replace(target=torch.full(T, IGNORED)),
        case._replace(target=case.target[:0], hidden=case.hidden[:0]),
    ):
        head = make_head(part, reduction=reduction)
        hidden = part.hidden.clone().requires_grad_()
        loss = head(hidden, part.target)
        loss.sum().backward()
        for value in (loss, hidden.grad, head.codebook.weight.grad):
            assert (value == 0).all()


def test_one_code_is_a_uniform_distribution() -> None:
    head = VQLinearCrossEntropy(H, V, torch.zeros(V, dtype=torch.int64), dtype=torch.float64)
    assert head.num_codes == 1
    hidden, target = torch.randn(5, H, dtype=torch.float64), torch.arange(5)
    torch.testing.assert_close(head(hidden, target).item(), math.log(V), rtol=1e-14, atol=0)


def test_one_code_per_class_is_the_plain_head() -> None:
    order = torch.randperm(V)
    plain = VocabParallelLinearCrossEntropy(H, V)
    head = VQLinearCrossEntropy(H, V, order)
    head.codebook.load_state_dict({"weight": torch.empty(V, H).index_copy(0, order, plain.weight.detach())})
    hidden, target = torch.randn(8, H), torch.randint(V, (8,))
    torch.testing.assert_close(head(hidden, target), plain(hidden, target))


def test_the_caller_may_reuse_the_map() -> None:
    token_to_code = torch.zeros(V, dtype=torch.int64)
    head = VQLinearCrossEntropy(H, V, token_to_code, num_codes=2)
    token_to_code += 1
    assert (head.token_to_code == 0).all()


# State


def load_and_run(group: ProcessGroup, state: dict[str, Tensor], case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """A head whose own map is another one, so that everything must come from ``state``."""
    head = VQLinearCrossEntropy(
        H, V, torch.arange(V) % K, num_codes=K, group=group, ignore_index=IGNORED, dtype=torch.float64
    )
    head.load_state_dict(state)
    own = {name: value.clone() for name, value in head.state_dict().items()}
    nn.init.zeros_(head.codebook.weight)
    head.load_state_dict(own)  # this rank's rows
    return head(case.hidden, case.target).detach(), own


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1), (1, 3)])
def test_state_moves_between_groups(sizes: tuple[int, int]) -> None:
    case = make_case()
    state: dict[str, Any] = dict(make_head(case).state_dict())
    assert set(state) == {"codebook.weight", "token_to_code", "code_count"}
    expected = full_logits(case, "mean").loss
    for world_size in sizes:
        losses, states = zip(*run_on_ranks(load_and_run, world_size, state, case), strict=True)
        assert all(max_error(loss, expected) < 1e-13 for loss in losses)
        state = states[0] | {"codebook.weight": torch.cat([of_rank["codebook.weight"] for of_rank in states])}
    assert torch.equal(state["codebook.weight"], case.codebook)


def test_is_an_ordinary_module() -> None:
    case = make_case()
    head = make_head(case)
    assert [name for name, _ in head.named_parameters()] == ["codebook.weight"]
    assert repr(head).startswith("VQLinearCrossEntropy(\n  vocab_size=90, num_codes=10\n")
    copied = copy.deepcopy(head)
    assert torch.equal(copied(case.hidden, case.target), head(case.hidden, case.target))
    assert copied.codebook.weight.data_ptr() != head.codebook.weight.data_ptr()


# Clusters of an existing head


def clustered_rows() -> tuple[Tensor, Tensor]:
    """Rows ``[V, H]`` close to ``K`` centres far apart, and which one each belongs to."""
    generator = torch.Generator().manual_seed(1)
    centres = 10 * torch.randn(K, H, generator=generator)
    member = torch.randint(K, (V,), generator=generator)
    return centres[member] + 0.01 * torch.randn(V, H, generator=generator), member


def assert_recovers(head: VQLinearCrossEntropy) -> None:
    rows, member = clustered_rows()
    # One code for all rows of a centre, and another for every other.
    assert len({(int(code), int(of)) for code, of in zip(head.token_to_code, member, strict=True)}) == K
    assert torch.equal(head.code_count, torch.bincount(head.token_to_code))
    means = torch.stack([rows[head.token_to_code == code].mean(0) for code in range(K)])
    torch.testing.assert_close(head.codebook.weight.detach(), means, rtol=1e-5, atol=1e-5)


def test_from_linear_recovers_clusters() -> None:
    pytest.importorskip("sklearn")
    rows = clustered_rows()[0]
    linear, embedding = nn.Linear(H, V, bias=False), nn.Embedding(V, H)
    for head in (linear, embedding):
        head.load_state_dict({"weight": rows})
        assert_recovers(VQLinearCrossEntropy.from_linear(head, K))
    head = VQLinearCrossEntropy.from_linear(rows.bfloat16(), K, ignore_index=IGNORED, reduction="sum")
    assert (head.codebook.weight.dtype, head.ignore_index, head.reduction) == (torch.bfloat16, IGNORED, "sum")


def test_frequent_rows_keep_their_own_codes() -> None:
    """The weights do not reach k-means: two close rows that the loss meets often would then share a code."""
    pytest.importorskip("sklearn")
    rows = torch.randn(V, H, generator=torch.Generator().manual_seed(3))
    rows[1] = rows[0] + 0.1
    row_weight = torch.ones(V, dtype=torch.int64)
    row_weight[:2] = 10**6
    alike, weighted = (VQLinearCrossEntropy.from_linear(rows, K, row_weight=w) for w in (None, row_weight))
    assert alike.token_to_code[0] == alike.token_to_code[1]
    assert weighted.token_to_code[0] != weighted.token_to_code[1]


def cluster_on_rank(group: ProcessGroup, rows: Tensor, sharded: bool) -> tuple[Tensor, Tensor]:
    """Each rank draws other clusters, as ranks that round differently might. A sharded head is uneven and padded."""
    rank, world_size = group.rank(), group.size()
    if not sharded:
        vq = VQLinearCrossEntropy.from_linear(rows, K, group=group, seed=rank)
    else:
        # In reverse rank order: the first rank holds the last rows.
        per_rank = V // world_size + 7
        start = (world_size - 1 - rank) * per_rank
        head = VocabParallelLinearCrossEntropy(H, V, group=group, shard=VocabShard(start, start + per_rank, V))
        head.load_state_dict({"weight": rows})
        vq = VQLinearCrossEntropy.from_linear(head, K, seed=rank)
    return vq.token_to_code, vq.codebook.weight.detach()


@pytest.mark.parametrize(("world_size", "sharded"), [(2, False), (3, True)])
def test_all_ranks_have_one_map(world_size: int, sharded: bool) -> None:
    """Rows without clusters, where every seed gives another map: ranks that cluster on their own would differ."""
    pytest.importorskip("sklearn")
    rows = torch.randn(V, H, generator=torch.Generator().manual_seed(2))
    maps, codebooks = zip(*run_on_ranks(cluster_on_rank, world_size, rows, sharded), strict=True)
    assert all(torch.equal(of_rank, maps[0]) for of_rank in maps)
    means = torch.stack([rows[maps[0] == code].mean(0) for code in range(K)])
    torch.testing.assert_close(torch.cat(codebooks), means, rtol=1e-5, atol=1e-5)
    assert not torch.equal(VQLinearCrossEntropy.from_linear(rows, K, seed=1).token_to_code, maps[0])


# Bad input

MAP = torch.zeros(V, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"token_to_code": [0, 1]}, TypeError, "token_to_code must be an int64 tensor, got list"),
        ({"token_to_code": MAP.int()}, TypeError, r"token_to_code must be an int64 tensor, got torch\.int32"),
        ({"token_to_code": MAP[1:]}, ValueError, r"token_to_code must have shape \(90,\) .*, got \(89,\)"),
        ({"vocab_size": 0, "token_to_code": MAP[:0]}, ValueError, r"shape \(0,\) for a vocab_size of at least 1, got"),
        ({"token_to_code": MAP - 1}, ValueError, r"token_to_code must be in \[0, 2\), got values from -1 to -1"),
        ({"token_to_code": MAP + 2}, ValueError, r"token_to_code must be in \[0, 2\), got values from 2 to 2"),
        ({"num_codes": None, "token_to_code": MAP - 1}, ValueError, "num_codes must be at least 1, got 0"),
        ({"num_codes": 0}, ValueError, "num_codes must be at least 1, got 0"),
        ({"num_codes": 2.0}, TypeError, r"num_codes must be an int, got 2\.0"),
        ({"in_features": 0}, ValueError, "in_features must be at least 1, got 0"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an int, got None"),
        ({"group": "tp"}, TypeError, "group must be a ProcessGroup, a one-dimensional DeviceMesh or None, got str"),
        ({"bias": True}, TypeError, "unexpected keyword argument 'bias'"),
        # Each would act on logits of codes that hold log n.
        ({"temperature": 2.0}, TypeError, "unexpected keyword argument 'temperature'"),
        ({"logit_softcap": 30.0}, TypeError, "unexpected keyword argument 'logit_softcap'"),
        ({"label_smoothing": 0.1}, TypeError, "unexpected keyword argument 'label_smoothing'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_module_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        VQLinearCrossEntropy(
            **{"in_features": H, "vocab_size": V, "token_to_code": MAP, "num_codes": 2, **arguments}  # pyright: ignore
        )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target": [1]}, TypeError, "target must be a tensor of int64 class ids, got list"),
        ({"target": torch.zeros(T)}, TypeError, r"target must be a tensor of int64 class ids, got torch\.float32"),
        # Named as classes, though the op underneath counts codes.
        (
            {"target": torch.full(T, V)},
            ValueError,
            r"target must be in \[0, 90\) or ignore_index, got 90 at position 0",
        ),
        (
            {"target": torch.full(T, -1)},
            ValueError,
            r"target must be in \[0, 90\) or ignore_index, got -1 at position 0",
        ),
        ({"target": torch.zeros(5, dtype=torch.int64)}, ValueError, r"target must have shape \(2, 7\) .*, got \(5,\)"),
        (
            {"input": torch.zeros(*T, H - 1)},
            ValueError,
            r"linear_weight must have shape \(V_local, 11\), got \(10, 12\)",
        ),
        ({"reduction": "avg"}, ValueError, r"reduction must be one of .*, got 'avg'"),
        ({"options": "eager"}, TypeError, "options must be a ComputeOptions or None, got str"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_calls(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    case = make_case(torch.float32)
    call = {"input": case.hidden, "target": case.target}
    head = make_head(case, **{name: value for name, value in changes.items() if name not in call})
    with pytest.raises(error, match=message):
        head(**{name: changes.get(name, value) for name, value in call.items()})


@pytest.mark.parametrize(
    ("row_weight", "message"),
    [
        ([1.0] * V, r"row_weight must be a tensor of shape \(90,\) or None, got list"),
        (torch.ones(V - 1), r"row_weight must be a tensor of shape \(90,\) or None, got \(89,\)"),
        (torch.arange(V), "row_weight must be positive and finite, got values from 0"),
        (torch.full((V,), torch.nan), "row_weight must be positive and finite, got values from nan"),
    ],
)
def test_bad_row_weights(row_weight: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VQLinearCrossEntropy.from_linear(torch.zeros(V, H), K, row_weight=row_weight)


def test_bad_seed() -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match="seed"):
        VQLinearCrossEntropy.from_linear(torch.zeros(V, H), K, seed="one")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("head", "num_codes", "error", "message"),
    [
        (nn.Linear(H, V), K, ValueError, "head must have no bias"),
        (nn.LayerNorm(H), K, TypeError, r"head must be a floating-point matrix .*, got \(12,\), torch\.float32"),
        (nn.GELU(), K, TypeError, "head must be a floating-point matrix .*, got GELU"),
        (torch.zeros(V, H, dtype=torch.int64), K, TypeError, r"got \(90, 12\), torch\.int64"),
        (torch.full((V, H), torch.nan), K, ValueError, "head must have a finite weight, got infinite or NaN elements"),
        (torch.zeros(V, H), V + 1, ValueError, r"num_codes must be in \[1, 90\], .*, got 91"),
        (torch.zeros(V, H), 0, ValueError, r"num_codes must be in \[1, 90\], .*, got 0"),
        (torch.zeros(V, H), None, TypeError, "num_codes must be an int, got None"),
    ],
)
def test_bad_heads(head: Any, num_codes: Any, error: type[Exception], message: str) -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(error, match=message):
        VQLinearCrossEntropy.from_linear(head, num_codes)


def test_from_linear_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        VQLinearCrossEntropy.from_linear(nn.Linear(H, V, bias=False), K)


# The demonstration


def test_demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The table holds a row per head, and no head is much worse than chance."""
    pytest.importorskip("sklearn")
    monkeypatch.setattr(vq_demo, "HELD_OUT_BATCHES", 2)
    monkeypatch.setattr(vq_demo, "TIMED_CALLS", 1)
    vq_demo.main(["--steps=8", "--fork=6", "--vocab-size=1025", "--tokens-per-code=16"])
    lines = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines()]
    rows = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines if len(cells) == 7}
    expected = {"a row per token": 1025, "64 codes, by frequency": 64, "64 codes, all alike": 64}
    assert set(rows) == {"head", *expected}
    for name, num_rows in expected.items():
        parameters, loss, share, perplexity, time, memory = rows[name]
        assert parameters == f"{num_rows * 128:,}"
        assert float(loss) < math.log(1025) + 0.1
        assert (float(share) > 0) == ("codes" in name)
        assert float(perplexity.replace(",", "")) == pytest.approx(math.exp(float(loss)), rel=1e-2)
        assert float(time.removesuffix(" ms")) > 0
        assert float(memory.removesuffix(" MiB")) > 0


def test_demo_needs_steps_on_both_sides_of_the_fork(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        vq_demo.main(["--steps=10", "--fork=9"])
    assert "--fork must be in [2, steps - 2]" in capsys.readouterr().err


def test_demo_needs_text_for_its_steps() -> None:
    with pytest.raises(SystemExit, match="3 batches need 48 windows, but the text has 1: use fewer steps"):
        vq_demo.draw_once(torch.arange(100), 3, seed=0)

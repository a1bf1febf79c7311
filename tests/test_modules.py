"""The head that owns its shard."""

import copy
import pickle
import warnings
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from vocab_parallel_fused import ComputeOptions, VocabParallelLinearCrossEntropy, VocabShard
from vocab_parallel_fused.testing import run_on_ranks

H, V = 6, 2050  # more than two blocks of the initialisation


def initial_state(group: ProcessGroup, padded: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    torch.manual_seed(3)
    rows = -(-V // group.size()) + 5
    shard = VocabShard(group.rank() * rows, (group.rank() + 1) * rows, V) if padded else None
    head = VocabParallelLinearCrossEntropy(H, V, bias=True, group=group, shard=shard)
    return dict(head.state_dict()), torch.rand(3)


def joined(states: Sequence[dict[str, torch.Tensor]], name: str) -> torch.Tensor:
    return torch.cat([state[name] for state in states])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_initialisation_does_not_depend_on_the_ranks(world_size: int, padded: bool) -> None:
    ((whole, next_numbers),) = run_on_ranks(initial_state, 1, False)
    states, next_numbers_of_ranks = zip(*run_on_ranks(initial_state, world_size, padded), strict=True)
    for name in ("weight", "bias"):
        parts = joined(states, name)
        assert torch.equal(parts[:V], whole[name])
        assert (parts[V:] == 0).all()
    assert all(torch.equal(next_numbers, numbers) for numbers in next_numbers_of_ranks)


def test_initialisation_is_that_of_a_linear_layer() -> None:
    head = VocabParallelLinearCrossEntropy(64, V, bias=True)
    bound = 1 / 8
    assert head.bias is not None
    for parameter in (head.weight, head.bias):
        assert parameter.abs().max() <= bound
        torch.testing.assert_close(parameter.std().item(), bound / 3**0.5, rtol=0.05, atol=0)
    assert len(head.weight[:, 0].unique()) > V - 20  # blocks of rows differ


def load_and_run(group: ProcessGroup, full: dict[str, torch.Tensor], padded: bool) -> tuple[torch.Tensor, ...]:
    rows = -(-V // group.size()) + 5
    shard = VocabShard(group.rank() * rows, (group.rank() + 1) * rows, V) if padded else None
    head = VocabParallelLinearCrossEntropy(H, V, bias=True, group=group, shard=shard, reduction="sum", ignore_index=5)
    head.load_state_dict(full)
    saved = {name: value.clone() for name, value in head.state_dict().items()}
    assert set(saved) == {"weight", "bias"}
    assert saved["weight"].shape == (head.shard.num_rows, H)
    nn.init.zeros_(head.weight)
    head.load_state_dict(saved)  # the shard's own
    assert torch.equal(head.weight, saved["weight"])

    hidden = torch.linspace(-1, 1, 8 * H).view(8, H).requires_grad_()
    target = torch.tensor([0, V - 1, V // 2, 5, 1, 2, 3, 4])
    loss = head(hidden, target)
    loss.backward()
    assert hidden.grad is not None
    assert head.weight.grad is not None
    return loss.detach(), hidden.grad, head.weight.grad[: head.shard.num_valid_rows]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_loads_a_full_matrix_and_a_shard(world_size: int, padded: bool) -> None:
    linear = nn.Linear(H, V)
    results = run_on_ranks(load_and_run, world_size, dict(linear.state_dict()), padded)
    hidden = torch.linspace(-1, 1, 8 * H).view(8, H).requires_grad_()
    target = torch.tensor([0, V - 1, V // 2, 5, 1, 2, 3, 4])
    expected = F.cross_entropy(linear(hidden), target, reduction="sum", ignore_index=5)
    expected.backward()
    for loss, dhidden, _ in results:
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(dhidden, hidden.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.cat([result[2] for result in results]), linear.weight.grad, rtol=1e-4, atol=1e-6)


def test_a_matrix_of_neither_size_is_refused() -> None:
    head = VocabParallelLinearCrossEntropy(H, V)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        head.load_state_dict({"weight": torch.zeros(V - 1, H)})


def test_padding_rows_that_are_not_zero_are_left_out_with_a_warning() -> None:
    """They may be another vocabulary's classes. Rows of zeros are padding for certain."""
    head = VocabParallelLinearCrossEntropy(H, V)
    matrix = torch.randn(V + 3, H)
    with pytest.warns(UserWarning, match=rf"head.weight has {V + 3} rows: the last 3 .* a vocabulary of {V}"):
        nn.ModuleDict({"head": head}).load_state_dict({"head.weight": matrix})
    assert torch.equal(head.weight, matrix[:V])
    matrix[V:] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head.load_state_dict({"weight": matrix})


def test_can_be_made_without_memory() -> None:
    """Deferred initialisation: built on the meta device, given memory, then initialised as any other head."""
    torch.manual_seed(5)
    expected = VocabParallelLinearCrossEntropy(H, V, bias=True)
    head = VocabParallelLinearCrossEntropy(H, V, bias=True, device="meta").to_empty(device="cpu")
    torch.manual_seed(5)
    head.reset_parameters()
    assert torch.equal(head.weight, expected.weight)


def initialised_under_fsdp(group: ProcessGroup) -> None:
    torch.manual_seed(5)
    expected = VocabParallelLinearCrossEntropy(H, V, bias=True)
    head = VocabParallelLinearCrossEntropy(H, V, bias=True, device="meta")
    fully_shard(head, mesh=DeviceMesh("cpu", list(range(group.size()))))
    head.to_empty(device="cpu")
    torch.manual_seed(5)
    head.reset_parameters()
    for name, parameter in expected.named_parameters():
        sharded = head.get_parameter(name)
        assert isinstance(sharded, DTensor)
        assert torch.equal(sharded.full_tensor(), parameter)


@pytest.mark.parametrize("world_size", [2, 3])
def test_deferred_initialisation_under_fsdp(world_size: int) -> None:
    """Parameters that ``fully_shard`` has cut into parts, evenly or not, get the numbers of whole ones."""
    run_on_ranks(initialised_under_fsdp, world_size)


def methods_under_fsdp(group: ProcessGroup) -> None:
    rank, world_size = group.rank(), group.size()
    torch.manual_seed(5)
    whole, head = (VocabParallelLinearCrossEntropy(H, V, bias=True) for _ in range(2))
    head.load_state_dict(whole.state_dict())
    fully_shard(head, mesh=DeviceMesh("cpu", list(range(world_size))))
    hidden = torch.randn(world_size, 6, H, generator=torch.Generator().manual_seed(0))
    with pytest.raises(TypeError, match=r"linear_weight .* got a DTensor .*register_fsdp_forward_method"):
        head.top_k(hidden[rank], 3)
    for name in ("token_stats", "top_k"):
        register_fsdp_forward_method(head, name)
    assert torch.equal(head.top_k(hidden[rank], 3).class_id, whole.top_k(hidden[rank], 3).class_id)
    entropy = head.token_stats(hidden[rank], outputs=["entropy"]).entropy
    expected = whole.token_stats(hidden, outputs=["entropy"]).entropy
    assert entropy is not None
    assert expected is not None
    torch.testing.assert_close(entropy, expected[rank])
    entropy.sum().backward()
    (expected.sum() / world_size).backward()  # the mean over the ranks
    for name, parameter in whole.named_parameters():
        grad = head.get_parameter(name).grad
        assert isinstance(grad, DTensor)
        torch.testing.assert_close(grad.full_tensor(), parameter.grad)


def test_methods_under_fsdp() -> None:
    """A rank's part of the parameters must never be taken for its rows of the vocabulary."""
    run_on_ranks(methods_under_fsdp, 2)


def test_initialisation_does_not_depend_on_the_default_dtype() -> None:
    torch.manual_seed(5)
    expected = VocabParallelLinearCrossEntropy(H, V, dtype=torch.float32)
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(5)
        head = VocabParallelLinearCrossEntropy(H, V, dtype=torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(head.weight, expected.weight)


def copy_head(group: ProcessGroup) -> None:
    """A copy for an average of weights, or a reference model: other parameters, the same group."""
    head = VocabParallelLinearCrossEntropy(H, 10, group=group)
    copied = copy.deepcopy(head)
    assert copied.group is head.group
    assert torch.equal(copied.weight, head.weight)
    assert copied.weight.data_ptr() != head.weight.data_ptr()
    hidden, target = torch.ones(4, H), torch.arange(4)
    assert torch.equal(head(hidden, target), copied(hidden, target))


def test_deep_copies_share_the_group() -> None:
    run_on_ranks(copy_head, 2)


def test_an_assigned_shard_does_not_hold_the_full_matrix() -> None:
    full = torch.randn(100, H)
    head = VocabParallelLinearCrossEntropy(H, 100, shard=VocabShard(10, 20, 100))
    head.load_state_dict({"weight": full}, assign=True)
    assert head.weight.untyped_storage().nbytes() == 10 * H * 4


def test_is_an_ordinary_module() -> None:
    head = VocabParallelLinearCrossEntropy(H, 10, dtype=torch.bfloat16, options=ComputeOptions(impl="eager"))
    assert repr(head) == ("VocabParallelLinearCrossEntropy(in_features=6, vocab_size=10, bias=False, rows=[0, 10))")
    assert head.weight.dtype == torch.bfloat16
    copy = pickle.loads(pickle.dumps(head))
    hidden, target = torch.randn(4, H, dtype=torch.bfloat16), torch.arange(4)
    assert torch.equal(head(hidden, target), copy(hidden, target))


def test_a_head_knows_its_arguments() -> None:
    """Every method of a head computes with the head's own bias, soft cap and temperature."""
    head = VocabParallelLinearCrossEntropy(H, 40, bias=True, logit_softcap=2.0, temperature=0.5, label_smoothing=0.1)
    hidden, target, token_weight = torch.randn(3, 4, H), torch.randint(40, (3, 4)), torch.rand(3, 4)
    logits = 2 * torch.tanh(F.linear(hidden, head.weight, head.bias) / 2) / 0.5
    log_probs = logits.log_softmax(-1)
    losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), label_smoothing=0.1, reduction="none")
    expected = (losses * token_weight.flatten()).sum() / token_weight.sum()
    torch.testing.assert_close(head(hidden, target, token_weight), expected)
    stats = head.token_stats(hidden, target, outputs=["log_prob", "entropy"])
    torch.testing.assert_close(stats.log_prob, log_probs.gather(-1, target[..., None])[..., 0])
    torch.testing.assert_close(stats.entropy, -(log_probs.exp() * log_probs).sum(-1))
    assert stats.lse is None
    top = head.top_k(hidden, 3)
    torch.testing.assert_close(top.log_prob, log_probs.topk(3).values)
    assert torch.equal(top.class_id, log_probs.topk(3).indices)

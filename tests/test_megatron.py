"""Converted models of Megatron-Core against themselves as they were, on gloo ranks."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import operator
import pickle
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.nn import ModuleList
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vocab_parallel_fused import ComputeOptions
from vocab_parallel_fused.functional import Reduction
from vocab_parallel_fused.testing import full_logits_cross_entropy, max_error, run_on_ranks

pytest.importorskip("megatron.core")

from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron_models import (
    SMALL_BLOCKS,
    B,
    Batch,
    H,
    Outcome,
    S,
    Training,
    V,
    accumulate,
    attribute_names,
    converted,
    data_parallel,
    forward,
    make_batch,
    make_bert,
    make_chunks,
    make_hybrid_model,
    make_model,
    set_up,
    without_attention,
)

from vocab_parallel_fused.megatron import _OPERATORS, LazyLogits, convert, linear_cross_entropy

# Sums of the same fp32 numbers in another order differ by a few of its units, 1.2e-7.
TOLERANCE = 1e-5


def assert_close(actual: Outcome, expected: Outcome, case: str = "") -> None:
    for loss, exact in zip(actual.losses, expected.losses, strict=True):
        assert max_error(loss, exact) < TOLERANCE, f"{case}: loss is off by {max_error(loss, exact):.1e}"
    assert actual.tensors.keys() == expected.tensors.keys(), case
    for name, exact in expected.tensors.items():
        error = max_error(actual.tensors[name], exact)
        assert error < TOLERANCE, f"{case}: {name} is off by {error:.1e}"


def assert_equal(actual: Outcome, expected: Outcome, case: str = "") -> None:
    for one, other in zip(actual.losses, expected.losses, strict=True):
        assert torch.equal(one, other), f"{case}: loss"
    for name, tensor in expected.tensors.items():
        assert torch.equal(actual.tensors[name], tensor), f"{case}: {name}"


def assert_as_good(actual: Outcome, stock: Outcome, exact: Outcome, case: str) -> None:
    """16-bit results are as far from fp32's as Megatron-Core's own: twice its error, or one rounding of bf16."""
    for ours, theirs, loss in zip(actual.losses, stock.losses, exact.losses, strict=True):
        assert max_error(ours, loss) <= 2 * max_error(theirs, loss) + 2**-8, f"{case}: loss"
    for name, tensor in exact.tensors.items():
        budget = 2 * max_error(stock.tensors[name], tensor) + 2**-8
        assert max_error(actual.tensors[name], tensor) <= budget, f"{case}: {name}"


def with_and_without_sequence_parallelism(group: ProcessGroup) -> list[bool]:
    return [False, True] if group.size() > 1 else [False]


def product_on_rank(group: ProcessGroup) -> None:
    set_up(tensor=group.size())
    batches = [make_batch(seed) for seed in range(2)]
    sequence_parallel = with_and_without_sequence_parallelism(group)
    for tied, sp, mtp, main_grad, dtype in product(
        [False, True], sequence_parallel, [None, 1], [False, True], [torch.float32, torch.bfloat16]
    ):
        case = f"{tied=} {sp=} {mtp=} {main_grad=} {dtype=} rank {group.rank()}"
        settings: dict[str, Any] = {"tied": tied, "sequence_parallel": sp, "mtp": mtp, "main_grad": main_grad}
        model = make_model(**settings, dtype=dtype)
        wrapped = data_parallel(model)
        stock = accumulate(wrapped, batches)
        state, attributes = model.state_dict(), attribute_names(wrapped)
        undo = convert(wrapped, options=SMALL_BLOCKS)
        assert state.keys() == model.state_dict().keys()
        actual = accumulate(wrapped, batches)
        undo()
        assert attribute_names(wrapped) == attributes, "undo leaves something behind"
        assert_equal(accumulate(wrapped, batches), stock, f"{case}: undo does not restore")
        if dtype == torch.float32:
            assert_close(actual, stock, case)
        else:
            exact = make_model(**settings)
            exact.load_state_dict(state)
            assert_as_good(actual, stock, accumulate(data_parallel(exact), batches), case)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_losses_and_gradients_are_those_of_megatron(world_size: int) -> None:
    """All combinations of tied embeddings, sequence parallelism, multi-token prediction, main_grad and dtype."""
    run_on_ranks(product_on_rank, world_size)


def training_on_rank(group: ProcessGroup, sizes: dict[str, int], folder: Path) -> None:
    set_up(**sizes)
    spec = without_attention() if "context" in sizes else None
    for tied, sp in product([False, True], [True] if "virtual" in sizes else [False, True]):
        case = f"{sizes} {tied=} {sp=} rank {group.rank()}"
        # With these heads and an embedding tied over stages, Megatron-Core makes an output weight that it does not use,
        # and its own overlap fails on it.
        mtp = None if tied and "pipeline" in sizes else 1
        settings: dict[str, Any] = {"tied": tied, "sequence_parallel": sp, "main_grad": True, "mtp": mtp, "spec": spec}
        chunks = make_chunks(**settings)
        before = {name: p.clone() for name, p in ModuleList(chunks).named_parameters()}
        convert(chunks, options=SMALL_BLOCKS)
        trainings = Training(make_chunks(**settings)), Training(chunks)
        source, target = (0, 1) if tied else (1, 0)
        early = [training.run(range(2)) for training in trainings]
        trainings[source].save(folder / str((tied, sp)))
        late = [training.run([2]) for training in trainings]
        for outcomes in (early, late):
            assert_close(outcomes[1], outcomes[0], case)
        # The schedule calls the loss on the last stage alone.
        num_losses = trainings[1].micro_batches if parallel_state.is_pipeline_last_stage() else 0
        assert len(late[1].losses) == num_losses
        still = [name for name, p in late[1].tensors.items() if (p - before[name]).abs().max() < 1e-3]
        assert not still, f"{case}: nothing was learnt by {still}"

        trainings[target].load(folder / str((tied, sp)))
        assert_equal(trainings[target].run([]), Outcome([], early[source].tensors), f"{case}: loaded parameters")
        assert_close(trainings[target].run([2]), late[source], f"{case}: from the other's checkpoint")


@pytest.mark.parametrize(
    "sizes",
    [{}, {"pipeline": 2}, {"pipeline": 2, "virtual": 2}, {"context": 2}],
    ids=["data", "pipeline", "interleaved", "context"],
)
def test_training_follows_megatron(sizes: dict[str, int], tmp_path: Path) -> None:
    """Steps of the real optimizer on four ranks, two of them for tensor parallelism and two for another.

    Then one goes on from the other's sharded checkpoint and optimizer: the converted model if embeddings are tied.
    Data: each replica has half of the optimizer's state, and its gradients are reduced while others are computed.
    Pipeline: forward and backward alternate over the stages; the last one has its own copy of a tied embedding.
    Interleaved: each stage has two chunks, and only the second of the last stage has a head.
    Context: hidden states and labels are those of half of each sequence.
    """
    run_on_ranks(training_on_rank, 4, {"tensor": 2} | sizes, tmp_path)


def details_on_rank(group: ProcessGroup) -> None:
    set_up(tensor=group.size())
    for check in (
        memory_on_rank,
        logits_on_rank,
        lazy_logits_on_rank,
        questions_on_rank,
        operators_on_rank,
        inference_on_rank,
        frozen_on_rank,
        scale_on_rank,
        accumulation_on_rank,
        packed_on_rank,
        masked_on_rank,
        bias_on_rank,
        hybrid_on_rank,
        stages_on_rank,
        checkpoints_on_rank,
        copies_on_rank,
        refused_settings_on_rank,
        refused_methods_on_rank,
        undo_on_rank,
        function_on_rank,
    ):
        check(group)


@pytest.mark.parametrize("world_size", [1, 2])
def test_details(world_size: int) -> None:
    run_on_ranks(details_on_rank, world_size)


class LargestTensor(TorchDispatchMode):
    """The most elements of a tensor that an operation returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


def memory_on_rank(group: ProcessGroup) -> None:
    """No operation of a training step returns as much as a quarter of the shard's logits."""
    # The shard is larger than the tile of the forward, and the tokens more than the hidden size: the weight is smaller.
    rows, sequence = 8192, 4 * H
    vocab_size = rows * group.size()
    batch = make_batch(0, sequence=sequence, vocab_size=vocab_size)
    of_logits = B * sequence * rows
    for sp, main_grad in product(with_and_without_sequence_parallelism(group), [False, True]):
        model = make_model(tied=True, sequence_parallel=sp, main_grad=main_grad, mtp=1, vocab_size=vocab_size)
        wrapped = data_parallel(model)
        undo = convert(wrapped, options=ComputeOptions(workspace_bytes=2**17))
        with LargestTensor() as largest:
            accumulate(wrapped, [batch])
        assert largest.numel < of_logits / 4, (sp, main_grad, largest.numel)
        undo()
        with LargestTensor() as largest:
            accumulate(wrapped, [batch])
        assert largest.numel >= of_logits, "the watch does not see Megatron's own logits"


def logits_on_rank(group: ProcessGroup) -> None:
    """Without labels the logits have the bits of the model that was not converted."""
    batch = make_batch(0)
    for sp, dtype in product(with_and_without_sequence_parallelism(group), [torch.float32, torch.bfloat16]):
        model = make_model(tied=True, sequence_parallel=sp, dtype=dtype)
        for gather in (None, False, True):
            expected = forward(model, batch, None, runtime_gather_output=gather)
            with converted(model):
                assert torch.equal(forward(model, batch, None, runtime_gather_output=gather), expected)
            assert expected.shape[-1] == (V if gather else V // group.size())


def lazy_logits_on_rank(group: ProcessGroup) -> None:
    """What stands for the logits answers as they would, and makes them only if it must."""
    batch = make_batch(0)
    for sp, dtype in product(with_and_without_sequence_parallelism(group), [torch.float32, torch.bfloat16]):
        model = make_model(sequence_parallel=sp, dtype=dtype)
        layer, all_hidden = model.output_layer, torch.randn(S, B, H).to(dtype)
        hidden = all_hidden.chunk(group.size())[group.rank()] if sp else all_hidden
        logits, _ = ColumnParallelLinear.forward(layer, hidden)
        with converted(model):
            lazy, _ = layer(hidden)
            later, _ = layer(hidden)
            assert isinstance(lazy, LazyLogits)
            assert lazy.shape == logits.shape
            assert lazy.size() == logits.shape
            assert lazy.size(-1) == logits.shape[-1]
            scaled = lazy * 0.25
            largest = scaled.max(dim=-1)
            exact = 0.25 * torch.nn.functional.linear(all_hidden.double(), layer.weight.double())
            assert torch.equal(largest.indices, exact.argmax(dim=-1))
            assert torch.equal(torch.argmax(scaled, dim=-1), largest.indices)
            assert max_error(largest.values, exact.amax(dim=-1)) < 2 * torch.finfo(dtype).eps
            assert "materialized" not in vars(scaled), "the largest logits were taken from all of them"
            assert torch.equal(torch.softmax(scaled, dim=-1), torch.softmax(logits * 0.25, dim=-1))
            assert torch.equal(scaled[0] + 1, (logits * 0.25)[0] + 1)
            assert torch.equal(scaled.max(dim=0).values, (logits * 0.25).max(dim=0).values)
            assert torch.equal(lazy * torch.ones(()), logits)
            layer.sequence_parallel = False  # as inference does between its calls
            assert torch.equal(later.transpose(0, 1), logits.transpose(0, 1))
            layer.sequence_parallel = sp
            # Logits that somebody holds may have been changed: all that follows is of the changed ones.
            changed = later.mul_(0.5).clone()
            assert torch.equal(later * 2.0, logits)
            assert torch.equal(later.max(dim=-1).values, changed.max(dim=-1).values)
            losses = [model.compute_language_model_loss(batch.labels.clamp(min=0), x) for x in (later, changed)]
            assert torch.equal(*losses)
            # A look at the logits without a graph must not take the gradient away from the loss.
            for look in (torch.no_grad, torch.inference_mode):
                seen, _ = layer(hidden)
                with look():
                    assert torch.equal(torch.argmax(input=seen, dim=-1), logits.argmax(dim=-1))
                assert model.compute_language_model_loss(batch.labels.clamp(min=0), seen).requires_grad


def questions_on_rank(group: ProcessGroup) -> None:
    """What one rank alone may ask, since no logits are needed to answer."""
    model = make_model(dtype=torch.bfloat16)
    hidden = torch.randn(S, B, H, dtype=torch.bfloat16)
    expected, _ = ColumnParallelLinear.forward(model.output_layer, hidden)
    names = ("shape", "ndim", "device", "is_cuda", "dtype", "requires_grad")
    with converted(model):
        for autocast, flat in product([False, True], [False, True]):
            with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
                lazy, _ = model.output_layer(hidden.flatten(0, 1) if flat else hidden)
                if group.rank() == 0:
                    like = expected.to(torch.float16 if autocast else expected.dtype).detach()
                    like = (like.flatten(0, 1) if flat else like).requires_grad_()
                    for name in names:
                        assert getattr(lazy, name) == getattr(like, name), name
                    assert (lazy.dim(), lazy.numel(), lazy.size()) == (like.dim(), like.numel(), like.size())
            assert not lazy.is_materialized
        with torch.no_grad():
            lazy, _ = model.output_layer(hidden)
            assert not lazy.requires_grad


def operators_on_rank(_group: ProcessGroup) -> None:
    """Operators are those of the logits, in whose memory those work that assign."""
    assert all(hasattr(Tensor, f"__{name}__") for name in _OPERATORS)
    model = make_model()
    layer, hidden = model.output_layer, torch.randn(S, B, H)
    logits = ColumnParallelLinear.forward(layer, hidden)[0].detach()
    other = torch.rand_like(logits)
    pure = [
        *(operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.pow),
        *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
    ]
    in_place = [operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.imod, operator.ipow]
    with converted(model):

        def lazy() -> Any:
            with torch.no_grad():
                return layer(hidden)[0]

        for function, operand in product(pure, [0.7, other]):
            case = (function.__name__, type(operand))
            for actual, expected in (
                (function(lazy(), operand), function(logits, operand)),
                (function(operand, lazy()), function(operand, logits)),
            ):
                assert isinstance(actual, (Tensor, LazyLogits)), case
                # NaN: a negative number to a power that is no whole number.
                assert torch.allclose(actual.float(), expected.float(), equal_nan=True), case
        for function in in_place:
            held = same = lazy()
            held = function(held, 0.7)
            assert torch.allclose(held, function(logits.clone(), 0.7), equal_nan=True), function.__name__
            assert torch.equal(same.materialized.nan_to_num(), held.nan_to_num()), function.__name__
        masked = lazy()
        masked[..., 3:] = -1e4
        assert (masked[..., 3:] == -1e4).all()
        assert torch.equal(masked[..., :3], logits[..., :3])
        assert torch.equal(-lazy(), -logits)
        assert torch.equal(abs(lazy()), logits.abs())
        assert torch.equal(lazy() @ other.mT, logits @ other.mT)
        assert len(lazy()) == len(logits)
        assert all(torch.equal(*pair) for pair in zip(lazy(), logits, strict=True))
        with pytest.raises(RuntimeError, match="ambiguous"):
            bool(lazy())
        halved = lazy() / 2.0
        assert not halved.is_materialized, "a scaled copy needs no logits"
        assert torch.equal(halved.float(), logits / 2.0)
        assert torch.isinf(lazy() / 0.0).all()
        assert len({lazy(), lazy()}) == 2


def inference_on_rank(_group: ProcessGroup) -> None:
    """Prefill and decoding give the bits of the model that was not converted."""
    model, batch = make_model().eval(), make_batch(0)

    def decode() -> list[Tensor]:
        context = StaticInferenceContext(B, S)
        logits = []
        with torch.no_grad():
            for start, stop in ((0, 4), (4, 5), (5, 6)):
                mask = torch.ones(stop - start, stop, dtype=torch.bool).triu(start + 1)[None, None]
                tokens, position = batch.tokens[:, start:stop], batch.position[:, start:stop]
                keywords = {"inference_context": context, "runtime_gather_output": True}
                logits.append(model(tokens, position, mask, **keywords))
                context.increment_sequence_len_offset(stop - start)
        return logits

    expected = decode()
    with converted(model):
        actual = decode()
    assert expected[-1].shape == (B, 1, V)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def frozen_on_rank(group: ProcessGroup) -> None:
    """A head without gradient changes no gradient of the others, and its own memory is left alone."""
    batches = [make_batch(seed) for seed in range(2)]
    for sp, main_grad in product(with_and_without_sequence_parallelism(group), [False, True]):
        model = make_model(sequence_parallel=sp, main_grad=main_grad)
        weight = model.output_layer.weight.requires_grad_(False)
        weight.main_grad = torch.zeros(())
        wrapped = data_parallel(model)
        stock = accumulate(wrapped, batches)
        with converted(wrapped):
            assert_close(accumulate(wrapped, batches), stock, f"frozen {sp=} {main_grad=}")
        assert weight.grad is None
        assert not weight.main_grad.any()

        # Detached: the model's own layer is called with a weight that has no history.
        model = make_model(sequence_parallel=sp, main_grad=main_grad)
        generator = torch.Generator().manual_seed(group.rank() if sp else 0)
        hidden = torch.randn(S // (group.size() if sp else 1), B, H, generator=generator).requires_grad_()
        dhidden = []
        for context in (contextlib.nullcontext(), converted(model)):
            with context:
                logits, _ = model.output_layer(hidden, weight=model.output_layer.weight.detach())
                loss = model.compute_language_model_loss(batches[0].labels.clamp(min=0), logits)
            dhidden.append(torch.autograd.grad(loss, hidden, batches[0].mask)[0])
        assert max_error(dhidden[1], dhidden[0]) < TOLERANCE


def scale_on_rank(_group: ProcessGroup) -> None:
    """A factor of the logits, as models under μP have it, which scales both gradients too."""
    batches = [make_batch(seed) for seed in range(2)]
    model = make_model()
    layer = model.output_layer
    results = []
    for context in (contextlib.nullcontext(), converted(model)):
        hidden = torch.randn(S, B, H, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with context:
            logits, _ = layer(hidden)
            loss = model.compute_language_model_loss(batches[0].labels.clamp(min=0), 0.5 * logits * 0.25)
        results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, layer.weight), batches[0].mask)))
    for expected, actual in zip(*results, strict=True):
        assert max_error(actual, expected) < TOLERANCE

    if hasattr(model.config, "use_mup"):
        model = make_model(mtp=1, use_mup=True, mup_base_hidden_size=H // 4)
        assert model.config.mup_output_mult == 0.25
        stock = accumulate(model, batches)
        with converted(model):
            assert_close(accumulate(model, batches), stock, "μP")


def accumulation_on_rank(group: ProcessGroup) -> None:
    """The other kinds of ``main_grad``: in 16 bit, and of Megatron-FSDP, which gives it out only in the backward."""
    batches = [make_batch(seed) for seed in range(2)]
    name = "output_layer.weight"
    wrapped = data_parallel(make_model(main_grad=True, dtype=torch.bfloat16))
    with converted(wrapped):
        dweight = accumulate(wrapped, batches).tensors[name]
    assert not torch.equal(dweight, dweight.bfloat16().float()), "a gradient was rounded before it was added"

    for sp in with_and_without_sequence_parallelism(group):
        model = make_model(sequence_parallel=sp, main_grad=True, dtype=torch.bfloat16)
        wrapped = data_parallel(model, grad_reduce_in_fp32=False)
        stock = accumulate(wrapped, batches)
        with converted(wrapped):
            actual = accumulate(wrapped, batches)
        dweight, exact = actual.tensors[name], stock.tensors[name]
        assert dweight.dtype == torch.bfloat16
        assert max_error(dweight, exact) < 2**-6

        buffers = []
        for fused in (False, True):
            model = make_model(sequence_parallel=sp, main_grad=True)
            if fused:
                convert(model, options=SMALL_BLOCKS)
            for parameter in model.parameters():
                parameter.main_grad, parameter.grad_added_to_main_grad = torch.zeros_like(parameter), False
            weight, buffer = model.output_layer.weight, torch.full_like(model.output_layer.weight, 7.0)
            weight.__fsdp_param__, weight.get_main_grad = True, lambda buffer=buffer: buffer
            loss = forward(model, batches[0], batches[0].labels)
            (loss * batches[0].mask).sum().backward()
            assert weight.main_grad is buffer
            assert weight.grad_added_to_main_grad
            assert weight.grad.shape == weight.shape
            buffers.append(buffer)
        assert max_error(buffers[1], buffers[0]) < TOLERANCE


def packed_on_rank(group: ProcessGroup) -> None:
    """Sequences packed into one, ``[t, 1, H]`` and ``[1, t]``."""
    batch = Batch(*(tensor.reshape(1, -1) for tensor in make_batch(0)))
    starts = torch.tensor([0, S, 2 * S], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts)
    for sp in with_and_without_sequence_parallelism(group):
        model = make_model(sequence_parallel=sp, mtp=1, spec=without_attention())
        stock = accumulate(model, [batch], packed_seq_params=packed)
        with converted(model):
            assert_close(accumulate(model, [batch], packed_seq_params=packed), stock, f"packed {sp=}")


def masked_on_rank(group: ProcessGroup) -> None:
    """Fine-tuning: prompts have no labels and are masked, for the heads of multi-token prediction too."""
    vocab_size = 4  # so few that heads without training are right at times
    batch = make_batch(0, vocab_size=vocab_size)
    prompts = torch.arange(S) < torch.tensor([[S // 2], [S - 4]])
    batch = batch._replace(labels=batch.labels.masked_fill(prompts, -100), mask=batch.mask.masked_fill(prompts, 0.0))
    for tied, sp in product([False, True], with_and_without_sequence_parallelism(group)):
        results, metrics = [], []
        model = make_model(tied=tied, sequence_parallel=sp, mtp=2, vocab_size=vocab_size)
        for context in (contextlib.nullcontext(), converted(model)):
            MTPLossLoggingHelper.tracker.clear()
            with context:
                results.append(accumulate(model, [batch]))
            metrics.append({k: v for k, v in MTPLossLoggingHelper.tracker.items() if isinstance(v, Tensor)})
        assert_close(results[1], results[0], f"masked {tied=} {sp=}")
        # What Megatron-Core logs: the losses of the heads, and in new versions how often they are right.
        assert metrics[0]
        for name, values in metrics[0].items():
            assert values.all(), name
            assert max_error(metrics[1][name], values) < TOLERANCE, name


def bias_on_rank(group: ProcessGroup) -> None:
    """A head with a bias, as BERT has it."""
    batches = [make_batch(seed) for seed in range(2)]
    for tied, sp, main_grad in product([False, True], with_and_without_sequence_parallelism(group), [False, True]):
        model = make_bert(tied=tied, sequence_parallel=sp, main_grad=main_grad)
        torch.nn.init.normal_(model.output_layer.bias)
        wrapped = data_parallel(model)
        stock, logits = accumulate(wrapped, batches), forward(model, batches[0], None)
        assert stock.tensors["output_layer.bias"].any()
        with converted(wrapped):
            assert_close(accumulate(wrapped, batches), stock, f"bias {tied=} {sp=} {main_grad=}")
            assert torch.equal(forward(model, batches[0], None), logits)


def hybrid_on_rank(group: ProcessGroup) -> None:
    batches = [make_batch(seed) for seed in range(2)]
    for sp in with_and_without_sequence_parallelism(group):
        model = make_hybrid_model(sequence_parallel=sp)
        stock, logits = accumulate(model, batches), forward(model, batches[0], None)
        with converted(model):
            assert_close(accumulate(model, batches), stock, f"hybrid {sp=}")
            assert torch.equal(forward(model, batches[0], None), logits)


def stages_on_rank(_group: ProcessGroup) -> None:
    """Chunks without an output layer are left alone, and those with one are converted."""
    chunks = [make_model(post_process=False), make_model(pre_process=False)]
    before = [attribute_names(chunk) for chunk in chunks]
    undo = convert(chunks)
    assert attribute_names(chunks[0]) == before[0]
    assert attribute_names(chunks[1]) != before[1]
    undo()
    assert attribute_names(chunks[1]) == before[1]


def checkpoints_on_rank(_group: ProcessGroup) -> None:
    """What a converted model saves, one that is not converted loads, in both of Megatron-Core's ways."""
    batch = make_batch(0)
    for tied in (False, True):
        model = make_model(tied=tied, mtp=1)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        expected, sharded = accumulate(model, [batch]), model.sharded_state_dict()
        with converted(model):
            file = io.BytesIO()
            torch.save(model.state_dict(), file)
            file.seek(0)
            assert {name: str(part) for name, part in model.sharded_state_dict().items()} == {
                name: str(part) for name, part in sharded.items()
            }
        other = make_model(tied=tied, mtp=1)
        other.load_state_dict(torch.load(file))
        assert_equal(accumulate(other, [batch]), expected)


def copies_on_rank(_group: ProcessGroup) -> None:
    """Copies of a converted layer use their own weights."""
    model = make_model()
    layer = model.output_layer
    layer.tp_group = None  # process groups cannot be copied,
    layer._load_state_dict_pre_hooks.clear()  # nor the layer's own hook be pickled
    layer.config = None
    with converted(model):
        for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            lazy, _ = copied(torch.ones(S, B, H))
            assert lazy.layer is copied
            assert lazy.weight is copied.weight
            assert torch.equal(copied.weight, layer.weight)


def refused(model: Any, error: type[Exception], name: str) -> None:
    before = attribute_names(model)
    with pytest.raises(error, match=name):
        convert(model)
    assert attribute_names(model) == before, "a refused model was changed"


def change(function: Callable[[Any], None]) -> Any:
    model = make_model()
    function(model)
    return model


def refused_settings_on_rank(group: ProcessGroup) -> None:
    config: dict[str, Any] = {
        "defer_embedding_wgrad_compute": True,
        "config_logger_dir": "folder",
        "cross_entropy_fusion_impl": "linear",
    }
    layer = {"disable_grad_reduce": True, "explicit_expert_comm": True, "gtp_remat_size": 2}
    for name, value in config.items():
        refused(change(lambda m, name=name, value=value: setattr(m.config, name, value)), ValueError, f"config.{name}")
    for name, value in layer.items():
        refused(
            change(lambda m, name=name, value=value: setattr(m.output_layer, name, value)),
            ValueError,
            f"output_layer.{name}",
        )
    added_elsewhere = change(lambda m: setattr(m.output_layer, "skip_bias_add", True))
    convert(added_elsewhere)()  # there is no bias, as in T5
    added_elsewhere.output_layer.bias = torch.nn.Parameter(torch.zeros(V // group.size()))
    refused(added_elsewhere, ValueError, "output_layer.skip_bias_add")
    gathered = change(lambda m: setattr(m.output_layer, "gather_output", True))
    if group.size() > 1:
        refused(gathered, ValueError, "gather_output")
    else:
        convert(gathered)  # nothing to gather
    for register in ("register_full_backward_hook", "register_full_backward_pre_hook"):
        hooked = change(lambda m, register=register: getattr(m.output_layer, register)(print))
        refused(hooked, ValueError, "backward hooks")
    refused(torch.nn.Linear(2, 2), TypeError, "LanguageModule.*Linear")
    with pytest.raises(TypeError, match=r"model must be .* got int"):
        convert(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"options must be .* got dict"):
        convert(make_model(), options={})  # pyright: ignore[reportArgumentType]


def refused_methods_on_rank(_group: ProcessGroup) -> None:
    """Heads and losses that compute something else, by a class of their own or replaced on Megatron-Core's."""

    class Capped(ColumnParallelLinear):
        def forward(self, *args: Any, **keywords: Any) -> Any:
            return super().forward(*args, **keywords)

    class Scaled(ColumnParallelLinear):
        def _forward_impl(self, *args: Any, **keywords: Any) -> Any:
            return 2 * super()._forward_impl(*args, **keywords)

    for layer_type in (Capped, Scaled):
        name = f"output_layer.*{layer_type.__name__}"
        refused(change(lambda m, new=layer_type: setattr(m.output_layer, "__class__", new)), TypeError, name)
    refused(change(lambda m: setattr(m.output_layer, "_forward_impl", print)), TypeError, "output_layer")
    # Replaced on the class itself, openly or behind the name of what is wrapped.
    for owner, method, name in (
        (ColumnParallelLinear, "forward", "output_layer"),
        (ColumnParallelLinear, "_forward_impl", "output_layer"),
        (LanguageModule, "compute_language_model_loss", "compute_language_model_loss"),
    ):
        for wrap in (functools.wraps(getattr(owner, method)), lambda function: function):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(owner, method, wrap(lambda: None))
                refused(make_model(), TypeError, name)
    # The dev branch's layer has a forward of its own, which without its own keywords is that of its base.
    Capped.forward.__module__ = "megatron.core.transformer.linear_cross_entropy"
    Capped.forward.__qualname__ = "LinearCrossEntropyModule.forward"
    convert(change(lambda m: setattr(m.output_layer, "__class__", Capped)))

    class OwnLoss(type(make_model())):
        def compute_language_model_loss(self, *args: Any) -> Any:
            return super().compute_language_model_loss(*args)

    refused(change(lambda m: setattr(m, "__class__", OwnLoss)), TypeError, "OwnLoss.compute_language_model_loss")

    class Wrapped(FSDPModule, ColumnParallelLinear):
        pass

    class FsdpModule(ColumnParallelLinear):
        """As Megatron-FSDP's is called."""

    for wrapped in (Wrapped, FsdpModule):
        name = f"fully_shard.* got {wrapped.__name__}"
        refused(change(lambda m, new=wrapped: setattr(m.output_layer, "__class__", new)), ValueError, name)
    model = make_model()
    with converted(model):
        refused(model, ValueError, "converted")
        model.output_layer.__class__ = Wrapped  # after the conversion
        with pytest.raises(ValueError, match="fully_shard"):
            forward(model, make_batch(0), None)


def undo_on_rank(group: ProcessGroup) -> None:
    model = make_model()
    undo = convert(model)
    undo()
    again = convert(model)
    undo()  # is over, and leaves the second conversion alone
    hidden = torch.ones(S, B, H)
    assert isinstance(model.output_layer(hidden)[0], LazyLogits)
    with pytest.raises(RuntimeError, match=r"weight must have .*shape"):
        model.output_layer(hidden, weight=torch.ones(V // group.size() - 1, H))  # stock raises too
    again()
    assert isinstance(model.output_layer(hidden)[0], Tensor)


def function_on_rank(group: ProcessGroup) -> None:
    """The function of Megatron-Core's dev branch."""
    names = ["hidden", "weight", "labels", "tp_group", "reduction", "ignore_index", "sequence_parallel"]
    assert list(inspect.signature(linear_cross_entropy).parameters) == names
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(S, B, H, generator=generator)
    weight = torch.randn(V, H, generator=generator)
    labels = torch.randint(V, (S, B), generator=generator)
    labels[2] = 7
    for sp, reduction in product(with_and_without_sequence_parallelism(group), get_args(Reduction)):
        part = hidden.chunk(group.size())[group.rank()] if sp else hidden
        full, rows = hidden.double().requires_grad_(), weight.double().requires_grad_()
        local, local_rows = part.clone().requires_grad_(), weight.chunk(group.size())[group.rank()].requires_grad_()
        expected = full_logits_cross_entropy(full, rows, labels, reduction=reduction, ignore_index=7)
        if reduction == "none":
            expected = expected.flatten()
        upstream = torch.randn(expected.shape, generator=generator)
        actual = linear_cross_entropy(local, local_rows, labels, group, reduction, 7, sp)
        dhidden, dweight = torch.autograd.grad(expected, (full, rows), upstream.double())
        if sp:
            dhidden = dhidden.chunk(group.size())[group.rank()]
        for one, exact in zip(
            (actual, *torch.autograd.grad(actual, (local, local_rows), upstream)),
            (expected, dhidden, dweight.chunk(group.size())[group.rank()]),
            strict=True,
        ):
            assert max_error(one, exact) < TOLERANCE

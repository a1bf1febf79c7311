"""Real models of Megatron-Core on gloo ranks without CUDA: what it takes to build them, feed them and train them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.mamba import MambaModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import layers as megatron_layers
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vocab_parallel_fused import ComputeOptions
from vocab_parallel_fused.megatron import convert

S, B, H, V = 16, 2, 16, 96
SMALL_BLOCKS = ComputeOptions(workspace_bytes=4096)


class _Apex:
    """The kernels of Apex that add a weight's gradient to ``main_grad``."""

    @staticmethod
    def wgrad_gemm_accum_fp32(hidden: Tensor, dlogits: Tensor, main_grad: Tensor) -> None:
        main_grad.addmm_(dlogits.float().t(), hidden.float())

    @staticmethod
    def wgrad_gemm_accum_fp16(hidden: Tensor, dlogits: Tensor, main_grad: Tensor) -> None:
        main_grad.addmm_(dlogits.t(), hidden)


class _CudaIsCpu(TorchFunctionMode):
    """Megatron-Core's pipelines and optimizers ask for CUDA tensors by name, and look for them by type."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.cuda:
            return args[0]
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        result = func(*args, **kwargs)
        return result.replace("torch.", "torch.cuda.") if func is Tensor.type and isinstance(result, str) else result


class _NoRngState(megatron_random.CudaRNGStatesTracker):
    """Dropout is off, and there is no CUDA generator whose state could be forked."""

    def fork(self, name: str = "") -> Any:  # noqa: ARG002
        return contextlib.nullcontext()


def _norm(cls: type, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:  # noqa: ARG001
    """A layer norm for sequence parallelism, which Megatron-Core's wrapper of torch's refuses."""
    norm = torch.nn.LayerNorm(hidden_size, eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]
    return norm


def _hybrid_block() -> Any:
    """The module of the layers of hybrid models, which moved in 0.18."""
    try:
        return import_module("megatron.core.models.hybrid.hybrid_block")
    except ModuleNotFoundError:
        return import_module("megatron.core.ssm.mamba_block")


def set_up(*, tensor: int, pipeline: int = 1, context: int = 1) -> None:
    """Megatron-Core on this rank, with parallelism of these sizes; data parallelism is what remains."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # pyright: ignore[reportAttributeAccessIssue]
    torch.cuda.current_stream = MagicMock()
    _CudaIsCpu().__enter__()
    megatron_random._CUDA_RNG_STATE_TRACKER = _NoRngState()
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    WrappedTorchNorm.__new__ = _norm  # pyright: ignore[reportAttributeAccessIssue]
    _hybrid_block().TENorm = WrappedTorchNorm
    megatron_layers.fused_weight_gradient_mlp_cuda = _Apex  # pyright: ignore[reportAttributeAccessIssue]
    megatron_layers._grad_accum_fusion_available = True
    # Memory that nobody wrote to holds NaN, so that a dummy gradient shows if it is used.
    torch.use_deterministic_algorithms(True)
    parallel_state.initialize_model_parallel(tensor, pipeline, context_parallel_size=context)


def make_model(
    *,
    tied: bool = False,
    sequence_parallel: bool = False,
    main_grad: bool = False,
    mtp: int | None = None,
    dtype: torch.dtype = torch.float32,
    vocab_size: int = V,
    spec: ModuleSpec | None = None,
    pre_process: bool | None = None,
    post_process: bool | None = None,
    **settings: Any,
) -> Any:
    """This rank's part of a GPT, the same at every call."""
    torch.manual_seed(0)
    pipeline = parallel_state.get_pipeline_model_parallel_world_size()
    config = TransformerConfig(
        num_layers=pipeline,
        hidden_size=H,
        num_attention_heads=4,
        use_cpu_initialization=True,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=pipeline,
        pipeline_dtype=dtype,
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
        sequence_parallel=sequence_parallel,
        gradient_accumulation_fusion=main_grad,
        mtp_num_layers=mtp,
        params_dtype=dtype,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        batch_p2p_sync=False,
        init_method_std=0.3,
        **settings,
    )
    spec = spec or get_gpt_layer_local_spec()
    stage: dict[str, Any] = {
        "pre_process": parallel_state.is_pipeline_first_stage() if pre_process is None else pre_process,
        "post_process": parallel_state.is_pipeline_last_stage() if post_process is None else post_process,
    }
    with_mtp = mtp is not None and stage["post_process"]
    model = GPTModel(
        config,
        spec,
        vocab_size,
        max_sequence_length=64,
        **stage,
        share_embeddings_and_output_weights=tied,
        mtp_block_spec=get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False) if with_mtp else None,  # pyright: ignore[reportArgumentType]
    )
    return model.to(dtype)


def without_attention() -> ModuleSpec:
    """A layer for context parallelism and packed sequences, which attention without Transformer Engine refuses."""
    spec = get_gpt_layer_local_spec()
    mask_type = {"attn_mask_type": AttnMaskType.causal}  # heads for multi-token prediction ask for it
    submodules: Any = spec.submodules
    submodules.self_attention = ModuleSpec(module=IdentityOp, params=mask_type)
    submodules.self_attn_bda = IdentityFuncOp
    return spec


def make_hybrid_model(**settings: Any) -> Any:
    """A model that is no GPT. Layers of state spaces need CUDA, so it has none."""
    block, layer = _hybrid_block(), get_gpt_layer_local_spec()
    kind = "Hybrid" if hasattr(block, "HybridStack") else "Mamba"
    mlp_layer = ModuleSpec(module=MLPLayer, submodules=layer.submodules)
    submodules = getattr(block, f"{kind}StackSubmodules")(attention_layer=layer, mlp_layer=mlp_layer)
    spec = ModuleSpec(module=getattr(block, f"{kind}Stack"), submodules=submodules)
    config = make_model(**settings).config
    config.num_layers = 2
    return MambaModel(config, spec, V, 64, hybrid_override_pattern="*-", position_embedding_type="rope")


def data_parallel(model: Any, **settings: Any) -> Any:
    """Megatron-Core's own wrapper, which gives every parameter a ``main_grad``, in fp32 unless told otherwise."""
    config = DistributedDataParallelConfig(**{"grad_reduce_in_fp32": True, **settings})
    return DistributedDataParallel(model.config, config, model)


class Batch(NamedTuple):
    tokens: Tensor  # [b, s]
    labels: Tensor  # [b, s]
    mask: Tensor  # [b, s] random upstream gradient of each token's loss, 0 for some
    position: Tensor  # [b, s]


def make_batch(seed: int, *, sequence: int = S, vocab_size: int = V) -> Batch:
    """This rank's part of a batch under context parallelism; else all of it."""
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(vocab_size, (2, B, sequence), generator=generator)
    labels[0, :2] = torch.tensor([0, vocab_size - 1])
    mask = torch.randn(B, sequence, generator=generator)
    mask[:, 3] = 0.0
    labels[:, 3] = torch.tensor([-1, -100])  # the loss mask of Megatron-Core hides them
    rank, ranks = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    # The earliest and the latest part for the first rank, and so on, as Megatron-Core's own data loader does.
    parts = [rank, 2 * ranks - 1 - rank]
    return Batch(
        *(
            torch.cat([whole.chunk(2 * ranks, dim=1)[part] for part in parts], dim=1)
            for whole in (tokens, labels, mask, torch.arange(sequence).expand_as(tokens))
        )
    )


def forward(model: Any, batch: Batch, labels: Tensor | None, **keywords: Any) -> Tensor:
    """Losses ``[b, s]``, or logits without labels; hidden states where the pipeline goes on."""
    attention_mask = torch.ones(2 * (batch.tokens.shape[1],), dtype=torch.bool).triu(1)[None, None]
    # Heads for multi-token prediction are given the mask too.
    if isinstance(model, (GPTModel, DistributedDataParallel)):
        keywords = {"loss_mask": (batch.mask != 0).float()} | keywords
    return model(batch.tokens, batch.position, attention_mask, labels=labels, **keywords)


class Outcome(NamedTuple):
    losses: list[Tensor]  # [b, s] of each micro-batch, 0 where masked
    tensors: dict[str, Tensor]  # gradients, or parameters after some steps, by their names


def accumulate(model: Any, batches: list[Batch], **keywords: Any) -> Outcome:
    """Losses of micro-batches and the sums of their gradients, in ``main_grad`` if the model is data-parallel."""
    model.zero_grad(set_to_none=True)
    if isinstance(model, DistributedDataParallel):
        model.zero_grad_buffer()
    losses = []
    for batch in batches:
        loss = forward(model, batch, batch.labels, **keywords)
        assert loss.shape == batch.labels.shape
        assert loss.dtype == torch.float32
        losses.append((loss * (batch.mask != 0)).detach())
        (loss * batch.mask).sum().backward()
    if isinstance(model, DistributedDataParallel):
        model.finish_grad_sync()
        parameters: dict[str, Any] = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
        return Outcome(losses, {name: p.main_grad.clone() for name, p in parameters.items()})
    return Outcome(losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def train(model: Any, *, steps: int = 3, micro_batches: int = 3) -> Outcome:
    """Losses and parameters of steps with Megatron-Core's schedules, distributed optimizer and both overlaps."""
    wrapped = data_parallel(
        model, use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=2000
    )
    # Adam divides by the gradient's size, so without a large epsilon it would show the rounding of gradients near 0.
    settings = OptimizerConfig(
        optimizer="adam", lr=0.05, adam_eps=0.1, use_distributed_optimizer=True, overlap_param_gather=True
    )
    optimizer = get_megatron_optimizer(settings, [wrapped])
    config = model.config
    config.no_sync_func, config.grad_scale_func = wrapped.no_sync, optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    losses: list[Tensor] = []

    def forward_step(batches: Iterator[Batch], chunk: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        batch = next(batches)

        def reduce(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            losses.append((output * (batch.mask != 0)).detach())
            return (output * batch.mask).mean(), {}

        return forward(chunk, batch, batch.labels), reduce

    replica = parallel_state.get_data_parallel_rank()
    for step in range(steps):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        seeds = range(micro_batches * (2 * step + replica), micro_batches * (2 * step + replica + 1))
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=(make_batch(seed) for seed in seeds),
            model=[wrapped],
            num_microbatches=micro_batches,
            seq_length=S,
            micro_batch_size=B,
        )
        optimizer.step()
    wrapped.disable_forward_pre_hook(param_sync=True)
    return Outcome(losses, {name: p.detach().clone() for name, p in model.named_parameters()})


def attribute_names(model: torch.nn.Module) -> list[set[str]]:
    return [set(vars(module)) for module in model.modules()]


@contextlib.contextmanager
def converted(model: torch.nn.Module) -> Iterator[None]:
    undo = convert(model, options=SMALL_BLOCKS)
    yield
    undo()

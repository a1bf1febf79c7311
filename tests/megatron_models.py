"""Real models of Megatron-Core on gloo ranks without CUDA: what it takes to build them, feed them and train them."""

from __future__ import annotations

import contextlib
import multiprocessing.dummy
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.bert.bert_model import BertModel
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
from megatron_model import CpuForCuda, NoGenerators
from torch import Tensor
from torch.nn import ModuleList

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


def set_up(*, tensor: int, pipeline: int = 1, virtual: int | None = None, context: int = 1) -> None:
    """Megatron-Core on this rank, with parallelism of these sizes; data parallelism is what remains.

    ``virtual`` is the number of chunks on each stage of an interleaved pipeline.
    """
    torch.cuda.current_device = lambda: torch.device("cpu")  # pyright: ignore[reportAttributeAccessIssue]
    torch.cuda.current_stream = torch.cuda.synchronize = MagicMock()
    CpuForCuda().__enter__()
    megatron_random._CUDA_RNG_STATE_TRACKER = NoGenerators()
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    WrappedTorchNorm.__new__ = _norm  # pyright: ignore[reportAttributeAccessIssue]
    _hybrid_block().TENorm = WrappedTorchNorm
    megatron_layers.fused_weight_gradient_mlp_cuda = _Apex  # pyright: ignore[reportAttributeAccessIssue]
    megatron_layers._grad_accum_fusion_available = True
    # Memory that nobody wrote to holds NaN, so that a dummy gradient shows if it is used.
    torch.use_deterministic_algorithms(True)
    # The ranks of a test may start no processes, so threads write checkpoints. Their memory is only logged.
    filesystem_async.mp = SimpleNamespace(get_context=lambda _: multiprocessing.dummy)
    filesystem_async._process_memory = lambda: 0
    parallel_state.initialize_model_parallel(tensor, pipeline, virtual, context_parallel_size=context)


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
    vp_stage: int | None = None,
    **settings: Any,
) -> Any:
    """This rank's part of a GPT, the same at every call. Each chunk of a pipeline has one layer."""
    torch.manual_seed(0)
    pipeline = parallel_state.get_pipeline_model_parallel_world_size()
    chunks = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    config = TransformerConfig(
        num_layers=pipeline * (chunks or 1),
        hidden_size=H,
        num_attention_heads=4,
        use_cpu_initialization=True,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=chunks,
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
        # Between the same two ranks, interleaved stages must not send several messages at a time.
        overlap_p2p_comm=chunks is not None,
        batch_p2p_comm=chunks is None,
        init_method_std=0.3,
        **settings,
    )
    spec = spec or get_gpt_layer_local_spec()
    is_first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    stage: dict[str, Any] = {
        "pre_process": is_first if pre_process is None else pre_process,
        "post_process": is_last if post_process is None else post_process,
        "vp_stage": vp_stage,
    }
    mtp_block_spec = None
    if mtp is not None and stage["post_process"]:
        mtp_block_spec = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False, vp_stage=vp_stage)
    model = GPTModel(
        config,
        spec,
        vocab_size,
        max_sequence_length=64,
        **stage,
        share_embeddings_and_output_weights=tied,
        # Sharded checkpoints take no two stages with learned positions, nor CPUs rotary ones under context parallelism.
        position_embedding_type="learned_absolute" if pipeline == 1 else "rope",
        mtp_block_spec=mtp_block_spec,  # pyright: ignore[reportArgumentType]
    )
    return model.to(dtype)


def make_chunks(**settings: Any) -> list[Any]:
    """This rank's parts of a GPT: several if its pipeline is interleaved."""
    chunks = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    return [make_model(**settings, vp_stage=stage) for stage in ([None] if chunks is None else range(chunks))]


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


def make_bert(*, tied: bool = False, **settings: Any) -> BertModel:
    """A model whose head has a bias."""
    config = make_model(**settings).config
    return BertModel(
        *(config, 0, bert_layer_local_spec, V, 64), share_embeddings_and_output_weights=tied, add_binary_head=False
    )


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
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    if isinstance(bare, BertModel):
        return model(batch.tokens, torch.ones_like(batch.tokens), lm_labels=labels)[0]
    attention_mask = torch.ones(2 * (batch.tokens.shape[1],), dtype=torch.bool).triu(1)[None, None]
    # Heads for multi-token prediction are given the mask too.
    if isinstance(bare, GPTModel):
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


class Training:
    """Of this rank's chunks, with Megatron-Core's schedules, distributed optimizer and both overlaps."""

    def __init__(self, chunks: list[Any]) -> None:
        self.chunks = chunks
        self.micro_batches = 2 * len(chunks)  # with fewer, interleaved stages do all forwards before any backward
        overlap: dict[str, Any] = {"use_distributed_optimizer": True, "overlap_param_gather": True}
        self.wrapped = [data_parallel(chunk, **overlap, overlap_grad_reduce=True, bucket_size=2000) for chunk in chunks]
        # Adam divides by the gradient's size, so without a large epsilon it shows the rounding of gradients near 0.
        settings = OptimizerConfig(optimizer="adam", lr=0.1, adam_eps=0.1, **overlap)
        self.optimizer: Any = get_megatron_optimizer(settings, self.wrapped)
        config = chunks[0].config
        no_sync = [chunk.no_sync for chunk in self.wrapped]
        config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
        config.grad_scale_func = self.optimizer.scale_loss
        config.finalize_model_grads_func = finalize_model_grads

    def run(self, steps: Iterable[int]) -> Outcome:
        """Losses of these steps and the parameters after them."""
        losses: list[Tensor] = []

        def forward_step(batches: Iterator[Batch], chunk: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
            batch = next(batches)

            def reduce(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                losses.append((output * (batch.mask != 0)).detach())
                return (output * batch.mask).mean(), {}

            return forward(chunk, batch, batch.labels), reduce

        replica, micro_batches = parallel_state.get_data_parallel_rank(), self.micro_batches
        for step in steps:
            for chunk in self.wrapped:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            seeds = range(micro_batches * (2 * step + replica), micro_batches * (2 * step + replica + 1))
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[map(make_batch, seeds) for _ in self.chunks],
                model=self.wrapped,
                num_microbatches=micro_batches,
                seq_length=S,
                micro_batch_size=B,
            )
            self.optimizer.step()
        for chunk in self.wrapped:
            chunk.disable_forward_pre_hook(param_sync=True)
            chunk.enable_forward_pre_hook()
        return Outcome(losses, {name: p.detach().clone() for name, p in ModuleList(self.chunks).named_parameters()})

    def save(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        dist_checkpointing.save(self._sharded_state_dict(is_loading=False), str(folder))

    @torch.no_grad()  # the optimizer of an fp32 model copies into the parameters themselves
    def load(self, folder: Path) -> None:
        """After a step, which makes the optimizer's state."""
        saved: Any = dist_checkpointing.load(self._sharded_state_dict(is_loading=True), str(folder))
        for i, chunk in enumerate(self.chunks):
            chunk.load_state_dict(saved[f"model{i}"])
        self.optimizer.load_state_dict(saved["optimizer"])
        # Torch's Adam, in place of Apex's, counts the steps of each parameter, which Megatron-Core does not load.
        step = saved["optimizer"]["optimizer"]["param_groups"][0]["step"]
        for optimizer in self.optimizer.chained_optimizers:
            for state in optimizer.optimizer.state.values():
                state["step"] = torch.tensor(float(step))

    def _sharded_state_dict(self, *, is_loading: bool) -> dict[str, Any]:
        metadata = {
            "distrib_optim_sharding_type": "dp_reshardable",
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        models = {f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(self.chunks)}
        optimizer = self.optimizer.sharded_state_dict(models, is_loading=is_loading, metadata=metadata)
        return models | {"optimizer": optimizer}


def attribute_names(model: torch.nn.Module) -> list[set[str]]:
    return [set(vars(module)) for module in model.modules()]


@contextlib.contextmanager
def converted(model: torch.nn.Module) -> Iterator[None]:
    undo = convert(model, options=SMALL_BLOCKS)
    yield
    undo()

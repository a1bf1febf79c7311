"""A GPT of Megatron-Core that needs neither Apex nor Transformer Engine, its data parallelism and its optimizer.

The model has the proportions of Llama 3: RMSNorm, rotary positions, grouped queries, SwiGLU, untied embeddings.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import megatron_wgrad  # noqa: F401  before Megatron-Core, which looks for Apex while it is imported
import torch
import torch.distributed as dist
import torch.nn.functional as F
from bootstrap import Context
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_HEAD_SIZE = 128


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What the models that are compared have in common."""

    num_layers: int
    hidden_size: int
    vocab_size: int
    """Rows of the embedding and of the head on all ranks together."""
    sequence_length: int
    dtype: torch.dtype


@contextlib.contextmanager
def model_parallel(context: Context, tensor_parallel_size: int) -> Iterator[None]:
    """Let Megatron-Core divide the ranks into groups for tensor and for data parallelism."""
    if context.group is None:  # Megatron-Core wants a group even for one rank
        backend = "nccl" if context.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    parallel_state.initialize_model_parallel(tensor_parallel_size, create_gloo_process_groups=False)
    with contextlib.nullcontext() if context.device.type == "cuda" else _cpu_in_place_of_cuda():
        yield
    parallel_state.destroy_model_parallel()
    if context.group is None:
        dist.destroy_process_group()


class Trainer:
    """A model, the buffers of its gradients, and its optimizer, all Megatron-Core's.

    Args:
        architecture: of the model.
        seed: of the initial weights.
        fused_loss: whether Megatron-Core computes its loss of stored logits with its own fused functions.
        plug_in: changes the model before it is wrapped for data parallelism.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        seed: int,
        device: torch.device,
        fused_loss: bool = False,
        plug_in: Callable[[nn.Module], object] | None = None,
    ) -> None:
        torch.manual_seed(seed)
        if device.type == "cuda":
            tensor_parallel.model_parallel_cuda_manual_seed(seed)
        config = _transformer_config(architecture, on_cpu=device.type == "cpu", fused_loss=fused_loss)
        norm: Any = _RMSNorm
        layer: Any = get_gpt_layer_local_spec(normalization=config.normalization)
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
        layer.submodules.self_attention.submodules.core_attention = _FlashAttention
        block: Any = TransformerBlockSubmodules(layer_specs=[layer] * architecture.num_layers, layer_norm=norm)
        model = GPTModel(
            config,
            block,
            architecture.vocab_size,
            architecture.sequence_length,
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
            rotary_base=500_000,
        )
        if plug_in is not None:
            plug_in(model)
        data_parallelism = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        self.model: Any = DistributedDataParallel(config, data_parallelism, model)
        self.optimizer: Any = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=0.0,  # each step has its own
                adam_beta2=0.95,
                weight_decay=0.1,
                clip_grad=1.0,
                bf16=config.bf16,
                params_dtype=config.params_dtype,
                use_distributed_optimizer=True,
            ),
            [self.model],
            use_gloo_process_groups=False,
        )
        if isinstance(self.optimizer.optimizer, torch.optim.AdamW):
            # Without Apex. Its loop over tensors would make temporary copies as large as all parameters, which would
            # hide what the head needs.
            for group in self.optimizer.optimizer.param_groups:
                group["fused"] = True

    def compute_gradients(self, windows: Tensor, micro_batch_size: int) -> Tensor:
        """The mean loss ``[]`` in fp64 of windows ``[B, L + 1]``; leaves its gradients in the ``main_grad`` of all."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        micro_batches = windows.split(micro_batch_size)
        positions = torch.arange(windows.shape[1] - 1, device=windows.device)
        # fp64, so that small differences between two trainings are not rounded away.
        total = torch.zeros((), dtype=torch.float64, device=windows.device)
        for number, batch in enumerate(micro_batches, start=1):
            with contextlib.nullcontext() if number == len(micro_batches) else self.model.no_sync():
                tokens, labels = batch[:, :-1], batch[:, 1:]
                losses = self.model(tokens, positions.expand_as(tokens), None, labels=labels)  # [b, s]
                (losses.mean() / len(micro_batches)).backward()
            total += losses.detach().sum(dtype=torch.float64)
        finalize_model_grads([self.model])
        return total / windows[:, 1:].numel()

    def update_parameters(self, learning_rate: float) -> None:
        """One step of AdamW with a clipped gradient."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()

    def state_bytes(self) -> dict[str, int]:
        """What of this rank's memory stays between steps: parameters, fp32 gradients, and the optimizer's tensors."""
        parameters = list(self.model.parameters())
        optimizer = self.optimizer.optimizer
        masters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        moments = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        # In fp32 the optimizer updates the parameters themselves, and has no others.
        storages = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        own = [tensor for tensor in masters if tensor.untyped_storage().data_ptr() not in storages]
        return {
            "parameters": sum(tensor.nbytes for tensor in parameters),
            "gradients": sum(tensor.main_grad.nbytes for tensor in parameters),
            "optimizer": sum(tensor.nbytes for tensor in own + moments),
        }


def _transformer_config(architecture: Architecture, *, on_cpu: bool, fused_loss: bool) -> TransformerConfig:
    tensor_parallel_size = parallel_state.get_tensor_model_parallel_world_size()
    num_heads = max(architecture.hidden_size // _HEAD_SIZE, tensor_parallel_size)
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=7 * architecture.hidden_size // 2,
        num_attention_heads=num_heads,
        num_query_groups=max(num_heads // 4, tensor_parallel_size),
        normalization="RMSNorm",
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tensor_parallel_size,
        sequence_parallel=tensor_parallel_size > 1,
        gradient_accumulation_fusion=True,
        params_dtype=architecture.dtype,
        bf16=architecture.dtype == torch.bfloat16,
        cross_entropy_loss_fusion=fused_loss,
        cross_entropy_fusion_impl="native",
        use_cpu_initialization=on_cpu,
        # Kernels of Apex and Transformer Engine.
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
    )


class _RMSNorm(nn.RMSNorm):
    """torch's norm for sequence parallelism, which Megatron-Core's own wrapper of it refuses."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__(hidden_size, eps, device=torch.cuda.current_device(), dtype=config.params_dtype)
        # Each rank has the gradient of its own tokens; Megatron-Core adds up what is marked so.
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]


class _FlashAttention(nn.Module):
    """Causal attention without stored scores, which at long sequences would take more memory than the logits."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()
        assert config.attention_dropout == 0.0

    def forward(self, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, **_: Any) -> Tensor:
        """``[s, b, heads, d]`` and twice ``[s, b, groups, d]`` to ``[s, b, heads · d]``."""
        query, key, value = (states.permute(1, 2, 0, 3) for states in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return attended.permute(2, 0, 1, 3).flatten(2)


@contextlib.contextmanager
def _cpu_in_place_of_cuda() -> Iterator[None]:
    """Let Megatron-Core run on a machine without CUDA, whose name is written into many of its functions."""
    cuda = patch.multiple(torch.cuda, current_device=lambda: torch.device("cpu"), current_stream=lambda: None)
    generators = patch.multiple(
        megatron_random, _CUDA_RNG_STATE_TRACKER=NoGenerators(), _CUDA_RNG_STATE_TRACKER_INITIALIZED=True
    )
    with cuda, generators, CpuForCuda():
        yield


class NoGenerators(megatron_random.CudaRNGStatesTracker):
    """For a model without dropout on a machine without CUDA generators."""

    def fork(self, name: str = "") -> Any:  # noqa: ARG002
        return contextlib.nullcontext()


class CpuForCuda(TorchFunctionMode):
    """Makes tensors on the CPU that are wanted on CUDA, and calls their type what Megatron-Core's optimizer expects."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.cuda:
            return args[0]
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        result = func(*args, **kwargs)
        return result.replace("torch.", "torch.cuda.") if func is Tensor.type and isinstance(result, str) else result

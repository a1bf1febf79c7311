"""Plug-in for Megatron-Core: its models train with the fused loss, and are otherwise what they were.

Every language model of Megatron-Core, in every version from 0.16.1 on, computes its loss in two calls:

    logits, _ = self.output_layer(hidden, weight=…, runtime_gather_output=…)      # [s, b, V_local]
    loss = self.compute_language_model_loss(labels, logits)                       # labels and loss [b, s]

:func:`convert` replaces these two, on the instances: the first then returns :class:`LazyLogits`, a note of what the
logits would be made of, and the second gives that to :func:`vocab_parallel_fused.linear_cross_entropy`. Modules,
parameters, hooks and checkpoints stay as they are. With ``s`` the sequence length and ``b`` the batch size, hidden
states are ``[s, b, H]``, or ``[s / R, b, H]`` under sequence parallelism.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_map_only

from vocab_parallel_fused import functional
from vocab_parallel_fused.collectives import Group, gather_hidden, rank_and_size, resolve_group
from vocab_parallel_fused.functional import Reduction
from vocab_parallel_fused.options import ComputeOptions

_IGNORED = -100

# Settings under which more than the loss uses the head's logits or its gradients, with the values that do not.
_OF_CONFIG: dict[str, tuple[Any, ...]] = {
    "defer_embedding_wgrad_compute": (False,),  # the weight's gradient is made elsewhere, of stored dlogits
    "config_logger_dir": ("",),  # logits are written to disk
    "cross_entropy_fusion_impl": ("native", "te"),  # "linear": the head is asked for losses, not logits
}
_OF_LAYER: dict[str, tuple[Any, ...]] = {
    "skip_bias_add": (False,),
    "disable_grad_reduce": (False,),
    "explicit_expert_comm": (False,),
    "gtp_remat_size": (1,),  # the weight is gathered for the forward of its layer alone
}
# By name, as a class whose method was replaced is not its own witness. The dev branch's layer can compute losses too,
# and otherwise does what its base does.
_KNOWN_METHODS = (
    "megatron.core.models.common.language_module.language_module.LanguageModule.compute_language_model_loss",
    "megatron.core.tensor_parallel.layers.ColumnParallelLinear._forward_impl",
    "megatron.core.tensor_parallel.layers.ColumnParallelLinear.forward",
    "megatron.core.transformer.linear_cross_entropy.LinearCrossEntropyModule.forward",
)
# Python looks for operators on the type, and passes `__getattr__` by.
_OPERATORS = """
    add radd iadd sub rsub isub imul rtruediv itruediv floordiv rfloordiv ifloordiv mod rmod imod pow rpow ipow
    matmul rmatmul neg pos abs invert and rand iand or ror ior xor rxor ixor
    eq ne lt le gt ge bool float int len iter contains getitem setitem
""".split()  # noqa: SIM905 (reads better than fifty strings)


def convert(model: nn.Module | Sequence[nn.Module], *, options: ComputeOptions | None = None) -> Callable[[], None]:
    """Let the language models in ``model`` compute their losses without logits.

    For released Megatron-Core from 0.16.1 on: GPT, Mamba and hybrid models with their heads for multi-token
    prediction, alone or inside others, before or after they are wrapped for data parallelism. Call it on every
    pipeline stage; those without an output layer are left alone. What the model returns without labels, and what it
    returns for inference, has the bits that it had; so have its state dict and its parameters. With
    ``gradient_accumulation_fusion`` the weight's gradient is added to its ``main_grad`` in the product that makes it.

    As in Megatron-Core, rows that pad the vocabulary take part in the softmax. A label outside the vocabulary has loss
    0 and no gradient: Megatron-Core leaves it to the loss mask to hide such a token.

    Args:
        model: a model, or the chunks of a virtual pipeline.
        options: how to compute. ``accumulate_main_grad`` follows the model's own setting.

    Returns:
        A function of no arguments that makes the model what it was.

    Raises:
        TypeError: there is no language model, or one that computes its logits or its loss in a way of its own.
        ValueError: a setting of the model needs logits; the message names it. Nothing has been changed then.
    """
    options = ComputeOptions() if options is None else options
    if not isinstance(options, ComputeOptions):
        raise TypeError(f"options must be a ComputeOptions or None, got {type(options).__name__}")
    chunks = [model] if isinstance(model, nn.Module) else model
    if not isinstance(chunks, Sequence) or not all(isinstance(chunk, nn.Module) for chunk in chunks):
        raise TypeError(f"model must be a Module or a sequence of them, got {type(model).__name__}")
    language_models = [module for chunk in chunks for module in chunk.modules() if isinstance(module, LanguageModule)]
    if not language_models:
        raise TypeError(f"model must hold a LanguageModule of Megatron-Core, got {type(model).__name__}")
    converted: list[Any] = [module for module in language_models if getattr(module, "output_layer", None) is not None]
    for module in converted:
        _check(module)
    for module in converted:
        module.output_layer.forward = partial(_forward, module.output_layer)
        module.compute_language_model_loss = partial(_compute_language_model_loss, module, options)

    def undo() -> None:
        while converted:  # once: the model may be converted again
            module = converted.pop()
            vars(module.output_layer).pop("forward", None)
            vars(module).pop("compute_language_model_loss", None)

    return undo


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    tp_group: Group = None,
    reduction: Reduction = "mean",
    ignore_index: int = _IGNORED,
    sequence_parallel: bool = False,
) -> Tensor:
    """The function of this name in ``megatron.core.transformer.linear_cross_entropy`` of Megatron-Core's dev branch.

    Put in its place there, it computes the losses of models with ``cross_entropy_fusion_impl="linear"``.

    Args:
        hidden: ``[s, b, H]``, or ``[s / R, b, H]`` with ``sequence_parallel``.
        weight: ``[V_local, H]``.
        labels: ``[s, b]`` int64 global ids.
        tp_group: the tensor-parallel group; None: one rank.
        reduction, ignore_index, sequence_parallel: as in :func:`vocab_parallel_fused.linear_cross_entropy`.

    Returns:
        The loss in fp32, flat ``[s · b]`` or ``[]``.
    """
    loss = functional.linear_cross_entropy(
        hidden,
        weight,
        labels,
        reduction=reduction,
        ignore_index=ignore_index,
        group=tp_group,
        sequence_parallel=sequence_parallel,
    )
    return loss.flatten() if reduction == "none" else loss


@dataclass(eq=False, repr=False)
class LazyLogits:
    """The logits ``[s, b, V_local]`` of this rank's rows, before anybody needs them.

    To scale them, to ask for their shape, dtype or device, or for the largest of each token computes none. Other
    methods, operators, indices and torch functions are those of the logits themselves, which then come from
    Megatron-Core's own forward and the weight as it is at that moment. The loss is Megatron-Core's own then too, and
    sends other messages: all ranks of the group must ask for logits, or none.
    """

    layer: ColumnParallelLinear
    hidden: Tensor  # [s, b, H], or [s / R, b, H] under sequence parallelism; any number of dimensions
    weight: Tensor  # [V_local, H]
    sequence_parallel: bool  # the layer's when it was called, not when logits are needed: inference toggles it
    scale: float = 1.0
    with_grad: bool = field(default_factory=torch.is_grad_enabled)  # likewise: who looks at logits may need no gradient

    @property
    def is_materialized(self) -> bool:
        """Whether somebody holds the logits, who may have changed them."""
        return "materialized" in vars(self)

    @property
    def group(self) -> ProcessGroup | None:
        return resolve_group(self.layer.tp_group)

    @property
    def shape(self) -> torch.Size:
        sequence, *others = self.hidden.shape[:-1]
        if self.sequence_parallel:
            sequence *= rank_and_size(self.group)[1]
        return torch.Size((sequence, *others, self.weight.shape[0]))

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def dim(self) -> int:
        return self.hidden.ndim

    @property
    def ndim(self) -> int:
        return self.hidden.ndim

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def is_cuda(self) -> bool:
        return self.hidden.is_cuda

    @property
    def dtype(self) -> torch.dtype:
        kind = self.hidden.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.hidden.dtype

    @property
    def requires_grad(self) -> bool:
        inputs = (self.hidden, self.weight, self.layer.bias)
        return self.with_grad and any(tensor is not None and tensor.requires_grad for tensor in inputs)

    def __mul__(self, scale: Any) -> Any:
        if isinstance(scale, (int, float)) and not self.is_materialized:
            return replace(self, scale=self.scale * scale)
        return self.materialized * scale

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Any:
        if isinstance(divisor, (int, float)) and divisor != 0 and not self.is_materialized:
            return replace(self, scale=self.scale / divisor)
        return self.materialized / divisor

    def max(self, dim: int | None = None, **keywords: Any) -> Any:
        """Along the last dimension: the largest logit of this rank's rows and its row, ``[s, b]``, no gradient."""
        if dim not in (-1, self.ndim - 1) or keywords or self.is_materialized:
            return self.materialized.max(*(() if dim is None else (dim,)), **keywords)
        with torch.no_grad():
            hidden = gather_hidden(self.hidden, self.group) if self.sequence_parallel else self.hidden
            stats = functional.linear_token_stats(
                hidden,
                self.weight,
                outputs=("argmax_logit", "argmax"),
                linear_bias=self.layer.bias,
                logit_scale=self.scale,
            )
        assert stats.argmax_logit is not None
        assert stats.argmax is not None
        return torch.return_types.max((stats.argmax_logit.to(hidden.dtype), stats.argmax))

    @cached_property
    def materialized(self) -> Tensor:
        """The logits."""
        layer = self.layer
        now, layer.sequence_parallel = layer.sequence_parallel, self.sequence_parallel
        try:
            # Who looks at them in inference mode may not be the last to use them.
            with torch.inference_mode(False), torch.set_grad_enabled(self.with_grad):
                logits, _ = ColumnParallelLinear.forward(layer, self.hidden, self.weight, False)
                return logits if self.scale == 1.0 else logits * self.scale
        finally:
            layer.sequence_parallel = now

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # protocols of Python are asked for by copy and pickle, not by users of logits
        return getattr(self.materialized, name)

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.argmax and kwargs == {"dim": -1} and isinstance(args[0], LazyLogits):
            return args[0].max(dim=-1).indices
        args, kwargs = tree_map_only(LazyLogits, lambda logits: logits.materialized, (args, kwargs or {}))
        return func(*args, **kwargs)


def _of_logits(operator: str) -> Callable[..., Any]:
    return lambda self, *operands: getattr(self.materialized, operator)(*operands)


for _name in _OPERATORS:
    setattr(LazyLogits, f"__{_name}__", _of_logits(f"__{_name}__"))


def _forward(
    layer: ColumnParallelLinear,
    input_: Tensor,
    weight: Tensor | None = None,
    runtime_gather_output: bool | None = None,
) -> tuple[Tensor | LazyLogits, Tensor | None]:
    """``ColumnParallelLinear.forward`` of an output layer whose logits may not be needed."""
    if runtime_gather_output:
        return ColumnParallelLinear.forward(layer, input_, weight, runtime_gather_output)
    _check_hooks(layer)  # again: they, and data parallelism, may have been set up after the conversion
    weight = layer.weight if weight is None else weight
    if weight is None:
        raise RuntimeError("weight must be given to an output layer that shares the embedding's, got None")
    expected = (layer.output_size_per_partition, layer.input_size)
    if weight.shape != expected:
        raise RuntimeError(f"weight must have the output layer's shape {expected}, got {tuple(weight.shape)}")
    return LazyLogits(layer, input_, weight, layer.sequence_parallel), None


def _compute_language_model_loss(
    model: LanguageModule, options: ComputeOptions, labels: Tensor, logits: Tensor | LazyLogits
) -> Tensor:
    """``LanguageModule.compute_language_model_loss``, ``[b, s]`` from labels ``[b, s]``."""
    if isinstance(logits, LazyLogits) and logits.is_materialized:
        logits = logits.materialized
    if isinstance(logits, Tensor):
        return LanguageModule.compute_language_model_loss(model, labels, logits)
    layer, weight, accumulate = logits.layer, logits.weight, False
    vocab_size = rank_and_size(logits.group)[1] * weight.shape[0]
    labels = labels.transpose(0, 1).to(torch.int64)
    if layer.gradient_accumulation_fusion and weight.requires_grad:
        weight, accumulate = _into_main_grad(weight)
    loss = functional.linear_cross_entropy(
        logits.hidden,
        weight,
        labels.where((labels >= 0) & (labels < vocab_size), _IGNORED),
        linear_bias=layer.bias,
        reduction="none",
        ignore_index=_IGNORED,
        logit_scale=logits.scale,
        group=logits.group,
        sequence_parallel=logits.sequence_parallel,
        options=replace(options, accumulate_main_grad=accumulate),
    )
    return loss.transpose(0, 1).contiguous()


def _into_main_grad(weight: Tensor) -> tuple[Tensor, bool]:
    """The weight as an input whose gradient ends in ``weight.main_grad``, and whether the op itself shall add it."""
    alias: Tensor = _MainGrad.apply(weight)  # pyright: ignore[reportAssignmentType]
    main_grad = getattr(weight, "main_grad", None)
    in_fp32 = main_grad is not None and main_grad.dtype == torch.float32
    if not in_fp32 or hasattr(weight, "__fsdp_param__"):
        return alias, False
    alias.main_grad = main_grad  # pyright: ignore[reportAttributeAccessIssue]
    return alias, True


class _MainGrad(Function):
    """The identity, whose backward does with the weight's gradient what Megatron-Core's linear layers do.

    ``main_grad`` is that of the forward: heads for multi-token prediction use the weight several times. The gradient is
    None if the op has added it.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.weight, ctx.main_grad = weight, getattr(weight, "main_grad", None)
        ctx.set_materialize_grads(False)
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, dweight: Tensor | None) -> Tensor | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight = ctx.weight
        if hasattr(weight, "__fsdp_param__"):
            # Megatron-FSDP makes room for the gradient only now, and adds up what it finds there.
            weight.main_grad = weight.get_main_grad()
            weight.main_grad.copy_(dweight)
        else:
            weight.main_grad = ctx.main_grad
            if dweight is not None:
                weight.main_grad.add_(dweight)
        if not hasattr(weight, "grad_added_to_main_grad"):
            return None
        weight.grad_added_to_main_grad = True
        # Hooks of data parallelism run on a gradient. Autograd adds that of a shared embedding to it.
        return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)


def _check(model: LanguageModule) -> None:
    """Refuse a model whose logits are more than an input of its loss."""
    layer, config, name = model.output_layer, model.config, type(model).__name__
    if (
        not isinstance(layer, ColumnParallelLinear)
        or not (_is_known(layer, "forward") and _is_known(layer, "_forward_impl"))
        or "_forward_impl" in vars(layer)
    ):
        raise TypeError(f"{name}.output_layer must compute as ColumnParallelLinear does, got {type(layer).__name__}")
    if not _is_known(model, "compute_language_model_loss"):
        raise TypeError(f"{name}.compute_language_model_loss must be LanguageModule's, got one of its own")
    if "forward" in vars(layer) or "compute_language_model_loss" in vars(model):
        raise ValueError(f"{name} must not be converted yet, got one with a forward or a loss that was replaced")
    _, world_size = rank_and_size(resolve_group(layer.tp_group))
    if layer.gather_output and world_size > 1:
        raise ValueError(f"{name}.output_layer.gather_output must be False (parallel_output=True), got True")
    for owner, of, settings in ((config, "config", _OF_CONFIG), (layer, "output_layer", _OF_LAYER)):
        for setting, supported in settings.items():
            value = getattr(owner, setting, supported[0])
            without_effect = setting == "skip_bias_add" and layer.bias is None
            if value not in supported and not without_effect:
                expected = " or ".join(map(repr, supported))
                raise ValueError(f"{name}.{of}.{setting} must be {expected}, got {value!r}")
    _check_hooks(layer)


def _is_known(owner: Any, method: str) -> bool:
    """Whether the method of the owner's type is one that this module knows, with nothing around it."""
    function = getattr(type(owner), method)
    known = f"{function.__module__}.{function.__qualname__}" in _KNOWN_METHODS
    return known and not hasattr(function, "__wrapped__")


def _check_hooks(layer: ColumnParallelLinear) -> None:
    """Refuse what would run too early, or never, where the layer has no logits to return."""
    if layer._backward_hooks or layer._backward_pre_hooks:
        raise ValueError("output_layer must have no backward hooks, which wait for gradients of logits")
    # torch's FSDPModule, and in Megatron-FSDP from 0.19 on an FsdpModule.
    if any(base.__name__.lower() == "fsdpmodule" for base in type(layer).__mro__):
        raise ValueError(
            "output_layer must not be wrapped by fully_shard on its own (use_torch_fsdp2, Megatron-FSDP), which frees "
            f"the weight before the loss; got {type(layer).__name__}"
        )

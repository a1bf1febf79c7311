"""Modules that own this rank's rows of the vocabulary; thin layers over ``functional.py``."""

import copy
import math
import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from typing_extensions import Self, TypedDict, Unpack

from vocab_parallel_fused.arguments import LinearArguments
from vocab_parallel_fused.collectives import Group, resolve_group
from vocab_parallel_fused.functional import (
    LinearTokenStats,
    LinearTopK,
    Reduction,
    linear_cross_entropy,
    linear_token_stats,
    linear_top_k,
)
from vocab_parallel_fused.options import ComputeOptions
from vocab_parallel_fused.sharding import VocabShard, check_size

_INIT_ROWS = 1024


def _whole(parameter: Tensor) -> Tensor:
    """The parameter itself, or memory for all of one of which ``fully_shard`` left a part here."""
    if not isinstance(parameter, DTensor):
        return parameter
    return torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)


class LossArguments(TypedDict, total=False):
    """Keywords of :func:`~vocab_parallel_fused.linear_cross_entropy` that a head keeps for every call."""

    reduction: Reduction
    ignore_index: int
    label_smoothing: float
    z_loss_weight: float
    logit_scale: float
    logit_softcap: float | None
    temperature: float
    sequence_parallel: bool
    options: ComputeOptions | None


class VocabParallelLinearCrossEntropy(nn.Module):
    """A language model's output layer and its loss: this rank's rows of the ``(vocab_size, in_features)`` matrix.

    Args:
        in_features: hidden size ``H``.
        vocab_size: number of classes over the whole group.
        bias: whether there is a bias per class.
        group: process group or one-dimensional device mesh over which the vocabulary is sharded; None: one rank.
        shard: which rows this rank holds. Default: ``VocabShard.even(vocab_size, group)``.
        device, dtype: of the parameters.
        **loss_arguments: keywords of :func:`~vocab_parallel_fused.linear_cross_entropy` for every call, of those that
            :class:`LossArguments` names.

    The parameters are initialised as those of :class:`torch.nn.Linear` are, block of rows by block of rows, so that
    ranks whose random number generators agree hold parts of one matrix that does not depend on how many ranks there
    are. ``state_dict`` holds the local rows as ``weight`` (and ``bias``); ``load_state_dict`` takes those, or the full
    matrix, of which it keeps this rank's rows.

    ``torch.distributed.fsdp.fully_shard`` of a head, over ranks with other tokens, gathers parameters for ``forward``;
    for ``token_stats`` and ``top_k`` too once ``register_fsdp_forward_method(head, "token_stats")`` has named them.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        vocab_size: int,
        *,
        bias: bool = False,
        group: Group = None,
        shard: VocabShard | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **loss_arguments: Unpack[LossArguments],
    ) -> None:
        super().__init__()
        unknown = set(loss_arguments) - set(LossArguments.__annotations__)
        if unknown:
            raise TypeError(f"unexpected keyword arguments {sorted(unknown)}")
        check_size("in_features", in_features)
        check_size("vocab_size", vocab_size)
        self.in_features = in_features
        self.vocab_size = vocab_size
        self.group = resolve_group(group)
        if shard is not None and not isinstance(shard, VocabShard):
            raise TypeError(f"shard must be a VocabShard or None, got {type(shard).__name__}")
        self.shard = VocabShard.even(vocab_size, self.group) if shard is None else shard
        if self.shard.vocab_size != vocab_size:
            raise ValueError(f"shard.vocab_size must be vocab_size {vocab_size}, got {self.shard.vocab_size}")
        self.loss_arguments = loss_arguments
        rows = self.shard.num_rows
        self.weight = nn.Parameter(torch.empty(rows, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw ``U(−1/√H, 1/√H)``, as ``nn.Linear`` does; padding rows are zero.

        One number from the default generator seeds a generator per block of global rows, so every rank draws only the
        blocks it holds a part of, and the default generators of all ranks move on alike. On the meta device nothing is
        drawn: call this again once the parameters have memory. Under ``fully_shard`` each rank then draws all rows of
        its ``shard`` for a moment, and keeps its part.
        """
        seed = int(torch.randint(2**62, (), device="cpu"))
        if self.weight.is_meta:
            return
        bound = 1 / math.sqrt(self.in_features)
        weight, bias = _whole(self.weight).zero_(), None if self.bias is None else _whole(self.bias).zero_()
        start, stop = self.shard.start, self.shard.start + self.shard.num_valid_rows
        for block in range(start // _INIT_ROWS * _INIT_ROWS, stop, _INIT_ROWS):
            generator = torch.Generator(weight.device).manual_seed(seed + block)
            # Weight and bias in one draw of fp32, so that neither dtype nor bias changes the numbers.
            values = torch.empty(_INIT_ROWS, self.in_features + 1, dtype=torch.float32, device=weight.device)
            values.uniform_(-bound, bound, generator=generator)
            first, last = max(start, block), min(stop, block + _INIT_ROWS)
            drawn = values[first - block : last - block]
            weight[first - start : last - start] = drawn[:, :-1].to(weight.dtype)
            if bias is not None:
                bias[first - start : last - start] = drawn[:, -1].to(bias.dtype)
        for parameter, whole in ((self.weight, weight), (self.bias, bias)):
            if isinstance(parameter, DTensor) and whole is not None:
                mesh, placements = parameter.device_mesh, parameter.placements
                parameter.copy_(distribute_tensor(whole, mesh, placements, src_data_rank=None))

    def forward(self, input: Tensor, target: Tensor, token_weight: Tensor | None = None) -> Tensor:
        """The loss of ``input`` ``(*, H)`` for ``target`` ``(*)``, each as in the function."""
        return linear_cross_entropy(
            input,
            self.weight,
            target,
            linear_bias=self.bias,
            token_weight=token_weight,
            group=self.group,
            shard=self.shard,
            **self.loss_arguments,
        )

    def token_stats(
        self, input: Tensor, target: Tensor | None = None, *, outputs: Collection[str] | None = None
    ) -> LinearTokenStats:
        """:func:`~vocab_parallel_fused.linear_token_stats` of this layer: log-probabilities, entropies and more."""
        ignore_index = self.loss_arguments.get("ignore_index", -100)
        return linear_token_stats(
            input, self.weight, target, outputs=outputs, ignore_index=ignore_index, **self.linear_arguments
        )

    def top_k(self, input: Tensor, k: int) -> LinearTopK:
        """:func:`~vocab_parallel_fused.linear_top_k` of this layer: its most probable classes."""
        return linear_top_k(input, self.weight, k, **self.linear_arguments)

    @property
    def linear_arguments(self) -> LinearArguments:
        """What the functions on a linear layer take beside its input and its weight."""
        kept: Any = {
            name: value for name, value in self.loss_arguments.items() if name in LinearArguments.__annotations__
        }
        return LinearArguments(linear_bias=self.bias, group=self.group, shard=self.shard, **kept)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy with its own parameters, in the same group."""
        memo[id(self.group)] = self.group
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, vocab_size={self.vocab_size}, bias={self.bias is not None}, "
            f"rows=[{self.shard.start}, {self.shard.stop})"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in ("weight", "bias"):
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and value.ndim >= 1:
                state_dict[prefix + name] = self._local_part(prefix + name, value)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _local_part(self, key: str, value: Tensor) -> Tensor:
        """This rank's rows of a full matrix, with or without padding rows; anything else as it is."""
        shard = self.shard
        if value.shape[0] == shard.num_rows or value.shape[0] < shard.vocab_size:
            return value
        padding = value[shard.vocab_size :]
        if not (value.is_meta or isinstance(value, DTensor)) and padding.count_nonzero() > 0:
            warnings.warn(
                f"{key} has {value.shape[0]} rows: the last {len(padding)} are taken for padding of a vocabulary of "
                f"{shard.vocab_size} and left out, but are not zero",
                stacklevel=2,
            )
        # A copy: the parameter may be assigned, and must not keep the full matrix alive.
        rows = value[shard.start : shard.stop].clone()
        missing = shard.num_rows - rows.shape[0]
        return rows if missing == 0 else torch.cat((rows, rows.new_zeros(missing, *rows.shape[1:])))

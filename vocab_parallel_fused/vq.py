"""The VQ-Logits head: classes share the rows of a small codebook.

    z_v = x · c_{m(v)}                                    [V] logits, equal for all classes v of one code
    lse = log Σ_v exp z_v = log Σ_k exp(x · c_k + log n_k)      n_k classes on code k
    −log p(y) = (lse − (x · c_{m(y)} + log n_{m(y)})) + log n_{m(y)}

The bracket is the cross-entropy of a linear layer of K classes with bias log n_k, which ``functional.py`` computes: a
class has an equal share of its code's probability. The loss is exact for this model; the model is an approximation of
one with V rows of its own.

Codebook, map and shared logits are those of VQ-Logits (Shao, Huang, Wu, Cheng, Wu, Shan and Zheng, 2025,
arXiv:2505.10202).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from vocab_parallel_fused.arguments import check_target_range
from vocab_parallel_fused.collectives import Group, gather_rows, rank_and_size, resolve_group
from vocab_parallel_fused.cross_entropy import reduce_tokens
from vocab_parallel_fused.functional import Reduction, linear_cross_entropy
from vocab_parallel_fused.modules import VocabParallelLinearCrossEntropy
from vocab_parallel_fused.options import ComputeOptions

_IGNORED_CODE = -100  # no code, whatever the module's own ignore_index is


class VQLinearCrossEntropy(nn.Module):
    """A language model's output layer and its loss, whose classes share the ``num_codes`` rows of a sharded codebook.

    Args:
        in_features: hidden size ``H``.
        vocab_size: number of classes ``V``.
        token_to_code: ``[V]`` int64, the row of the codebook that each class uses, in ``[0, num_codes)``; the same on
            every rank. A copy is kept.
        num_codes: rows ``K`` of the codebook over the whole group. Default: the largest code and one. A code without
            classes has probability 0.
        group: process group or one-dimensional device mesh over which the codebook is sharded, ``ceil(K / R)`` rows to
            each rank until none is left; None: one rank.
        device, dtype: of the codebook (and ``device`` of the buffers).
        reduction, ignore_index, sequence_parallel, options: of :func:`~vocab_parallel_fused.linear_cross_entropy`, for
            every call. What else that function takes would act on the logits of codes instead of classes.

    Raises:
        TypeError: an argument has the wrong type or dtype, or is none of the above.
        ValueError: ``token_to_code`` has the wrong shape or values.

    Attributes:
        codebook: a :class:`~vocab_parallel_fused.VocabParallelLinearCrossEntropy` over the codes. Its ``weight`` holds
            this rank's rows, initialised as they are there; ``load_state_dict`` takes those, or the full codebook.
        token_to_code: ``[V]`` int64 buffer, replicated.
        code_count: ``[K]`` int64 buffer, replicated: how many classes use each code.
    """

    token_to_code: Tensor
    code_count: Tensor

    def __init__(
        self,
        in_features: int,
        vocab_size: int,
        token_to_code: Tensor,
        *,
        num_codes: int | None = None,
        group: Group = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: Reduction = "mean",
        ignore_index: int = -100,
        sequence_parallel: bool = False,
        options: ComputeOptions | None = None,
    ) -> None:
        super().__init__()
        num_codes = _check_map(token_to_code, vocab_size, num_codes)
        if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
            raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")
        self.vocab_size = vocab_size
        self.num_codes = num_codes
        self.reduction: Reduction = reduction
        self.ignore_index = ignore_index
        self.sequence_parallel = sequence_parallel
        self.options = options
        self.codebook = VocabParallelLinearCrossEntropy(
            in_features,
            num_codes,
            group=group,
            device=device,
            dtype=dtype,
        )
        # Counts and not their logarithms: Module.to(torch.bfloat16) would round those.
        count = torch.bincount(token_to_code, minlength=num_codes)
        self.register_buffer("token_to_code", token_to_code.clone().to(self.codebook.weight.device))
        self.register_buffer("code_count", count.to(self.codebook.weight.device))

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls,
        head: nn.Module | Tensor,
        num_codes: int,
        *,
        row_weight: Tensor | None = None,
        group: Group = None,
        seed: int = 0,
        **loss_arguments: Any,
    ) -> Self:
        """Cluster the rows of an existing head with k-means: the codebook holds the centroids, the map the clusters.

        Rank 0 clusters and the others receive its result, so that all have one map. While it does, they wait in a
        collective: mind the group's timeout where ``V · K · H`` is large. A sharded head is gathered on every rank.

        Args:
            head: a :class:`~vocab_parallel_fused.VocabParallelLinearCrossEntropy`; another module with a ``weight``
                ``(V, H)``, such as :class:`torch.nn.Linear` or :class:`torch.nn.Embedding`; or such a tensor. It must
                have no bias.
            num_codes: number of clusters ``K``, at most ``V``.
            row_weight: ``[V]``, positive: how much the distance of each row from its centroid counts. How often each
                class occurs in the training text, plus one, leaves frequent classes a code of their own. Default: all
                alike.
            group: as in the constructor. Default: that of a sharded head.
            seed: of ``sklearn.cluster.KMeans``.
            **loss_arguments: the constructor's, from ``reduction`` on.

        Returns:
            A head with a codebook of ``head``'s dtype and device.

        Raises:
            ImportError: scikit-learn is missing.
            TypeError, ValueError: an argument is none of the above, or the weight is not finite.
        """
        weight = _weight_of(head)
        vocab_size = len(weight)
        if isinstance(head, VocabParallelLinearCrossEntropy):
            vocab_size = head.vocab_size
            group = head.group if group is None else group
        _check_num_codes(num_codes, largest=vocab_size)
        _check_row_weight(row_weight, vocab_size)
        k_means = _k_means(num_codes, seed)
        group = resolve_group(group)
        if isinstance(head, VocabParallelLinearCrossEntropy):
            weight = gather_rows(weight[: head.shard.num_valid_rows], head.shard.start, vocab_size, head.group)
        # All checks are made on every rank: the others would wait for a rank that fails alone.
        if not weight.isfinite().all():
            raise ValueError("head must have a finite weight, got infinite or NaN elements")

        token_to_code, centroids = torch.empty(0, dtype=torch.int64, device=weight.device), weight[:0]
        rank, _ = rank_and_size(group)
        if rank == 0:
            rows = weight.to(torch.promote_types(weight.dtype, torch.float32)).cpu().numpy()
            k_means.fit(rows, sample_weight=None if row_weight is None else row_weight.double().cpu().numpy())
            token_to_code = torch.from_numpy(k_means.labels_).to(token_to_code)
            centroids = torch.from_numpy(k_means.cluster_centers_).to(weight)
        # Rank 0 holds all rows and the others none, so this sends them from it to all.
        new = cls(
            weight.shape[1],
            vocab_size,
            gather_rows(token_to_code, 0, vocab_size, group),
            num_codes=num_codes,
            group=group,
            device=weight.device,
            dtype=weight.dtype,
            **loss_arguments,
        )
        new.codebook.load_state_dict({"weight": gather_rows(centroids, 0, num_codes, group)})
        return new

    @property
    def log_count(self) -> Tensor:
        """``[K]`` log of how many classes use each code, −inf for none; constants, in fp32 (fp64 for fp64)."""
        return self.code_count.to(torch.promote_types(self.codebook.weight.dtype, torch.float32)).log()

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of ``input`` ``(*, H)`` for the classes ``target`` ``(*)``, all three as in the function."""
        return self._cross_entropy(input, target, self.reduction)

    def log_prob(self, input: Tensor, target: Tensor) -> Tensor:
        """Log-probability of each target among all ``V`` classes, differentiable, by way of the loss.

        Args:
            input: ``(*, H)``, as in the loss.
            target: ``(*)``, as in the loss.

        Returns:
            ``(*)`` fp32 (fp64 for fp64), 0 for ignored targets.
        """
        return -self._cross_entropy(input, target, "none")

    @torch.no_grad()
    def full_log_probs(self, input: Tensor) -> Tensor:
        """Log-probabilities of all classes, to evaluate few tokens: this stores ``[*, V]`` numbers, as no other method.

        Every rank of the group must call it, since it gathers the codebook. Each gets the result for its own ``input``.

        Args:
            input: ``(*, H)``; the ranks' may differ in number and content.

        Returns:
            ``(*, V)`` fp32 (fp64 for fp64), without gradient.
        """
        shard = self.codebook.shard
        codebook = gather_rows(self.codebook.weight, shard.start, self.num_codes, self.codebook.group)
        log_count = self.log_count
        with torch.autocast(input.device.type, enabled=False):
            logits = F.linear(input.to(log_count.dtype), codebook.to(log_count.dtype))  # [*, K]
        lse = torch.logsumexp(logits + log_count, dim=-1, keepdim=True)
        return (logits - lse)[..., self.token_to_code]

    def extra_repr(self) -> str:
        return f"vocab_size={self.vocab_size}, num_codes={self.num_codes}"

    def _cross_entropy(self, input: Tensor, target: Tensor, reduction: Reduction) -> Tensor:
        """``−log p(y) = −log p(code of y) + log n_{code of y}``."""
        if not isinstance(target, Tensor) or target.dtype != torch.int64:
            got = target.dtype if isinstance(target, Tensor) else type(target).__name__
            raise TypeError(f"target must be a tensor of int64 class ids, got {got}")
        valid = target != self.ignore_index
        check_target_range(target.flatten(), self.ignore_index, self.vocab_size)
        row = target.clamp(0, self.vocab_size - 1)
        code = self.token_to_code[row]
        # Where reading the targets would stall the device, an id outside the vocabulary becomes a code outside the
        # codebook, which the op asserts against.
        target_code = code.where(row == target, self.num_codes).where(valid, _IGNORED_CODE)
        log_count = self.log_count
        shard = self.codebook.shard
        code_loss = linear_cross_entropy(
            input,
            self.codebook.weight,
            target_code,
            linear_bias=log_count[shard.start : shard.stop],
            reduction=reduction,
            ignore_index=_IGNORED_CODE,
            group=self.codebook.group,
            shard=shard,
            sequence_parallel=self.sequence_parallel,
            options=self.options,
        )
        return code_loss + reduce_tokens(log_count[code].where(valid, 0.0), None, None, valid, reduction)


def _check_num_codes(num_codes: Any, *, largest: int | None = None) -> None:
    if not isinstance(num_codes, int) or isinstance(num_codes, bool):
        raise TypeError(f"num_codes must be an int, got {num_codes!r}")
    if num_codes < 1 or (largest is not None and num_codes > largest):
        expected = "at least 1" if largest is None else f"in [1, {largest}], as many as there are classes at most"
        raise ValueError(f"num_codes must be {expected}, got {num_codes}")


def _check_map(token_to_code: Any, vocab_size: int, num_codes: int | None) -> int:
    """The number of codes, if the three fit together."""
    if not isinstance(token_to_code, Tensor) or token_to_code.dtype != torch.int64:
        got = token_to_code.dtype if isinstance(token_to_code, Tensor) else type(token_to_code).__name__
        raise TypeError(f"token_to_code must be an int64 tensor, got {got}")
    if token_to_code.shape != (vocab_size,) or vocab_size < 1:
        raise ValueError(
            f"token_to_code must have shape ({vocab_size},) for a vocab_size of at least 1, "
            f"got {tuple(token_to_code.shape)}"
        )
    smallest, largest = (int(code) for code in token_to_code.aminmax())
    if num_codes is None:
        num_codes = largest + 1
    _check_num_codes(num_codes)
    if smallest < 0 or largest >= num_codes:
        raise ValueError(f"token_to_code must be in [0, {num_codes}), got values from {smallest} to {largest}")
    return num_codes


def _check_row_weight(row_weight: Any, vocab_size: int) -> None:
    if row_weight is None:
        return
    if not isinstance(row_weight, Tensor) or row_weight.shape != (vocab_size,):
        got = tuple(row_weight.shape) if isinstance(row_weight, Tensor) else type(row_weight).__name__
        raise ValueError(f"row_weight must be a tensor of shape ({vocab_size},) or None, got {got}")
    if not ((row_weight > 0) & row_weight.isfinite()).all():
        raise ValueError(f"row_weight must be positive and finite, got values from {row_weight.min()}")


def _k_means(num_codes: int, seed: int) -> Any:
    """scikit-learn's estimator, not yet fitted."""
    try:
        from sklearn.cluster import KMeans
        from sklearn.utils import check_random_state
    except ImportError as error:
        raise ImportError("from_linear needs scikit-learn for k-means: pip install scikit-learn") from error
    check_random_state(seed)  # the estimator itself would look at it on rank 0 only
    return KMeans(num_codes, random_state=seed)


def _weight_of(head: Any) -> Tensor:
    """``head`` itself or its ``weight``, a floating-point matrix."""
    weight = head if isinstance(head, Tensor) else getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        got = f"{tuple(weight.shape)}, {weight.dtype}" if isinstance(weight, Tensor) else type(head).__name__
        raise TypeError(f"head must be a floating-point matrix (V, H) or a module with such a weight, got {got}")
    if getattr(head, "bias", None) is not None:
        raise ValueError("head must have no bias, which the classes of one code could not keep, got one with a bias")
    return weight

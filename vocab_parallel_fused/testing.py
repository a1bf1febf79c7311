"""What tests of a vocabulary-parallel loss need: problems, an oracle, an error budget, ranks, a measure of memory."""

import contextlib
import functools
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
import weakref
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import TypedDict, Unpack

from vocab_parallel_fused.functional import LinearTokenStats, Reduction, linear_cross_entropy
from vocab_parallel_fused.options import ComputeOptions
from vocab_parallel_fused.sharding import VocabShard

R = TypeVar("R")


class Problem(NamedTuple):
    """One instance of the loss over the full vocabulary."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    target: Tensor  # [T] int64
    upstream: Tensor  # [T] fp32, a random gradient of each token's loss

    def to(self, dtype: torch.dtype) -> "Problem":
        """The same numbers in another precision; fresh leaves that require gradients."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype).requires_grad_()

        bias = None if self.bias is None else leaf(self.bias)
        return self._replace(hidden=leaf(self.hidden), weight=leaf(self.weight), bias=bias)


class Results(NamedTuple):
    """Per-token losses and the gradients that the random upstream gradient makes of them."""

    loss: Tensor  # [T]
    dhidden: Tensor  # [T, H]
    dweight: Tensor  # [V, H]
    dbias: Tensor | None  # [V]


def make_problem(
    T: int,
    H: int,
    V: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    bias: bool = True,
    ignore_index: int = -100,
    seed: int = 0,
) -> Problem:
    """Random hidden states and weights with logits of standard deviation 3, and targets that include both ends of the
    vocabulary and, from 8 tokens on, two ignored tokens."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(std).to(dtype).requires_grad_()

    target = torch.randint(V, (T,), generator=generator, device=device)
    target[:1] = V - 1
    target[1:2] = 0
    if T >= 8:
        target[[3, T - 2]] = ignore_index
    upstream = torch.randn(T, generator=generator, device=device)
    return Problem(normal(T, H), normal(V, H, std=3 / H**0.5), normal(V) if bias else None, target, upstream)


def full_logits_results(
    problem: Problem, *, ignore_index: int = -100, loss: Callable[[Tensor], Tensor] | None = None
) -> Results:
    """The oracle: torch's cross-entropy on stored logits, in the problem's dtype up to the logits.

    Gradients are those of 16-bit logits upcast before the softmax, which is how models are usually trained. The losses
    are those of logits never rounded to 16 bits, as the op's are not: products of the device's own 16-bit matrix units
    where those can leave an fp32 result, and of upcast operands elsewhere.

    Args:
        problem: whose logits.
        ignore_index: of the cross-entropy.
        loss: another function of the logits ``[T, V]``, fp32 or fp64, to losses ``[T]``.
    """
    hidden, weight, bias, target, _ = problem
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if loss is None:
        loss = functools.partial(F.cross_entropy, target=target, reduction="none", ignore_index=ignore_index)
    results = gradients(loss(F.linear(hidden, weight, bias).to(dtype)), problem)
    if hidden.dtype == dtype:
        return results
    with torch.no_grad():
        on_matrix_units = hidden.is_cuda and torch.version.hip is None
        product = (
            torch.mm(hidden, weight.t(), out_dtype=dtype)
            if on_matrix_units
            else hidden.to(dtype) @ weight.to(dtype).t()
        )
        return results._replace(loss=loss(product if bias is None else product + bias))


class Transform(TypedDict, total=False):
    """Keywords for the logits."""

    logit_scale: float
    logit_softcap: float | None
    temperature: float


def full_logits_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    **transform: Unpack[Transform],
) -> Tensor:
    """The oracle of :func:`~vocab_parallel_fused.linear_cross_entropy`: stored logits and torch's own cross-entropy, in
    the dtype that all inputs have. Gradients by autograd, of ``token_weight`` too."""
    valid = (target != ignore_index).flatten()
    logits = transformed_logits(F.linear(input, linear_weight, linear_bias), **transform).flatten(0, -2)[valid]
    classes = target.flatten()[valid]
    loss = F.cross_entropy(logits, classes, weight=weight, reduction="none", label_smoothing=label_smoothing)
    z_loss = z_loss_weight * logits.logsumexp(dim=-1).square()
    of_token = torch.ones_like(loss) if token_weight is None else token_weight.flatten()[valid]
    if reduction == "none":
        return loss.new_zeros(target.shape).masked_scatter(valid.view(target.shape), of_token * (loss + z_loss))
    if reduction == "sum":
        return (of_token * (loss + z_loss)).sum()

    def mean(terms: Tensor, weights: Tensor) -> Tensor:
        # With a weight of 0 in total, torch divides by it.
        return (of_token * terms).sum() / weights.sum() if weights.sum() != 0 else 0 * logits.sum()

    return mean(loss, of_token if weight is None else of_token * weight[classes]) + mean(z_loss, of_token)


def full_logits_token_stats(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    **transform: Unpack[Transform],
) -> LinearTokenStats:
    """The oracle of :func:`~vocab_parallel_fused.linear_token_stats`, as :func:`full_logits_cross_entropy` is."""
    logits = transformed_logits(F.linear(input, linear_weight, linear_bias), **transform)
    of_target: list[Tensor | None] = [None, None, None]
    log_probs, prob = logits.log_softmax(dim=-1), logits.softmax(dim=-1)
    argmax_logit, argmax = logits.max(dim=-1)
    if target is not None:
        valid = target != ignore_index
        several = target.ndim == logits.ndim
        classes = target.where(valid, 0) if several else target.where(valid, 0)[..., None]
        log_prob, target_logit = (x.gather(-1, classes).view_as(target) for x in (log_probs, logits))
        is_argmax = target == (argmax[..., None] if several else argmax)
        of_target = [log_prob.where(valid, 0), target_logit.where(valid, 0), is_argmax & valid]
    return LinearTokenStats(
        log_prob=of_target[0],
        entropy=-(prob * log_probs.where(prob > 0, 0)).sum(dim=-1),
        lse=logits.logsumexp(dim=-1),
        target_logit=of_target[1],
        argmax=argmax,
        argmax_logit=argmax_logit,
        target_is_argmax=of_target[2],
    )


def transformed_logits(
    raw: Tensor, *, logit_scale: float = 1.0, logit_softcap: float | None = None, temperature: float = 1.0
) -> Tensor:
    """The oracle of :class:`~vocab_parallel_fused.transform.LogitTransform`, differentiable."""
    logits = logit_scale * raw
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    return logits / temperature


def gradients(loss: Tensor, problem: Problem) -> Results:
    """Pair per-token losses with the gradients of ``problem``'s parameters."""
    parameters = [p for p in problem[:3] if p is not None]
    dhidden, dweight, *dbias = torch.autograd.grad(loss, parameters, problem.upstream.to(loss.dtype))
    return Results(loss.detach(), dhidden, dweight, dbias[0] if dbias else None)


def sharded_results(
    problem: Problem,
    group: ProcessGroup | None,
    shard: VocabShard,
    *,
    sequence_parallel: bool = False,
    ignore_index: int = -100,
    options: ComputeOptions | None = None,
    loss: Callable[..., Tensor] | None = None,
) -> Results:
    """This rank's results of the op on its part of ``problem``, which is the same on every rank.

    The loss is that of all tokens; ``dhidden`` covers this rank's tokens, ``dweight`` and ``dbias`` its rows, padding
    included.

    Args:
        problem: whose parts.
        group, shard, sequence_parallel, options: as the op takes them.
        ignore_index: of the cross-entropy.
        loss: another function of this rank's part, a :class:`Problem` itself, and those four as keywords, to losses
            ``[T]`` of all tokens.
    """
    hidden = local_tokens(problem.hidden, group, sequence_parallel=sequence_parallel).detach().requires_grad_()
    weight, bias = (
        None if p is None else local_rows(p, shard).requires_grad_() for p in (problem.weight, problem.bias)
    )
    assert weight is not None
    part = problem._replace(hidden=hidden, weight=weight, bias=bias)
    keywords: Any = {"group": group, "shard": shard, "sequence_parallel": sequence_parallel, "options": options}
    if loss is not None:
        return gradients(loss(part, **keywords), part)
    keywords |= {"linear_bias": bias, "reduction": "none", "ignore_index": ignore_index}
    return gradients(linear_cross_entropy(hidden, weight, problem.target, **keywords), part)


def local_tokens(full: Tensor, group: ProcessGroup | None, *, sequence_parallel: bool) -> Tensor:
    """This rank's part of all tokens ``[T, *]``."""
    return full if group is None or not sequence_parallel else full.chunk(group.size())[group.rank()]


def local_rows(full: Tensor, shard: VocabShard) -> Tensor:
    """The shard's rows of ``[V, *]``. Padding rows hold large numbers, so that they show if they take part."""
    padding = full.new_full((shard.num_rows - shard.num_valid_rows, *full.shape[1:]), 1e3)
    return torch.cat((full[shard.start : shard.start + shard.num_valid_rows], padding)).detach()


def local_part(full: Results, group: ProcessGroup | None, shard: VocabShard, *, sequence_parallel: bool) -> Results:
    """What :func:`sharded_results` should return on this rank, given the results of the full vocabulary."""

    def rows(gradient: Tensor | None) -> Tensor | None:
        if gradient is None:
            return None
        padding = gradient.new_zeros(shard.num_rows - shard.num_valid_rows, *gradient.shape[1:])
        return torch.cat((gradient[shard.start : shard.start + shard.num_valid_rows], padding))

    dhidden, dweight = local_tokens(full.dhidden, group, sequence_parallel=sequence_parallel), rows(full.dweight)
    assert dweight is not None
    return Results(full.loss, dhidden, dweight, rows(full.dbias))


def max_error(actual: Tensor, reference: Tensor) -> float:
    """Largest absolute difference, as a fraction of the reference's largest magnitude; NaN if there is one."""
    if reference.numel() == 0:
        return 0.0
    reference = reference.double()
    return float((actual.double() - reference).abs().max() / reference.abs().max().clamp(min=1e-300))


class Check(NamedTuple):
    """One result held against its budget."""

    name: str
    error: float
    budget: float

    @property
    def passed(self) -> bool:
        return self.error <= self.budget  # False for NaN


def check_error_budget(
    actual: Results,
    same_dtype: Results,
    reference: Results,
    *,
    ranks: int = 1,
    logit_units: float = 0.0,
    kept: bool = False,
) -> list[Check]:
    """Hold every result to the error that plain PyTorch of the same dtype has against float64.

    - Gradients: twice that error, or twice the unit roundoff of their dtype if it is larger: once for rounding the
      gradients of the logits, once for rounding the result. The hidden states' gradient is a sum to which each further
      rank adds a rounded share, hence one more. Hardware exp2 and log2 are good to two units of fp32 each, once in lse
      and again in the probabilities, which adds six.
    - The loss: twice the error of unrounded logits, and 16 units of fp32 (fp64 for fp64) for the sum over V, the
      hardware functions and the merge.

    Args:
        actual: results under test.
        same_dtype: of the full-logits method in the precision under test.
        reference: of the full-logits method in float64.
        ranks: over how many ranks the hidden states' gradient was summed.
        logit_units: by how many further units of fp32 a loss allows its gradients to be off: where it is made of
            logits in full, their rounding.
        kept: with exponentials kept from the forward. Their scale is a factor of the hidden states before the one
            product, and of the result of the other: either is rounded once more.
    """
    checks = []
    for name, value, same, exact in zip(Results._fields, actual, same_dtype, reference, strict=True):
        if value is None or same is None or exact is None:
            assert value is same is exact is None, f"{name} is missing from some results"
            continue
        eps = torch.finfo(value.dtype).eps
        if name == "loss":
            budget = 2 * max_error(same, exact) + 16 * eps
        else:
            hardware = 0.0 if value.dtype == torch.float64 else (6 + logit_units) * torch.finfo(torch.float32).eps
            roundings = (1 + ranks if name == "dhidden" else 2) + kept
            budget = roundings * max(max_error(same, exact), eps / 2) + hardware
        checks.append(Check(name, max_error(value, exact), budget))
    return checks


def assert_within_error_budget(
    actual: Results, same_dtype: Results, reference: Results, *, ranks: int = 1, kept: bool = False
) -> None:
    """Assert what :func:`check_error_budget` finds, and that shapes agree."""
    for value, exact in zip(actual, reference, strict=True):
        assert value is None or exact is None or value.shape == exact.shape, (value.shape, exact.shape)
    for check in check_error_budget(actual, same_dtype, reference, ranks=ranks, kept=kept):
        assert check.passed, f"{check.name}: error {check.error:.2e} above its budget {check.budget:.2e}"


class PeakBytes(TorchDispatchMode):
    """Measure the bytes of tensors made inside the block that are alive together at the worst moment.

    Counts every storage that an operation returns, on any device; not temporary memory inside an operation.

    Attributes:
        bytes: at the worst moment so far.
        alive: now.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.alive = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # In inference mode an operation made of others arrives whole, and would hide the tensors between them.
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        for tensor in tree_leaves((args, kwargs)):
            self._note(tensor, size=0)  # made outside, so not counted when an operation returns it
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor, size=tensor.untyped_storage().nbytes())
        self.bytes = max(self.bytes, self.alive)
        return result

    def _note(self, tensor: Any, size: int) -> None:
        if not isinstance(tensor, Tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._seen:
            self._seen.add(key)
            self.alive += size
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.alive -= size


def run_on_ranks(fn: Callable[..., R], world_size: int, *args: Any, timeout: float = 120.0) -> list[R]:
    """Call ``fn(group, *args)`` in ``world_size`` processes that form a gloo group; return the results in rank order.

    Args:
        fn: a module-level function.
        timeout: seconds after which ranks that have not answered are taken to hang.

    Raises:
        RuntimeError: a rank raised; the message holds its traceback. The other ranks are ended.
        TimeoutError: ranks hang; the message names them.
    """
    context = _fork_server()
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_rank_main, args=(theirs, f"{folder}/store", rank, world_size, timeout, fn, args), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _collect(pipes, timeout)
        finally:
            for pipe, process in zip(pipes, processes, strict=True):
                pipe.close()
                process.kill()
                process.join()


@functools.cache
def _fork_server() -> Any:
    """A server process that has imported torch once; ranks are forked from it, before it has any thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vocab_parallel_fused"])
    return context


def _rank_main(
    pipe: Connection, store: str, rank: int, world_size: int, timeout: float, fn: Callable[..., Any], args: tuple
) -> None:
    try:
        torch.set_num_threads(1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        answer = (True, fn(dist.group.WORLD, *args))
    except BaseException:
        answer = (False, traceback.format_exc())
    # As bytes: a tensor sent as such would be shared memory that ends with this process.
    pipe.send_bytes(pickle.dumps(answer))
    # Other ranks may still be talking to this one, so it ends when the caller has heard from all.
    with contextlib.suppress(EOFError):
        pipe.recv_bytes()


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        pending = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(pending.values())} of {len(pipes)} gave no answer within {timeout} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pending[pipe]
            try:
                good, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise RuntimeError(f"rank {rank} of {len(pipes)} died without an answer") from None
            if not good:
                raise RuntimeError(f"rank {rank} of {len(pipes)} raised:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]

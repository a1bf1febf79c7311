"""What a test of a vocabulary-parallel loss needs: problems, an oracle, an error budget, ranks, and a measure of memory."""

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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
        parameters = (None if p is None else p.detach().to(dtype).requires_grad_() for p in self[:3])
        return Problem(*parameters, self.target, self.upstream)


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


def full_logits_results(problem: Problem, *, ignore_index: int = -100) -> Results:
    """The oracle: torch's cross-entropy on stored logits, in the problem's dtype up to the logits.

    16-bit logits are upcast before the softmax, which is how models are usually trained.
    """
    logits = F.linear(problem.hidden, problem.weight, problem.bias)
    loss = F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)),
        problem.target,
        reduction="none",
        ignore_index=ignore_index,
    )
    return gradients(loss, problem)


def gradients(loss: Tensor, problem: Problem) -> Results:
    """Pair per-token losses with the gradients of ``problem``'s parameters."""
    parameters = [p for p in problem[:3] if p is not None]
    dhidden, dweight, *dbias = torch.autograd.grad(loss, parameters, problem.upstream.to(loss.dtype))
    return Results(loss.detach(), dhidden, dweight, dbias[0] if dbias else None)


def max_error(actual: Tensor, reference: Tensor) -> float:
    """Largest absolute difference, as a fraction of the reference's largest magnitude; NaN if there is one."""
    if reference.numel() == 0:
        return 0.0
    reference = reference.double()
    return float((actual.double() - reference).abs().max() / reference.abs().max().clamp(min=1e-300))


def error_budget(same_dtype: Tensor, reference: Tensor, dtype: torch.dtype, *, roundings: int = 2) -> float:
    """How large :func:`max_error` may be: ``roundings`` times what plain PyTorch of the same dtype has.

    Args:
        same_dtype: result of the full-logits method in the precision under test.
        reference: its float64 result.
        dtype: of the result under test; its own unit roundoff is the least that a budget allows per rounding.
        roundings: 2 for one rank. Each further rank rounds its share of a sum once: add 1 for each.
    """
    return roundings * max(max_error(same_dtype, reference), torch.finfo(dtype).eps)


def assert_within_error_budget(
    actual: Results, same_dtype: Results, reference: Results, *, loss_dtype: torch.dtype = torch.float32, ranks: int = 1
) -> None:
    """Every result is as near to float64 as plain PyTorch of the same dtype is, up to the roundings of the ranks' sum.

    The loss is held to fp32's budget whatever the inputs' dtype, since the logits are never rounded to 16 bits.
    """
    for name, value, same, exact in zip(Results._fields, actual, same_dtype, reference, strict=True):
        if value is None or same is None or exact is None:
            assert value is same is exact is None, f"{name}: present in some results only"
            continue
        if name == "loss":
            # fp32: products summed over H, then sums over V; their errors are a small multiple of eps each.
            budget = 16 * torch.finfo(loss_dtype).eps
        else:
            budget = error_budget(same, exact, value.dtype, roundings=1 + ranks)
        error = max_error(value, exact)
        assert error <= budget, f"{name}: error {error:.2e} above its budget {budget:.2e}"


class PeakBytes(TorchDispatchMode):
    """Measure the bytes of tensors made inside the block that are alive together at the worst moment.

    Counts every storage that an operation returns, on any device; not temporary memory inside an operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._alive = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):
            self._note(tensor, size=0)  # made outside, so not counted when an operation returns it
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor, size=tensor.untyped_storage().nbytes())
        self.bytes = max(self.bytes, self._alive)
        return result

    def _note(self, tensor: Any, size: int) -> None:
        if not isinstance(tensor, Tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._seen:
            self._seen.add(key)
            self._alive += size
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._alive -= size


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
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main, args=(sender, f"{folder}/store", rank, world_size, timeout, fn, args), daemon=True
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return _collect(pipes, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


@functools.cache
def _fork_server() -> Any:
    """A server process that has imported torch once; ranks are forked from it, before it has any thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vocab_parallel_fused"])
    return context


def _rank_main(
    sender: Connection, store: str, rank: int, world_size: int, timeout: float, fn: Callable[..., Any], args: tuple
) -> None:
    try:
        torch.set_num_threads(1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        answer = (True, fn(dist.group.WORLD, *args))
    except BaseException:
        answer = (False, traceback.format_exc())
    # As bytes: a tensor sent as such would be shared memory that ends with this process.
    sender.send_bytes(pickle.dumps(answer))
    sender.close()
    if dist.is_initialized() and answer[0]:
        dist.destroy_process_group()


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

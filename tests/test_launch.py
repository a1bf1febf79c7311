"""Every launcher starts the same ranks with the same results, and ends all of them when one dies."""

import contextlib
import json
import os
import re
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
from launchers import Launch, find_launch
from launching import FOREIGN, TIMEOUT, Launcher, finish, mpirun, sbatch, start, torchrun, torchrun_on_two_machines

PROGRAM = str(Path(__file__).with_name("launched.py"))


@pytest.fixture(scope="module")
def gradients() -> dict[int, set[str]]:
    """Bits of the gradient by number of ranks, of all launchers."""
    return defaultdict(set)


@pytest.mark.parametrize(
    ("launcher", "ranks", "machines"),
    [(torchrun, 2, 1), (sbatch, 2, 1), (torchrun_on_two_machines, 4, 2), (mpirun, 4, 1)],
)
def test_results(launcher: Launcher, ranks: int, machines: int, tmp_path: Path, gradients: dict[int, set[str]]) -> None:
    """A launcher whose numbers are misread gives ranks that wait for each other, or that share a shard."""
    codes, output = launcher(ranks, PROGRAM, str(tmp_path), "success", CUDA_VISIBLE_DEVICES="")
    assert set(codes) == {0}, output
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]
    for rank, result in enumerate(results):
        assert (result["rank"], result["world_size"]) == (rank, ranks)
        assert result["published"] == [str(rank), str(ranks), str(result["local_rank"])]
        assert result["loss"] == pytest.approx(result["expected_loss"], rel=1e-6)  # a few units of fp32
        assert result["uses_mpi"] == (launcher is mpirun)
        gradients[ranks].add(result["gradient"])
    local_ranks = list(range(ranks // machines)) * machines
    assert sorted(result["local_rank"] for result in results) == sorted(local_ranks)
    assert len(gradients[ranks]) == 1, "the same ranks, but other bits than with another launcher"


@pytest.mark.parametrize(
    ("launcher", "ending", "named"),
    [
        (torchrun, "killed", r"rank +: 1 \(local_rank: 1\)\n +exitcode +: -9"),
        (torchrun, "raises", r"\[rank1\]: ValueError: no more data"),
        (mpirun, "killed", r"process rank 1 with PID \d+ on node \S+ exited on\s+signal 9"),
        (mpirun, "raises", r"\[rank1\]: ValueError: no more data\nrank 1 of 3 has failed"),
    ],
    ids=["torchrun, killed", "torchrun, raises", "mpirun, killed", "mpirun, raises"],
)
def test_one_rank_dies(launcher: Launcher, ending: str, named: str, tmp_path: Path) -> None:
    """Where ranks outlive one that they wait for, the job holds its GPUs until somebody looks."""
    codes, output = launcher(3, PROGRAM, str(tmp_path), ending, CUDA_VISIBLE_DEVICES="")
    assert codes[0] != 0, output
    assert re.search(named, output), output
    for rank in range(3):
        wait_for_end(int((tmp_path / f"{rank}.pid").read_text()))


def wait_for_end(pid: int) -> None:
    """mpirun itself may end a moment before those that it has killed."""
    end = time.monotonic() + TIMEOUT
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < end:
            os.kill(pid, 0)
            time.sleep(0.05)
        raise AssertionError(f"process {pid} outlives its launcher")


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without any launcher."""
    for name in list(os.environ):
        if FOREIGN.match(name):
            monkeypatch.delenv(name)
    return monkeypatch


TORCH = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    ("set_by_launchers", "expected"),
    [
        ({}, Launch(0, 1, 0)),
        (TORCH, Launch(3, 4, 1)),
        (SLURM, Launch(3, 4, 1)),
        # The script of a batch job is not one of its tasks.
        ({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}, Launch(0, 1, 0)),
        # srun with PMI-2 sets a variable of Hydra's.
        ({**SLURM, "PMI_RANK": "3", "PMI_SIZE": "4"}, Launch(3, 4, 1)),
        # Scripts often export these for srun.
        ({**SLURM, "WORLD_SIZE": "4", "RANK": "3"}, Launch(3, 4, 1)),
        # One torchrun per task of srun or mpirun.
        ({**TORCH, **SLURM, "SLURM_PROCID": "1", "TORCHELASTIC_RUN_ID": "a"}, Launch(3, 4, 1)),
        ({**TORCH, "OMPI_COMM_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "a"}, Launch(3, 4, 1)),
        # One rank needs nobody to meet.
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}, Launch(0, 1, 0)),
    ],
)
def test_which_launcher(set_by_launchers: dict[str, str], expected: Launch, variables: pytest.MonkeyPatch) -> None:
    for name, value in set_by_launchers.items():
        variables.setenv(name, value)
    assert find_launch() == expected


@pytest.mark.parametrize(
    ("set_by_launchers", "changed", "message"),
    [
        (
            TORCH,
            {"RANK": None},
            r"RANK is not set, but another variable of torchrun is: start the script with torchrun",
        ),
        (TORCH, {"WORLD_SIZE": None}, r"WORLD_SIZE is not set"),
        (TORCH, {"LOCAL_RANK": None}, r"LOCAL_RANK is not set"),
        (TORCH, {"MASTER_PORT": None}, r"MASTER_PORT is not set, through which 4 ranks find each other: use torchrun"),
        (TORCH, {"RANK": "first"}, r"RANK must be a whole number, as torchrun sets it, got 'first'"),
        (TORCH, {"RANK": "4"}, r"RANK must be less than WORLD_SIZE, got RANK=4 and WORLD_SIZE=4: unset both"),
        (TORCH, {"LOCAL_RANK": "4"}, r"LOCAL_RANK must be less than WORLD_SIZE"),
        (SLURM, {"SLURM_PROCID": None}, r"SLURM_PROCID is not set, but another variable of srun is"),
        (SLURM, {"SLURM_LOCALID": "-1"}, r"SLURM_LOCALID must be a whole number, as srun sets it, got '-1'"),
        (SLURM, {"MASTER_ADDR": None}, r"MASTER_ADDR is not set, .*: export it .* as launch/slurm.sbatch does"),
        (SLURM, {"RANK": "0"}, r"RANK must be 3, as srun has it, or not set, got '0': unset it, or start one torchrun"),
        ({"OMPI_COMM_WORLD_SIZE": "two"}, {}, r"OMPI_COMM_WORLD_SIZE must be a whole number, as mpirun sets it"),
        ({"MPI_LOCALRANKID": "0"}, {}, r"PMI_SIZE is not set, but another variable of mpirun is"),
    ],
)
def test_contradicting_variables(
    set_by_launchers: dict[str, str], changed: dict[str, str | None], message: str, variables: pytest.MonkeyPatch
) -> None:
    for name, value in {**set_by_launchers, **changed}.items():
        if value is not None:
            variables.setenv(name, value)
    with pytest.raises(RuntimeError, match=message):
        find_launch()


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_mpirun_without_mpi4py(name: str, variables: pytest.MonkeyPatch) -> None:
    variables.setenv(name, "2")
    if name == "PMI_SIZE":
        variables.setenv("MPI_LOCALRANKID", "0")
    variables.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(RuntimeError, match=r"mpirun has started this process, which needs mpi4py .*pip install mpi4py"):
        find_launch()


def test_mpirun_of_another_mpi(tmp_path: Path) -> None:
    """As if MPICH had started it: each of its ranks would take itself for the only one, and train alone."""
    process = start(sys.executable, PROGRAM, str(tmp_path), "success", MPI_LOCALRANKID="0", PMI_SIZE="2")
    codes, output = finish(process)
    assert codes == [1]
    assert "mpirun has started 2 ranks, but mpi4py finds 1: it uses Open MPI" in output
    assert not list(tmp_path.iterdir())

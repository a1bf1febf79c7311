"""The launchers as commands, for tests that start a script as a user does."""

import os
import random
import re
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS = Path(sysconfig.get_path("scripts"))
# What this run of the tests may have been given by a launcher of its own.
FOREIGN = re.compile(
    r"(SLURM|OMPI|PMI|PMIX|PRTE|MPI|TORCHELASTIC)_|(RANK|WORLD_SIZE|LOCAL_RANK|MASTER_ADDR|MASTER_PORT)$"
)
TIMEOUT = 120  # seconds for any command here; gloo would let a rank wait for half an hour


def environment(**more: str) -> dict[str, str]:
    """For a launcher: this one's without other launchers, for root, and for fewer cores than ranks."""
    return {
        **{name: value for name, value in os.environ.items() if not FOREIGN.match(name)},
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'launch'}",
        "TERM": "dumb",  # Open MPI gives rank 0 a terminal, in which the progress of a script would be drawn
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        **more,
    }


def start(*command: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(**variables),
    )


def finish(*processes: subprocess.Popen[str]) -> tuple[list[int], str]:
    """Exit codes and all that they wrote."""
    try:
        output = "".join(process.communicate(timeout=TIMEOUT)[0] for process in processes)
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], output


def torchrun(ranks: int, *program: str, **variables: str) -> tuple[list[int], str]:
    return finish(start("torchrun", "--standalone", f"--nproc-per-node={ranks}", *program, **variables))


def torchrun_on_two_machines(ranks: int, *program: str, **variables: str) -> tuple[list[int], str]:
    """Two of them, as one for each of two machines."""
    options = ["--nnodes=2", f"--nproc-per-node={ranks // 2}", "--rdzv-backend=c10d", "--rdzv-id=test"]
    endpoint = f"--rdzv-endpoint=localhost:{free_port()}"
    return finish(*(start("torchrun", *options, endpoint, *program, **variables) for _ in range(2)))


def mpirun(ranks: int, *program: str, **variables: str) -> tuple[list[int], str]:
    return finish(start("mpirun", "-n", str(ranks), sys.executable, *program, **variables))


def sbatch(ranks: int, *program: str, **variables: str) -> tuple[list[int], str]:
    """launch/slurm.sbatch, with stand-ins for the commands of Slurm that it calls."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        for name, script in (("scontrol", SCONTROL), ("srun", SRUN)):
            (Path(folder) / name).write_text(script)
            (Path(folder) / name).chmod(0o755)
        return finish(
            start(
                *("bash", str(ROOT / "launch" / "slurm.sbatch"), *program),
                PATH=f"{folder}{os.pathsep}{environment()['PATH']}",
                SLURM_JOB_ID=str(70_000 + port % 10_000),
                SLURM_JOB_NODELIST="node[1-2]",
                SLURM_NTASKS=str(ranks),
                SLURM_CPUS_PER_TASK="3",
                SLURM_PROCID="0",  # the job's script has it, too
                **variables,
            )
        )


SCONTROL = """#!/usr/bin/env bash
[[ "$*" == "show hostnames node[1-2]" ]] && printf '%s\\n' localhost another
"""

# Without --kill-on-bad-exit it would wait for all tasks, as Slurm's does.
SRUN = """#!/usr/bin/env bash
[[ "$1 $2" == "--cpus-per-task=3 --kill-on-bad-exit=1" ]] || exit 99
shift 2
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_STEP_NUM_TASKS=$SLURM_NTASKS "$@" &
done
for ((task = 0; task < SLURM_NTASKS; task++)); do
    wait -n || { kill $(jobs -p); exit 1; }
done
"""


def free_port() -> int:
    """Of those from which slurm.sbatch chooses."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)):
                return port


Launcher = Callable[..., tuple[list[int], str]]

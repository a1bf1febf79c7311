"""What test_launch.py lets launchers start: ranks that agree on a loss, or one that dies among others that wait."""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from bootstrap import Context, distributed

T, H, V = 24, 16, 97


def main(folder: Path, ending: str) -> None:
    with distributed() as context:
        (folder / f"{context.rank}.pid").write_text(str(os.getpid()))
        if ending == "success":
            (folder / f"{context.rank}.json").write_text(json.dumps(describe(context)))
        elif context.rank == 1:
            time.sleep(1)  # until the others wait
            if ending == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("no more data")
        elif context.rank == 2:
            time.sleep(300)  # as in a collective that does not notice, where gloo's does
        else:
            dist.all_reduce(torch.ones(1))


def describe(context: Context) -> dict[str, object]:
    from vocab_parallel_fused import VocabParallelLinearCrossEntropy  # takes a second, which dying ranks do not need

    torch.manual_seed(0)
    hidden, target = torch.randn(T, H, requires_grad=True), torch.randint(V, (T,))
    full = torch.nn.Linear(H, V, bias=False)
    head = VocabParallelLinearCrossEntropy(H, V, group=context.group)
    head.load_state_dict(full.state_dict())
    loss = head(hidden, target)
    loss.backward()
    assert hidden.grad is not None
    return {
        "rank": context.rank,
        "world_size": context.world_size,
        "local_rank": context.local_rank,
        "loss": loss.item(),
        "expected_loss": torch.nn.functional.cross_entropy(full.double()(hidden.double()), target).item(),
        "gradient": hashlib.sha256(hidden.grad.numpy().tobytes()).hexdigest(),
        "published": [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")],
        "uses_mpi": "mpi4py" in sys.modules,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

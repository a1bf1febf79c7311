"""launch/megatron_train.py, as a user runs it, with a tiny model."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import megatron_wgrad
import pytest
import torch

pytest.importorskip("megatron.core")

import megatron_report
import megatron_train
from megatron_report import NOISE, REFERENCE, Memory, Report, Run

from vocab_parallel_fused.testing import max_error

ROOT = Path(__file__).parent.parent
RANKS = 1 if torch.cuda.device_count() == 1 else 2
STEPS = 12


def test_converted_model_trains_as_stock(tmp_path: Path) -> None:
    numbers, picture = tmp_path / "folder" / "megatron.json", tmp_path / "megatron.png"
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"),
            *(ROOT / "launch" / "megatron_train.py", "--modes", REFERENCE, NOISE, "recompute", f"--steps={STEPS}"),
            *("--layers=1", "--hidden-size=64", "--seq-length=128", "--dtype=float32"),
            # Logits large enough to be most of the memory, and padding that no token of the text names.
            *("--vocab-size=16384", "--tokenizer-size=1025", f"--json={numbers}", f"--plot={picture}"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "peak of forward and backward" in run.stdout
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    report = json.loads(numbers.read_text())
    assert report["setting"]["tensor_parallel_size"] == RANKS
    runs: dict[str, Any] = {run["mode"]: run for run in report["runs"]}
    assert set(runs) == {REFERENCE, NOISE, "recompute"}
    losses = {mode: torch.tensor(run["losses"], dtype=torch.float64) for mode, run in runs.items()}
    assert losses[REFERENCE].shape == (STEPS,)
    # Near the uniform distribution's at first: the sum over micro-batches and ranks is a mean.
    assert abs(losses[REFERENCE][0] - math.log(16384)) < 0.1
    for mode in (NOISE, "recompute"):
        # Rounding moves them by 1e-7. A gradient of the head that is lost moves them by 5e-4 within these steps.
        assert max_error(losses[mode], losses[REFERENCE]) < 1e-5, mode
    assert not torch.equal(losses[NOISE], losses[REFERENCE]), "no noise: both runs sum in the same order"
    for memory in (memory for run in runs.values() for memory in run["memory"]):
        assert memory["parameters"] == memory["gradients"] <= memory["optimizer"] / 2
        assert memory["resting"] <= memory["update_peak"]
    stock, recompute = (
        max(memory["compute_peak"] for memory in runs[mode]["memory"]) for mode in ("stock", "recompute")
    )
    logits = 2 * 128 * 16384 // RANKS * 4
    if not torch.cuda.is_available():  # there, the scratch memory of the op is as large as these few logits
        assert recompute < stock - logits // 2, "the converted model stores logits"
    assert all(len(run["step_ms"]) == STEPS - 6 and run["num_tokens"] == 4 * 128 for run in runs.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps=6"], r"--steps must be more than 6.*got 6"),
        (["--micro-batch-size=1"], r"--micro-batch-size must be at least 2.*got 1"),
        (["--vocab-size=1000"], r"--tokenizer-size must be at most --vocab-size 1000, got 32768"),
    ],
)
def test_refuses_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        megatron_train.parse_arguments(arguments)
    assert re.search(message, capsys.readouterr().err)


def test_differences() -> None:
    memory = [Memory(1, 1, 1, 1, 1, 1)]
    runs = [
        Run(mode, losses, [3.0, 1.0, 2.0], 1, memory) for mode, losses in ((REFERENCE, [3.0, 2.0]), (NOISE, [3.0, 6.0]))
    ]
    report = Report("", {}, runs)
    assert report.differences(runs[0]) is None
    assert report.differences(runs[1]) == [0.0, 4.0]
    assert Report("", {}, runs[1:]).differences(runs[1]) is None
    assert megatron_report.root_mean_square([0.0, 4.0]) == math.sqrt(8)
    assert math.isnan(megatron_report.root_mean_square([0.0, math.nan]))
    assert runs[0].median_ms == 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stand_in_for_apex(dtype: torch.dtype, device: torch.device) -> None:
    """Stock's gradients depend on it, so it must add, and sum in fp32."""
    hidden, dlogits = (torch.randn(40, size, device=device).to(dtype) for size in (16, 24))
    before = torch.randn(24, 16, device=device)
    main_grad = before.clone()
    megatron_wgrad.wgrad_gemm_accum_fp32(hidden, dlogits, main_grad)
    assert max_error(main_grad, before.double() + dlogits.double().t() @ hidden.double()) < 1e-6

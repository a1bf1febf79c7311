"""launch/demo.py, as a user runs it, with a small vocabulary and few steps."""

from dataclasses import replace
from pathlib import Path

import demo
import pytest
import text
import torch
from demo_report import TOLERANCE, Comparison, Run
from launching import Launcher, mpirun, torchrun
from torch import Tensor

from vocab_parallel_fused import VocabParallelLinearCrossEntropy

ROOT = Path(__file__).parent.parent
RANKS = 1 if torch.cuda.device_count() == 1 else 2
VOCAB_SIZE = 1025  # uneven on two ranks


@pytest.fixture(scope="module")
def losses() -> list[list[str]]:
    """What each launcher's run printed of them."""
    return []


@pytest.mark.parametrize("launcher", [torchrun, mpirun])
def test_runs_on_ranks(launcher: Launcher, tmp_path: Path, losses: list[list[str]]) -> None:
    picture = tmp_path / "folder" / "demo.png"
    script = [str(ROOT / "launch" / "demo.py"), "--steps=3", f"--vocab-size={VOCAB_SIZE}", f"--output={picture}"]
    codes, output = launcher(RANKS, *script)
    assert codes == [0], output
    rows = {
        cells[0]: cells[1:]
        for cells in ([cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines())
        if len(cells) == 3
    }
    local_rows = -(-VOCAB_SIZE // RANKS)
    assert rows["vocabulary rows per rank"] == [f"{VOCAB_SIZE:,}", f"{local_rows:,}"]
    assert rows["logits stored per rank"] == ["4.0 MiB", "none"]
    assert rows["logits avoided per rank"] == ["none", f"{1024 * local_rows * 4 / 2**20:.1f} MiB"]
    full, sharded = (float(cell.removesuffix(" MiB")) for cell in rows["peak memory of the loss"])
    assert sharded < full
    assert all(float(cell.replace(",", "")) > 0 for cell in rows["tokens/s"])
    assert float(rows["largest difference in 3 steps"][1]) <= TOLERANCE
    assert str(picture) in output
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    losses.append([*rows["loss, first step"], *rows["loss, last step"]])
    assert losses[-1] == losses[0], "another launcher, and other losses"


def test_fails_if_the_sharded_head_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Wrong(VocabParallelLinearCrossEntropy):
        def forward(self, input: Tensor, target: Tensor, token_weight: Tensor | None = None) -> Tensor:
            return 1.0001 * super().forward(input, target, token_weight)

    monkeypatch.setattr(demo, "VocabParallelLinearCrossEntropy", Wrong)
    with pytest.raises(SystemExit, match="The loss curves part"):
        demo.main(["--steps=2", f"--vocab-size={VOCAB_SIZE}", f"--output={tmp_path / 'demo.png'}"])
    assert "largest difference in 2 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("losses", "agree"),
    [
        ([7.0, 6.0], True),
        ([7.0, 6.0 + TOLERANCE / 2], True),
        ([7.0, 6.0 - 2 * TOLERANCE], False),
        ([7.0, float("nan")], False),
        ([float("nan"), 6.0], False),
    ],
)
def test_verdict(losses: list[float], agree: bool) -> None:
    full = Run("full", [7.0, 6.0], num_tokens=1, tokens_per_second=1.0, vocab_rows=1, peak_bytes=1)
    assert Comparison("", full, replace(full, losses=losses)).curves_agree == agree


def test_text_too_short_for_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_read_sources", lambda _held_out: ["some words"])
    with pytest.raises(ValueError, match=r"vocab_size 1025 cannot be reached: the 1 files of .* \(10 characters\)"):
        text.load_text(VOCAB_SIZE)

"""launch/check.py, as a user runs it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def check(*launcher: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *launcher, str(ROOT / "launch" / "check.py"), "--shapes", "small"],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env=environment,
    )


@pytest.mark.parametrize("ranks", [1, 3])
def test_passes(ranks: int) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    run = check(*launcher)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{ranks} rank(s)" in run.stdout
    assert "rows passed" in run.stdout
    assert "FAILED" not in run.stdout


def test_fails_when_a_kernel_is_wrong(tmp_path: Path) -> None:
    """A forward whose sums of exponentials are off by a thousandth."""
    (tmp_path / "broken.py").write_text(
        "import sys, runpy\n"
        "sys.argv = sys.argv[1:]\n"
        "from vocab_parallel_fused.kernels import eager\n"
        "whole = eager.local_stats\n"
        "def broken(*arguments, **options):\n"
        "    stats, cache = whole(*arguments, **options)\n"
        "    return stats._replace(sum_exp=1.001 * stats.sum_exp), cache\n"
        "eager.local_stats = broken\n"
        "sys.path.insert(0, sys.argv[0].rsplit('/', 1)[0])\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    run = check(str(tmp_path / "broken.py"))
    assert run.returncode == 1, run.stdout + run.stderr
    assert "FAILED" in run.stdout

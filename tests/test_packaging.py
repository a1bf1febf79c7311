"""What is built holds the kernels and runs, whichever way it is built: some backends drop a symlink in silence."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytest.importorskip("build")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A source distribution, a wheel built from it, and a wheel built from the checkout."""
    folder = tmp_path_factory.mktemp("dist")
    # The build backend of the environment: an isolated one would fetch it anew.
    command = [sys.executable, "-m", "build", "--no-isolation", str(ROOT)]
    for arguments in (["--outdir", str(folder / "both")], ["--wheel", "--outdir", str(folder / "direct")]):
        run = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr
    return {
        "sdist": next((folder / "both").glob("*.tar.gz")),
        "wheel of the sdist": next((folder / "both").glob("*.whl")),
        "wheel of the checkout": next((folder / "direct").glob("*.whl")),
    }


def expected_files() -> set[str]:
    package = {f"vocab_parallel_fused/{path.name}" for path in (ROOT / "vocab_parallel_fused").glob("*.py")}
    kernels = {f"vocab_parallel_fused/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    return package | kernels | {"vocab_parallel_fused/py.typed", "vocab_parallel_fused/kernels/tiles.json"}


@pytest.mark.parametrize("which", ["wheel of the sdist", "wheel of the checkout"])
def test_wheels_hold_every_file(built: dict[str, Path], which: str) -> None:
    names = {name for name in zipfile.ZipFile(built[which]).namelist() if ".dist-info/" not in name}
    assert names == expected_files()


def test_the_source_distribution_holds_every_file(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert expected_files() <= names
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names


def test_an_installed_wheel_runs(built: dict[str, Path], tmp_path: Path) -> None:
    zipfile.ZipFile(built["wheel of the sdist"]).extractall(tmp_path)
    program = (
        "import torch, vocab_parallel_fused as vpf\n"
        "print(vpf.__file__)\n"
        "vpf.linear_cross_entropy(torch.ones(2, 3), torch.ones(5, 3), torch.zeros(2, dtype=torch.int64))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.startswith(str(tmp_path))

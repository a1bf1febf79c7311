"""Who may import whom, and who may communicate: the rules of docs/design.md, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "vocab_parallel_fused"

# For every module, the modules of the project that it may import; lower layers first.
ALLOWED = {
    "arrival": set(),
    "options": set(),
    "stats": set(),
    "transform": set(),
    "losses": set(),
    "cross_entropy": {"stats"},
    "collectives": {"arrival", "stats"},
    "sharding": {"collectives"},
    "kernels.configs": set(),
    "exp_cache": {"transform"},
    "kernels.plan": set(),
    "kernels.sweep": {"kernels.plan", "transform"},
    "kernels.eager": {"arrival", "exp_cache", "kernels.plan", "kernels.sweep", "stats", "transform"},
    "kernels.tiles": {"arrival", "kernels.configs", "transform"},
    "kernels.launcher": {"kernels.tiles"},
    "kernels.streams": {"arrival", "kernels.tiles", "transform"},
    "kernels.hopper": {"kernels.tiles"},
    "kernels.hopper_tiles": {"kernels.configs", "kernels.hopper", "kernels.launcher", "kernels.tiles", "transform"},
    "kernels.hopper_matmul": {
        "kernels.configs",
        "kernels.hopper",
        "kernels.plan",
        "kernels.streams",
        "kernels.sweep",
        "kernels.tiles",
    },
    "kernels.kept": {
        "exp_cache",
        "kernels.configs",
        "kernels.hopper_matmul",
        "kernels.plan",
        "kernels.sweep",
        "kernels.tiles",
        "stats",
        "transform",
    },
    "kernels.forward": {
        "arrival",
        "exp_cache",
        "kernels.configs",
        "kernels.hopper",
        "kernels.hopper_tiles",
        "kernels.launcher",
        "kernels.plan",
        "kernels.streams",
        "kernels.tiles",
        "stats",
        "transform",
    },
    "kernels.backward": {
        "arrival",
        "exp_cache",
        "kernels.configs",
        "kernels.hopper",
        "kernels.hopper_matmul",
        "kernels.hopper_tiles",
        "kernels.kept",
        "kernels.launcher",
        "kernels.plan",
        "kernels.streams",
        "kernels.sweep",
        "kernels.tiles",
        "stats",
        "transform",
    },
    "divergence": {"stats"},
    "kernels.divergence": {
        "divergence",
        "kernels.configs",
        "kernels.hopper_matmul",
        "kernels.plan",
        "kernels.sweep",
        "kernels.tiles",
        "stats",
        "transform",
    },
    "kernels.tokens": {"kernels.launcher", "kernels.tiles", "stats"},
    "kernels.selection": {"kernels.configs", "kernels.plan", "kernels.tiles", "transform"},
    "dispatch": {
        "exp_cache",
        "kernels.eager",
        "kernels.forward",
        "kernels.backward",
        "kernels.divergence",
        "kernels.selection",
        "kernels.tiles",
        "kernels.tokens",
        "options",
        "stats",
    },
    "autograd": {
        "arrival",
        "collectives",
        "dispatch",
        "divergence",
        "exp_cache",
        "kernels.sweep",
        "sharding",
        "stats",
        "transform",
    },
    "arguments": {"autograd", "collectives", "dispatch", "options", "sharding", "transform"},
    "functional": {
        "arguments",
        "autograd",
        "collectives",
        "cross_entropy",
        "divergence",
        "options",
        "sharding",
        "stats",
    },
    "modules": {"arguments", "collectives", "functional", "options", "sharding"},
    "vq": {"arguments", "collectives", "cross_entropy", "functional", "modules", "options"},
    "megatron": {"collectives", "functional", "options"},
    "testing": {"functional", "options", "sharding"},
    "__init__": {"functional", "losses", "modules", "options", "sharding", "vq"},
}


def source_files() -> dict[str, Path]:
    files = {path.stem: path for path in (ROOT / PACKAGE).glob("*.py")}
    return files | {f"kernels.{path.stem}": path for path in (ROOT / "kernels").glob("*.py")}


def imports_of(path: Path) -> set[str]:
    """Full names of all modules that a file imports, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            # `from package import module` names modules only where they are packages' children.
            holds_modules = module == PACKAGE or module.endswith(".kernels")
            names |= {f"{module}.{alias.name}" for alias in node.names} if holds_modules else {module}
    return names


def test_every_module_has_a_place() -> None:
    assert set(source_files()) == set(ALLOWED)


@pytest.mark.parametrize("module", ALLOWED)
def test_imports_go_downwards(module: str) -> None:
    ours = {name for name in imports_of(source_files()[module]) if name.split(".")[0] == PACKAGE}
    assert {name.removeprefix(f"{PACKAGE}.") for name in ours} <= ALLOWED[module]
    order = [*ALLOWED]
    assert all(order.index(below) < order.index(module) for below in ALLOWED[module]), "the table has a loop"


def test_only_collectives_communicates() -> None:
    """Types of torch.distributed are free to import; its functions are not."""
    types = {"torch.distributed.device_mesh", "torch.distributed.tensor"}
    for module, path in source_files().items():
        if module in {"collectives", "testing"}:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                assert "distributed" not in {alias.name for alias in node.names}, module
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.distributed"):
                names = {alias.name for alias in node.names}
                assert node.module in types or names <= {"ProcessGroup"}, f"{module} imports {names} of {node.module}"
                assert not module.startswith("kernels."), f"{module} knows a process group"
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith("torch.distributed") for alias in node.names), module
            elif isinstance(node, ast.Attribute):
                assert ast.unparse(node) != "torch.distributed", module


def test_what_communicates_says_so() -> None:
    tree = ast.parse((ROOT / PACKAGE / "collectives.py").read_text())
    for function in [node for node in tree.body if isinstance(node, ast.FunctionDef)]:
        calls = {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
        communicates = any(call.startswith(("_all_gather", "_reduce_scatter", "dist.", "gather_")) for call in calls)
        assert communicates == function.name.startswith(("gather_", "reduce_", "scatter_")), function.name


def test_runs_without_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, vocab_parallel_fused as vpf\n"
        "x = torch.ones(2, 3, requires_grad=True)\n"
        "vpf.linear_cross_entropy(x, torch.ones(5, 3), torch.zeros(2, dtype=torch.int64)).backward()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_the_checkout_does_not_hide_other_packages() -> None:
    """With an __init__.py, `import kernels` in a checkout would find this folder and not the package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / PACKAGE / "kernels").is_symlink()
    assert (ROOT / PACKAGE / "kernels").readlink() == Path("../kernels")

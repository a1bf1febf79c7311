"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before Triton is first imported."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from vocab_parallel_fused.options import Impl

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """Whenever a kernel calls a function, Triton's interpreter looks through all of the language for what to replace,
    which took it nearly half of its time. What there is to find does not change."""
    if torch.cuda.is_available() or find_spec("triton") is None:
        yield
        return
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @functools.cache
    def names(namespace: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(namespace) if is_builtin(member)]

    def replace_builtins(namespace: Any, *how: Any) -> None:
        for name in names(namespace):
            member = getattr(namespace, name)
            if is_builtin(member):
                interpreter._patch_attr(namespace, name, member, *how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_builtin", replace_builtins)
        yield


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tests of one rank run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def set_fp32_precision() -> Iterator[Callable[[str], None]]:
    """Sets how torch multiplies fp32 matrices on a GPU, until the test ends."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield lambda precision: setattr(matmul, "fp32_precision", precision)
    matmul.fp32_precision = before


@pytest.fixture(params=["eager", "triton"])
def impl(request: pytest.FixtureRequest) -> Impl:
    """Each implementation: Triton is compiled on a GPU and interpreted on the CPU."""
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param

"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before Triton is first imported."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

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

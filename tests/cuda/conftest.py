from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

# Deterministic matrix products on GPUs need it, before the first one.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# The shapes and error budgets of the operators' own tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))

import cuda_build


@pytest.fixture(scope="session")
def gpu():
    """The kernels on the emulated GPU."""
    return cuda_build.emulated_gpu()


@pytest.fixture
def set_order(gpu) -> Iterator[Callable[[int], None]]:
    """Sets the order of the emulated threads by a seed; 0 afterwards."""
    library = cuda_build.emulated_library()
    yield library.set_order
    library.set_order(0)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN, so that an operator that leaves an element unwritten is caught."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    enabled = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(enabled)
    torch.utils.deterministic.fill_uninitialized_memory = before

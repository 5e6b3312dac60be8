from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator

import pytest
import torch

if path := os.environ.get("HELLM_EXTENSION"):
    # Another build of the extension than the installed one: that of `make sanitize`.
    spec = importlib.util.spec_from_file_location("hellm._C", path)
    sys.modules["hellm._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["hellm._C"])

from op_cases import KERNELS

from hellm import ops
from hellm.ops.backends import loaders


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN, so that an operator that leaves an element unwritten is caught."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    enabled = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(enabled)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small inputs gain nothing from threads; the tests about threads set their own number, races.py one for all."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("HELLM_KERNEL_THREADS", "1")))
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[KERNELS[0], KERNELS[-1]])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The native backend as it chose itself, and plain torch: for what does not depend on the instruction set."""
    with ops.backend(request.param[0]):
        yield request.param[0]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every usable backend and instruction set; the name of the backend."""
    backend, instruction_set = request.param
    extension = loaders.native()
    before = None if instruction_set is None else extension.instruction_set()
    if instruction_set is not None:
        extension.use_instruction_set(instruction_set)
    with ops.backend(backend):
        yield backend
    if before is not None:
        extension.use_instruction_set(before)

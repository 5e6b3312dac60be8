"""An operator is its own files, and what all operators share names none of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, NamedTuple

import pytest
import torch
from torch import Tensor

from hellm import ops, selftest
from hellm.ops import _registration
from hellm.ops._operator import Derivatives, Operator
from hellm.ops.backends import loaders

ROOT = Path(__file__).resolve().parents[2]
NAMES = [name for name in ops.__all__ if name != "backend"]
COMPILED = sorted(path.stem for path in (ROOT / "csrc").glob("*.cpp") if path.stem != "bindings")
SHARED = [
    *("CMakeLists.txt", "csrc/binding.h", "csrc/bindings.cpp", "csrc/dtype.h", "csrc/cpu/dispatch.cpp"),
    *("csrc/cpu/dispatch.h", "csrc/cuda/common.cuh", "csrc/cuda/kernels.cu", "csrc/cuda/kernels.h"),
    *("csrc/cuda/launch.cu", "csrc/cuda/launch.h", "csrc/cuda/parameters.cuh", "csrc/cuda/plan.h"),
    *("hellm/selftest.py", "hellm/ops/_arguments.py", "hellm/ops/_cases.py", "hellm/ops/_operator.py"),
    *("hellm/ops/_registration.py", "hellm/ops/backends/__init__.py", "hellm/ops/backends/_backend.py"),
    *("hellm/ops/backends/loaders.py", "hellm/ops/backends/nvrtc.py", "hellm/ops/backends/verified.py"),
    *("benchmarks/gpu_build.py", "benchmarks/registry.py", "docs/reference/ops.md", "tests/cuda/emulated_gpu.cpp"),
]


@pytest.mark.parametrize("path", SHARED)
def test_what_operators_share_names_none(path):
    found = re.findall(rf"\b(?:{'|'.join(NAMES)})\w*", (ROOT / path).read_text(encoding="utf-8"))
    assert found == []


@pytest.mark.parametrize("name", COMPILED)
def test_the_files_of_compiled_kernels_have_the_name_of_their_plan(name):
    for path in (f"csrc/{name}.h", f"csrc/cpu/{name}.cpp", f"csrc/cuda/{name}.cuh"):
        assert (ROOT / path).is_file(), path
    if not isinstance(loaders.native(), ImportError):
        assert f"{name}.cuh" in loaders.native().device_code.values()


def test_every_operator_has_a_file_of_its_name_with_cases_of_the_self_test():
    assert [module.__name__ for module in ops.MODULES] == [f"hellm.ops.{name}" for name in NAMES]
    for module, name in zip(ops.MODULES, NAMES, strict=True):
        assert name in {operator.name for operator in module.OPERATORS}
    assert {case.op for case in selftest._cases("small")} == set(NAMES)


class Arguments(NamedTuple):
    x: Annotated[Tensor, "rows N D"]


class Doubling(Derivatives):
    @staticmethod
    def setup_context(ctx, arguments, output):
        pass

    @staticmethod
    def backward(ctx, needs, grad):
        return {"x": 2 * grad}

    @staticmethod
    def jvp(ctx, saved, tangents):
        return 2 * tangents.x


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_an_operator_without_kernels_is_its_definition_everywhere(backend):
    if not hasattr(torch.ops.hellm, "doubled"):
        _registration.register(
            Operator(
                name="doubled",
                arguments=Arguments,
                returns="Tensor",
                method="doubled",
                plain=lambda arguments: 2 * arguments.x,
                run=lambda method, arguments: method(arguments),
                fake=lambda arguments: torch.empty_like(arguments.x),
                derivatives=Doubling,
            )
        )
    if backend == "native" and isinstance(loaders.native(), ImportError):
        pytest.skip("needs the compiled extension")
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    with ops.backend(backend):
        assert torch.equal(torch.ops.hellm.doubled(x), 2 * x)
        assert torch.autograd.gradcheck(torch.ops.hellm.doubled, x)
        torch.library.opcheck(torch.ops.hellm.doubled.default, (x,))

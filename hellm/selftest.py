"""Checks every usable backend and instruction set on this machine against the definitions in float64.

Operators of GPU backends are checked in processes of their own, since a kernel that goes astray leaves a process no
usable GPU: python -m hellm.selftest BACKEND DEVICE [SIZE [OPERATOR]] prints the records, a line of JSON each.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from hellm import ops
from hellm.hypergraph import Hypergraph
from hellm.ops import backends
from hellm.ops._cases import DTYPES, Case, Function, Samples
from hellm.ops.backends import loaders

_COMMAND = [sys.executable, "-m", "hellm.selftest"]


def selftest(*, seconds: float = 600.0) -> list[dict[str, Any]]:
    """Outputs and gradients of every operator on small random inputs: in seconds on a CPU, minutes with Triton.

    Args:
        seconds: how long one GPU backend may take.

    Returns:
        One record for each backend, instruction set, operator and dtype: "backend", "instruction_set" (on a GPU its
        architecture, "sm_90"; None for plain torch on the CPU), "op", "dtype", "case" (the inputs that came nearest to
        their budget), "worst_error" (the largest difference from float64 there, relative to the largest value),
        "budget" (what it may be), "ok", "failure" (what was raised, if so), "seconds". An operator of a GPU backend
        whose process died or took too long has a record more, with "dtype" "-".
    """
    found = []
    for backend, instruction_set in _cpu_kernels():
        found += ({"backend": backend, "instruction_set": instruction_set, **one} for one in _check_all("cpu", "small"))
    if torch.cuda.is_available():
        device = torch.device("cuda")
        for name, backend in backends.BACKENDS.items():
            if backend.available(device):
                rows = isolated(name, "cuda", seconds)
                architecture = loaders.architecture(device)
                found += ({"backend": name, "instruction_set": architecture, **one} for one in rows)
    return found


def isolated(backend: str, device: str, seconds: float, size: str = "large") -> list[dict[str, Any]]:
    """The records of one backend: of each operator from a process of its own, as many at a time as there are cores.

    Most of the time goes into compilation, where there is one.
    """
    operators = list(dict.fromkeys(case.op for case in _cases(size)))
    deadline = time.monotonic() + seconds
    with ThreadPoolExecutor(min(len(operators), os.cpu_count() or 1)) as pool:
        rows = pool.map(lambda op: _apart(op, (backend, device, size, op), deadline - time.monotonic()), operators)
        return [row for one in rows for row in one]


def _apart(op: str, arguments: Sequence[str], seconds: float) -> list[dict[str, Any]]:
    """The records of an operator from a process of its own, and a failed one more if that did not end well."""
    command, seconds = [*_COMMAND, *arguments], max(seconds, 0.0)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        out, failure = done.stdout, f"exit status {done.returncode}: {done.stderr[-500:]}" if done.returncode else None
    except subprocess.TimeoutExpired as error:
        out, failure = (error.stdout or b"").decode(errors="replace"), f"not done after {seconds:.0f} s"
    # What was cut off in the middle of a line is none.
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{") and line.endswith("}")]
    if failure is not None or not rows:
        rows.append({"op": op, "dtype": "-", "case": "its process", "failure": failure or "it printed nothing"})
        rows[-1] |= {"worst_error": float("inf"), "budget": 0.0, "ok": False, "seconds": 0.0}
    return rows


def _cpu_kernels() -> Iterator[tuple[str, str | None]]:
    """Every usable backend and instruction set, in use while yielded; what was in use before is restored."""
    if backends.BACKENDS["native"].available(torch.device("cpu")):
        extension = loaders.extension()
        before = extension.instruction_set()
        try:
            for name in extension.instruction_sets():
                extension.use_instruction_set(name)
                with ops.backend("native"):
                    yield "native", name
        finally:
            extension.use_instruction_set(before)
    with ops.backend("torch"):
        yield "torch", None


def _check_all(device: str, size: str, operator: str | None = None) -> Iterator[dict[str, Any]]:
    """The records of the backend in use; for each operator and dtype, the case that came nearest to its budget."""
    for op, cases in itertools.groupby(_cases(size), lambda case: case.op):
        if operator not in (None, op):
            continue
        cases = list(cases)
        for dtype in DTYPES:
            start = time.perf_counter()
            found = [_check(case, device, dtype) for case in cases if dtype in case.dtypes]
            worst = max(found, key=lambda one: one["worst_error"] / one["budget"])
            yield {
                "op": op,
                "dtype": str(dtype).removeprefix("torch."),
                **worst,
                "seconds": time.perf_counter() - start,
            }


def _check(case: Case, device: str, dtype: torch.dtype) -> dict[str, Any]:
    budget = 1e-10 if dtype == torch.float64 else max(32 * torch.finfo(dtype).eps, case.budget)
    failure = None
    try:
        error = _worst_error(case, [x.to(device, dtype) for x in case.inputs])
    except Exception as raised:  # a kernel that cannot run is a finding, not the end of the test
        error, failure = float("inf"), f"{type(raised).__name__}: {str(raised)[:300]}"
    return {"case": case.name, "worst_error": error, "budget": budget, "ok": error <= budget, "failure": failure}


@functools.lru_cache(maxsize=1)
def _cases(size: str) -> list[Case]:
    """Those of one operator stand together. "large" adds many rows, hubs and the wide ones in every dtype."""
    samples = Samples(_hypergraph, large=size == "large")
    return [case for module in ops.MODULES for case in module.cases(samples)]


def _hypergraph(incidence: Tensor, num_vertices: int, num_hyperedges: int) -> Hypergraph:
    return Hypergraph(incidence, num_vertices=num_vertices, num_hyperedges=num_hyperedges)


@contextlib.contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _worst_error(case: Case, inputs: list[Tensor]) -> float:
    with _matmul_precision(case.precision):
        found = _outputs_and_gradients(case.function, inputs)
    truth = _outputs_and_gradients(case.definition, [x.double() for x in inputs])
    return max(
        float((t - f.double()).abs().max() / t.abs().max()) if torch.isfinite(f).all() else float("inf")
        for t, f in zip(truth, found, strict=True)
    )


def _outputs_and_gradients(function: Function, inputs: list[Tensor]) -> list[Tensor]:
    """Outputs, and the gradient of each input under a fixed cotangent."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    with torch.enable_grad():
        outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not outputs[0].requires_grad:
        return list(outputs)
    cotangents = [
        torch.linspace(-1, 1, o.numel(), dtype=torch.float64, device=o.device).view_as(o).to(o.dtype) for o in outputs
    ]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, cotangents)]


if __name__ == "__main__":
    name, where, *which = sys.argv[1:]
    with ops.backend(name):
        for record in _check_all(where, *(which or ["large"])):
            print(json.dumps(record), flush=True)

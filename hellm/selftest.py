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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hellm import ops
from hellm.hypergraph import Hypergraph
from hellm.ops import backends, reference
from hellm.ops.backends import loaders

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_TEMPERATURE = 0.2
# What float32 may lose in sums of hundreds of terms and in logits of some tens.
_LONG_SUMS = 2e-5
_COMMAND = [sys.executable, "-m", "hellm.selftest"]

Function = Callable[..., "Tensor | tuple[Tensor, ...]"]


@dataclass(frozen=True)
class Case:
    """An operator on some float64 inputs, its definition, and the least error budget of float32 rows."""

    op: str
    name: str
    inputs: list[Tensor]
    function: Function
    definition: Function
    precision: str = "highest"
    budget: float = 0.0
    dtypes: tuple[torch.dtype, ...] = _DTYPES


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
        extension = loaders.native()
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
        for dtype in _DTYPES:
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
    generator = torch.Generator().manual_seed(0)

    def rows(count: int, dim: int) -> Tensor:
        return torch.randn(count, dim, generator=generator, dtype=torch.float64)

    def integers(high: int, count: int) -> Tensor:
        return torch.randint(high, (count,), generator=generator)

    large = size == "large"
    cases = []
    # Vertices, hyperedges, incidences besides those of a hub, its vertices, columns.
    sparse = [(97, 31, 400, 0, 67), (97, 31, 4000, 0, 64)]
    if large:
        sparse += [(1500, 200, 20_000, 0, 200), (6000, 300, 9000, 5000, 64)]
    for shape in sparse:
        cases += _sparse_cases(*shape, rows, integers)
    many = 1500 if large else 300
    for num_rows, dim, precision in itertools.product((97, many), (64, 67, 200), ("highest", "high")):
        if num_rows == 300 and dim != 64:
            continue
        # Every variant of the kernels in float32; 16-bit rows differ only in how they are loaded.
        dtypes = _DTYPES if (num_rows, dim) == (97, 67) or (large and num_rows == 97) else (torch.float32,)
        settings = {"precision": precision, "dtypes": dtypes}
        cases += _loss_cases(num_rows, dim, rows, integers, settings)
    # The similarities alone: which of two near neighbours comes first is up to rounding.
    nearest = [(97, 67, 5), (97, 300, 5)] + ([(1500, 64, 10), (1500, 67, 40)] if large else [])
    for num_rows, dim, k in nearest:
        x = [rows(num_rows, dim)]
        definition = functools.partial(lambda x, k: reference.knn(x, k)[1].detach(), k=k)
        cases.append(Case("knn", f"N {num_rows}, D {dim}", x, functools.partial(_similarities, k=k), definition))
    return sorted(cases, key=lambda case: case.op)


def _similarities(x: Tensor, k: int) -> Tensor:
    return ops.knn(x, k)[1]


def _sparse_cases(num_vertices, num_hyperedges, count, hub, dim, rows, integers) -> list[Case]:
    """The sparse products over a random hypergraph, one hyperedge of which may have many vertices.

    Two layers over long rows leave little but rounding: all rows of the result are nearly the same.
    """
    num_layers = 2 if count < 1000 else 1
    vertex = torch.cat([torch.arange(hub), integers(num_vertices, count)])
    edge = torch.cat([torch.zeros(hub, dtype=torch.int64), integers(num_hyperedges, count)])
    graph = Hypergraph(torch.stack([vertex, edge]), num_vertices=num_vertices, num_hyperedges=num_hyperedges)
    there = functools.cache(graph.to)
    scales = functools.cache(lambda device: there(device).scales(self_loops=False, dtype=torch.float64))
    vertices, hyperedges = rows(num_vertices, dim), rows(num_hyperedges, dim)

    def conv(x: Tensor) -> Tensor:
        graph = there(x.device)
        return reference.hypergraph_conv(x, *graph.vertex_csr, *graph.edge_csr, *scales(x.device), num_layers)

    def propagate(user: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
        graph = there(user.device)
        csr = (*graph.vertex_csr[:2], *graph.edge_csr[:2])
        return reference.bipartite_propagate(user, item, *csr, *graph.bipartite_scales(torch.float64), 2)

    name = f"{num_vertices} x {num_hyperedges}, D {dim}" + (f", hub of {hub}" if hub else "")
    # Plain torch adds 16-bit numbers up in 16 bits.
    settings = {"dtypes": (torch.float32, torch.float64) if hub else _DTYPES, "budget": _LONG_SUMS}
    return [
        Case(
            "incidence_product", name, [hyperedges],
            lambda x: ops.incidence_product(x, there(x.device)),
            lambda x: reference.incidence_product(x, *there(x.device).vertex_csr), **settings,
        ),
        Case(
            "incidence_product", f"{name}, transposed", [vertices],
            lambda x: ops.incidence_product(x, there(x.device), transpose=True),
            lambda x: reference.incidence_product(x, *there(x.device).edge_csr), **settings,
        ),
        Case(
            "hypergraph_conv", name, [vertices],
            lambda x: ops.hypergraph_conv(x, there(x.device), self_loops=False, num_layers=num_layers),
            conv, **settings,
        ),
        Case(
            "bipartite_propagate", name, [vertices, hyperedges],
            lambda u, i: ops.bipartite_propagate(u, i, there(u.device)), propagate, **settings,
        ),
    ]  # fmt: skip


def _loss_cases(num_rows: int, dim: int, rows, integers, settings: dict[str, Any]) -> list[Case]:
    """InfoNCE of all rows and of some that repeat, and item cross-entropy over a third as many items."""
    num_items, precision = num_rows // 3, settings["precision"]
    name = f"N {num_rows}, D {dim}, {precision}"
    views, chosen = [rows(num_rows, dim), rows(num_rows, dim)], integers(num_rows, num_rows // 2)
    hidden, items, bias = rows(num_rows, dim), rows(num_items, dim), rows(num_items, 1)[:, 0]
    target = integers(num_items, num_rows)

    def nce(a: Tensor, p: Tensor, rows: Tensor | None = None) -> Tensor:
        rows = None if rows is None else rows.to(a.device)
        return ops.info_nce(a, p, _TEMPERATURE, rows=rows, precision=precision)

    def defined(a: Tensor, p: Tensor, rows: Tensor | None = None) -> Tensor:
        return reference.info_nce(a, p, _TEMPERATURE, None if rows is None else rows.to(a.device)).mean()

    some = functools.partial
    nce_budget, item_budget = (2**-9 / _TEMPERATURE, 2e-2) if precision == "high" else (_LONG_SUMS, _LONG_SUMS)
    return [
        Case("info_nce", name, views, nce, defined, budget=nce_budget, **settings),
        Case(
            "info_nce", f"{name}, some rows", views, some(nce, rows=chosen), some(defined, rows=chosen),
            budget=nce_budget, **settings,
        ),
        Case(
            "item_cross_entropy", name, [hidden, items, bias],
            lambda h, e, b: ops.item_cross_entropy(h, e, target.to(h.device), bias=b),
            lambda h, e, b: reference.item_cross_entropy(h, e, target.to(h.device), b).mean(),
            budget=item_budget, **settings,
        ),
    ]  # fmt: skip


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

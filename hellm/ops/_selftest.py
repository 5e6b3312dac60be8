"""Checks every usable backend and instruction set on this machine against the definitions in float64."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hellm import ops
from hellm.hypergraph import Hypergraph
from hellm.ops import _backends, reference

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_NUM_VERTICES, _NUM_HYPEREDGES, _DIM = 97, 31, 67

Function = Callable[..., "Tensor | tuple[Tensor, ...]"]


def selftest() -> list[dict[str, Any]]:
    """Outputs and gradients of every operator, on small random inputs, in a few seconds.

    Returns:
        One record for each backend, instruction set, operator and dtype: "backend", "instruction_set" (on a GPU its
        architecture, "sm_90"; None for plain torch on the CPU), "op", "dtype", "worst_error" (largest difference from
        float64, relative to the largest value),
        "budget" (what it may be), "ok", "seconds".
    """
    return [
        {"backend": backend, "instruction_set": instruction_set, **record}
        for backend, instruction_set, device in _kernels()
        for record in _check_all(device)
    ]


def _kernels() -> Iterator[tuple[str, str | None, str]]:
    """Every usable backend, instruction set and device, in use while yielded; what was in use before is restored."""
    if _backends.unusable("native", "cpu") is None:
        extension = _backends.native()
        before = extension.instruction_set()
        try:
            for name in extension.instruction_sets():
                extension.use_instruction_set(name)
                with ops.backend("native"):
                    yield "native", name, "cpu"
        finally:
            extension.use_instruction_set(before)
    with ops.backend("torch"):
        yield "torch", None, "cpu"
    if not torch.cuda.is_available():
        return
    for name in _backends.BACKENDS:
        if _backends.unusable(name, "cuda") is None:
            with ops.backend(name):
                yield name, _backends.architecture(torch.device("cuda")), "cuda"


def _check_all(device: str) -> Iterator[dict[str, Any]]:
    for name, (inputs, function, definition) in _cases(device).items():
        for dtype in _DTYPES:
            start = time.perf_counter()
            budget = 1e-10 if dtype == torch.float64 else 32 * torch.finfo(dtype).eps
            try:
                error = _worst_error(function, definition, [x.to(device, dtype) for x in inputs])
            except Exception:  # a kernel that cannot run is a finding, not the end of the test
                error = float("inf")
            yield {
                "op": name,
                "dtype": str(dtype).removeprefix("torch."),
                "worst_error": error,
                "budget": budget,
                "ok": error <= budget,
                "seconds": time.perf_counter() - start,
            }


def _cases(device: str) -> dict[str, tuple[list[Tensor], Function, Function]]:
    """Operator -> (inputs, the operator, its definition)."""
    generator = torch.Generator().manual_seed(0)

    def rows(count: int) -> Tensor:
        return torch.randn(count, _DIM, generator=generator, dtype=torch.float64)

    vertex, edge = (torch.randint(n, (400,), generator=generator) for n in (_NUM_VERTICES, _NUM_HYPEREDGES))
    graph = Hypergraph(torch.stack([vertex, edge]), num_vertices=_NUM_VERTICES, num_hyperedges=_NUM_HYPEREDGES)
    graph = graph.to(device)
    scales = graph.scales(self_loops=False, dtype=torch.float64)
    csr = (*graph.vertex_csr, *graph.edge_csr)
    bipartite = (*graph.vertex_csr[:2], *graph.edge_csr[:2], *graph.bipartite_scales(torch.float64))
    vertices, hyperedges, positive = rows(_NUM_VERTICES), rows(_NUM_HYPEREDGES), rows(_NUM_VERTICES)
    bias, target = rows(_NUM_HYPEREDGES)[:, 0], torch.randint(_NUM_HYPEREDGES, (_NUM_VERTICES,), generator=generator)
    target = target.to(device)
    return {
        "incidence_product": (
            [hyperedges],
            lambda x: ops.incidence_product(x, graph),
            lambda x: reference.incidence_product(x, *graph.vertex_csr),
        ),
        "hypergraph_conv": (
            [vertices],
            lambda x: ops.hypergraph_conv(x, graph, self_loops=False, num_layers=2),
            lambda x: reference.hypergraph_conv(x, *csr, *scales, 2),
        ),
        "bipartite_propagate": (
            [vertices, hyperedges],
            lambda u, i: ops.bipartite_propagate(u, i, graph),
            lambda u, i: reference.bipartite_propagate(u, i, *bipartite, 2),
        ),
        "info_nce": (
            [vertices, positive],
            lambda a, p: ops.info_nce(a, p, precision="highest"),
            lambda a, p: reference.info_nce(a, p, 0.2).mean(),
        ),
        "item_cross_entropy": (
            [vertices, hyperedges, bias],
            lambda h, e, b: ops.item_cross_entropy(h, e, target, bias=b),
            lambda h, e, b: reference.item_cross_entropy(h, e, target, b).mean(),
        ),
        # The similarities alone: which of two near neighbours comes first is up to rounding.
        "knn": ([vertices], lambda x: ops.knn(x, 5)[1], lambda x: reference.knn(x, 5)[1].detach()),
    }


def _worst_error(function: Function, definition: Function, inputs: list[Tensor]) -> float:
    found = _outputs_and_gradients(function, inputs)
    truth = _outputs_and_gradients(definition, [x.double() for x in inputs])
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

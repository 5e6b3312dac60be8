"""Registration with torch.library: what every operator has in common.

An operator is one schema, one implementation per backend, its shapes without data, a dtype under autocast and its
derivatives. They serve every way to call it: autograd, forward mode, transforms of `torch.func`, autocast, tracing.
Arguments are checked in `hellm.ops`; only values are checked in kernels, where compiled code comes by too.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hellm.ops import _backends, _gpu, _native, _nvrtc, _triton, reference

_library = torch.library.Library("hellm", "DEF")

# The compiled kernels serve the first two; the others get plain torch, as every device gets that torch comes to know
# as PrivateUse1.
_KERNEL_KEYS = ("CPU", "CUDA", "MPS", "XPU", "HPU", "MTIA", "PrivateUse1")
_AUTOCAST_KEYS = {
    "cpu": "AutocastCPU",
    "cuda": "AutocastCUDA",
    "mps": "AutocastMPS",
    "xpu": "AutocastXPU",
    "hpu": "AutocastHPU",
    "mtia": "AutocastMTIA",
}

# Backend -> its implementation of every operator, under the same names with the same arguments.
_IMPLEMENTATIONS: dict[str, Any] = {
    "native": _native,
    "cuda": _gpu.Gpu(_gpu.launch_compiled),
    "nvrtc": _gpu.Gpu(_nvrtc.launch),
    "triton": _triton,
    "torch": SimpleNamespace(
        incidence_product=reference.incidence_product,
        hypergraph_conv=reference.hypergraph_conv,
        bipartite_propagate=reference.bipartite_propagate,
        info_nce=reference.info_nce_with_gradients,
        item_cross_entropy=reference.item_cross_entropy_with_gradients,
        knn=reference.knn_by_panels,
    ),
}


class Derivatives(torch.autograd.Function):
    """Derivatives of an operator by its arguments, as methods of an autograd function.

    `jvp` gets what was saved as its second argument, where it is free of its own tangents. Derivatives of `backward`
    and `jvp` are taken in turn, so that both consist of operations that have them. `define` adds `forward` and, where
    there is none, a `vmap` that computes one element of the batch after the other.
    """

    @staticmethod
    def without_precomputed(*args):
        """The arguments, with what only a plain backward pass can use left out: it has no derivative of its own."""
        return args


def define(
    schema: str,
    kernel_of: Callable[[Any], Callable],
    fake: Callable,
    derivatives: type[Derivatives],
    *,
    autocast: torch.dtype | None = None,
) -> None:
    """Define one operator.

    Args:
        schema: as `torch.library` reads it.
        kernel_of: from a module of implementations to the one of this operator.
        fake: the shapes, dtypes and device of its outputs, which are contiguous.
        derivatives: by its arguments.
        autocast: the dtype that matrices have under autocast; None is the one autocast is set to.
    """
    name = schema[: schema.index("(")]
    _library.define(schema)
    operator = getattr(torch.ops.hellm, name).default
    kernels = {backend: kernel_of(implementation) for backend, implementation in _IMPLEMENTATIONS.items()}

    def kernel(*args):
        found = kernels[_backends.select(_device(args))](*args)
        return tuple(t.contiguous() for t in found) if isinstance(found, tuple) else found.contiguous()

    for key in _KERNEL_KEYS:
        _library.impl(name, kernel, key)
    torch.library.register_fake(f"hellm::{name}", fake, lib=_library)

    def below_autograd(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    function = _autograd_function(name, operator, below_autograd, derivatives)

    def with_autograd(*args):
        if forward_ad._current_level >= 0:
            return function.apply(*function.without_precomputed(*args))
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return function.apply(*args)
        return below_autograd(*args)

    _library.impl(name, with_autograd, "Autograd")

    def transformed(*args):
        args = _cast_rows(args, autocast) if autocast_enabled(_device(args).type) else args
        return function.apply(*function.without_precomputed(*args))

    # Where transforms of torch.func come in, before autocast and autograd; autograd functions know what to do there.
    _library.impl(name, transformed, "FuncTorchDynamicLayerFrontMode")

    for key in filter(lambda key: hasattr(torch._C.DispatchKey, key), _AUTOCAST_KEYS.values()):
        excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def under_autocast(*args, excluded=excluded):
            with torch._C._ExcludeDispatchKeyGuard(excluded):
                return operator(*_cast_rows(args, autocast))

        _library.impl(name, under_autocast, key)


def _autograd_function(
    name: str, operator: Callable, forward: Callable, derivatives: type[Derivatives]
) -> type[Derivatives]:
    """Gradients come from the backend that was asked for at the forward pass.

    Autograd runs the backward pass of a GPU in a thread of its own, where the caller's choice is not in force.
    """

    def setup_context(ctx, inputs, output):
        ctx.chosen_backend = _backends.chosen()
        derivatives.setup_context(ctx, inputs, output)

    def backward(ctx, *grads):
        with contextlib.nullcontext() if ctx.chosen_backend is None else _backends.backend(ctx.chosen_backend):
            return derivatives.backward(ctx, *grads)

    def jvp(ctx, *tangents):
        # torch turns forward mode off in here, for the transforms around this one as well.
        saved = [None if t is None else forward_ad.unpack_dual(t, level=0).primal for t in ctx.saved_tensors]
        with forward_ad._set_fwd_grad_enabled(True):
            return derivatives.jvp(ctx, saved, *tangents)

    methods = {"forward": forward, "setup_context": setup_context, "backward": backward, "jvp": jvp}
    if derivatives.vmap is torch.autograd.Function.vmap:
        methods["vmap"] = functools.partial(one_by_one, operator)
    return type(name, (derivatives,), {method: staticmethod(function) for method, function in methods.items()})


def one_by_one(operator: Callable, info: Any, in_dims: tuple, *args) -> tuple:
    """`vmap` of an operator: its outputs for each element of the batch, stacked, and where the batch is in them."""
    found = [
        operator(*(a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(found[0], Tensor):
        return torch.stack(found), 0
    return tuple(map(torch.stack, zip(*found, strict=True))), (0,) * len(found[0])


def _device(args: tuple) -> torch.device:
    return next(a.device for a in args if isinstance(a, Tensor))


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for a type of device; False for one that it does not know."""
    return device_type in _AUTOCAST_KEYS and torch.is_autocast_enabled(device_type)


def _cast_rows(args: tuple, dtype: torch.dtype | None) -> tuple:
    """Matrices of rows follow autocast; scales, values and indices (all 1-d) keep their dtype, and so does float64."""
    dtype = dtype or torch.get_autocast_dtype(_device(args).type)
    return tuple(
        a.to(dtype)
        if isinstance(a, Tensor) and a.ndim == 2 and a.is_floating_point() and a.dtype != torch.float64
        else a
        for a in args
    )


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32

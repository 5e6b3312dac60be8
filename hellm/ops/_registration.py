"""Registration of operators with torch.library, for every backend and way to call them.

The first argument of each is a tensor, whose device is that of all.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hellm.ops import backends
from hellm.ops._arguments import schema
from hellm.ops._dtypes import AUTOCAST_KEYS, autocast_enabled, cast_rows
from hellm.ops._operator import Operator

_library = torch.library.Library("hellm", "DEF")

# The compiled kernels serve the first two; the others get plain torch, as every device gets that torch comes to know
# as PrivateUse1.
_KERNEL_KEYS = ("CPU", "CUDA", "MPS", "XPU", "HPU", "MTIA", "PrivateUse1")


def register(*operators: Operator) -> None:
    for operator in operators:
        _register(operator)


def _register(operator: Operator) -> None:
    name, arguments = operator.name, operator.arguments
    _library.define(schema(name, arguments, operator.returns))
    overload = getattr(torch.ops.hellm, name).default
    kernels = {
        backend.name: functools.partial(operator.run, getattr(backend, operator.method, operator.plain))
        for backend in backends.BACKENDS.values()
    }

    def kernel(*args):
        found = kernels[backends.select(args[0].device).name](arguments(*args))
        return tuple(t.contiguous() for t in found) if isinstance(found, tuple) else found.contiguous()

    for key in _KERNEL_KEYS:
        _library.impl(name, kernel, key)
    torch.library.register_fake(f"hellm::{name}", lambda *args: operator.fake(arguments(*args)), lib=_library)

    def below_autograd(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    function = _autograd_function(operator, overload, below_autograd)

    def transformable(args: tuple) -> tuple:
        return operator.derivatives.without_precomputed(arguments(*args))

    def with_autograd(*args):
        if forward_ad._current_level >= 0:
            return function.apply(*transformable(args))
        if torch.is_grad_enabled():
            for a in args:
                if isinstance(a, Tensor) and a.requires_grad:
                    return function.apply(*args)
        return below_autograd(*args)

    _library.impl(name, with_autograd, "Autograd")

    def transformed(*args):
        device_type = args[0].device.type
        args = cast_rows(args, device_type, operator.autocast) if autocast_enabled(device_type) else args
        return function.apply(*transformable(args))

    # Where transforms of torch.func come in, before autocast and autograd; autograd functions know what to do there.
    _library.impl(name, transformed, "FuncTorchDynamicLayerFrontMode")

    for key in filter(lambda key: hasattr(torch._C.DispatchKey, key), AUTOCAST_KEYS.values()):
        excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def under_autocast(*args, excluded=excluded):
            with torch._C._ExcludeDispatchKeyGuard(excluded):
                return overload(*cast_rows(args, args[0].device.type, operator.autocast))

        _library.impl(name, under_autocast, key)


def _autograd_function(operator: Operator, overload: Any, forward: Any) -> type[torch.autograd.Function]:
    """Gradients come from the backend that was asked for at the forward pass.

    Autograd runs the backward pass of a GPU in a thread of its own, where the caller's choice is not in force.
    """
    arguments, derivatives = operator.arguments, operator.derivatives

    def setup_context(ctx, inputs, output):
        ctx.chosen_backend = backends.chosen()
        derivatives.setup_context(ctx, arguments(*inputs), output)

    def backward(ctx, *grads):
        with contextlib.nullcontext() if ctx.chosen_backend is None else backends.backend(ctx.chosen_backend):
            found = derivatives.backward(ctx, arguments(*ctx.needs_input_grad), *grads)
        return tuple(map(found.get, arguments._fields))

    def jvp(ctx, *tangents):
        # torch turns forward mode off in here, for the transforms around this one as well.
        saved = [None if t is None else forward_ad.unpack_dual(t, level=0).primal for t in ctx.saved_tensors]
        with forward_ad._set_fwd_grad_enabled(True):
            return derivatives.jvp(ctx, saved, arguments(*tangents))

    def vmap(info, in_dims, *args):
        return derivatives.vmap(overload, info, arguments(*in_dims), arguments(*args))

    methods = {"forward": forward, "setup_context": setup_context, "backward": backward, "jvp": jvp, "vmap": vmap}
    methods = {name: staticmethod(method) for name, method in methods.items()}
    return type(derivatives.__name__, (torch.autograd.Function,), methods)

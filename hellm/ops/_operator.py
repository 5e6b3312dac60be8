"""What an operator consists of, and what its derivatives have in common.

An operator is one argument tuple, one implementation per backend, its shapes without data, a dtype under autocast and
its derivatives. They serve every way to call it: autograd, forward mode, transforms of `torch.func`, autocast, tracing.
Arguments are checked in the public functions; only values are checked in `Operator.run`, where compiled code comes by
too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Result = Tensor | tuple[Tensor, ...]


class Derivatives:
    """Derivatives of an operator by its arguments: methods of a `torch.autograd.Function` with names for positions.

    `arguments`, `needs`, `tangents` and `in_dims` are argument tuples of the operator, of what their names say.
    Derivatives of `backward` and `jvp` are taken in turn, so that both consist of operations that have them.
    """

    @staticmethod
    def without_precomputed(arguments: Any) -> Any:
        """The arguments, with what only a plain backward pass can use left out: it has no derivative of its own."""
        return arguments

    @staticmethod
    def setup_context(ctx: Any, arguments: Any, output: Any) -> None:
        raise NotImplementedError

    @staticmethod
    def backward(ctx: Any, needs: Any, *grads: Tensor | None) -> Mapping[str, Tensor | None]:
        """Gradients by the name of their argument; what is left out has none."""
        raise NotImplementedError

    @staticmethod
    def jvp(ctx: Any, saved: list[Any], tangents: Any) -> Any:
        """Tangents of the outputs; `saved` is what was saved, free of its own tangents."""
        raise NotImplementedError

    @staticmethod
    def vmap(operator: Callable, info: Any, in_dims: Any, arguments: Any) -> tuple[Result, Any]:
        """Outputs of a batch and where it is in them: of one element after the other, if there is no better way."""
        return one_by_one(operator, info, in_dims, arguments)


def one_by_one(operator: Callable, info: Any, in_dims: Any, arguments: Any) -> tuple[Result, Any]:
    found = [
        operator(*(a if dim is None else a.select(dim, i) for a, dim in zip(arguments, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(found[0], Tensor):
        return torch.stack(found), 0
    return tuple(map(torch.stack, zip(*found, strict=True))), (0,) * len(found[0])


@dataclass(frozen=True)
class Operator:
    """One operator of `torch.ops.hellm`.

    Attributes:
        name: in `torch.ops.hellm`.
        arguments: the class of its argument tuple, from which its schema is made.
        returns: the results in that schema.
        method: the name of the method of a backend that computes it.
        plain: the same in plain torch, for a backend without that method and where the others cannot run.
        run: from that method or `plain`, and an argument tuple, to the outputs.
        fake: from an argument tuple to the shapes, dtypes and device of the outputs, which are contiguous.
        derivatives: by its arguments.
        autocast: the dtype that matrices have under autocast; None is the one autocast is set to.
    """

    name: str
    arguments: type
    returns: str
    method: str
    plain: Callable[[Any], Any]
    run: Callable[[Callable, Any], Result]
    fake: Callable[[Any], Result]
    derivatives: type[Derivatives]
    autocast: torch.dtype | None = None

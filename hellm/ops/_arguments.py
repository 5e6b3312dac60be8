"""The argument tuple of an operator: its schema for torch, and what kernels take for granted of it.

A kernel reads memory as what it is told that it holds. The public functions check what users give; the checks here
stand in front of the kernels, for whoever calls an operator or a backend itself.

The fields of a tuple, in the order of the operator, say what they hold: `Annotated[Tensor, "rows N D"]` is a kind and
sizes. All "rows" have the dtype of the first; "floating", "index" (int32 or int64), "int32" and "int64" are dtypes; a
"schedule" is int32 and read by GPUs alone. Equal letters are equal sizes, "V+1" is one more, and "R=N" is N where the
argument is None; the first tensor with a letter is always there. A "count" is at least its first bound and at most its
second. A field without a layout is taken as it is. A second note is the type in the schema where that is not the
field's own.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor

from hellm.ops._dtypes import FLOATING

T = TypeVar("T", bound=NamedTuple)

_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "rows": FLOATING,
    "floating": FLOATING,
    "int32": (torch.int32,),
    "schedule": (torch.int32,),
    "int64": (torch.int64,),
    "index": (torch.int32, torch.int64),
}
_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", bool: "bool", str: "str"}


class _Field(NamedTuple):
    name: str
    layout: str
    schema_type: str
    optional: bool


@functools.cache
def _fields(arguments: type) -> list[_Field]:
    found = []
    for name, hint in typing.get_type_hints(arguments, include_extras=True).items():
        kind, *notes = typing.get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
        layout, schema_type = [*notes, "", ""][:2]
        found.append(_Field(name, layout, schema_type or _SCHEMA_TYPES[kind], kind == Tensor | None))
    return found


def layouts(arguments: type) -> dict[str, str]:
    """Field -> kind and sizes, of those that have them."""
    return {field.name: field.layout for field in _fields(arguments) if field.layout}


def schema(name: str, arguments: type, returns: str) -> str:
    """Of an operator, as `torch.library` reads it."""
    return f"{name}({', '.join(f'{field.schema_type} {field.name}' for field in _fields(arguments))}) -> {returns}"


def checked(arguments: type[T], *, schedules: bool = True) -> Callable[[Callable[[Any, T], Any]], Callable]:
    """For a method of a backend, that gets the tensors of its argument tuple contiguous and as their layouts say.

    Args:
        arguments: the class of the tuple.
        schedules: whether the schedules of matrices are read.

    Raises:
        ValueError: at a call, naming the argument, what it must be, and what it was.
    """
    check = _check_of(arguments, schedules)

    def decorate(method: Callable[[Any, T], Any]) -> Callable[[Any, T], Any]:
        @functools.wraps(method)
        def call(backend: Any, given: T) -> Any:
            return method(backend, check(given))

        return call

    return decorate


@functools.cache
def _check_of(arguments: type[T], schedules: bool) -> Callable[[T], T]:
    """A function from a tuple to one that kernels may take, written out: reading layouts costs more than a small call.

    In its text a letter is a size from the first tensor on that brings it.
    """
    lines, tensors, contiguous, known = [], [], [], set()
    for field in _fields(arguments):
        kind, *sizes = field.layout.split() or [""]
        if kind == "count":
            lines += _lines_of_count(field.name, *sizes)
        elif kind and (schedules or kind != "schedule"):
            lines += _lines_of_tensor(field, kind, sizes, known, is_first=not tensors)
            tensors.append(field.name)
            absent = f"{field.name} is None or " if field.optional else ""
            contiguous.append(f"({absent}{field.name}.is_contiguous())")
    lines = [f"{', '.join(arguments._fields)}, = given", *lines]
    lines += [f"return given if {' and '.join(contiguous)} else made_contiguous(given)"]
    names = {
        "made_contiguous": functools.partial(_made_contiguous, tensors),
        "refuse": functools.partial(_refuse, arguments),
    }
    names |= {f"{kind}_dtypes": dtypes for kind, dtypes in _DTYPES.items()}
    text = "\n    ".join(["def check(given):", *lines])
    exec(compile(text, f"<check of {arguments.__name__}>", "exec"), names)
    return typing.cast("Callable[[T], T]", names["check"])


def _lines_of_tensor(field: _Field, kind: str, sizes: Sequence[str], known: set[str], *, is_first: bool) -> list[str]:
    name, refuse = field.name, f"refuse({field.name!r}, locals())"
    letters = _letters(sizes)
    wanted = [f"{name}.dtype in {kind}_dtypes", f"len(shape) == {len(letters)}"]
    if not is_first:
        wanted += [f"{name}.device == device"] + ([f"{name}.dtype is dtype"] if kind == "rows" else [])
    brought = []
    for place, (letter, more, _) in enumerate(letters):
        if letter in known:
            wanted.append(f"shape[{place}] == {letter} + {more}" if more else f"shape[{place}] == {letter}")
            continue
        wanted += [f"shape[{place}] >= {more}"] if more else []
        brought.append(f"{letter} = shape[{place}] - {more}" if more else f"{letter} = shape[{place}]")
        known.add(letter)
    lines = [f"shape = {name}.shape", f"if not ({' and '.join(wanted)}): {refuse}", *brought]
    if is_first:
        lines = [f"device, dtype = {name}.device, {name}.dtype", *lines]
    if not field.optional:
        return lines
    defaults = [f"{letter} = {default}" for letter, _, default in letters if default]
    return [f"if {name} is not None:", *(f"    {line}" for line in lines), *(f"else: {line}" for line in defaults)]


def _lines_of_count(name: str, low: str, high: str | None = None) -> list[str]:
    wanted = f"{name} >= {low}" if high is None else f"{low} <= {name} <= {high}"
    limit = f">= {low}" if high is None else f"between {low} and {{{high}}}"
    return [f'if not {wanted}: raise ValueError(f"{name} must be {limit}, got {{{name}}}")']


def _made_contiguous(names: Sequence[str], given: T) -> T:
    tensors = {name: getattr(given, name) for name in names}
    return given._replace(**{name: x.contiguous() for name, x in tensors.items() if x is not None})


def _letters(sizes: Sequence[str]) -> list[tuple[str, int, str]]:
    """Of "M+1" or "R=N": the letter, what is added to it, and what it is where there is no tensor."""
    split = [(*size.partition("=")[0].partition("+"), size.partition("=")[2]) for size in sizes]
    return [(letter, int(more or 0), default) for letter, _, more, default in split]


def _refuse(arguments: type, name: str, found: dict[str, Any]) -> NoReturn:
    """`found`: what the check knows when it meets `name`, the sizes by their letters among it."""
    kind, *sizes = layouts(arguments)[name].split()
    tensor, device, dtypes = found[name], found["device"], _DTYPES[kind]
    if kind == "rows" and found["dtype"] in dtypes:
        dtypes = (found["dtype"],)
    letters = _letters(sizes)
    # A size that nothing else says may be what it is.
    free = tensor.shape if tensor.ndim == len(letters) else [letter for letter, *_ in letters]
    shape = [
        str(found[letter] + more if letter in found else size)
        for (letter, more, _), size in zip(letters, free, strict=True)
    ]
    wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    raise ValueError(
        f"{name} must be [{', '.join(shape)}] {wanted} on {device}, got {tuple(tensor.shape)} "
        f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
    )

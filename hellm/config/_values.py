"""Between dataclasses and plain values."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, cast

from hellm.config._checks import require

__all__ = ["build", "checked", "plain", "replace_dotted", "setting_type", "unknown"]

ConfigT = TypeVar("ConfigT")


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def unknown(kind: str, name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown {kind} {name!r}{hint} Known: {', '.join(known)}"


def _field_types(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def build(cls: type[ConfigT], values: Any, prefix: str) -> ConfigT:
    if isinstance(values, cls):
        return values
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix.rstrip('.') or cls.__name__} must be a mapping of settings, got {values!r}")
    hints = _field_types(cls)
    for key in values:
        if key not in hints:
            raise ValueError(unknown("setting", f"{prefix}{key}", [f"{prefix}{name}" for name in hints]))
    return cls(**{key: _convert(hints[key], value, f"{prefix}{key}") for key, value in values.items()})


def replace_dotted(config: Any, path: list[str], value: Any, name: str) -> Any:
    """With one setting replaced, and not held to what goes with the others; see `checked`."""
    hints = _field_types(type(config))
    prefix = name[: len(name) - len(".".join(path))]
    if path[0] not in hints:
        raise ValueError(unknown("setting", f"{prefix}{path[0]}", [f"{prefix}{key}" for key in hints]))
    if len(path) == 1:
        return _with(config, path[0], _convert(hints[path[0]], value, name))
    child = getattr(config, path[0])
    if not dataclasses.is_dataclass(child):
        raise ValueError(f"setting {prefix}{path[0]} has no parts, got {name!r}")
    return _with(config, path[0], replace_dotted(child, path[1:], value, name))


def _with(config: Any, field: str, value: Any) -> Any:
    changed = copy.copy(config)
    object.__setattr__(changed, field, value)
    return changed


def checked(config: ConfigT) -> ConfigT:
    """The same settings, held to what they must be. Raises: ValueError, which one and what it must be."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(cast(Any, config))}
    return type(config)(
        **{name: checked(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()}
    )


def setting_type(cls: type, name: str) -> Any:
    """The annotated type of a dotted setting, without `| None`. Raises: ValueError, unknown, with the nearest name."""
    kind, prefix = cls, ""
    for part in name.split("."):
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            raise ValueError(f"setting {prefix.rstrip('.')} has no parts, got {name!r}")
        hints = _field_types(kind)
        if part not in hints:
            raise ValueError(unknown("setting", f"{prefix}{part}", [f"{prefix}{key}" for key in hints]))
        kind, prefix = hints[part], f"{prefix}{part}."
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            (kind,) = [one for one in typing.get_args(kind) if one is not type(None)]
    return kind


def _convert(expected: Any, value: Any, name: str) -> Any:
    """`value` as the annotated type `expected`, or a ValueError that says what was expected."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if isinstance(expected, type) and dataclasses.is_dataclass(expected):
        return build(expected, value, f"{name}.")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = [argument for argument in arguments if argument is not type(None)]
        return _convert(inner, value, name)
    if origin is Literal:
        require(value in arguments, name, f"one of {', '.join(map(repr, arguments))}", value)
        return value
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(arguments[0], item, name) for item in items)
    if expected is float:
        # YAML 1.1 reads 1e-3 as text.
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                pass
        require(isinstance(value, (int, float)) and not isinstance(value, bool), name, "a number", value)
        return float(value)
    kinds = {int: "an integer", bool: "true or false", str: "text"}
    require(
        isinstance(value, expected) and (expected is bool or not isinstance(value, bool)), name, kinds[expected], value
    )
    return value

"""What settings are held to."""

from __future__ import annotations

__all__ = ["require"]


def require(condition: bool, name: str, rule: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {rule}, got {value!r}")

"""Which device torch computes on."""

from __future__ import annotations

__all__ = ["no_cuda_reason", "resolve_device"]


def no_cuda_reason() -> str | None:
    """Why torch has no GPU here: its build, no driver, a driver that is too old; None where it has one."""
    import torch

    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
    except RuntimeError as error:
        # Its first sentence names the versions of a driver that is too old.
        return f"torch sees no CUDA device: {str(error).splitlines()[0]}"
    return "torch sees no CUDA device"


def resolve_device(name: str) -> str:
    """`name` with "auto" decided. Raises: ValueError, another device than CPU and CUDA, or one that is not there."""
    import torch

    if name == "auto":
        return "cpu" if no_cuda_reason() else "cuda"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = None
    if kind not in ("cpu", "cuda"):
        raise ValueError(f'device must be "auto", "cpu", "cuda" or "cuda:N", got {name!r}')
    reason = no_cuda_reason() if kind == "cuda" else None
    if reason is not None:
        raise ValueError(f"device must be usable, got {name!r}: {reason}")
    count, index = torch.cuda.device_count(), torch.device(name).index
    if kind == "cuda" and index is not None and index >= count:
        raise ValueError(f"device must be usable, got {name!r} where torch sees {count} CUDA device(s)")
    return name

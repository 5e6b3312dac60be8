"""Checkpoints.

A checkpoint is a single safetensors file: model, optimiser and generator tensors, with everything else as JSON in its
header. One file is replaced in one step, so a kill or a full disk leaves the previous checkpoint whole, and nothing in
it can run code when it is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hellm._files import atomic_path, reading

__all__ = [
    "load_checkpoint",
    "load_training_state",
    "model_weights",
    "read_model",
    "save_checkpoint",
    "save_training_state",
    "training_state",
    "whole_weights",
]


def model_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint keeps of a model: all of it, or what is trained where the model tells that apart."""
    return getattr(model, "trainable_state_dict", model.state_dict)()


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """`model_weights` as a checkpoint names them; of a model of which each process has a part, in all processes."""
    return {f"model.{name}": _whole(tensor) for name, tensor in model_weights(model).items()}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # pyright: ignore[reportAttributeAccessIssue]


def _part(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What this process has of a whole value where `like`, of the same shape, is a `DTensor`; else the value."""
    if not hasattr(like, "full_tensor") or value.dim() == 0:
        return value
    from torch.distributed.tensor import distribute_tensor

    placed: Any = like
    return distribute_tensor(value.to(like.device), placed.device_mesh, placed.placements)


def save_checkpoint(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]
) -> None:
    """Write named tensors and JSON-able `state` to one file, whole or not at all."""
    from safetensors.torch import save_file

    # An owned copy each: safetensors refuses tensors that share memory, and views would write their whole storage.
    owned = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    with atomic_path(path) as temporary:
        save_file(owned, temporary, metadata={"state": json.dumps(state)})


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and state of `save_checkpoint`.

    Raises: FileNotFoundError; ValueError naming the file if it is not such a checkpoint.
    """
    from safetensors import safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    with reading(path):
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = file.metadata() or {}
        if "state" not in metadata:
            raise ValueError(f"{path} must carry a training state in its header, got {sorted(metadata) or 'none'}")
        return tensors, json.loads(metadata["state"])


def save_training_state(
    path: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    """Everything a run needs to go on: `training_state`, and `state` (JSON-able)."""
    tensors, groups = training_state(model, optimizer)
    save_checkpoint(path, tensors, {**state, **groups})


def training_state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors of model, optimiser and torch's generators, and what else is to be noted.

    Of a model of which each process has a part, all processes ask for it together, and get it whole.
    """
    tensors = whole_weights(model)
    packed = optimizer.state_dict()
    for index, values in packed["state"].items():
        tensors |= {f"optimizer.{index}.{name}": _whole(torch.as_tensor(value)) for name, value in values.items()}
    tensors["generator.cpu"] = torch.get_rng_state()
    device = _device_of(model)
    if device.type == "cuda":
        tensors["generator.cuda"] = torch.cuda.get_rng_state(device)
    # The learning rate of a captured step is a tensor.
    groups = [
        {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in group.items()}
        for group in packed["param_groups"]
    ]
    return tensors, {"optimizer": groups}


def load_training_state(
    path: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore what `save_training_state` wrote into `model`, `optimizer` and torch's generators; returns `state`."""
    tensors, state = load_checkpoint(path)
    _load_model(path, model, tensors)
    packed: dict[int, dict[str, torch.Tensor | int]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            # Some parameters were scalars before, and so are what is kept of them.
            own = parameters[int(index)]
            if key != "step":
                tensor = _part(tensor.reshape(own.shape), own)
            elif not tensor.is_floating_point():
                # SparseAdam counts in a number, and with it computes in float64.
                tensor = int(tensor)
            packed.setdefault(int(index), {})[key] = tensor
    # How the update is computed is a matter of this device, not of the one that the run was saved on.
    groups = [
        saved | {name: own[name] for name in ("foreach", "fused", "capturable") if name in own}
        for saved, own in zip(state.pop("optimizer"), optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": packed, "param_groups": groups})
    torch.set_rng_state(tensors["generator.cpu"])
    device = _device_of(model)
    if "generator.cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["generator.cuda"], device)
    return state


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def read_model(path: str | os.PathLike[str], model: nn.Module) -> dict[str, Any]:
    """Load only the weights of a checkpoint into `model`; returns its state."""
    tensors, state = load_checkpoint(path)
    _load_model(path, model, tensors)
    return state


def saved_weights(tensors: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights among the tensors of a checkpoint, by the names that they have in `model`."""
    weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    renamed = getattr(model, "renamed_state_dict", None)
    return weights if renamed is None else renamed(weights)


def _load_model(path: str | os.PathLike[str], model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    weights = saved_weights(tensors, model)
    own = model_weights(model)
    expected = {name: tuple(value.shape) for name, value in own.items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if expected != found:
        name = next(name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name))
        raise ValueError(
            f"{path} does not fit the model: {name} must be {expected.get(name, 'absent')}, "
            f"got {found.get(name, 'absent')}; the settings (config.yaml) are of another model, or one of the two is "
            "damaged"
        )
    for name, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{path} holds NaN or infinity in {name}: its training had diverged and cannot go on")
    weights = {name: _part(value, own[name]) for name, value in weights.items()}
    getattr(model, "load_trainable_state_dict", model.load_state_dict)(weights)

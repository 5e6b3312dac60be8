"""Reading settings from presets, YAML files and overrides, and writing them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from hellm._files import atomic_path
from hellm.config._values import build, checked, plain, replace_dotted, unknown
from hellm.config.presets import presets_of

__all__ = [
    "config_from_dict",
    "config_to_dict",
    "load_config",
    "load_saved_config",
    "override_config",
    "save_config",
]

ConfigT = TypeVar("ConfigT")


def load_config(cls: type[ConfigT], source: str | os.PathLike[str], overrides: Iterable[str] = ()) -> ConfigT:
    """A config from a preset name or a YAML file, with `key=value` overrides on top.

    Args:
        cls: config class, e.g. `PretrainConfig`.
        source: a preset of `cls`, or the path of a YAML file (ends in .yaml or .yml, or exists).
        overrides: dotted settings such as "model.num_layers=3"; values are read as YAML.
    Raises: ValueError for an unknown preset or key (naming the nearest one) and for values of a wrong type or range.
    """
    presets = presets_of(cls)
    path = Path(source)
    if str(source) in presets:
        config = presets[str(source)]
    elif path.is_file():
        config = config_from_dict(cls, _read_yaml(path), where=str(path))
    elif path.suffix in (".yaml", ".yml"):
        raise FileNotFoundError(f"config file {path} does not exist")
    else:
        raise ValueError(unknown("preset or config file", str(source), list(presets)))
    return override_config(config, overrides)


def load_saved_config(cls: type[ConfigT], path: str | os.PathLike[str]) -> ConfigT:
    """The config that `save_config` wrote. Raises: FileNotFoundError; ValueError, also for a file without settings."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    values = _read_yaml(path)
    if not values:
        raise ValueError(f"{path}: damaged, holds no settings")
    return config_from_dict(cls, values, where=str(path))


def override_config(config: ConfigT, overrides: Iterable[str]) -> ConfigT:
    """`config` with dotted `key=value` settings applied in order, and checked once all are.

    Raises: ValueError as `load_config` does.
    """
    import yaml

    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f'an override must look like "key=value", got {text!r}')
        config = replace_dotted(config, key.split("."), yaml.safe_load(value), key)
    return checked(config)


def config_from_dict(cls: type[ConfigT], values: Mapping[str, Any], where: str = "") -> ConfigT:
    """A config from nested plain values; missing keys keep their defaults. `where` names the source in errors."""
    prefix = f"{where}: " if where else ""
    try:
        return build(cls, values, "")
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None


def config_to_dict(config: Any) -> dict[str, Any]:
    """Plain nested values (dict, list, str, int, float, bool, None) of a config."""
    return plain(dataclasses.asdict(config))


def save_config(config: Any, path: str | os.PathLike[str]) -> None:
    """Write `config` as YAML, whole or not at all."""
    import yaml

    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False), encoding="utf-8")


def _read_yaml(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ValueError(f"{path}: a config file must be a mapping of settings, got {type(values).__name__}")
    return values

"""What a search tries: spaces written as words, and settings as a point of one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from hellm.config import FinetuneConfig, PretrainConfig, SASRecConfig, config_from_dict, config_to_dict, setting_type

if TYPE_CHECKING:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    Distribution: TypeAlias = CategoricalDistribution | FloatDistribution | IntDistribution

__all__ = ["SPACES", "is_dimension", "parse_space", "plain_values", "point_of", "with_settings"]

ConfigT = TypeVar("ConfigT")

SPACES: Mapping[type, tuple[str, ...]] = MappingProxyType(
    {
        PretrainConfig: (
            "learning_rate=3e-4..1e-2:log",
            "l2_weight=1e-5..1e-2:log",
            "temperature=0.1..1.0",
            "user_contrastive_weight=0.01..1.0:log",
            "item_contrastive_weight=0.01..1.0:log",
            "model.num_layers=1..4",
        ),
        SASRecConfig: (
            "learning_rate=3e-4..3e-3:log",
            "dropout=0.1..0.7",
            "embedding_dim=32,64,128",
            "num_layers=1..3",
            "norm_first=false,true",
        ),
        FinetuneConfig: (
            "learning_rate=3e-4..3e-3:log",
            "weight_decay=0.01..0.3:log",
            "model.item_dropout=0.0..0.5",
            "model.item_id_dim=0,64,128",
            "model.lora_rank=4,16,64",
        ),
    }
)
"""What is searched where nothing is named, for the settings of each stage."""

# They say what the trials are compared by, so they are the same for all.
_COMPARED_BY = ("monitor", "ks", "protocol", "seed")
_END = r"[^\s:]*?"
_RANGE = re.compile(rf"(?P<low>{_END})\.\.(?P<high>{_END})(?::(?P<scale>.*))?", re.DOTALL)
# A path may hold two dots as well.
_PATH = re.compile(r"[/\\]|^\.\.$")


def is_dimension(value: str) -> bool:
    """Whether the value of a setting is a range or several values, not one."""
    if ".." in value and not _PATH.search(value):
        return True
    try:
        return len(_choices(value)) > 1
    except ValueError:
        return False


def parse_space(words: Iterable[str], config: Any) -> dict[str, Distribution]:
    """Name -> distribution, of words NAME=LOW..HIGH, NAME=LOW..HIGH:log or NAME=VALUE,VALUE,...

    Values are read as YAML and are kept as their text; a range is of whole numbers for a setting that is one.

    Args:
        words: One for each setting; dotted names reach into groups.
        config: Settings of the stage, which all values must suit.
    Raises: ValueError, naming the setting: unknown, given twice, one that trials are compared by, a range of what is
        no number, or values that it cannot have.
    """
    space: dict[str, Distribution] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not (name and equals and text):
            raise ValueError(f"SPACE must be NAME=LOW..HIGH[:log] or NAME=VALUE,VALUE,..., got {word!r}")
        if name in space:
            raise ValueError(f"{name} must be given once, got it twice")
        if name in _COMPARED_BY:
            raise ValueError(f"{name} must be the same for all trials, which are compared by it, got {text!r}")
        kind = setting_type(type(config), name)
        is_range = ".." in text and not _PATH.search(text)
        space[name] = _range(name, text, kind) if is_range else _values(name, text)
    if not space:
        raise ValueError("SPACE must be of at least one setting, got none")
    first = {name: _ends(one)[0] for name, one in space.items()}
    for name, one in space.items():
        for value in _ends(one):
            with_settings(config, first | {name: value})
    return space


def with_settings(config: ConfigT, values: Mapping[str, Any]) -> ConfigT:
    """`config` with other values of dotted settings, set at once; text is read as YAML.

    Raises: ValueError, values that do not go together.
    """
    changed = config_to_dict(config)
    for name, value in plain_values(values).items():
        *groups, last = name.split(".")
        group = changed
        for one in groups:
            group = group[one]
        group[last] = value
    return config_from_dict(type(config), changed)


def plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a point of a space, with what is text read as YAML."""
    import yaml

    return {name: yaml.safe_load(value) if isinstance(value, str) else value for name, value in values.items()}


def point_of(config: Any, space: Mapping[str, Distribution]) -> dict[str, Any] | None:
    """The values that `config` has in a space; None where one of them is outside."""
    from optuna.distributions import CategoricalDistribution

    point: dict[str, Any] = {}
    for name, one in space.items():
        value: Any = config_to_dict(config)
        for part in name.split("."):
            value = value[part]
        if isinstance(one, CategoricalDistribution):
            same = [text for text in one.choices if with_settings(config, {name: text}) == config]
            if not same:
                return None
            point[name] = same[0]
        elif value is not None and one.low <= value <= one.high:
            point[name] = value
        else:
            return None
    return point


def _range(name: str, text: str, kind: type) -> Distribution:
    from optuna.distributions import FloatDistribution, IntDistribution

    match = _RANGE.fullmatch(text)
    numbers = None
    if match is not None and match["scale"] in (None, "log"):
        try:
            numbers = [kind(match[end]) if kind is int else float(match[end]) for end in ("low", "high")]
        except ValueError:
            numbers = None
    if kind not in (int, float):
        raise ValueError(f"{name} must be VALUE,VALUE,... as it is no number, got {text!r}")
    if numbers is None or not all(map(math.isfinite, numbers)):
        numbers_are = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{name} must be LOW..HIGH or LOW..HIGH:log of {numbers_are}, got {text!r}")
    low, high = numbers
    log = text.endswith(":log")
    if low >= high:
        raise ValueError(f"{name} must have LOW < HIGH, got {text!r}")
    if log and low <= 0:
        raise ValueError(f"{name} must have LOW > 0 with :log, got {text!r}")
    return IntDistribution(int(low), int(high), log=log) if kind is int else FloatDistribution(low, high, log=log)


def _values(name: str, text: str) -> Distribution:
    from optuna.distributions import CategoricalDistribution

    try:
        choices = _choices(text)
    except ValueError:
        raise ValueError(f"{name} must be VALUE,VALUE,... in YAML, got {text!r}") from None
    if len(set(choices)) < len(choices):
        raise ValueError(f"{name} must have different values, got {text!r}")
    if len(choices) < 2:
        raise ValueError(f"{name} must have two values or more, or be LOW..HIGH, got {text!r}")
    return CategoricalDistribution(choices)


def _choices(text: str) -> list[str]:
    """Each value as YAML of one line. Raises: ValueError, no YAML."""
    import json

    import yaml

    try:
        values = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    return [value if isinstance(value, str) else json.dumps(value, default=str) for value in values]


def _ends(distribution: Distribution) -> list[Any]:
    from optuna.distributions import CategoricalDistribution

    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    return [distribution.low, distribution.high]

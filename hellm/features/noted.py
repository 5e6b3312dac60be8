"""Other items encoded as those of a data set or a run were: by the encoders that it notes, with their options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hellm.data import ItemFeatures
from hellm.data.simple_features import TEXT_FIELDS, image_features, item_texts
from hellm.features.packaged import ENCODERS

__all__ = ["BUILT_IN", "NotedEncoder"]

BUILT_IN = ("hashed", "colours")
"""Features without an encoder (`hellm.data.simple_features`); "hashed" needs all texts of its data."""
_OPTIONS = ("revision", "language_model", "num_layers", "max_length", "bfloat16")


@dataclass(frozen=True)
class NotedEncoder:
    """What one modality of a data set or run was encoded by.

    Attributes:
        modality: What the features are called. "image" is of pictures, everything else of texts.
        name: Encoder as `load_text_encoder` and `load_image_encoder` take it, one of `BUILT_IN`, or None: not noted.
        text_fields: What made the text of an item.
        options: (name, value) pairs for `load_text_encoder`.
        key: Of its weights and settings, see `hellm.features.cache.encoder_key`; None: not noted.
    """

    modality: str
    name: str | None
    text_fields: tuple[str, ...] = TEXT_FIELDS
    options: tuple[tuple[str, Any], ...] = ()
    key: str | None = None

    @classmethod
    def of(cls, encoders: Mapping[str, Mapping[str, Any]], modality: str) -> NotedEncoder:
        """From `Dataset.encoders`, or from what a run keeps of it."""
        about = encoders.get(modality, {})
        options = tuple((name, about[name]) for name in _OPTIONS if name in about)
        fields = tuple(about.get("text_fields", TEXT_FIELDS))
        return cls(modality, about.get("encoder"), fields, options, about.get("key"))

    @property
    def is_of_pictures(self) -> bool:
        return self.modality == "image"

    @property
    def is_at_hand(self) -> bool:
        """Whether nothing is fetched, or read from a place that somebody named: weights come in a package, if any."""
        return self.name in (("efficientnet", "colours") if self.is_of_pictures else ENCODERS)

    def gives_as(self, other: NotedEncoder) -> bool:
        """Whether features of both can stand in one table: by the same encoder, whatever it was given to read."""
        return (self.name, self.options) == (other.name, other.options)

    def is_other(self, name: str, encoder: Any) -> bool:
        """Whether another encoder is known not to be this one: by its key, or as one of two that a name is enough for.

        Args:
            name, encoder: As `load_text_encoder` takes it, and what that gave.
        """
        if self.key is not None:
            return getattr(encoder, "key", None) != self.key
        named = self.name in BUILT_IN or (self.is_at_hand and replace(self, name=name).is_at_hand)
        return named and name != self.name

    def texts(self, titles: list[str] | None, fields: Mapping[str, list[str]]) -> list[str] | None:
        """One text per item; None where the items have none of the fields."""
        return item_texts(titles, dict(fields), self.text_fields)

    def load(self, device: str = "auto") -> Any:
        """What has `features(texts)`, or `features(paths, on_unreadable=...)` for pictures.

        Raises: ValueError, an encoder that is not noted, or "hashed". As `load_text_encoder` and `load_image_encoder`.
        """
        from hellm.features.image import load_image_encoder
        from hellm.features.text import load_text_encoder

        if self.is_of_pictures and self.name == "colours":
            return _Colours()
        if self.name is None or self.name in BUILT_IN:
            raise ValueError(f"{self.modality} features must be by an encoder, got {self.name!r}")
        if self.is_of_pictures:
            return load_image_encoder(self.name, device=device)
        return load_text_encoder(self.name, device=device, **dict(self.options))


class _Colours:
    """`image_features` as an encoder, which needs no weights."""

    def features(
        self,
        paths: Sequence[str | Path],
        *,
        cache: str | Path | None = None,
        on_unreadable: Callable[[str, Exception], None] | None = None,
    ) -> ItemFeatures:
        return image_features(paths, on_unreadable=on_unreadable)

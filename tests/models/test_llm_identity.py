"""A saved model knows its language model by content: nothing that changes its numbers goes unnoticed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from saved_llm import save_tiny_llm
from tiny_llm import Bigram, CharTokenizer, recommender, tiny_model, tiny_tables, tiny_titles

from hellm.models import RecommenderLLM, load_language_model
from hellm.models.llm.prompt import title_tokens

transformers = pytest.importorskip("transformers", reason='needs the extra: pip install "hellm[smollm2]"')
pytest.importorskip("peft", reason='needs the extra: pip install "hellm[smollm2]"')
safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture
def base(tmp_path):
    return save_tiny_llm(tmp_path / "base")


@pytest.fixture
def saved(base, tmp_path):
    model = RecommenderLLM(*load_language_model(base), tiny_tables(), max_length=8)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder, **options):
    return RecommenderLLM.from_pretrained(folder, tiny_tables(), **options)


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def swap_letters(values):
    vocabulary = values["model"]["vocab"]
    vocabulary["e"], vocabulary["z"] = vocabulary["z"], vocabulary["e"]


def change_one_weight(path):
    tensors = safetensors.load_file(path)
    tensors["model.layers.0.mlp.down_proj.weight"][3, 1] += 1
    safetensors.save_file(tensors, path, metadata={"format": "pt"})


CHANGES = {
    "rms_norm_eps": lambda base: edit(base / "config.json", lambda c: c.update(rms_norm_eps=0.1)),
    "hidden_act": lambda base: edit(base / "config.json", lambda c: c.update(hidden_act="relu")),
    "rope_parameters": lambda base: edit(
        base / "config.json", lambda c: c.update(rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    ),
    "prompt": lambda base: edit(base / "tokenizer.json", swap_letters),
    "all_weights": lambda base: change_one_weight(base / "model.safetensors"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_base_that_has_changed_is_noticed_and_both_are_named(what, base, saved):
    load(saved)
    CHANGES[what](base)
    with pytest.raises(
        ValueError, match=rf"trained with the language model .*base \(.*{what} .*, got .*base .*{what} "
    ):
        load(saved)


def test_what_computes_nothing_may_differ(base, saved):
    edit(base / "config.json", lambda c: c.update(transformers_version="9.9", use_cache=False, eos_token_id=7))
    load(saved)


def test_entries_that_another_version_does_not_know_are_left_out(base, saved):
    edit(saved / "config.json", lambda c: c["language_model"]["config"].update(of_later_times=1))
    load(saved)
    edit(saved / "config.json", lambda c: c["language_model"]["config"].pop("rms_norm_eps"))
    load(saved)


def test_models_saved_before_there_was_more_to_compare_load(base, saved):
    old = ("name", "revision", "model_type", "num_layers", "width", "weights", "dtype")
    edit(saved / "config.json", lambda c: c.update(language_model={key: c["language_model"][key] for key in old}))
    load(saved)
    edit(saved / "config.json", lambda c: c["language_model"].update(weights="0" * 16))
    with pytest.raises(ValueError, match="was trained with the language model"):
        load(saved)


def test_a_moved_base_can_be_told(base, saved, tmp_path):
    moved = shutil.move(base, tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"folder .*base does not exist; if it was moved, say where it is now"):
        load(saved)
    model = load(saved, language_model=moved)
    assert model.prompted.identity["name"] == str(moved)
    other = save_tiny_llm(tmp_path / "other")
    change_one_weight(other / "model.safetensors")
    with pytest.raises(ValueError, match=r"language model .*base \(.*got .*other \("):
        load(saved, language_model=other)


def test_the_identity_does_not_depend_on_the_dtype(base):
    identities = [
        RecommenderLLM(*load_language_model(base, dtype=dtype), tiny_tables(), max_length=8).prompted.identity
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert identities[0] == identities[1]


def test_tokens_of_titles_count_where_there_are_titles(tmp_path):
    class Shifted(CharTokenizer):
        def encode(self, text, add_special_tokens=False):
            ids = super().encode(text)
            return ids if "\n" in text else [i + 1 for i in ids]

    model = recommender(titles=True)
    model.save_pretrained(tmp_path / "model")
    given = {"language_model": tiny_model(), "item_titles": tiny_titles()}
    load(tmp_path / "model", tokenizer=CharTokenizer(), **given)
    given["language_model"] = tiny_model()
    with pytest.raises(ValueError, match=r"title_tokens \w+.*got .*title_tokens \w+"):
        load(tmp_path / "model", tokenizer=Shifted(), **given)


def test_missing_and_empty_titles_are_one(tmp_path):
    titles = [title or "" for title in tiny_titles()]
    recommender(titles=True, item_titles=titles).save_pretrained(tmp_path / "model")
    for given in (titles, [title or None for title in titles]):
        load(tmp_path / "model", language_model=tiny_model(), tokenizer=CharTokenizer(), item_titles=given)


def test_models_saved_with_none_for_missing_titles_load(tmp_path):
    from hellm.models.llm.checkpoint import catalogue

    titles = tiny_titles()
    recommender(titles=True, item_titles=titles).save_pretrained(tmp_path / "model")
    old = catalogue(tiny_tables(), titles, None, missing=None)
    edit(tmp_path / "model" / "config.json", lambda c: c.update(catalogue=old))
    load(tmp_path / "model", language_model=tiny_model(), tokenizer=CharTokenizer(), item_titles=titles)
    with pytest.raises(ValueError, match="was trained with the catalogue"):
        other = ["other", *titles[1:]]
        load(tmp_path / "model", language_model=tiny_model(), tokenizer=CharTokenizer(), item_titles=other)


def test_what_a_strangers_config_asks_for_is_not_done(base, saved):
    edit(saved / "config.json", lambda c: c["language_model"].update(dtype="hub"))
    with pytest.raises(ValueError, match=r"config.json must name a dtype of torch, got 'hub'"):
        load(saved)
    edit(saved / "config.json", lambda c: (c["language_model"].update(dtype="float32"), c["settings"].update(run="x")))
    with pytest.raises(ValueError, match=r"config.json must have settings among graph_context, .*, got run"):
        load(saved)


# ---- what users write


def test_special_tokens_in_titles_are_text(base):
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    ids, lengths = title_tokens(tokenizer, ["a<s>b", "plain"], 16)
    assert tokenizer.bos_token_id not in ids[0, : lengths[0]].tolist() and int(lengths[0]) == 6
    assert tokenizer.encode("a<s>b", add_special_tokens=False)[1] == tokenizer.bos_token_id


def test_a_title_of_a_megabyte_is_cut_before_it_is_read():
    class Counting(CharTokenizer):
        longest = 0

        def encode(self, text, add_special_tokens=False):
            self.longest = max(self.longest, len(text))
            return super().encode(text)

    tokenizer = Counting()
    _, lengths = title_tokens(tokenizer, ["x" * 1_000_000, "\x1b[31m\u202e\U0001f600", None], 16)
    assert lengths.tolist() == [16, 8, 0] and tokenizer.longest <= 16 * 256


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_numbers_that_are_not_finite_are_named_with_table_and_row(value):
    tables = tiny_tables()
    tables["sequence"] = tables["sequence"].double()
    tables["sequence"][7, 1] = value
    with pytest.raises(ValueError, match=r"item_embeddings\['sequence'\] must be finite, got NaN or infinity in row 7"):
        recommender(tables=tables)
    model = recommender()
    with pytest.raises(ValueError, match=r"item_embeddings\['sequence'\] must be finite, got .* in row 7"):
        model.add_items(tables)
    assert model.num_items == 12


def test_a_model_with_more_items_leaves_the_first_as_it_was():
    model = recommender(sequence_residual=True, titles=True)
    keys = model.item_keys()
    more = model.extended(tiny_tables(), tiny_titles(), sequence_model=Bigram(24))
    assert (model.num_items, more.num_items) == (12, 24) and len(more.item_titles) == 24 != len(model.item_titles)
    assert torch.equal(model.item_keys(), keys) and more.prompted is model.prompted
    assert len(more.item_keys()) == 24 and len(model.sequence_model.item_keys()) == 12

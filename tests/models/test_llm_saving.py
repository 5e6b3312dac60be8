"""What is saved of the recommender, and what is refused where it is loaded."""

from __future__ import annotations

import json

import pytest
import torch
from support.llm_ways import HISTORIES, scores, ways
from tiny_llm import CharTokenizer, recommender, tiny_model, tiny_tables, tiny_titles

from hellm.models import RecommenderLLM

pytest.importorskip("transformers", reason='needs the extra: pip install "hellm[smollm2]"')
pytest.importorskip("peft", reason='needs the extra: pip install "hellm[smollm2]"')


# ---- saving


@ways
def test_saved_and_loaded_equals_before(settings, tmp_path):
    model = recommender(**settings)
    expected = scores(model, HISTORIES)
    model.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert files == {
        ".hellm.json",
        "config.json",
        "model.safetensors",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    given = {"item_titles": tiny_titles(), "sequence_model": model.sequence_model}
    language_model = tiny_model()
    loaded = RecommenderLLM.from_pretrained(
        tmp_path / "model", tiny_tables(), language_model=language_model, tokenizer=CharTokenizer(), **given
    )
    assert not loaded.training
    assert torch.equal(scores(loaded, HISTORIES), expected)


def test_only_what_was_trained_is_saved_and_peft_reads_it(tmp_path):
    from peft import PeftModel
    from safetensors.torch import load_file

    model = recommender()
    model.save_pretrained(tmp_path / "model")
    saved = load_file(tmp_path / "model" / "model.safetensors"), load_file(tmp_path / "model/adapter_model.safetensors")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(tensor.numel() for file in saved for tensor in file.values()) == trained
    peft = PeftModel.from_pretrained(tiny_model(), tmp_path / "model")
    ids = torch.arange(5)[None]
    torch.testing.assert_close(peft(ids).logits, model.prompted.language_model(ids).logits)
    assert json.loads((tmp_path / "model/adapter_config.json").read_text())["base_model_name_or_path"] == "llama"


def test_no_adapter_without_lora(tmp_path):
    model = recommender(lora_rank=0)
    model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "adapter_config.json").exists()
    loaded = RecommenderLLM.from_pretrained(
        tmp_path / "model", tiny_tables(), language_model=tiny_model(), tokenizer=CharTokenizer()
    )
    assert torch.equal(scores(loaded, HISTORIES), scores(model, HISTORIES))


def test_a_checkpoint_of_another_catalogue_or_model_names_both(tmp_path):
    folder = tmp_path / "model"
    recommender().save_pretrained(folder)

    def load(tables=None, seed=0):
        tables = tiny_tables() if tables is None else tables
        return RecommenderLLM.from_pretrained(
            folder, tables, language_model=tiny_model(seed=seed), tokenizer=CharTokenizer()
        )

    load()
    with pytest.raises(
        ValueError, match=r"trained with the catalogue num_items 12, .* got num_items 9, tables \{'graph'"
    ):
        load(tiny_tables(num_items=9))
    with pytest.raises(ValueError, match=r"with the catalogue num_items 12, .*fingerprint \w+, got .*fingerprint \w+"):
        load(tiny_tables(seed=1))
    with pytest.raises(ValueError, match=r"trained with the language model llama \(.*\), got llama \(.*weights \w+"):
        load(seed=1)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors does not exist"):
        load()
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"model.safetensors is not readable"):
        load()
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config.json is not the config.json of a saved RecommenderLLM"):
        load()
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        load()
    with pytest.raises(FileNotFoundError, match=r"none holds no saved RecommenderLLM"):
        RecommenderLLM.from_pretrained(tmp_path / "none", tiny_tables())


def test_the_language_model_is_found_by_its_name(tmp_path, monkeypatch):
    model = recommender()
    model.prompted.identity["name"] = "some/model"
    model.save_pretrained(tmp_path / "model")
    calls = []

    def load(name, **options):
        calls.append((name, options))
        return tiny_model(), CharTokenizer()

    monkeypatch.setattr("hellm.models.llm.checkpoint.load_language_model", load)
    loaded = RecommenderLLM.from_pretrained(tmp_path / "model", tiny_tables())
    assert calls == [("some/model", {"dtype": torch.float32, "revision": None, "num_layers": 2, "random_seed": None})]
    assert torch.equal(scores(loaded, HISTORIES), scores(model, HISTORIES))


def test_state_of_other_settings_is_refused():
    model = recommender()
    state = {name: tensor + 1 for name, tensor in model.trainable_state_dict().items()}
    model.load_trainable_state_dict(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.trainable_state_dict().items())
    headless = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    with pytest.raises(
        ValueError, match=r"the state lacks head\.log_scale, head\.projector\.bias, head\.projector\.weight"
    ):
        model.load_trainable_state_dict(headless)
    with pytest.raises(ValueError, match="the state has unknown other"):
        model.load_trainable_state_dict(state | {"other": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"the state must have head.log_scale \[1\], got \[2\]"):
        model.load_trainable_state_dict(state | {"head.log_scale": torch.zeros(2)})


def test_state_with_the_names_of_before_loads():
    model = recommender(sequence_residual=True)
    state = {name: tensor.clone() for name, tensor in model.trainable_state_dict().items()}
    now = {"residual.gate": "residual_gate", "head.log_scale": "log_scale"}
    for part, before in (("context.running_graph", "items.running_graph"), ("head.projector", "query_projector")):
        now |= {name: name.replace(part, before) for name in state if name.startswith(part)}
    assert len(now) == 2 + 4 + 2
    other = recommender(sequence_residual=True, seed=7)
    other.load_trainable_state_dict({now.get(name, name): tensor for name, tensor in state.items()})
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.trainable_state_dict().items())

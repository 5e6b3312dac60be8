"""Language models of every kind are served right, or refused by name before anything is trained."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_llm import CharTokenizer, flat, tiny_model, tiny_tables

from hellm.models import RecommenderLLM
from hellm.models.histories import pad_histories
from hellm.models.llm.language_model import run_decoder, run_without_cache

transformers = pytest.importorskip("transformers", reason='needs the extra: pip install "hellm[smollm2]"')
pytest.importorskip("peft", reason='needs the extra: pip install "hellm[smollm2]"')

HISTORIES = [[0, 1, 2, 3, 4, 5, 6], [3], [7, 8, 9, 3, 3]]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
DELTA = {
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
# Family -> further sizes, and the way that it takes.
SERVED = {
    "Llama": ({}, "shared"),
    "StableLm": ({}, "shared"),
    "Nemotron": ({}, "shared"),
    "DiffLlama": ({}, "cached"),
    "MiniCPM3": (LATENT, "cached"),
    "Lfm2": ({"layer_types": ["conv", "full_attention"]}, "whole"),
    "Qwen3_5": (DELTA | {"layer_types": ["linear_attention", "full_attention"]}, "whole"),
    "OPT": ({"word_embed_proj_dim": 16, "ffn_dim": 48}, "shared"),
    "Bloom": ({"n_head": 4, "n_layer": 2}, "cached"),
    "Mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2}, "cached"),
    "Mamba": ({}, "whole"),
    "Llama4": ({"num_local_experts": 2, "intermediate_size_mlp": 48, "head_dim": 8}, "shared"),
}
families = pytest.mark.parametrize("name", SERVED)


def family(name: str, **options):
    """A random model whose norms and biases all count."""
    kind = "Llama4Text" if name == "Llama4" else "Qwen3_5Text" if name == "Qwen3_5" else name
    config = getattr(transformers, f"{kind}Config")(**(SIZES | SERVED.get(name, ({}, ""))[0]))
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(config, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def recommender(model, **settings) -> RecommenderLLM:
    settings = {"graph_context": "none", "lora_rank": 0, "max_length": 20} | settings
    return RecommenderLLM(model, CharTokenizer(), tiny_tables(), **settings).eval()


@families
def test_hidden_states_are_those_of_the_family_itself(name):
    model = family(name)
    plain = copy.deepcopy(model)
    served = recommender(model)
    padded, mask = pad_histories(*flat(HISTORIES))
    with torch.no_grad():
        found = served.hidden_all(padded, mask)
        for history, own in zip(HISTORIES, found, strict=True):
            tokens, _, _ = served.items(
                torch.tensor([history]), torch.ones(1, len(history), dtype=torch.bool), served.prompted.embed_text
            )
            text = served.prompted.embed_text(served.instruction).unsqueeze(0)
            expected = run_without_cache(plain, torch.cat([text, tokens], dim=1))[0, text.shape[1] :]
            torch.testing.assert_close(own[: len(history)], expected, rtol=1e-4, atol=1e-4)
    alone = torch.cat([served.embed(*flat([history])) for history in HISTORIES])
    torch.testing.assert_close(served.embed(*flat(HISTORIES)), alone, rtol=1e-4, atol=1e-4)


@families
def test_items_see_the_instruction_and_no_later_item(name):
    served = recommender(family(name))
    padded, mask = pad_histories(*flat(HISTORIES[:1]))
    changed = padded.clone()
    changed[0, 4:] = 11
    with torch.no_grad():
        before, after = served.hidden_all(padded, mask), served.hidden_all(changed, mask)
        served.prompted.instruction = served.instruction.flip(0)
        other = served.hidden_all(padded, mask)
    torch.testing.assert_close(before[0, :4], after[0, :4], rtol=1e-5, atol=1e-5)
    assert (before[0, 4:] - after[0, 4:]).abs().max() > 1e-3
    assert (before - other).abs().max() > 1e-4


@families
def test_the_way_through_a_family(name):
    assert recommender(family(name)).prompted.way == SERVED[name][1]


@families
def test_every_way_can_be_trained(name):
    served = recommender(family(name)).train()
    padded, mask = pad_histories(*flat(HISTORIES))
    queries = served.all_queries(padded, mask)[mask]
    (queries * torch.randn(queries.shape)).sum().backward()
    assert all(parameter.grad is not None for parameter in served.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["StableLm", "Nemotron"])
def test_nobody_learns_random_histories_by_looking_ahead(name, attention):
    served = recommender(family(name, attn_implementation=attention), graph_context="causal")
    padded, mask = pad_histories(*flat(HISTORIES[:1]))
    changed = padded.clone()
    changed[0, 3:] = 11
    served.train()

    def gradient(items):
        torch.manual_seed(0)
        queries = served.all_queries(items, mask)[0, :3]
        # Of a unit vector only a part has a gradient.
        return torch.autograd.grad((queries * torch.randn(queries.shape)).sum(), served.items.projector[0].weight)[0]

    before = gradient(padded)
    assert before.abs().max() > 1e-3
    torch.testing.assert_close(gradient(changed), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("context", ["causal", "prefix"])
@pytest.mark.parametrize("name", ["Llama", "StableLm", "Nemotron"])
def test_the_gate_of_a_prefix_counts(name, context):
    served = recommender(family(name), graph_context=context, learned_prefix=True)
    shut = served.embed(*flat(HISTORIES))
    with torch.no_grad():
        served.prompted.prefix_gate.fill_(1.0)
    opened = served.embed(*flat(HISTORIES))
    assert (shut - opened).abs().max() > 1e-3
    alone = torch.cat([served.embed(*flat([history])) for history in HISTORIES])
    torch.testing.assert_close(opened, alone, rtol=1e-4, atol=1e-4)


def test_the_check_leaves_no_trace():
    """Weights, gates, modes, gradients and torch's generator are as they would be without it."""
    model = tiny_model()
    model.model.layers[0].train()
    torch.manual_seed(5)
    served = RecommenderLLM(model, CharTokenizer(), tiny_tables(), learned_prefix=True, lora_rank=0)
    fresh = tiny_model()
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, served.prompted.base.state_dict()[name])
    assert not served.prompted.prefix_gate.any() and served.prompted.way == "shared"
    assert served.prompted.base.model.layers[0].training and not served.prompted.base.model.layers[1].training
    assert all(parameter.grad is None for parameter in served.parameters())


REFUSED = {
    "Bert": ({}, {}, r"BertLMHeadModel\) cannot rank items: it is not causal: items see the items after them"),
    "Electra": (
        {"embedding_size": 16},
        {},
        r"ElectraForCausalLM\) cannot rank items: it takes tokens of width 16 and gives hidden states of 32",
    ),
    "CpmAnt": ({"dim_head": 8, "dim_ff": 48}, {}, r"CpmAntForCausalLM\) cannot rank items: it cannot be run on item"),
    "Qwen3_5Text": (
        DELTA | {"layer_types": ["linear_attention", "full_attention"]},
        {"learned_prefix": True},
        r"prefix key/values need a model whose layers have self_attn.k_proj|a prefix needs keys and values",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_named_with_the_reason(name):
    sizes, settings, message = REFUSED[name]
    config = getattr(transformers, f"{name}Config")(**(SIZES | sizes))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match=message):
        recommender(model, **settings)


def test_a_layer_without_keys_and_values_is_named_and_the_model_run_whole():
    class Mixer(torch.nn.Module):
        def forward(self, hidden_states, **kwargs):
            return hidden_states.cumsum(1), None

    model = tiny_model()
    model.model.layers[0].self_attn = Mixer()
    with pytest.raises(ValueError, match="a layer must keep keys and values, got a DynamicLayer without"):
        run_decoder(model, torch.randn(1, 3, model.config.hidden_size), None)
    assert recommender(model).prompted.way == "whole"


def test_numbers_that_are_not_finite_are_refused():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"cannot rank items: it gives hidden states that are not finite"):
        recommender(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Llama", "StableLm", "DiffLlama", "Mamba"])
def test_half_precision_is_judged_as_such(name, dtype):
    assert recommender(family(name).to(dtype)).prompted.way == SERVED[name][1]
    with pytest.raises(ValueError, match="is not causal"):
        recommender(transformers.BertLMHeadModel(transformers.BertConfig(**SIZES)).to(dtype))


def test_a_large_half_precision_model_is_tried_as_it_is(monkeypatch):
    monkeypatch.setattr("hellm.models.llm.decoder_check._MOST_COPIED", 0)
    for settings in ({}, {"learned_prefix": True}, {"graph_context": "prefix"}):
        assert recommender(family("Llama").bfloat16(), **settings).prompted.way == "shared"


def test_a_language_model_belongs_to_one_recommender():
    model = tiny_model()
    kept = copy.deepcopy(model)
    first = recommender(model, lora_rank=2)
    with pytest.raises(
        ValueError, match=r"language_model must belong to one recommender, but LlamaForCausalLM is part"
    ):
        recommender(model)
    recommender(kept)
    del first
    with pytest.raises(ValueError, match=r"whose LoRA layers are in it; load it again"):
        recommender(model)

from __future__ import annotations

import copy
import dataclasses
import json
import typing

import pytest
import torch
from official_llm import official_scores
from tiny_llm import NUM_ITEMS, SIZES, Bigram, CharTokenizer, flat, recommender, tiny_model, tiny_tables, tiny_titles

from hellm.config import OFFICIAL_LLM, LLMConfig
from hellm.models import RecommenderLLM
from hellm.models.histories import pad_histories
from hellm.models.llm.context import CONTEXTS
from hellm.models.llm.head import HEADS
from hellm.models.llm.language_model import prefix_key_values, run_decoder
from hellm.models.llm.prompt import build_prompt, title_tokens

pytest.importorskip("transformers", reason='needs the extra: pip install "hellm[smollm2]"')
pytest.importorskip("peft", reason='needs the extra: pip install "hellm[smollm2]"')

HISTORIES = [[3, 1, 4, 1, 5], [], [9, 2], [6], [5, 3, 5]]
OFFICIAL = {"compat": "official", **OFFICIAL_LLM}
# What changes the way through the model.
WAYS = {
    "causal": {},
    "causal, learned prefix": {"learned_prefix": True},
    "learned prefix, one softmax": {"learned_prefix": True, "prefix_gate": False},
    "none": {"graph_context": "none"},
    "prefix": {"graph_context": "prefix"},
    "both prefixes": {"graph_context": "prefix", "learned_prefix": True},
    "both prefixes, one softmax": {"graph_context": "prefix", "learned_prefix": True, "prefix_gate": False},
    "causal, titles": {"titles": True, "max_title_tokens": 3},
    "prefix, titles": {"graph_context": "prefix", "titles": True},
    "residual": {"sequence_residual": True},
    "trained head": {"head": "trained"},
    "official": OFFICIAL,
}
ways = pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS)
families = pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3", "mistral"])


def scores(model: RecommenderLLM, histories: list[list[int]]) -> torch.Tensor:
    return model.embed(*flat(histories)) @ model.item_keys().T


# ---- one history and many


@ways
def test_alone_equals_in_a_padded_batch(settings):
    model = recommender(**settings)
    together = model.embed(*flat(HISTORIES))
    alone = torch.cat([model.embed(*flat([history])) for history in HISTORIES])
    assert together.dtype == torch.float32 and together.shape == (5, model.item_keys().shape[1])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    # Each history has a query of its own.
    assert torch.cdist(together, together).fill_diagonal_(1).min() > 1e-3


@families
@pytest.mark.parametrize("name", ["causal", "causal, learned prefix", "both prefixes"])
def test_families_of_models(kind, name):
    model = recommender(kind, **WAYS[name])
    together = model.embed(*flat(HISTORIES))
    alone = torch.cat([model.embed(*flat([history])) for history in HISTORIES])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in WAYS if not {"prefix", "official"} & set(WAYS[name].values())])
def test_every_position_is_the_query_of_the_history_up_to_it(name):
    model = recommender(**WAYS[name])
    items, mask = pad_histories(*flat(HISTORIES))
    together = model.all_queries(items, mask)
    for row, history in enumerate(HISTORIES):
        cut = [history[: t + 1] for t in range(len(history))]
        if cut:
            torch.testing.assert_close(together[row, : len(cut)], model.embed(*flat(cut)), rtol=1e-5, atol=1e-5)


def test_shared_instruction_equals_an_instruction_per_row():
    """Values and gradients of the trained parts, against one plain sequence per row."""
    shared = recommender(learned_prefix=True, prefix_gate=False, lora_dropout=0.0).double()
    per_row = copy.deepcopy(shared)
    items, mask = pad_histories(*flat([[3, 1, 4], [1, 5, 9]]))
    cotangent = torch.randn(2, 3, 16, dtype=torch.float64)
    first = shared.hidden_all(items, mask)
    (first * cotangent).sum().backward()

    part = per_row.prompted
    graph = per_row.context.of_items(per_row.items, items)
    tokens, _, _ = per_row.items(items, mask, part.embed_text, graph)
    instruction = part.embed_text(part.instruction).expand(2, -1, -1)
    past = prefix_key_values(part._attentions[0], *part.prefix())
    past = [tuple(x.expand(2, -1, -1, -1) for x in pair) for pair in past]
    hidden, _ = run_decoder(part.base, torch.cat([instruction, tokens], dim=1), past, start=10)
    second = hidden[:, len(part.instruction) :]
    (second * cotangent).sum().backward()
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
    other = dict(per_row.named_parameters())
    compared = 0
    for name, parameter in shared.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, other[name].grad, rtol=1e-4, atol=1e-6)
            compared += 1
    assert compared > 12


@ways
def test_gradients_reach_everything_that_is_trained(settings):
    model = recommender(**settings)
    items, mask = pad_histories(*flat(HISTORIES))
    query = model.queries(items, mask)
    logits = query @ model.item_keys_trainable().T
    torch.nn.functional.cross_entropy(logits, torch.arange(5)).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.abs().max()] == []
    assert [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None] == []
    assert {p.dtype for p in trained.values()} == {torch.float32}


def test_long_histories_keep_their_latest_items():
    model = recommender(max_length=3)
    torch.testing.assert_close(scores(model, [[1, 2, 3, 4, 5]]), scores(model, [[3, 4, 5]]))


def test_embed_leaves_the_mode_and_works_in_small_batches(monkeypatch):
    model = recommender()
    expected = model.embed(*flat(HISTORIES))
    monkeypatch.setattr("hellm.models.llm.recommender.EMBED_TOKENS", 4)
    torch.testing.assert_close(model.train().embed(*flat(HISTORIES)), expected, rtol=1e-4, atol=1e-5)
    assert model.training
    assert model.embed(torch.tensor([0]), torch.tensor([], dtype=torch.int64)).shape == (0, 16)


def test_queries_of_empty_histories_only():
    model = recommender()
    none = torch.zeros(2, 0, dtype=torch.int64)
    queries = model.queries(none, none.bool())
    torch.testing.assert_close(queries, model.embed(*flat([[], []])), rtol=1e-4, atol=1e-5)
    assert model.all_queries(none, none.bool()).shape == (2, 0, 16)


def test_a_half_precision_language_model_works():
    model = RecommenderLLM(tiny_model().bfloat16(), CharTokenizer(), tiny_tables())
    items, mask = pad_histories(*flat(HISTORIES))
    query = model.all_queries(items, mask)
    assert query.dtype == torch.float32
    query.square().sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_it_learns_what_comes_next():
    """Item i is followed by i + 5 modulo the number of items."""
    torch.manual_seed(0)
    model = recommender(disturb=False).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    start = torch.arange(NUM_ITEMS)
    items = (start[:, None] + 5 * torch.arange(3)) % NUM_ITEMS
    mask, target = torch.ones_like(items).bool(), (items[:, -1] + 5) % NUM_ITEMS
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model.queries(items, mask) @ model.item_keys_trainable().T, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = scores(model.eval(), items.tolist()).argmax(1)
    assert (found == target).float().mean() > 0.9


# ---- parts


def test_logits_start_at_order_one():
    model = recommender(disturb=False)
    logits = scores(model, HISTORIES)
    assert 0.2 < logits.std() < 5
    torch.testing.assert_close(model.item_keys().square().mean(), torch.tensor(1.0), rtol=1e-4, atol=0)
    token, _, _ = model.items(torch.arange(NUM_ITEMS)[None], torch.ones(1, NUM_ITEMS).bool(), model.prompted.embed_text)
    rms = model.prompted.base.get_input_embeddings().weight.square().mean().sqrt()
    torch.testing.assert_close(token.square().mean().sqrt(), rms, rtol=1e-3, atol=0)


def test_tables_are_used_at_unit_scale_and_frozen():
    tables = tiny_tables()
    model, scaled = (recommender(tables={**tables, "graph": tables["graph"] * scale}) for scale in (1, 100))
    torch.testing.assert_close(scores(model, HISTORIES), scores(scaled, HISTORIES), rtol=1e-4, atol=1e-5)
    assert not any("features" in name for name in model.state_dict())


def test_sequence_residual_starts_as_the_sequence_model():
    sequence = Bigram()
    model = recommender(sequence_residual=True, sequence_model=sequence, disturb=False)
    table = sequence.table.detach()
    expected = torch.stack([torch.zeros(5) if not h else table[h[-1]].roll(1) for h in HISTORIES]) @ table.T
    torch.testing.assert_close(scores(model, HISTORIES), expected, rtol=1e-5, atol=1e-6)
    assert not sequence.table.requires_grad and not model.train().sequence_model.training
    with torch.no_grad():
        model.residual.gate.fill_(1.0)
    own = recommender(disturb=False)
    torch.testing.assert_close(scores(model.eval(), HISTORIES), expected + scores(own, HISTORIES), rtol=1e-4, atol=1e-4)


def test_titles_stand_after_their_items():
    model = recommender(titles=True, max_title_tokens=3)
    items, mask = pad_histories(*flat([[2, 3, 5], [1, 0, 0]]))
    mask[1, 1:] = False
    graph = model.context.of_items(model.items, items)
    tokens, used, last = model.items(items, mask, model.prompted.embed_text, graph)
    # Item 2 has " ti" of "ti", item 3 no title, item 5 the first three letters of " title".
    letters = CharTokenizer().encode(" ti")
    embed = model.prompted.base.get_input_embeddings().weight
    own = model.items.keys()
    scale = model.items.token_scale
    expected = [
        (own[2] + graph[0, 0]) * scale,
        *embed[letters],
        (own[3] + graph[0, 1]) * scale,
        (own[5] + graph[0, 2]) * scale,
        *embed[letters],
    ]
    torch.testing.assert_close(tokens[0], torch.stack(expected))
    assert used.sum(1).tolist() == [9, 3] and last.tolist()[0] == [3, 4, 8] and last[1, 0] == 2
    assert used[1].tolist() == [True] * 3 + [False] * 6


def test_title_tokens_are_cut_and_padded():
    ids, lengths = title_tokens(CharTokenizer(), ["ab", None, "", "abcdef"], 4)
    assert lengths.tolist() == [3, 0, 0, 4]
    encode = CharTokenizer().encode
    assert ids.tolist() == [[*encode(" ab"), 0], [0] * 4, [0] * 4, encode(" abc")]


def test_prompt_has_one_bos_and_the_published_one_two():
    prompt = build_prompt(CharTokenizer())
    assert prompt.instruction[0] == 1 and (torch.cat(prompt) == 1).sum() == 1
    official = build_prompt(CharTokenizer(), official=True)
    assert official.instruction[0] == 1 and official.response[0] == 1
    assert (official.response[1:] == torch.tensor(CharTokenizer().encode("\n### Response:\n"))).all()

    class NoBos(CharTokenizer):
        bos_token_id = None

    assert torch.equal(build_prompt(NoBos()).instruction, prompt.instruction[1:])


@pytest.mark.parametrize("head", ["trained", "frozen"])
def test_heads_with_a_table(head):
    model = recommender(head=head)
    assert model.head.weight.requires_grad == (head == "trained")
    assert torch.equal(model.item_keys(), model.head.weight)


def test_ablations_leave_their_parts_out():
    model = recommender(graph_context="none", lora_rank=0, tables={"text": torch.randn(6, 3)})
    names = {name.split(".")[0] for name in model.trainable_state_dict()}
    assert names == {"items", "head"}
    assert model.prompted.prefix is None and scores(model, [[1, 2]]).shape == (1, 6)


def ids_of(model, items):
    return model.items.id_embedding.weight.detach()[items]


def test_new_items_rank_at_once():
    model = recommender(titles=True)
    before = scores(model, HISTORIES)
    tables = {name: table[[4, 7]] for name, table in tiny_tables().items()}
    model.add_items(tables, [tiny_titles()[4], None], item_ids=ids_of(model, [4, 7]))
    after = scores(model, HISTORIES)
    assert model.num_items == NUM_ITEMS + 2
    torch.testing.assert_close(after[:, :NUM_ITEMS], before)
    torch.testing.assert_close(after[:, NUM_ITEMS:], before[:, [4, 7]])
    # A copy of an item is that item in a history as well.
    torch.testing.assert_close(scores(model, [[1, NUM_ITEMS]]), scores(model, [[1, 4]]))


def test_titles_of_new_items_are_read_in_histories_and_saved(tmp_path):
    model = recommender(titles=True)
    rows = {name: table[[4, 4, 4]] for name, table in tiny_tables().items()}
    model.add_items(rows, [tiny_titles()[4], "other", None], item_ids=ids_of(model, [4, 4, 4]))
    same, other, none = (scores(model, [[1, NUM_ITEMS + place]]) for place in range(3))
    torch.testing.assert_close(same, scores(model, [[1, 4]]))
    assert not torch.allclose(other, same, atol=1e-4) and not torch.allclose(none, same, atol=1e-4)
    assert not torch.allclose(other, none, atol=1e-4)
    model.save_pretrained(tmp_path / "model")
    tables = {name: torch.cat([table, rows[name]]) for name, table in tiny_tables().items()}
    given = {"language_model": tiny_model(), "tokenizer": CharTokenizer()}
    titles = [*tiny_titles(), tiny_titles()[4], "other", None]
    loaded = RecommenderLLM.from_pretrained(tmp_path / "model", tables, item_titles=titles, **given)
    history = [[NUM_ITEMS + 1, 2, NUM_ITEMS + 2]]
    torch.testing.assert_close(scores(loaded, history), scores(model, history))
    titles[-2] = "another"
    with pytest.raises(ValueError, match="was trained with the catalogue"):
        RecommenderLLM.from_pretrained(tmp_path / "model", tables, item_titles=titles, **given)


def test_new_items_with_the_residual_take_both_scores():
    model = recommender(sequence_residual=True)
    before, sequence = scores(model, HISTORIES), model.sequence_model
    copied = [4, 7]
    longer = Bigram(NUM_ITEMS + 2)
    with torch.no_grad():
        longer.table.copy_(torch.cat([sequence.table, sequence.table[copied]]))
    tables = {name: table[copied] for name, table in tiny_tables().items()}
    model.add_items(tables, sequence_model=longer, item_ids=ids_of(model, copied))
    after = scores(model, HISTORIES)
    torch.testing.assert_close(after[:, :NUM_ITEMS], before)
    torch.testing.assert_close(after[:, NUM_ITEMS:], before[:, copied])
    torch.testing.assert_close(scores(model, [[1, NUM_ITEMS]]), scores(model, [[1, 4]]))
    assert not any(parameter.requires_grad for parameter in longer.parameters())
    with torch.no_grad():
        longer.table[NUM_ITEMS] += 1
    moved = scores(model, HISTORIES)
    assert not torch.allclose(moved[:, NUM_ITEMS], after[:, NUM_ITEMS])
    torch.testing.assert_close(moved[:, NUM_ITEMS + 1], after[:, NUM_ITEMS + 1])


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
    with pytest.raises(ValueError, match=r"the state must have head.log_scale \[\], got \[2\]"):
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


# ---- the published model


def test_official_agrees_with_the_published_definition():
    """Scores and all gradients of a padded batch."""
    model = recommender(lora_rank=3, lora_alpha=6.0, **OFFICIAL).double()
    language_model = tiny_model()
    weights = {name: weight.double() for name, weight in language_model.state_dict().items()}
    trained = {
        name: p.detach().clone().requires_grad_(p.requires_grad)
        for name, p in model.named_parameters()
        if p.requires_grad or name == "head.weight"
    }
    items, mask = pad_histories(*flat([[3, 5, 7, 1], [2, 4], [8]]))
    tables = [table.double() for table in tiny_tables().values()]
    prompt = (model.instruction, model.response)
    expected = official_scores(weights, trained, language_model.config, tables, *prompt, items, mask, lora_scale=2.0)
    result = model.queries(items, mask) @ model.item_keys_trainable().T
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    cotangent = torch.randn_like(expected)
    (expected * cotangent).sum().backward()
    (result * cotangent).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            error = (parameter.grad - trained[name].grad).abs().max() / trained[name].grad.abs().max()
            assert error < 1e-5, name


def test_official_takes_padding_for_item_zero():
    """One history gets another query beside a longer one; served alone or in `embed` it has none of that."""
    model = recommender(**OFFICIAL)
    alone = model.queries(*pad_histories(*flat([[9, 2]])))[0]
    padded = model.queries(*pad_histories(*flat([[9, 2], [1, 2, 3, 4]])))[0]
    assert (alone - padded).abs().max() > 1e-3
    fixed = recommender(graph_context="prefix")
    alone = fixed.queries(*pad_histories(*flat([[9, 2]])))[0]
    padded = fixed.queries(*pad_histories(*flat([[9, 2], [1, 2, 3, 4]])))[0]
    torch.testing.assert_close(alone, padded, rtol=1e-4, atol=1e-5)


def test_official_starts_as_published():
    model = recommender(disturb=False, **OFFICIAL)
    assert not model.head.weight.requires_grad and model.head.weight.abs().max() <= 16**-0.5
    tables = tiny_tables()
    assert torch.equal(model.items.features, torch.cat(list(tables.values()), dim=1))
    drops = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.p]
    assert sorted(set(drops)) == [0.05, 0.3] and drops.count(0.3) == 4
    lora = dict(model.prompted.language_model.named_parameters())
    assert all(not p.any() for name, p in lora.items() if "lora_B" in name)


def test_number_of_trained_parameters_is_the_published_one():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32
    )
    with torch.device("meta"):
        tables = {"graph": torch.empty(12_101, 64), "sequence": torch.empty(12_101, 64)}
        model = RecommenderLLM(LlamaForCausalLM(config), CharTokenizer(), tables, **OFFICIAL)
    counts = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next(key for key in ("lora", "projector", "mlp", "norm", "prefix_") if key in name)
            counts[part] = counts.get(part, 0) + parameter.numel()
    assert counts == {
        "lora": 32 * 16 * 3 * (4096 + 11_008),
        "projector": 17_309_696,
        "mlp": 67_125_248,
        "prefix_": 2 * 32 * 10 * 4096,
        "norm": 4 * 4096,
    }
    assert counts["lora"] == 23_199_744 and sum(counts.values()) == 110_272_512


# ---- settings and errors


def test_settings_are_those_of_the_config():
    fields = {field.name: field.default for field in dataclasses.fields(LLMConfig)}
    types = typing.get_type_hints(LLMConfig)
    assert typing.get_args(types["head"]) == tuple(HEADS)
    assert typing.get_args(types["graph_context"]) == tuple(CONTEXTS)
    model = recommender(disturb=False)
    assert model.settings == fields | {"lora_targets": list(fields["lora_targets"])}
    assert LLMConfig(**OFFICIAL).compat == "official"
    assert recommender(**dataclasses.asdict(LLMConfig(**OFFICIAL))).settings["head"] == "frozen"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"graph_context": "both"}, "graph_context must be one of 'prefix', 'causal', 'none', got 'both'"),
        ({"head": "other"}, "head must be one of 'tied', 'trained', 'frozen', got 'other'"),
        ({"compat": "paper"}, "compat must be one of None, 'official', got 'paper'"),
        ({"compat": "official"}, "graph_context must be 'prefix' with compat=\"official\", got 'causal'"),
        ({"num_prefix_tokens": 0}, "num_prefix_tokens must be >= 1, got 0"),
        ({"max_length": 0}, "max_length must be >= 1, got 0"),
        ({"prefix_dropout": 1.0}, r"prefix_dropout must be in \[0, 1\), got 1.0"),
        ({"gram_rank": 0}, "gram_rank must be null or >= 1, got 0"),
        ({"lora_rank": -1}, "lora_rank must be >= 0, got -1"),
        ({"titles": True, "item_titles": None}, "item_titles must be given for all 12 items, got none"),
        ({"titles": True, "item_titles": ["a"]}, "item_titles must be given for all 12 items, got 1"),
        ({"sequence_residual": True, "sequence_model": None}, "sequence_residual needs a sequence_model, got None"),
        ({"sequence_residual": True, "sequence_model": Bigram(5)}, "sequence_model must have 12 items, got 5"),
        (
            {"sequence_residual": True, "max_length": 51},
            "max_length must be at most 50, that of sequence_model, got 51",
        ),
        (
            {"max_length": 500, "learned_prefix": True},
            r"max_length 500 makes prompts of up to 580 tokens \(500 of items\), longer than the context of 512 tokens",
        ),
        ({"tables": {}}, r"item_embeddings must hold at least one table \[items, width\], got none"),
        ({"tables": {"graph": torch.zeros(3)}}, r"item_embeddings must be tables \[items, width\], got graph \[3\]"),
        (
            {"tables": {"graph": torch.zeros(3, 2), "text": torch.zeros(4, 2)}},
            "item_embeddings must have one row per item, got {'graph': 3, 'text': 4}",
        ),
        ({"tables": {"text": torch.zeros(3, 2)}}, r'\'causal\' needs item_embeddings\["graph"\], got text'),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_wrong_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        recommender(**settings)


def test_official_is_for_llama():
    with pytest.raises(ValueError, match="compat=\"official\" is defined for Llama models, got 'qwen2'"):
        recommender("qwen2", **OFFICIAL)


def test_a_prefix_needs_a_model_with_projections():
    with pytest.raises(ValueError, match=r"\(GPT2LMHeadModel\) has"):
        recommender("gpt2", learned_prefix=True)
    model = recommender("gpt2", graph_context="none", lora_targets=("c_fc",), lora_rank=0)
    assert scores(model, [[1], []]).shape == (2, NUM_ITEMS)


def test_wrong_histories():
    model = recommender(learned_prefix=True)
    with pytest.raises(ValueError, match=r"items must be in \[0, 12\), got 12"):
        model.embed(*flat([[1, 12]]))
    with pytest.raises(ValueError, match="indptr must run from 0 to the number of items 2"):
        model.embed(torch.tensor([0, 3]), torch.tensor([1, 2]))
    long = torch.zeros(1, SIZES["max_position_embeddings"], dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"a history of 512 items makes prompts of up to 592 tokens .* 512 tokens of llama"
    ):
        model.queries(long, torch.ones_like(long).bool())
    with pytest.raises(ValueError, match='all positions at once need graph_context "causal" or "none"'):
        recommender(graph_context="prefix").all_queries(long, torch.ones_like(long).bool())


def test_new_items_that_cannot_be():
    rows = {name: table[:2] for name, table in tiny_tables().items()}
    with pytest.raises(ValueError, match="head must be \"tied\" for items that were not trained, got 'trained'"):
        recommender(head="trained").add_items(rows)
    with pytest.raises(ValueError, match=r"must have the widths {'graph': 4, 'sequence': 3}, got {'graph': 4}"):
        recommender().add_items({"graph": rows["graph"]})
    with pytest.raises(ValueError, match="item_titles must be given for all 2 items, got none"):
        recommender(titles=True).add_items(rows)
    model = recommender(sequence_residual=True)
    with pytest.raises(ValueError, match="sequence_residual needs a sequence_model, got None"):
        model.add_items(rows)
    model.add_items(rows, sequence_model=Bigram(14))
    assert scores(model, [[13]]).shape == (1, 14)


@pytest.mark.parametrize("context", ["prefix", "causal", "none"])
def test_gradient_checkpointing_is_refused(context):
    model = recommender(graph_context=context).train()
    for layer in model.prompted.base.model.layers:
        layer.gradient_checkpointing = True
    items, mask = pad_histories(*flat([[1, 2]]))
    with pytest.raises(ValueError, match="gradient checkpointing must be off"):
        model.queries(items, mask)

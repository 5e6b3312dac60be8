"""Queries of histories: alone and in batches, of every position, learned."""

from __future__ import annotations

import copy

import pytest
import torch
from support.llm_ways import HISTORIES, WAYS, families, scores, ways
from tiny_llm import NUM_ITEMS, CharTokenizer, flat, recommender, tiny_model, tiny_tables

from hellm.models import RecommenderLLM
from hellm.models.histories import pad_histories
from hellm.models.llm.language_model import prefix_key_values, run_decoder

pytest.importorskip("transformers", reason='needs the extra: pip install "hellm[smollm2]"')
pytest.importorskip("peft", reason='needs the extra: pip install "hellm[smollm2]"')


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

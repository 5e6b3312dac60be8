"""Parts of the recommender: tables, titles, prompt, heads, residual, and items that come later."""

from __future__ import annotations

from typing import Literal, get_type_hints

import pytest
import torch
from support.llm_ways import HISTORIES, scores
from tiny_llm import NUM_ITEMS, Bigram, CharTokenizer, flat, recommender, tiny_model, tiny_tables, tiny_titles

from hellm.config import LLMConfig
from hellm.models import RecommenderLLM
from hellm.models.histories import pad_histories
from hellm.models.llm.context import CONTEXTS
from hellm.models.llm.head import HEADS, TiedHead
from hellm.models.llm.prompt import build_prompt, title_tokens

pytest.importorskip("transformers", reason='needs the extra: pip install "hellm[smollm2]"')
pytest.importorskip("peft", reason='needs the extra: pip install "hellm[smollm2]"')


# ---- parts


def test_settings_name_the_heads_and_contexts_that_there_are():
    hints = get_type_hints(LLMConfig)
    assert hints["head"] == Literal[tuple(HEADS)]
    assert hints["graph_context"] == Literal[tuple(CONTEXTS)]


def test_a_head_of_ones_own_is_a_class_and_a_line(monkeypatch):
    class Doubled(TiedHead):
        def query(self, hidden):
            return 2 * super().query(hidden)

    monkeypatch.setitem(HEADS, "doubled", Doubled)
    tied, doubled = recommender(disturb=False), recommender(disturb=False, head="doubled")
    history = flat([[1, 2, 3]])
    torch.testing.assert_close(doubled.embed(*history), 2 * tied.embed(*history))


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

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from hellm.models import SASRec
from hellm.models.histories import pad_histories
from hellm.models.sequence import WhitenedContent

# Lengths on both sides of the borders (8, 16, 32) between groups that share an attention block.
LENGTHS = (3, 9, 1, 8, 17, 33, 16, 2)
NUM_ITEMS = 37


def make_model(seed=0, **options):
    torch.manual_seed(seed)
    settings = {"embedding_dim": 12, "num_layers": 2, "num_heads": 3, "feedforward_dim": 20, "max_length": 40} | options
    model = SASRec(NUM_ITEMS, **settings)
    # Larger than at initialisation, so that attention is not uniform and norms and biases matter.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


def make_histories(lengths=LENGTHS, seed=1):
    indptr = torch.tensor([0, *np.cumsum(lengths)])
    return indptr, torch.randint(NUM_ITEMS, (int(indptr[-1]),), generator=torch.Generator().manual_seed(seed))


def one_by_one(indptr, items):
    return [items[start:stop] for start, stop in itertools.pairwise(indptr)]


def reference_hidden(model, items):
    """Hidden states [T, D] of one history, from the formulas of the docstring and nothing of the model's code."""
    w = dict(model.named_parameters())

    def norm(x, name):
        centred = x - x.mean(1, keepdim=True)
        scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = norm(w["items.id_embedding.weight"][items] + w["position_embedding.weight"][: len(items)], "norm")
    for layer in range(model.settings["num_layers"]):
        block = f"blocks.{layer}"
        heads = []
        for part in linear(x, f"{block}.query_key_value").chunk(3, dim=1):
            heads.append(part.view(len(items), model.settings["num_heads"], -1))
        query, key, value = heads
        mixed = torch.zeros_like(query)
        for head in range(query.shape[1]):
            for t in range(len(items)):
                weight = torch.softmax(key[: t + 1, head] @ query[t, head] / math.sqrt(query.shape[2]), 0)
                mixed[t, head] = weight @ value[: t + 1, head]
        x = norm(x + linear(mixed.flatten(1), f"{block}.output"), f"{block}.attention_norm")
        inner = linear(x, f"{block}.feedforward.0")
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        x = norm(x + linear(inner, f"{block}.feedforward.2"), f"{block}.feedforward_norm")
    return x


def test_forward_and_gradients_are_those_of_the_formulas():
    model = make_model().double()
    indptr, items = make_histories((5, 9, 1))
    padded, mask = pad_histories(indptr, items)
    hidden = model(padded, mask)[mask]
    expected = torch.cat([reference_hidden(model, history) for history in one_by_one(indptr, items)])
    torch.testing.assert_close(hidden, expected, rtol=1e-10, atol=1e-10)
    cotangent = torch.randn(hidden.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mine, theirs = (torch.autograd.grad(one, list(model.parameters()), cotangent) for one in (hidden, expected))
    for (name, _), a, b in zip(model.named_parameters(), mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_padded_batch_gives_what_each_history_gives_alone():
    model = make_model()
    indptr, items = make_histories()
    padded, mask = pad_histories(indptr, items)
    batch = model(padded, mask)
    for row, history in enumerate(one_by_one(indptr, items)):
        alone = model(history[None], torch.ones(1, len(history), dtype=torch.bool))[0]
        torch.testing.assert_close(batch[row, : len(history)], alone, rtol=1e-6, atol=1e-6)
    assert (batch[~mask] == 0).all()


def test_padding_may_stand_on_the_left_and_is_not_read():
    model = make_model()
    indptr, items = make_histories()
    padded, mask = pad_histories(indptr, items)
    left = padded.flip(1).masked_fill(~mask.flip(1), NUM_ITEMS + 5)
    in_reverse = torch.cat([history.flip(0) for history in one_by_one(indptr, items)])
    expected = model(*pad_histories(indptr, in_reverse))[mask]
    torch.testing.assert_close(model(left, mask.flip(1))[mask.flip(1)], expected, rtol=1e-6, atol=1e-6)


def test_later_items_do_not_change_earlier_states():
    model = make_model()
    items = torch.arange(20)[None]
    mask = torch.ones_like(items, dtype=torch.bool)
    changed = items.clone()
    changed[0, 12] = 30
    before, after = model(items, mask)[0], model(changed, mask)[0]
    assert torch.equal(before[:12], after[:12])
    assert ((before[12:] - after[12:]).abs().amax(1) > 1e-3).all()


def test_embed_is_the_state_of_the_last_item():
    model = make_model()
    indptr, items = make_histories()
    queries = model.embed(indptr, items)
    for row, history in enumerate(one_by_one(indptr, items)):
        expected = reference_hidden(model, history)[-1]
        torch.testing.assert_close(queries[row], expected, rtol=0, atol=1e-5)
    assert not queries.requires_grad and queries.dtype == torch.float32


def test_embed_reads_the_latest_items_of_a_long_history():
    model = make_model(max_length=5)
    _, items = make_histories((12,))
    assert torch.equal(model.embed(torch.tensor([0, 12]), items), model.embed(torch.tensor([0, 5]), items[-5:]))


def test_embed_of_many_histories_is_that_of_its_parts(monkeypatch):
    model = make_model()
    indptr, items = make_histories()
    whole = model.embed(indptr, items)
    monkeypatch.setattr("hellm.models.sequence.sasrec._BATCH", 3)
    torch.testing.assert_close(model.embed(indptr, items), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lengths", [(0,), (0, 0), (0, 4, 0), ()], ids=str)
def test_empty_history_gives_zeros(lengths):
    model = make_model()
    indptr, items = make_histories(lengths)
    queries = model.embed(indptr.long(), items)
    assert queries.shape == (len(lengths), 12)
    assert [bool((query == 0).all()) for query in queries] == [length == 0 for length in lengths]


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (2, 0), (2, 3)], ids=str)
def test_forward_of_nothing_is_nothing(shape):
    hidden = make_model()(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool))
    assert hidden.shape == (*shape, 12) and (hidden == 0).all()


def test_embed_takes_evaluation_mode_and_gives_the_mode_back():
    model = make_model(dropout=0.5)
    indptr, items = make_histories()
    expected = model.embed(indptr, items)
    model.train()
    assert torch.equal(model.embed(indptr, items), expected) and model.training
    padded, mask = pad_histories(indptr, items)
    assert not torch.allclose(model(padded, mask), model(padded, mask))


def test_item_table_is_shared_by_input_and_output():
    model = make_model()
    assert model.item_keys().data_ptr() == model.items().data_ptr() == model.items.id_embedding.weight.data_ptr()
    assert not model.item_keys().requires_grad and model.item_keys().shape == (NUM_ITEMS, 12)


def test_fresh_weights_follow_bert():
    torch.manual_seed(0)
    model = SASRec(5000)
    for name, value in model.named_parameters():
        if value.ndim == 2:
            assert value.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            assert (value == ("norm.weight" in name)).all(), name
    # item and position tables, input norm, and per layer 4 attention maps, a feed-forward part and two norms
    block = 4 * (64 * 64 + 64) + (64 * 256 + 256) + (256 * 64 + 64) + 2 * 128
    assert sum(value.numel() for value in model.parameters()) == 5000 * 64 + 50 * 64 + 128 + 2 * block


def test_saved_model_loads_with_equal_scores(tmp_path):
    model = make_model(dropout=0.3).train()
    model.save(tmp_path)
    again = SASRec.load(tmp_path)
    assert not again.training and again.settings == model.settings
    indptr, items = make_histories()
    scores = [one.embed(indptr, items) @ one.item_keys().T for one in (model, again)]
    assert torch.equal(*scores)
    assert torch.equal(load_file(tmp_path / "embeddings.safetensors")["sequence_embedding"], model.item_keys())


def test_what_is_no_sasrec_run_is_not_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"embeddings.safetensors does not exist: .* is no run directory"):
        SASRec.load(tmp_path)
    path = tmp_path / "embeddings.safetensors"
    save_file({"user": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match=r"must be of a stage-1, SASRec, transition, .* or fused run, got user"):
        SASRec.load(tmp_path)
    path.write_bytes(b"no tensors here, only a long enough text")
    with pytest.raises(ValueError, match=r"embeddings.safetensors: damaged, or not the file that must be there"):
        SASRec.load(tmp_path)
    make_model().save(tmp_path)
    tensors = load_file(path)
    del tensors["norm.weight"]
    save_file(tensors, path, metadata={"sasrec": '{"num_items": 37}'})
    with pytest.raises(ValueError, match=r"does not fit its own settings"):
        SASRec.load(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_items": 0}, r"num_items must be >= 1, got 0"),
        ({"num_layers": 0}, r"num_layers must be >= 1, got 0"),
        ({"max_length": 0}, r"max_length must be >= 1, got 0"),
        ({"embedding_dim": 10, "num_heads": 4}, r"embedding_dim must be a multiple of num_heads 4, got 10"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_settings_must_be_in_range(options, message):
    with pytest.raises(ValueError, match=message):
        SASRec(**({"num_items": 5} | options))


def test_wrong_histories_are_named():
    model = make_model(max_length=5)
    with pytest.raises(ValueError, match=r"items must be in \[0, 37\), got 37"):
        model.embed(torch.tensor([0, 1]), torch.tensor([37]))
    with pytest.raises(ValueError, match=r"items must be at most max_length 5 wide, got 6"):
        model(torch.zeros(1, 6, dtype=torch.int64), torch.ones(1, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"items and mask must be \[B, T\] alike, got \[1, 3\] and \[1, 2\]"):
        model(torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool))


def test_a_model_of_before_content_still_loads(tmp_path):
    model = make_model()
    model.save(tmp_path)
    path = tmp_path / "embeddings.safetensors"
    tensors = load_file(path)
    del tensors["items.id_embedding.weight"]  # its table was kept as what it gives
    later = ("norm_first", "item_id", "content_hidden_dim", "content_dropout")
    settings = {name: value for name, value in model.settings.items() if name not in later}
    save_file(tensors, path, metadata={"sasrec": json.dumps(settings)})
    indptr, items = make_histories()
    assert torch.equal(SASRec.load(tmp_path).embed(indptr, items), model.embed(indptr, items))


def whitened(num_items=NUM_ITEMS, width=6, components=None, seed=0):
    features = torch.randn(num_items, width, generator=torch.Generator().manual_seed(seed)) * 3 + 1
    features[::5] = 0
    return features, WhitenedContent.of(features, components)


def test_whitened_content_has_uncorrelated_columns_of_variance_1():
    features, content = whitened()
    table = content.table[features.any(1)].double()
    covariance = table.T @ table / len(table)
    torch.testing.assert_close(covariance, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-5)
    assert (content.table[::5] == 0).all()
    # ZCA stays as close to the features as whitening can: its map is symmetric.
    torch.testing.assert_close(content.matrix, content.matrix.T, rtol=0, atol=1e-6)
    kept = whitened(components=2)[1]
    assert kept.table.shape == (NUM_ITEMS, 2)
    variance = torch.linalg.eigvalsh(torch.cov(features[features.any(1)].T, correction=0))
    torch.testing.assert_close(kept.matrix.norm(dim=0), variance.flip(0)[:2].rsqrt(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("components", [None, 4])
def test_directions_without_variance_are_no_numbers_out_of_noise(components):
    features = torch.randn(20, 1).expand(20, 5) + torch.arange(5.0)
    table = WhitenedContent.of(features, components).table
    assert torch.isfinite(table).all() and table.abs().max() < 5
    assert (WhitenedContent.of(torch.zeros(4, 3), components).table == 0).all()
    assert torch.isfinite(WhitenedContent.of(torch.ones(1, 3), components).table).all()


@pytest.mark.parametrize(
    ("item_id", "hidden"), [(True, 0), (False, 0), (False, 7), (True, 7)], ids=["both", "content", "deep", "both deep"]
)
def test_item_embeddings_are_ids_and_projected_content(item_id, hidden):
    features, content = whitened()
    model = make_model(content={"a.b": content}, item_id=item_id, content_hidden_dim=hidden)
    weights, x = dict(model.items.named_parameters()), content.table
    projector = [weights[name] for name in weights if name.startswith("projectors.0")]
    expected = torch.zeros(NUM_ITEMS, 12)
    if hidden:
        inner = F.gelu(x @ projector[0].T + projector[1])
        expected = (inner @ projector[2].T + projector[3]) * features.any(1, keepdim=True)
    else:
        expected = x @ projector[0].T
    if item_id:
        expected = expected + weights["id_embedding.weight"]
    torch.testing.assert_close(model.item_keys(), expected)
    assert model.items.modalities == ["a.b"]


@pytest.mark.parametrize("norm_first", [False, True])
def test_model_with_content_saves_loads_and_takes_new_items(norm_first, tmp_path):
    features, content = whitened()
    model = make_model(content={"text": content}, content_hidden_dim=5, norm_first=norm_first).eval()
    model.save(tmp_path)
    again, (indptr, items) = SASRec.load(tmp_path), make_histories()
    assert torch.equal(again.embed(indptr, items), model.embed(indptr, items))
    longer = again.extended({"text": features[1:3]}, lambda table: table[1:3])
    assert torch.equal(longer.item_keys()[:NUM_ITEMS], model.item_keys())
    torch.testing.assert_close(longer.item_keys()[NUM_ITEMS:], model.item_keys()[1:3])
    assert torch.equal(longer.embed(indptr, items), model.embed(indptr, items))
    assert torch.equal(again.item_keys(), model.item_keys())
    # What a longer catalogue does not change is there once.
    assert all(
        weight is longer.get_parameter(name) for name, weight in again.named_parameters() if "id_embedding" not in name
    )
    absent = again.extended({"other": torch.ones(1, 2)}, lambda table: table[:1] * 0)
    assert (absent.item_keys()[-1] == 0).all()
    with pytest.raises(ValueError, match=r"features must be \[n, 6\], got \[1, 2\]"):
        again.extended({"text": torch.ones(1, 2)}, lambda table: table[:1])


def test_items_need_ids_or_content():
    with pytest.raises(ValueError, match="items must have ids, content or both"):
        make_model(item_id=False)
    with pytest.raises(ValueError, match=r"content\['text'\] must be of the 37 items, got 4"):
        make_model(content={"text": whitened(4)[1]})

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hellm import ops
from hellm.config import ModelConfig, PretrainConfig, load_config, override_config
from hellm.evaluate import compare, evaluate_dataset, read_test_evaluations
from hellm.graphs import item_hypergraph, user_hypergraph
from hellm.models.graph.backbone import NGCF
from hellm.models.graph.content import ItemContent
from hellm.recommend import Recommender
from hellm.training import pretrain as module
from hellm.training.candidates import CandidateItems
from hellm.training.checkpoint import read_model
from hellm.training.loop import Interrupted
from hellm.training.pretrain import build_encoder, pretrain, pretrain_losses, resolve_config
from hellm.training.processes import Processes
from hellm.training.samplers import Triples
from hellm.training.step import total_loss

CONFIG = PretrainConfig(
    model=ModelConfig(embedding_dim=8, knn_k=4),
    learning_rate=0.02,
    batch_size=20,
    max_epochs=8,
    validate_every=2,
    ks=(5,),
    monitor=("recall@5", "ndcg@5"),
    num_threads=1,
    device="cpu",
    tensorboard=False,
)


def changed(*overrides):
    return override_config(CONFIG, overrides)


def run(config, dataset, out, **options):
    return pretrain(config, dataset, out, **options)


def records(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "seconds" not in name} for line in lines]


def without_splits(dataset, *names):
    codes = [("train", "valid", "test").index(name) for name in names]
    kept = ~np.isin(dataset.split, codes)
    return replace(dataset, users=dataset.users[kept], items=dataset.items[kept], split=dataset.split[kept])


@pytest.fixture(scope="module")
def finished(small_dataset, tmp_path_factory):
    """(folder, result, calls of evaluate) of one whole run."""
    folder, calls = tmp_path_factory.mktemp("runs") / "run", []

    def evaluate(scorer, dataset, **options):
        calls.append((options["split"], scorer.embeddings().item.clone()))
        return evaluate_dataset(scorer, dataset, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hellm.training.pretrain.evaluate_dataset", evaluate)
        result = pretrain(changed("max_epochs=20"), small_dataset, folder)
    return folder, result, calls


def test_pretraining_learns_the_blocks(finished):
    # chance is 5 of the 20 items outside the training history
    assert finished[1]["test"]["metrics"]["recall@5"] > 0.5


class TestSoftmax:
    def test_learns_the_blocks_by_cosine(self, small_dataset, tmp_path):
        result = run(changed("max_epochs=20", "loss=softmax"), small_dataset, tmp_path / "run")
        assert result["test"]["metrics"]["recall@5"] > 0.5
        items = load_file(tmp_path / "run" / "embeddings.safetensors")["item"]
        torch.testing.assert_close(items.norm(dim=1), torch.ones(len(items)))
        assert "softmax_loss" in records(tmp_path / "run")[0] and "bpr_loss" not in records(tmp_path / "run")[0]

    def test_items_without_events_are_no_negatives(self, small_dataset):
        cold = int(small_dataset.pairs("train")[1][0])
        kept = (small_dataset.items != cold) | (small_dataset.split != 0)
        dataset = small_dataset.of_events(kept)
        config, _ = resolve_config(changed("loss=softmax", "model.item_hypergraph=false"), dataset)
        encoder = build_encoder(config, dataset)
        row = dataset.pairs("train")
        triples = Triples(*(torch.from_numpy(one[:8]) for one in (*row, row[1])))
        losses = pretrain_losses(
            encoder,
            triples,
            l2_weight=0.0,
            user_contrastive_weight=0.0,
            item_contrastive_weight=0.0,
            temperature=0.5,
            softmax_temperature=0.2,
            candidates=CandidateItems.of(dataset).of_step(0, 0, triples.positives.numpy()),
        )
        losses["softmax_loss"].backward()
        gradient = encoder.item_table.weight.grad
        assert not gradient[cold].any() and gradient[dataset.pairs("train")[1]].any()

    def test_is_not_the_published_loss(self):
        with pytest.raises(ValueError, match="loss must be bpr with compat, got 'softmax'"):
            changed("loss=softmax", "compat=official")


def test_run_directory_is_complete(finished):
    folder, result, _ = finished
    assert {path.name for path in folder.iterdir()} == {
        ".hellm.json",
        "checkpoint",
        "config.yaml",
        "content.safetensors",
        "curves.png",
        "embeddings.safetensors",
        "histories.parquet",
        "ids.parquet",
        "metrics.jsonl",
        "result.json",
        "test_evaluations.jsonl",
        "test_users.safetensors",
    }
    assert {path.name for path in (folder / "checkpoint").iterdir()} == {
        "last.safetensors",
        "best.safetensors",
        "data.json",
    }
    assert json.loads((folder / "result.json").read_text()) == result
    resolved = load_config(PretrainConfig, folder / "config.yaml")
    assert resolved.model.modalities == ("image", "text")


def test_result_says_what_was_run(finished, small_dataset):
    _, result, _ = finished
    assert result["dataset"] == {
        "name": "blocks",
        "form": "hellm",
        "split": "given",
        "num_users": 60,
        "num_items": 24,
        "num_events": {"train": 240, "valid": 60, "test": 60},
        "features": {"image": [24, 3], "text": [24, 3]},
        "fingerprint": small_dataset.fingerprint,
    }
    assert result["test"]["protocol"] == "standard" and result["test"]["num_users"] == 60
    low, high = result["test"]["confidence_intervals"]["ndcg@5"]
    assert low < result["test"]["metrics"]["ndcg@5"] < high
    assert result["num_parameters"] == 2 * (60 + 24) * 8
    assert result["num_epochs"] == 20 and result["seconds"] > 0 and result["peak_memory_bytes"]["host"] > 0
    assert result["environment"]["torch"] == torch.__version__ and result["notes"] == []


def test_test_split_is_scored_once_with_the_best_weights(finished):
    folder, result, calls = finished
    assert [split for split, _ in calls] == ["valid"] * 10 + ["test"]
    best = calls[(result["best_epoch"] - 1) // 2][1]
    assert torch.equal(calls[-1][1], best)
    assert torch.equal(load_file(folder / "embeddings.safetensors")["item"], best)
    record = next(r for r in records(folder) if r["epoch"] == result["best_epoch"])
    assert result["valid"]["metrics"]["recall@5"] == record["valid_recall@5"]


def test_embeddings_are_float32_tables(finished):
    tensors = load_file(finished[0] / "embeddings.safetensors")
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {
        "user": (60, 8),
        "item": (24, 8),
        "user_hypergraph": (60, 8),
        "item_hypergraph": (24, 8),
        "item_hypergraph_source": (24, 8),
        "item_hypergraph_input": (24, 8),
        "item_backbone": (24, 8),
        "fold_in_source": (24, 8),
        "fold_in_view": (24, 8),
    }
    assert all(value.dtype == torch.float32 for value in tensors.values())


def test_epoch_record_holds_every_term(finished):
    for record in records(finished[0]):
        terms = record["bpr_loss"] + record["l2_loss"] + record["contrastive_loss"]
        assert record["loss"] == pytest.approx(terms)
        assert record["loss_mean"] == pytest.approx(record["loss"] / 13)  # 240 // 20 + 1 steps
        assert min(record["bpr_loss"], record["l2_loss"], record["contrastive_loss"]) > 0


def test_same_seed_gives_the_same_bits(finished, small_dataset, tmp_path):
    folder, _, _ = finished
    run(changed("max_epochs=20"), small_dataset, tmp_path / "again")
    assert records(tmp_path / "again") == records(folder)
    first, second = (load_file(path / "embeddings.safetensors") for path in (folder, tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    run(changed("max_epochs=2", "seed=1"), small_dataset, tmp_path / "other")
    assert records(tmp_path / "other")[0] != records(folder)[0]


def test_finished_run_is_returned_as_it_is(finished, small_dataset):
    folder, result, _ = finished
    assert run(changed("max_epochs=20"), small_dataset, folder, resume=True) == result


@pytest.mark.parametrize("call", [5, 40])
def test_interrupted_run_ends_like_an_uninterrupted_one(small_dataset, tmp_path, monkeypatch, call):
    config = changed("model.backbone=ngcf", "contrastive_rows=16", "negatives=popularity", "max_epochs=4")
    whole = run(config, small_dataset, tmp_path / "whole")
    calls = []

    def losses(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return pretrain_losses(*arguments, **options)

    monkeypatch.setattr(module, "pretrain_losses", losses)
    with pytest.raises(Interrupted):
        run(config, small_dataset, tmp_path / "broken")
    assert len(calls) == call and not (tmp_path / "broken" / "result.json").exists()
    torch.manual_seed(77)
    resumed = run(config, small_dataset, tmp_path / "broken", resume=True)
    assert resumed["test"] == whole["test"]
    assert records(tmp_path / "broken") == records(tmp_path / "whole")
    first, second = (load_file(tmp_path / name / "embeddings.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_finished_run_can_be_prolonged(small_dataset, tmp_path):
    run(changed("max_epochs=4"), small_dataset, tmp_path / "run")
    result = run(changed("max_epochs=6"), small_dataset, tmp_path / "run", resume=True)
    run(changed("max_epochs=6"), small_dataset, tmp_path / "whole")
    counts = {name: len(read_test_evaluations(tmp_path / name)) for name in ("run", "whole")}
    assert counts == {"run": 2, "whole": 1}
    assert result["num_epochs"] == 6
    assert records(tmp_path / "run") == records(tmp_path / "whole")


def test_run_of_other_settings_or_data_is_not_resumed(finished, small_dataset):
    folder, _, _ = finished
    with pytest.raises(ValueError, match=r"must keep its settings; temperature was 0.6, got 0.3"):
        run(changed("max_epochs=20", "temperature=0.3"), small_dataset, folder, resume=True)
    other = replace(small_dataset, items=np.roll(small_dataset.items, 6))
    with pytest.raises(ValueError, match=r"must keep its data"):
        run(changed("max_epochs=20"), other, folder, resume=True)
    with pytest.raises(FileExistsError, match=r"is not empty; resume=True goes on with it"):
        run(CONFIG, small_dataset, folder)


def test_tensorboard_events_are_written(small_dataset, tmp_path):
    run(changed("max_epochs=1", "tensorboard=true"), small_dataset, tmp_path / "run")
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))


def test_data_without_features_trains_without_the_item_hypergraph(small_dataset, tmp_path):
    result = run(changed("max_epochs=1"), replace(small_dataset, item_features={}), tmp_path / "run")
    assert result["notes"] == ["data set 'blocks' has no item features: trained without the item hypergraph"]
    assert not load_config(PretrainConfig, tmp_path / "run" / "config.yaml").model.item_hypergraph
    assert "item_hypergraph" not in load_file(tmp_path / "run" / "embeddings.safetensors")


def test_data_without_validation_or_test_trains_to_the_end(small_dataset, tmp_path):
    result = run(changed("max_epochs=3"), without_splits(small_dataset, "valid", "test"), tmp_path / "run")
    assert (result["best_epoch"], result["test"], result["valid"]["metrics"]) == (2, None, {})
    assert result["notes"] == ["no validation events: trained for max_epochs, the last weights are kept"]


def test_training_never_sees_validation_and_test_events(small_dataset, tmp_path):
    run(changed("max_epochs=3"), small_dataset, tmp_path / "all")
    run(changed("max_epochs=3"), without_splits(small_dataset, "valid", "test"), tmp_path / "train")
    losses = [[(r["bpr_loss"], r["contrastive_loss"]) for r in records(tmp_path / name)] for name in ("all", "train")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.modalities=[audio]"], r"model.modalities must be among \['image', 'text'\].*got 'audio'"),
        (["device=tpu"], r'device must be "auto", "cpu", "cuda" or "cuda:N", got \'tpu\''),
    ],
)
def test_settings_must_fit_the_data(small_dataset, overrides, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(changed(*overrides), small_dataset, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_training_events_are_needed(small_dataset):
    with pytest.raises(ValueError, match=r"data set 'blocks' must have training events, got none"):
        resolve_config(CONFIG, without_splits(small_dataset, "train"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_absent_device_is_named(small_dataset):
    with pytest.raises(ValueError, match=r"device must be usable, got 'cuda': torch .*CUDA"):
        resolve_config(changed("device=cuda"), small_dataset)
    assert resolve_config(changed("device=auto"), small_dataset)[0].device == "cpu"


def test_large_k_is_cut_to_the_catalogue(small_dataset):
    config, notes = resolve_config(changed("model.knn_k=99"), small_dataset)
    assert config.model.knn_k == 24 and notes == ["model.knn_k 99 cut to the 24 items there are"]


def test_official_mode_contrasts_all_nodes(small_dataset):
    config, notes = resolve_config(changed("compat=official", "contrastive_rows=16"), small_dataset)
    assert config.contrastive_rows is None
    assert notes == ["the published loss runs over all nodes: contrastive_rows 16 is not used"]


def test_encoder_is_built_from_train_events_and_chosen_features(small_dataset):
    model = build_encoder(changed("model.modalities=[text]", "compat=official"), small_dataset)
    index = torch.from_numpy(np.stack(small_dataset.pairs("train")))
    expected = user_hypergraph(index, 60, 24)
    assert torch.equal(model.user_hypergraph.hyperedge_index, expected.hyperedge_index)
    text = torch.from_numpy(small_dataset.item_features["text"].values)
    content = item_hypergraph({"text": text}, 4, keep_nonpositive=True)
    assert torch.equal(model.item_hypergraph.hyperedge_index, content.hyperedge_index)


class TestAttributes:
    def test_values_are_hyperedges_where_the_data_have_them(self, small_dataset, dataset_with_brands):
        config, notes = resolve_config(CONFIG, dataset_with_brands)
        assert config.model.item_hypergraph and config.model.attributes == ("brand",) and not notes
        graph = build_encoder(config, dataset_with_brands).item_hypergraph
        assert graph.num_hyperedges == 3
        assert sorted(graph.hyperedge_index[0].tolist()) == [*range(22)]
        both = replace(dataset_with_brands, item_features=small_dataset.item_features)
        assert build_encoder(CONFIG, both).item_hypergraph.num_hyperedges == 2 * 24 + 3

    def test_none_are_with_compat_or_when_left_out(self, small_dataset, dataset_with_brands):
        both = replace(dataset_with_brands, item_features=small_dataset.item_features)
        plain = build_encoder(changed("compat=official"), small_dataset).item_hypergraph
        for override in ("compat=official", "model.attributes=[]"):
            config, _ = resolve_config(changed(override), both)
            assert config.model.attributes == ()
            graph = build_encoder(config, both).item_hypergraph
            assert graph.num_hyperedges == plain.num_hyperedges and graph.hyperedge_weight is None
        config, notes = resolve_config(changed("model.attributes=[]"), dataset_with_brands)
        assert not config.model.item_hypergraph and "has no item features" in notes[0]

    def test_an_attribute_must_be_there(self, dataset_with_brands):
        with pytest.raises(ValueError, match=r"model.attributes must be among brand \(data set 'blocks'\), got 'size'"):
            resolve_config(changed("model.attributes=[size]"), dataset_with_brands)

    def test_new_items_join_the_hyperedges_of_their_values(self, dataset_with_brands, tmp_path):
        run(changed("max_epochs=8"), dataset_with_brands, tmp_path / "run")
        recommender = Recommender.load(tmp_path / "run")
        before = recommender.item.clone()
        recommender.add_items({}, ["new"], attributes={"brand": [["brand 1"]]})
        similarity = torch.as_tensor(before[:22] @ recommender.item[24])
        of_brand = torch.arange(22) % 3 == 1
        assert similarity[of_brand].min() > similarity[~of_brand].max()


def test_neighbours_are_searched_on_the_device_of_the_model(small_dataset, monkeypatch):
    searched = []
    knn = ops.knn

    def recorded(x, k):
        searched.append(x.device.type)
        return knn(torch.ones(x.shape), k)

    monkeypatch.setattr("hellm.graphs.knn", recorded)
    content = ItemContent.of(small_dataset.item_features, 4, "meta")
    assert searched == ["meta"] * 2 and {rows.device.type for rows in content.neighbours.values()} == {"cpu"}

    def graph(features, k, *, masks, **options):
        assert {x.device.type for x in (*features.values(), *masks.values())} == {"meta"}
        return item_hypergraph({"text": torch.eye(24)}, k)

    monkeypatch.setattr(module, "item_hypergraph", graph)
    model = build_encoder(CONFIG, small_dataset, "meta")
    assert model.item_hypergraph.device.type == model.device.type == "meta"


def test_ablations_are_settings(small_dataset):
    without_user = build_encoder(changed("model.user_hypergraph=false"), small_dataset)
    assert without_user.user_branch_table is None and without_user.item_branch_table is not None
    without_item = build_encoder(changed("model.item_hypergraph=false"), small_dataset)
    assert without_item.item_branch_table is None and without_item.user_branch_table is not None
    assert isinstance(build_encoder(changed("model.backbone=ngcf"), small_dataset).backbone, NGCF)


@pytest.mark.parametrize("side", ["user", "item"])
def test_zero_weight_leaves_the_fusion_only_in_official_mode(small_dataset, side):
    zero = f"{side}_contrastive_weight=0"
    assert getattr(build_encoder(changed(zero), small_dataset), f"{side}_branch_table") is not None
    official = build_encoder(changed(zero, "compat=official"), small_dataset)
    assert getattr(official, f"{side}_branch_table") is None


def test_step_losses_are_the_published_sum(small_dataset):
    torch.manual_seed(0)
    model = build_encoder(CONFIG, small_dataset).double()
    triples = Triples(np.array([0, 5, 9]), np.array([1, 2, 1]), np.array([4, 4, 7]))
    weights = {"l2_weight": 0.5, "user_contrastive_weight": 0.3, "item_contrastive_weight": 0.7, "temperature": 0.4}
    losses = pretrain_losses(model, triples, **weights)
    user, item, user_view, item_view = model()
    u, p, n = user[triples.users], item[triples.positives], item[triples.negatives]

    def contrast(first, second):
        first, second = (x / x.norm(dim=1, keepdim=True).clamp(min=1e-12) for x in (first, second))
        within, across = torch.exp(first @ first.T / 0.4), torch.exp(first @ second.T / 0.4)
        return -torch.log(across.diag() / (within.sum(1) + across.sum(1) - within.diag())).mean()

    expected = {
        "bpr_loss": -torch.log(torch.sigmoid((u * p).sum(1) - (u * n).sum(1))).mean(),
        "l2_loss": 0.5 * 0.5 * (u.square().sum() + p.square().sum() + n.square().sum()) / 3,
        "contrastive_loss": 0.3 * contrast(user, user_view) + 0.7 * contrast(item, item_view),
    }
    assert list(losses) == list(expected)
    parameters = list(model.parameters())
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-9, atol=1e-12)
        mine = torch.autograd.grad(losses[name], parameters, retain_graph=True, materialize_grads=True)
        theirs = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_zero_contrastive_weight_is_not_computed(small_dataset, monkeypatch):
    def fail(*arguments, **options):
        raise AssertionError("computed")

    monkeypatch.setattr(module, "synergistic_contrastive_loss", fail)
    model = build_encoder(CONFIG, small_dataset)
    triples = Triples(*(np.array([0]), np.array([1]), np.array([2])))
    weights = {"l2_weight": 1e-3, "user_contrastive_weight": 0.0, "item_contrastive_weight": 0.0, "temperature": 0.4}
    assert pretrain_losses(model, triples, **weights)["contrastive_loss"].item() == 0


def test_sampled_anchors_estimate_the_whole_contrast(small_dataset):
    model = build_encoder(CONFIG, small_dataset)
    triples = Triples(*(np.array([0]), np.array([1]), np.array([2])))
    weights = {"l2_weight": 0.0, "user_contrastive_weight": 1.0, "item_contrastive_weight": 1.0, "temperature": 0.4}
    whole = pretrain_losses(model, triples, **weights)["contrastive_loss"].item()
    config, sampled = changed("contrastive_rows=12"), []
    choices = module._contrastive_choices(config, model)
    for step in range(200):
        rows = module._contrastive_rows(config, choices, 0, step)
        assert {name: len(set(chosen.tolist())) for name, chosen in rows.items()} == {"user_rows": 12, "item_rows": 12}
        sampled.append(pretrain_losses(model, triples, **weights, **rows)["contrastive_loss"].item())
    assert np.std(sampled) > 0
    assert np.mean(sampled) == pytest.approx(whole, abs=4 * np.std(sampled) / 200**0.5)


def test_sampled_keys_estimate_the_whole_contrast(small_dataset):
    model = build_encoder(CONFIG, small_dataset)
    triples = Triples(*(np.array([0]), np.array([1]), np.array([2])))
    # Losses are logarithms: with keys that are alike enough, that of a mean is the mean of theirs.
    weights = {"l2_weight": 0.0, "user_contrastive_weight": 1.0, "item_contrastive_weight": 1.0, "temperature": 4.0}
    whole = pretrain_losses(model, triples, **weights)["contrastive_loss"].item()
    config, sampled = changed("contrastive_rows=6", "contrastive_keys=12"), []
    choices = module._contrastive_choices(config, model)
    for step in range(200):
        chosen = module._contrastive_rows(config, choices, 0, step)
        for kind in ("user", "item"):
            rows, keys = chosen[f"{kind}_rows"].tolist(), chosen[f"{kind}_keys"].tolist()
            assert len(rows) == 6 and len(set(keys)) == 12 and keys == sorted(keys) and set(rows) <= set(keys)
        sampled.append(pretrain_losses(model, triples, **weights, **chosen)["contrastive_loss"].item())
    assert np.std(sampled) > 0
    assert np.mean(sampled) == pytest.approx(whole, abs=4 * np.std(sampled) / 200**0.5)


@pytest.mark.parametrize(
    "overrides",
    [
        ("contrastive_rows=8", "contrastive_keys=16"),
        ("loss=softmax", "sampled_items=7"),
        ("contrastive_rows=8", "contrastive_keys=16", "sampled_neighbours=2"),
        ("loss=softmax", "sampled_items=7", "contrastive_rows=8", "contrastive_keys=16", "sampled_neighbours=2"),
    ],
)
def test_training_with_samples_learns_and_goes_on_like_without_a_break(small_dataset, tmp_path, overrides):
    config = changed(*overrides, "max_epochs=6")
    whole = run(config, small_dataset, tmp_path / "whole")
    run(replace(config, max_epochs=2), small_dataset, tmp_path / "parts")
    parts = run(config, small_dataset, tmp_path / "parts", resume=True)
    assert parts["test"] == whole["test"] and records(tmp_path / "parts") == records(tmp_path / "whole")
    losses = [one["loss"] for one in records(tmp_path / "whole")]
    assert losses[-1] < losses[0]


class TestSampledNeighbours:
    SETTINGS = ("contrastive_rows=8", "contrastive_keys=16")
    SOFTMAX = ("loss=softmax", "sampled_items=7")

    @pytest.mark.parametrize("backbone", ["lightgcn", "mf"])
    @pytest.mark.parametrize("loss", [(), SOFTMAX, ("loss=softmax",)], ids=str)
    @pytest.mark.parametrize(
        "graphs", [(), ("model.item_hypergraph=false",), ("model.user_hypergraph=false",)], ids=str
    )
    def test_where_nothing_is_left_out_a_step_is_that_of_the_whole_graphs(self, small_dataset, graphs, loss, backbone):
        """Losses and gradients, and nothing beside the step's own numbers is drawn."""
        config = changed(*self.SETTINGS, *graphs, *loss, f"model.backbone={backbone}")
        found = []
        for chosen in (config, replace(config, sampled_neighbours=10**9)):
            torch.manual_seed(0)
            model = build_encoder(chosen, small_dataset).double()
            state = torch.get_rng_state()
            terms = module.step_losses(chosen, model, module.build_sampler(chosen, small_dataset))(3, 1)
            total_loss(terms).backward()
            assert torch.equal(torch.get_rng_state(), state)
            gradients = {name: one.grad for name, one in model.named_parameters()}
            assert all(one.is_sparse == (chosen.sampled_neighbours is not None) for one in gradients.values())
            found.append((terms, {name: one.to_dense() for name, one in gradients.items()}))
        torch.testing.assert_close(*found, check_layout=False)

    def test_only_rows_that_are_read_are_updated(self, small_dataset):
        config = changed(
            "batch_size=1", "user_contrastive_weight=0", "item_contrastive_weight=0", "sampled_neighbours=1"
        )
        model = build_encoder(config, small_dataset)
        before = {name: one.detach().clone() for name, one in model.named_parameters()}
        step = module.build_step(model, config, module.build_sampler(config, small_dataset), Processes())
        step.run(0, 0)
        for name, parameter in model.named_parameters():
            changed_rows = (parameter != before[name]).any(1).sum()
            assert 0 < changed_rows < len(parameter) / 2, name

    def test_draws_are_those_of_the_seed_the_epoch_and_the_step(self, small_dataset):
        config = changed(*self.SETTINGS, "sampled_neighbours=1")
        model = build_encoder(config, small_dataset)
        sampled = module._sampled_rows(config, model)
        other = module._sampled_rows(replace(config, seed=1), model)

        def rows(of_step, epoch, step):
            return of_step(epoch, step)(torch.arange(60), torch.arange(24)).user

        torch.manual_seed(1)
        assert torch.equal(rows(sampled, 2, 3), rows(sampled, 2, 3))
        for different in (rows(sampled, 3, 2), rows(sampled, 2, 4), rows(other, 2, 3)):
            assert not torch.equal(rows(sampled, 2, 3), different)

    @pytest.mark.parametrize("loss", [(), SOFTMAX], ids=str)
    def test_it_learns_the_blocks(self, small_dataset, tmp_path, loss):
        settings = (*self.SETTINGS, *loss, "sampled_neighbours=4", "max_epochs=20")
        result = run(changed(*settings), small_dataset, tmp_path / "run")
        # Chance, and what popularity does where all items are alike, is 5 of 20.
        assert result["test"]["metrics"]["recall@5"] > 0.5

    def test_it_is_for_one_process(self, small_dataset, tmp_path, monkeypatch):
        processes = Processes()
        processes.count = 2
        monkeypatch.setattr(module, "launched_processes", lambda *_, **__: processes)
        with pytest.raises(ValueError, match="sampled_neighbours must be null in several processes, got 4 in 2"):
            run(changed(*self.SETTINGS, "sampled_neighbours=4"), small_dataset, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_samples_and_a_captured_step_exclude_each_other():
    keys = ("contrastive_rows=8", "contrastive_keys=8")
    for sampled in (keys, (*keys, "sampled_neighbours=2"), ("loss=softmax", "sampled_items=8")):
        with pytest.raises(ValueError, match="capture must be null or false with sampled_items, contrastive_keys or"):
            module._resolve_capture(changed("device=cuda", *sampled, "capture=true"))
    assert module._resolve_capture(changed("device=cuda"))
    assert not module._resolve_capture(changed("device=cuda", "loss=softmax", "sampled_items=8"))


def test_too_little_memory_says_how_much_was_asked_for(small_dataset, tmp_path, monkeypatch):
    def losses(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.\nmore")

    monkeypatch.setattr(module, "pretrain_losses", losses)
    message = r"pre-training needs more memory than there is \(.*Tried to allocate 3.00 GiB.\); lower contrastive_rows"
    with pytest.raises(MemoryError, match=message):
        run(CONFIG, small_dataset, tmp_path / "run")


def test_gpu_number_that_is_not_there(small_dataset, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"got 'cuda:1' where torch sees 1 CUDA device"):
        resolve_config(changed("device=cuda:1"), small_dataset)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("HELLM_SLOW"), reason="takes minutes; set HELLM_SLOW=1")
def test_first_epoch_on_tiktok_is_the_published_one(shared_data, tmp_path):
    # Reference sums over the 59 steps of the published code on these two modalities.
    config = load_config(PretrainConfig, "mmhcl-tiktok", ["max_epochs=1", "tensorboard=false"])
    run(config, shared_data / "tiktok", tmp_path / "run")
    (record,) = records(tmp_path / "run")
    assert record["loss"] == pytest.approx(80.053, rel=0.01)
    assert record["bpr_loss"] == pytest.approx(32.093, rel=0.02)
    assert record["contrastive_loss"] == pytest.approx(47.871, rel=0.005)


def test_result_has_the_test_by_slices(finished, small_dataset):
    folder, result, _ = finished
    slices = result["test"]["slices"]
    assert json.loads((folder / "result.json").read_text())["test"]["slices"] == slices
    assert list(slices) == ["item popularity", "history length"]
    config = resolve_config(CONFIG, small_dataset)[0]
    model = build_encoder(config, small_dataset)
    read_model(folder / "checkpoint" / "best.safetensors", model)
    table = compare({"run": model.eval()}, small_dataset, ks=config.ks, slices=True)
    for kind, parts in table["models"][0]["slices"].items():
        assert {label: part["num_users"] for label, part in slices[kind].items()} == {
            label: part["num_users"] for label, part in parts.items()
        }
        for label, part in parts.items():
            assert slices[kind][label]["what"] == table["slices"][kind][label]
            assert slices[kind][label]["metrics"]["recall@5"] == pytest.approx(part["metrics"]["recall@5"])
            low, high = slices[kind][label]["confidence_intervals"]["recall@5"]
            assert [low, high] == pytest.approx(part["confidence_intervals"]["recall@5"])

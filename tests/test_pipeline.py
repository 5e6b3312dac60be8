"""From raw data to recommendations, from Python."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import hellm
from hellm import graphs
from hellm.config import PRESETS, RunConfig
from hellm.data import ItemFeatures, load_dataset, write_sample_shop


def small_config() -> RunConfig:
    config = PRESETS[RunConfig]["demo"]
    stages = {
        name: replace(getattr(config, name), max_epochs=1, num_threads=1, tensorboard=False)
        for name in ("pretrain", "sasrec", "content")
    }
    return replace(config, language_model=False, baselines=("popularity",), text="none", image="none", **stages)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(steps, values, folder, features that neighbours were searched for)."""
    top, steps, searched = tmp_path_factory.mktemp("pipeline"), [], []
    shop = load_dataset(write_sample_shop(top / "shop", num_users=80, num_items=160))
    features = {
        name: ItemFeatures.from_values(np.random.default_rng(n).standard_normal((160, 8)))
        for n, name in enumerate(("look", "sound"))
    }
    dataset = replace(shop, item_features=features)
    knn = graphs.knn

    def counted(x, k):
        searched.append((tuple(x.shape), float(x.double().sum())))
        return knn(x, k)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "knn", counted)
        values = hellm.run(dataset, top / "all", small_config(), on_step=steps.append)
    return steps, values, top / "all", searched


def test_every_step_is_told_before_it_runs_and_gives_what_came_of_it(ran):
    steps, values, out, _ = ran
    names = ["data", "stage1", "transitions", "sasrec", "content", "fused", "compare", "recommend"]
    assert [step.name for step in steps] == list(values) == names
    assert all(step.text.endswith(".") and step.command.startswith("hellm ") for step in steps)
    assert values["data"].num_items == 160
    assert values["fused"]["stage"] == "fuse" and values["transitions"]["chosen"]["decay"] in (0.3, 0.5, 0.7)
    assert {row["name"] for row in values["compare"]["models"]} >= {str(out / "fused"), "popularity"}
    assert all(len(one["items"]) == 5 and one["history"] for one in values["recommend"])


def test_neighbours_of_items_are_searched_once(ran):
    _, values, _, searched = ran
    content = values["data"].item_content
    assert len(content) > 2  # two tables of features, and attributes
    assert len(searched) == len(set(searched)) == len(content)


def test_a_finished_pipeline_is_read(ran):
    _, values, out, _ = ran
    with pytest.raises(FileExistsError, match=r"resume=True"):
        hellm.run(values["data"], out, small_config())
    loaded = hellm.Recommender.load(out / "fused")
    answer = loaded.recommend(users=[values["recommend"][0]["user"]], k=5)[0]
    assert [item.item for item in answer] == [item["item"] for item in values["recommend"][0]["items"]]


def test_options_of_reading_are_for_paths(tmp_path):
    shop = write_sample_shop(tmp_path / "shop", num_users=60, num_items=160)
    events = shop / "events.csv"
    header, _, rest = events.read_text(encoding="utf-8").partition("\n")
    events.write_text(header.replace("user", "buyer_nr") + "\n" + rest, encoding="utf-8")
    values: dict[str, Any] = {}

    class Stopped(Exception):
        pass

    def stop(step, value):
        values[step.name] = value
        raise Stopped

    config = RunConfig(text="none", image="none")
    with pytest.raises(Stopped):
        hellm.run(shop, tmp_path / "out", config, columns={"user": "buyer_nr"}, on_value=stop)
    assert values["data"].columns["user"] == "buyer_nr"
    with pytest.raises(ValueError, match="data must be a path where columns are given, got a data set"):
        hellm.run(values["data"], tmp_path / "other", config, columns={"user": "buyer_nr"})
    assert not (tmp_path / "other").exists()


def test_a_language_model_that_is_not_there_is_told_before_anything_is_trained(tmp_path, monkeypatch):
    from hellm.models.llm.language_model import PACKAGED

    monkeypatch.setitem(PACKAGED, "smollm2-135m", ("no_such_package", "no-such-package"))
    config = replace(small_config(), language_model=True)
    with pytest.raises(ImportError, match="smollm2-135m is in the package no-such-package, which is not installed"):
        hellm.run(tmp_path / "absent.csv", tmp_path / "all", config)
    assert [one.name for one in tmp_path.iterdir()] in ([], [".all.lock"])
    finetune = replace(config.finetune, llm=str(tmp_path / "model.gguf"))
    with pytest.raises(FileNotFoundError, match=r"language model file .*model\.gguf does not exist"):
        hellm.run(tmp_path / "absent.csv", tmp_path / "all", replace(config, finetune=finetune))

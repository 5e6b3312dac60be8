from __future__ import annotations

import os
import signal
from dataclasses import replace

import numpy as np
import pytest

from hellm._folders import FolderInUseError, hold
from hellm.config import FinetuneConfig, PretrainConfig, SASRecConfig, load_config
from hellm.evaluate import read_test_evaluations
from hellm.training import sasrec as training
from hellm.training.loop import Interrupted
from hellm.training.search import search
from hellm.training.search_space import SPACES, is_dimension, parse_space, point_of, with_settings

optuna = pytest.importorskip("optuna")

LOOP = {"ks": (1, 5), "monitor": ("recall@5",), "num_threads": 1, "device": "cpu", "tensorboard": False}
CONFIG = SASRecConfig(
    embedding_dim=8, num_layers=1, feedforward_dim=16, batch_size=64, max_epochs=5, validate_every=1, **LOOP
)
SPACE = ["learning_rate=1e-5..1e-1:log", "embedding_dim=8,16", "num_heads=1..2"]


def without_time(found):
    return found | {"trials": [{k: v for k, v in one.items() if k != "seconds"} for one in found["trials"]]}


@pytest.fixture(scope="module")
def whole(small_dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("search") / "whole"
    return out, search("sasrec", small_dataset, out, num_trials=10, space=SPACE, config=CONFIG)


def test_words_are_ranges_and_values():
    space = parse_space(
        [*SPACE, "dropout=0..0.5", "content=[],[text],null", "loss=bce,cross_entropy", "norm_first=true,false"], CONFIG
    )
    rate, width, heads, dropout, content, loss, norm = space.values()
    assert (rate.low, rate.high, rate.log) == (1e-5, 0.1, True) and (dropout.low, dropout.log) == (0.0, False)
    assert width.choices == ("8", "16") and (type(heads.low), heads.low, heads.high) == (int, 1, 2)
    assert content.choices == ("[]", '["text"]', "null") and loss.choices == ("bce", "cross_entropy")
    changed = with_settings(
        CONFIG, {"content": '["text"]', "norm_first": "true", "learning_rate": 2e-5, "num_heads": 1}
    )
    assert changed == replace(CONFIG, content=("text",), norm_first=True, learning_rate=2e-5, num_heads=1)
    assert norm.choices == ("true", "false")


def test_dotted_names_reach_into_groups():
    space = parse_space(["model.lora_rank=4..8", "llm_layers=2,null"], FinetuneConfig())
    assert with_settings(FinetuneConfig(), {"model.lora_rank": 5, "llm_layers": "null"}).model.lora_rank == 5
    assert point_of(FinetuneConfig(), space) is None
    assert point_of(FinetuneConfig(llm_layers=None), parse_space(["llm_layers=2,null"], FinetuneConfig())) == {
        "llm_layers": "null"
    }


@pytest.mark.parametrize("config", [PretrainConfig, SASRecConfig, FinetuneConfig])
def test_the_first_trial_of_every_default_space_has_the_default_settings(config):
    point = point_of(config(), parse_space(SPACES[config], config()))
    assert with_settings(config(), point) == config()


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        *((word, True) for word in ("a..b", "1..2:log", "1,2", "[],[a]", "null,1")),
        *((word, False) for word in ("1", "[1,2]", "../models/llm", "[", "..", "a b")),
    ],
)
def test_one_value_is_no_dimension(word, expected):
    assert is_dimension(word) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "SPACE must be of at least one setting, got none"),
        (["learning_rate"], r"SPACE must be NAME=LOW..HIGH\[:log\] or NAME=VALUE,VALUE,..., got 'learning_rate'"),
        (["learnig_rate=1..2"], "unknown setting 'learnig_rate'; did you mean 'learning_rate'"),
        (["dropout=0..0.5", "dropout=0.1,0.2"], "dropout must be given once, got it twice"),
        (["monitor=[a@1],[b@1]"], "monitor must be the same for all trials"),
        (["seed=1,2"], "seed must be the same for all trials"),
        (["dropout=0.5..0.1"], r"dropout must have LOW < HIGH, got '0.5..0.1'"),
        (["dropout=0..0.5:log"], "dropout must have LOW > 0 with :log"),
        (["dropout=0..0.5:lgo"], r"dropout must be LOW..HIGH or LOW..HIGH:log of numbers, got '0..0.5:lgo'"),
        (["dropout=0.."], "dropout must be LOW..HIGH or LOW..HIGH:log of numbers"),
        (["dropout=0..nan"], "dropout must be LOW..HIGH or LOW..HIGH:log of numbers"),
        (["num_layers=1..2.5"], "num_layers must be LOW..HIGH or LOW..HIGH:log of whole numbers"),
        (["norm_first=0..1"], "norm_first must be VALUE,VALUE,... as it is no number"),
        (["num_layers=1,1"], "num_layers must have different values"),
        (["num_layers=1"], "num_layers must have two values or more, or be LOW..HIGH"),
        (["dropout=[,1"], "dropout must be VALUE,VALUE,... in YAML"),
        (["dropout=0.1..1.5"], r"dropout must be in \[0, 1\), got 1.5"),
        (["num_layers=1,two"], "num_layers must be an integer, got 'two'"),
        (["dropout.x=0..1"], "setting dropout has no parts, got 'dropout.x'"),
    ],
)
def test_what_is_wrong_with_a_space_is_named(words, message):
    with pytest.raises(ValueError, match=message):
        parse_space(words, CONFIG)


def test_search_keeps_the_best_by_validation_alone(whole, small_dataset):
    out, found = whole
    trials = found["trials"]
    assert [one["trial"] for one in trials] == list(range(10)) and found["monitor"] == "recall@5"
    first = trials[0]["settings"]
    assert first == {"learning_rate": 1e-3, "embedding_dim": 8, "num_heads": 2}
    finished = [one for one in trials if one["state"] == "finished"]
    best = max(finished, key=lambda one: one["value"])
    assert found["best"] == best["trial"] and best["value"] > trials[0]["value"]
    config = load_config(SASRecConfig, out / "config.yaml")
    assert config == with_settings(CONFIG, best["settings"]) != CONFIG
    assert load_config(SASRecConfig, out / "base.yaml") == CONFIG
    # No trial has test events, so no test can have been looked at.
    for one in trials:
        assert read_test_evaluations(out / one["run"]) == []
    tested = training.train_sasrec(config, small_dataset, out.parent / "final")
    assert tested["valid"]["metrics"]["recall@5"] == best["value"] and tested["test"] is not None


def evaluate_histories():
    from hellm.evaluate import evaluate_histories

    return evaluate_histories


def test_trials_below_the_median_are_given_up_before_their_end(whole):
    given_up = [one for one in whole[1]["trials"] if one["state"] == "given up"]
    assert given_up
    for one in given_up:
        assert 3 <= one["num_validations"] <= 5 and one["why"] == "below the median of the other trials"
    assert min(one["num_validations"] for one in given_up) < 5
    assert all(one["trial"] >= 5 for one in given_up)


def test_search_goes_on_where_it_was(whole, small_dataset, tmp_path):
    out = tmp_path / "cut"
    told = []
    options = {"config": CONFIG, "on_trial": told.append}
    search("sasrec", small_dataset, out, num_trials=4, space=SPACE, **options)
    # The space need not be given again.
    found = search("sasrec", small_dataset, out, num_trials=10, resume=True, **options)
    assert without_time(found) == without_time(whole[1]) and told == found["trials"]
    again = search("sasrec", small_dataset, out, num_trials=3, resume=True, **options)
    assert again == found and len(told) == 10


def test_a_space_that_is_not_given_again_is_that_of_before(small_dataset, tmp_path):
    # The widths that are searched where nothing is named are no multiples of three.
    config = replace(CONFIG, num_heads=3, embedding_dim=6, max_epochs=1)
    with pytest.raises(ValueError, match="embedding_dim must be a multiple of num_heads 3, got 32"):
        search("sasrec", small_dataset, tmp_path / "out", num_trials=1, config=config)
    search("sasrec", small_dataset, tmp_path / "out", num_trials=1, space=["dropout=0.1..0.5"], config=config)
    found = search("sasrec", small_dataset, tmp_path / "out", num_trials=2, config=config, resume=True)
    assert [list(one["settings"]) for one in found["trials"]] == [["dropout"], ["dropout"]]


def test_an_interrupted_trial_goes_on(whole, small_dataset, tmp_path, monkeypatch):
    original, steps = training.sasrec_losses, []

    def interrupting(*args):
        steps.append(args)
        if len(steps) in (7, 20, 33):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(training, "sasrec_losses", interrupting)
    out, options = tmp_path / "cut", {"num_trials": 10, "space": SPACE, "config": CONFIG, "resume": True}
    for _ in range(3):
        with pytest.raises(Interrupted):
            search("sasrec", small_dataset, out, **options)
    found = search("sasrec", small_dataset, out, **options)
    assert without_time(found) == without_time(whole[1])


def test_settings_that_do_not_go_together_and_losses_that_are_none_cost_a_trial(small_dataset, tmp_path, monkeypatch):
    original = training.sasrec_losses

    def diverging(model, *args):
        terms = original(model, *args)
        return {name: term * float("nan") for name, term in terms.items()} if model.items().shape[1] == 8 else terms

    monkeypatch.setattr(training, "sasrec_losses", diverging)
    config = replace(CONFIG, max_epochs=1, num_heads=1, embedding_dim=6)
    space = ["num_heads=1,3", "embedding_dim=6,8"]
    found = search("sasrec", small_dataset, tmp_path / "out", num_trials=9, space=space, config=config)
    failed = [one for one in found["trials"] if one["state"] == "failed"]
    why = [(one["settings"]["num_heads"] == 3, one["why"]) for one in failed]
    assert {one["settings"]["embedding_dim"] for one in failed} == {8}
    assert (True, "embedding_dim must be a multiple of num_heads 3, got 8") in why
    assert any(not three and text.startswith("cross_entropy became nan in epoch 0") for three, text in why)
    assert found["trials"][found["best"]]["settings"]["embedding_dim"] == 6


def test_a_resumed_search_keeps_what_it_was_started_with(whole, small_dataset):
    out, _ = whole

    def fails(match, dataset=small_dataset, config=CONFIG, space=None):
        with pytest.raises(ValueError, match=match):
            search("sasrec", dataset, out, num_trials=11, space=space, config=config, resume=True)

    fails(
        r"a resumed search must keep its settings, was dropout 0\.5, got dropout 0\.1",
        config=replace(CONFIG, dropout=0.1),
    )
    fails("a resumed search must keep its space", space=SPACE[:2])
    fails("a resumed search must keep its data", dataset=small_dataset.with_permuted_content())
    free = replace(CONFIG, num_threads=None, eval_batch_size=7)
    assert search("sasrec", small_dataset, out, num_trials=1, config=free, resume=True)["best"] is not None


def test_mistakes_show_before_anything_is_trained(small_dataset, tmp_path):
    def fails(match, stage="sasrec", dataset=small_dataset, kind=ValueError, **options):
        options = {"num_trials": 2, "space": SPACE, "config": CONFIG} | options
        with pytest.raises(kind, match=match):
            search(stage, dataset, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    fails("stage must be one of pretrain, sasrec, finetune, got 'sasrek'", stage="sasrek")
    fails("num_trials must be >= 1, got 0", num_trials=0)
    fails("content must be among the features and attributes of data set 'blocks'", space=["content=[text],[sound]"])
    fails("unknown setting 'depth'", space=["depth=1..2"])
    bare = small_dataset.of_events(small_dataset.split != 1)
    fails("must have validation events to choose by, got none", dataset=bare)


def test_one_process_at_a_time_and_nothing_foreign_is_replaced(whole, small_dataset, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(FileExistsError, match=r"holds no \.hellm\.json"):
        search("sasrec", small_dataset, tmp_path / "mine", num_trials=1, space=SPACE, config=CONFIG, overwrite=True)
    with pytest.raises(FileExistsError, match="is not empty"):
        search("sasrec", small_dataset, whole[0], num_trials=1, space=SPACE, config=CONFIG)
    import threading

    errors = []

    def other():
        try:
            search("sasrec", small_dataset, whole[0], num_trials=1, space=SPACE, config=CONFIG, resume=True)
        except FolderInUseError as error:
            errors.append(error)

    with hold(whole[0]):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(errors) == 1


def test_the_data_without_events_keep_everything_else(small_dataset):
    fewer = small_dataset.of_events(small_dataset.split != 2)
    assert not (fewer.split == 2).any() and fewer.num_events == 5 * 60
    assert fewer.fingerprints["item features"] == small_dataset.fingerprints["item features"]
    assert np.array_equal(fewer.pairs("train"), small_dataset.pairs("train"))

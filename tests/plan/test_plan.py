"""The model of cost against what it is a model of, and plans from samples."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from hellm.cli import main
from hellm.config import PretrainConfig, RunConfig, SASRecConfig, override_config
from hellm.data import load_dataset
from hellm.plan import STAGES, Rates, Sizes, plan, planning
from hellm.plan.model import (
    cost,
    fitted,
    neighbour_products,
    num_steps,
    sent_by_columns,
    sent_by_shards,
    sent_bytes,
)
from hellm.plan.sample import measured_stages
from hellm.plan.shop import write_shop
from hellm.training.pretrain import build_encoder, build_sampler
from hellm.training.sasrec import build_sequence_sampler

CONFIG = RunConfig(language_model=False)
SIZES = [Sizes(events, events / 10, items) for events in (20_000, 80_000) for items in (500, 4_000)]
COUNTS = [one.terms(CONFIG) for one in SIZES]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    write_shop(folder / "shop", 4_000, 400, 60)
    return load_dataset(folder / "shop")


class TestModel:
    def test_rates_are_found_again(self):
        rates = {"1": 3.0, "events": 2e-5, "items": 1e-4, "lists": 4e-9}
        values = [cost(rates, one) for one in COUNTS]
        assert fitted(list(rates), COUNTS, values) == pytest.approx(rates)

    def test_no_rate_is_negative(self):
        """Where a quantity falls with a term, the term is left out and the others say the best there is."""
        values = [5.0 - size.events / 1e5 for size in SIZES]
        rates = fitted(("1", "events", "items"), COUNTS, values)
        assert rates["events"] == rates["items"] == 0 and 4 < rates["1"] < 5
        noise = np.random.default_rng(0).uniform(0.9, 1.1, len(SIZES))
        assert min(fitted(("1", "events", "items", "lists"), COUNTS, noise.tolist()).values()) >= 0

    @pytest.mark.parametrize("sampler", ["user-uniform", "interaction-uniform"])
    @pytest.mark.parametrize("batch_size", [64, 1024])
    def test_steps_of_stage_1_are_those_of_the_sampler(self, shop, sampler, batch_size):
        config = RunConfig(pretrain=PretrainConfig(sampler=sampler, batch_size=batch_size))
        sizes = Sizes(shop.num_events, shop.num_users, shop.num_items)
        expected = build_sampler(config.pretrain, shop).num_steps
        assert num_steps("stage1", config, sizes) == pytest.approx(expected, rel=0.1, abs=1)

    def test_steps_of_the_sequence_model_are_those_of_the_sampler(self, shop):
        config = RunConfig(sasrec=SASRecConfig(batch_size=128))
        sizes = Sizes(shop.num_events, shop.num_users, shop.num_items)
        expected = build_sequence_sampler(config.sasrec, shop).num_steps
        assert num_steps("sequence", config, sizes) == pytest.approx(expected, rel=0.1, abs=1)

    def test_what_is_sent_is_that_of_a_ring(self):
        assert sent_bytes(1000, 5, 1) == 0
        assert sent_bytes(1000, 5, 4) == 5 * 4000 * 2 * 3 / 4
        assert sent_by_shards(100, 60, 10, 1) == 0
        assert sent_by_shards(100, 60, 10, 4) == 4 * (100 + 3 * 60 + 2 * 10) * 3 / 4

    def test_who_shares_columns_sends_the_rows_that_a_loss_reads(self):
        config = PretrainConfig(batch_size=100)
        assert sent_by_columns(config, 1e6, 1e5, 1) == 0
        # All users and items in both views and 3 rows of a triple, there and twice back; the lengths of two views.
        whole = 3 * 64 * (2 * 1.1e6 + 300) + 4 * 1.1e6
        assert sent_by_columns(config, 1e6, 1e5, 2) == pytest.approx(4 / 2 * whole)
        drawn = replace(config, contrastive_rows=64, contrastive_keys=1000)
        assert sent_by_columns(drawn, 1e6, 1e5, 2) == pytest.approx(4 / 2 * (3 * 64 * (4000 + 300) + 4 * 1.1e6))

    @pytest.mark.parametrize("settings", [[], ["model.item_hypergraph=false"], ["model.user_hypergraph=false"]])
    def test_a_backbone_that_mixes_columns_sends_gradients(self, shop, settings):
        config = override_config(PretrainConfig(), ["model.backbone=ngcf", *settings])
        model = build_encoder(config, shop)
        parameters = sum(one.numel() for one in model.parameters())
        assert sent_by_columns(config, shop.num_users, shop.num_items, 2) == 4 * parameters

    def test_an_approximate_search_grows_more_slowly(self):
        model = replace(PretrainConfig().model, knn_search="approximate")
        approximate = RunConfig(pretrain=PretrainConfig(model=model))
        one, ten = Sizes(1, 1, 1e6), Sizes(1, 1, 1e7)
        assert neighbour_products(RunConfig(), ten, 8) == 100 * neighbour_products(RunConfig(), one, 8)
        assert neighbour_products(approximate, ten, 8) < 12 * neighbour_products(approximate, one, 8)


def test_a_shop_has_the_sizes_that_are_asked_for(tmp_path, shop):
    assert (shop.num_events, shop.num_users) == (4_000, 400) and shop.num_items <= 60
    for suffix in ("parquet", "csv"):
        write_shop(tmp_path / suffix, 1_000, 300, 20, suffix=suffix)
        data = load_dataset(tmp_path / suffix, features="none")
        assert (data.num_events, data.num_users) == (1_000, 300)


RATES = {
    "rest": {"1": 4.0, "events": 1e-5, "items": 1e-4, "lists": 1e-8},
    "step": {"1": 0.05, "events": 1e-6, "items": 1e-5},
    "validation": {"1": 0.1, "events": 1e-6, "lists": 1e-8},
    "peak": {"1": 4e8, "events": 300.0, "items": 2000.0},
    "disk": {"1": 1e5, "events": 50.0, "items": 700.0},
    "parameters": {"events": 12.8, "items": 128.0},
}


@pytest.fixture
def made_up(monkeypatch):
    """Samples whose costs are those of `RATES`; returns the sizes that were asked for."""
    asked = []

    def measured(sizes, stages, config, folder, *, widths=None, processor_time=False):
        folder.mkdir()
        asked.append((sizes, tuple(stages), widths))
        return {
            name: {quantity: cost(RATES[quantity], sizes.terms(config)) for quantity in RATES} | {"seconds": 1.0}
            for name in stages
        }

    monkeypatch.setattr(planning, "measured_stages", measured)
    monkeypatch.setattr(planning, "neighbour_rate", lambda width, **_: 1e-13)
    return asked


class TestPlan:
    def test_what_the_rates_say_of_larger_data(self, made_up, tmp_path):
        config = RunConfig(language_model=False, pretrain=PretrainConfig(max_epochs=7, validate_every=2))
        sizes = Sizes(1e8, 1e7, 1e6)
        planned = plan(sizes, config, processes=4, folder=tmp_path)
        assert list(planned["stages"]) == [name for name in STAGES if name != "llm"]
        stage_1 = planned["stages"]["stage1"]
        steps = int(1e8 - 2e7) // 1024 + 1
        assert stage_1["steps_per_epoch"] == steps
        epoch = steps * cost(RATES["step"], sizes.terms(CONFIG))
        assert stage_1["seconds_per_epoch"] == pytest.approx(epoch, rel=1e-3)
        expected = (
            cost(RATES["rest"], sizes.terms(CONFIG))
            + 7 * epoch
            + 4 * cost(RATES["validation"], sizes.terms(CONFIG))
            + 1e-13 * 1e12 * 512
        )
        assert stage_1["seconds"] == pytest.approx(expected, rel=1e-2)
        assert stage_1["peak_bytes"] == pytest.approx(cost(RATES["peak"], sizes.terms(CONFIG)), rel=1e-3)
        sent = sent_by_columns(CONFIG.pretrain, sizes.users, sizes.items, 4)
        assert stage_1["sent_bytes"] == pytest.approx(7 * steps * sent, rel=1e-3)
        assert planned["stages"]["batch"]["steps_per_epoch"] == 0
        assert planned["seconds"] == sum(one["seconds"] for one in planned["stages"].values())
        assert not list(tmp_path.iterdir())

    def test_samples_have_the_users_of_the_data(self, made_up):
        plan(Sizes(1e9, 1e8, 1e7), RunConfig(), ["data", "sequence"])
        assert {sizes.events / sizes.users for sizes, _, _ in made_up} == {10}
        assert [stages for _, stages, _ in made_up] == [("data",)] * 4 + [("data", "sequence")] * 4

    def test_a_language_model_is_sampled_on_fewer_events_and_slows_what_reads_it(self, made_up):
        sizes = Sizes(1e6, 1e5, 1e4)
        without, with_llm = (plan(sizes, RunConfig(language_model=given))["stages"] for given in (False, True))
        assert max(one.events for one, stages, _ in made_up if "llm" in stages) < 10_000
        more = cost(RATES["validation"], sizes.terms(CONFIG))
        # A fourth tower reads the histories too.
        slower = with_llm["batch"]["seconds"] - without["batch"]["seconds"]
        assert more < slower < more + RATES["rest"]["events"] * sizes.events
        assert with_llm["fusion"]["seconds"] - without["fusion"]["seconds"] == pytest.approx(3 * more, rel=0.05)

    def test_batch_scoring_is_planned_for_all_towers_unless_it_is_known_which_are_kept(self, made_up):
        sizes, rates = Sizes(1e6, 1e5, 1e4), Rates.measured(10, RunConfig(language_model=False))
        seconds = {kept: rates.plan(sizes, kept=kept)["stages"]["batch"]["seconds"] for kept in (None, 1, 3)}
        assert seconds[None] == seconds[3]
        read = rates.rates["batch"]["rest"]["read"] * sizes.events
        assert read > 0 and seconds[3] - seconds[1] == pytest.approx(2 * read)

    def test_who_shares_out_a_language_model_sends_its_weights(self, made_up, monkeypatch):
        """As `benchmarks.traffic` counts a step, whose every weight is gathered and whose gradients are reduced."""
        sizes, settings = Sizes(1e6, 1e5, 1e4), ["finetune.sharded=true", "finetune.max_epochs=2"]
        monkeypatch.setitem(RATES, "weights", {"1": 1e8, "items": 192.0})
        monkeypatch.setitem(RATES, "layers", {"1": 6e7})
        for accumulate in (1, 4):
            config = override_config(RunConfig(), [*settings, f"finetune.accumulate={accumulate}"])
            planned = plan(sizes, config, ["llm"], processes=4)["stages"]["llm"]
            steps, updates = 2 * planned["steps_per_epoch"], 2 * -(-planned["steps_per_epoch"] // accumulate)
            trained = cost(RATES["parameters"], {"events": 0, "items": 1e4})
            gathered = sent_by_shards(1e8 + 192 * 1e4, 6e7, 0, 4)
            assert sent_by_shards(1e8 + 192 * 1e4, 6e7, trained, 4) == gathered + sent_by_shards(0, 0, trained, 4)
            expected = steps * gathered + updates * sent_by_shards(0, 0, trained, 4)
            assert planned["sent_bytes"] == pytest.approx(expected, rel=1e-3)
        whole = plan(sizes, RunConfig(finetune=replace(config.finetune, sharded=False)), ["llm"], processes=4)
        assert whole["stages"]["llm"]["sent_bytes"] < planned["sent_bytes"] / 100
        assert plan(sizes, config, ["llm"])["stages"]["llm"]["sent_bytes"] == 0

    def test_sampled_neighbours_are_noted(self, made_up):
        keys = ["pretrain.contrastive_rows=64", "pretrain.contrastive_keys=64"]
        config = override_config(RunConfig(), [*keys, "pretrain.sampled_neighbours=8"])
        sizes = Sizes(1e6, 1e5, 1e4)
        alone, several = (plan(sizes, config, ["stage1"], processes=count) for count in (1, 2))
        assert any("its time is an upper limit" in note for note in alone["notes"])
        assert several["stages"]["stage1"]["sent_bytes"] == 0
        assert "with sampled_neighbours stage 1 trains in one process" in several["notes"]
        for without in (plan(sizes, RunConfig(), ["stage1"]), plan(sizes, config, ["sequence"])):
            assert not any("sampled_neighbours" in note for note in without["notes"])

    def test_a_stage_that_fails_is_told(self, monkeypatch, made_up):
        monkeypatch.setattr(
            planning, "measured_stages", lambda sizes, stages, config, folder, **_: folder.mkdir() or {
                name: {"failure": f"hellm {name}: it broke"} for name in stages
            }
        )  # fmt: skip
        with pytest.raises(RuntimeError, match="hellm data: it broke"):
            plan(Sizes(1e6, 1e5, 1e4), RunConfig(), ["data"])

    @pytest.mark.parametrize(
        ("sizes", "stages", "message"),
        [
            (Sizes(100, 0, 5), None, r"users must be >= 1, got 0"),
            (Sizes(100, 50, 5), None, r"events must be at least three for each user.*got 100 of 50 users"),
            (Sizes(1e6, 1e5, 5), ["stage2"], r"stages must be among data, stage1, .*, got 'stage2'"),
        ],
    )
    def test_sizes_and_stages_that_cannot_be(self, made_up, sizes, stages, message):
        with pytest.raises(ValueError, match=message):
            plan(sizes, RunConfig(), stages)


class TestCommand:
    def test_of_sizes(self, made_up, capsys):
        argv = ["plan", "--events", "1e9", "--users", "1e8", "--items", "1e7", "--stages", "data", "stage1"]
        assert main([*argv, "--processes", "8", "pretrain.max_epochs=2", "--json"]) == 0
        planned = json.loads(capsys.readouterr().out)
        assert planned["sizes"]["items"] == 1e7 and set(planned["stages"]) == {"data", "stage1"}
        assert planned["stages"]["stage1"]["sent_bytes"] > 0
        assert main(argv) == 0
        out = capsys.readouterr().out
        assert "1,000,000,000 events, 100,000,000 users, 10,000,000 items" in out
        assert "this machine has" in out and "A model, whose rates were measured here" in out

    def test_of_a_data_set(self, made_up, capsys, tmp_path):
        write_shop(tmp_path / "shop", 4_000, 400, 60)
        assert main(["plan", str(tmp_path / "shop"), "--stages", "data", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["sizes"]["events"] == 4_000
        assert made_up[0][2] == {"text": 512}

    def test_what_is_missing_is_named(self, fails):
        fails("plan", "--events", "1e6", match="missing: --users")
        argv = ["plan", "--events", "1e6", "--users", "1e5", "--items", "10", "--processes", "0"]
        fails(*argv, match="--processes must be >= 1, got 0")


def test_commands_are_timed_on_a_shop(tmp_path):
    """The real thing, as small as it can be."""
    config = RunConfig(pretrain=PretrainConfig(batch_size=256))
    sizes = Sizes(1_500, 150, 80)
    found = measured_stages(sizes, ["data", "stage1"], config, tmp_path / "sample", widths={"look": 7})
    stage_1 = found["stage1"]
    assert found["data"]["rest"] == found["data"]["seconds"] > 0
    steps = num_steps("stage1", config, sizes)
    assert stage_1["seconds"] == pytest.approx(stage_1["rest"] + steps * stage_1["step"] + stage_1["validation"])
    assert stage_1["peak"] > 1e8 and stage_1["disk"] > stage_1["parameters"] * 4 and stage_1["step"] > 0
    assert load_dataset(tmp_path / "sample" / "data").item_features["look"].values.shape == (80, 7)

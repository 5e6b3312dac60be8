from __future__ import annotations

import json
from dataclasses import replace

import polars as pl
import pytest
from support.datasets import make_blocks

from hellm.artifact.run_directory import RunDirectory, environment, peak_memory_bytes
from hellm.config import PretrainConfig, load_config
from hellm.data import IdMap
from hellm.training.plots import plot_curves


@pytest.fixture
def small_dataset():
    return make_blocks()


def test_new_run_makes_its_folders(tmp_path):
    run = RunDirectory(tmp_path / "runs" / "first")
    assert run.checkpoints.is_dir() and run.read_metrics() == []


def test_existing_run_is_refused_kept_or_replaced(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.write_config(PretrainConfig())
    with pytest.raises(FileExistsError, match=r"run is not empty; resume=True goes on with it, overwrite=True"):
        RunDirectory(tmp_path / "run")
    assert RunDirectory(tmp_path / "run", resume=True).config.is_file()
    assert not RunDirectory(tmp_path / "run", overwrite=True).config.is_file()


def test_overwrite_deletes_nothing_but_runs(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"holds no \.hellm\.json, so hellm did not make it"):
        RunDirectory(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_file_and_contradiction_are_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match=r"file is a file; give another folder"):
        RunDirectory(tmp_path / "file", resume=True)
    with pytest.raises(ValueError, match=r"resume and overwrite must not both be given"):
        RunDirectory(tmp_path / "new", resume=True, overwrite=True)


def test_resumed_run_keeps_its_settings(tmp_path):
    run = RunDirectory(tmp_path / "run")
    assert run.write_config(PretrainConfig(seed=5)) is False
    # Nothing was trained with it yet.
    assert run.write_config(PretrainConfig(seed=1)) is False
    run.last.touch()
    assert run.write_config(PretrainConfig(seed=1)) is False
    assert run.write_config(PretrainConfig(seed=1)) is False
    assert run.write_config(PretrainConfig(seed=1, max_epochs=9), may_change=("max_epochs",)) is True
    assert load_config(PretrainConfig, run.config).max_epochs == 9
    with pytest.raises(ValueError, match=r"a resumed run must keep its settings; seed was 1, got 2"):
        run.write_config(PretrainConfig(seed=2, max_epochs=9))


def test_resumed_run_keeps_its_data(tmp_path, small_dataset):
    run = RunDirectory(tmp_path / "run")
    renamed = replace(small_dataset, item_ids=IdMap(f"x{index}" for index in range(small_dataset.num_items)))
    moved = replace(renamed, split=small_dataset.split[::-1].copy())
    run.check_data(renamed)
    run.check_data(small_dataset, "runs")
    run.last.touch()
    run.check_data(small_dataset, "runs")
    for other, what in (
        (renamed, "item ids"),
        (replace(small_dataset, item_titles=None), "item titles"),
        (moved, "split, item ids"),
        (replace(small_dataset, item_features={}), "item features"),
    ):
        with pytest.raises(ValueError, match=rf"must keep its data, and those given are others: {what}; give what"):
            run.check_data(other, "runs")
    with pytest.raises(ValueError, match=r"must keep its input runs, and those given are others; .*overwrite=True"):
        run.check_data(small_dataset, "x")


def test_resumed_run_of_an_earlier_version_keeps_its_data(tmp_path, small_dataset):
    run = RunDirectory(tmp_path / "run")
    run.last.touch()
    note = run.checkpoints / "data.json"
    note.write_text(json.dumps({"fingerprint": small_dataset.fingerprint}))
    run.check_data(small_dataset)
    note.write_text(json.dumps({"fingerprint": small_dataset.fingerprint}))
    other = replace(small_dataset, split=small_dataset.split[::-1].copy())
    with pytest.raises(ValueError, match=r"those given are others: events, split or item features"):
        run.check_data(other)
    # Once it is finished, its ids are there to be compared.
    run.write_tables(small_dataset)
    with pytest.raises(ValueError, match=r"those given are others: user ids"):
        run.check_data(replace(small_dataset, user_ids=IdMap(map(str, range(small_dataset.num_users)))))


def test_metrics_survive_a_cut_line_and_are_truncated(tmp_path):
    run = RunDirectory(tmp_path / "run")
    for epoch in range(4):
        run.append_metrics({"epoch": epoch, "loss": 0.1 * epoch})
    with open(run.metrics, "a") as file:
        file.write('{"epoch": 4, "lo')
    assert [record["epoch"] for record in run.read_metrics()] == [0, 1, 2, 3]
    run.truncate_metrics(2)
    assert run.metrics.read_text() == '{"epoch": 0, "loss": 0.0}\n{"epoch": 1, "loss": 0.1}\n'


def test_epochs_without_a_record_are_told_of(tmp_path, caplog):
    run = RunDirectory(tmp_path / "run")
    for epoch in (0, 2):
        run.append_metrics({"epoch": epoch})
    run.append_metrics({"epoch": 3, "step": 5})
    run.truncate_metrics(1)
    assert not caplog.records
    run.append_metrics({"epoch": 3, "step": 5})
    run.truncate_metrics(4, 2)
    assert caplog.messages == [
        f"{run.metrics}: damaged, lacks 3 of 4 epochs, the first of them 1; training goes on from its checkpoint, but "
        "curves and seconds are those of the other epochs"
    ]


def test_ids_name_every_embedding_row(tmp_path, small_dataset):
    run = RunDirectory(tmp_path / "run")
    run.write_tables(small_dataset)
    table = pl.read_parquet(run.ids)
    users, items = (table.filter(side=side) for side in ("user", "item"))
    assert users["id"].to_list() == small_dataset.user_ids.ids
    assert items["id"].to_list() == small_dataset.item_ids.ids
    assert items["index"].to_list() == list(range(small_dataset.num_items))
    assert items["title"][0] == small_dataset.item_titles[0] and items["title"][1] is None
    assert users["title"].null_count() == small_dataset.num_users


def test_environment_and_memory():
    assert {"hellm", "torch", "numpy", "python", "device"} <= set(environment("cpu"))
    assert peak_memory_bytes("cpu")["host"] > 50e6


def test_curves_are_a_readable_picture(tmp_path):
    records = [
        {"epoch": e, "loss": 9.0 / (e + 1), "loss_mean": 1 / (e + 1), "valid_recall@20": 0.1 * e} for e in range(4)
    ]
    plot_curves(records, tmp_path / "curves.png", metrics=["recall@20"], best_epoch=3, title="shop")
    from PIL import Image

    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG" and image.width >= 1000
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 20)) > 10

"""Lists of many users in one file: those of `Recommender.recommend`, whatever interrupts the work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from support.command_line import last_json
from support.planted_runs import DATA, MODELS, make_run

import hellm.recommend.batch
from hellm._folders import FolderInUseError, hold
from hellm.artifact.run_hash import run_hash
from hellm.data import DataError
from hellm.recommend import Recommender
from hellm.recommend.batch import batch, read_metadata

pytestmark = pytest.mark.usefixtures("same_threads")
PART = 8


@pytest.fixture(scope="module", params=MODELS)
def any_run(request, tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs"), request.param)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), "graph")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(hellm.recommend.batch, "_PART", PART)


def rows(answers, labels=None) -> list[tuple]:
    labels = labels or [one.user for one in answers]
    return [
        (label, one.basis, [item.item for item in one], [item.score for item in one])
        for label, one in zip(labels, answers, strict=True)
    ]


class TestLists:
    def test_all_users_get_the_lists_of_the_recommender(self, any_run, tmp_path, monkeypatch):
        """As it is called with a part at a time, and as one call where parts are whole blocks of a call."""
        report = batch(any_run, tmp_path / "lists.parquet", k=4)
        recommender = Recommender.load(any_run)
        users = recommender.user_ids.ids
        parts = [recommender.recommend(users[start : start + PART], k=4) for start in range(0, len(users), PART)]
        found = pl.read_parquet(tmp_path / "lists.parquet")
        assert found.rows() == rows([one for part in parts for one in part])
        assert found.schema == {
            "user": pl.String,
            "basis": pl.String,
            "items": pl.List(pl.String),
            "scores": pl.List(pl.Float32),
        }
        assert report["lists"] == len(users) == sum(report["basis"].values())
        assert report["basis"]["popularity"] == 1
        monkeypatch.undo()
        batch(any_run, tmp_path / "lists.parquet", k=4, overwrite=True)
        assert pl.read_parquet(tmp_path / "lists.parquet").rows() == rows(recommender.recommend(users, k=4))

    def test_parts_are_whole_blocks_of_what_is_scored_at_once(self, monkeypatch):
        monkeypatch.undo()
        assert hellm.recommend.batch._PART % hellm.recommend.recommender._BATCH == 0

    def test_seen_items_candidates_and_excluded_ones(self, run, tmp_path):
        recommender = Recommender.load(run)
        stock, sold_out = [f"p{row}" for row in range(9)], ["p3", "p4", "gone"]
        options = {"k": 9, "exclude_seen": False}
        report = batch(run, tmp_path / "lists.parquet", candidates=[*stock, "new"], exclude=sold_out, **options)
        left = [item for item in stock if item not in sold_out]
        expected = [
            one
            for start in range(0, DATA.num_users, PART)
            for one in recommender.recommend(recommender.user_ids.ids[start : start + PART], candidates=left, **options)
        ]
        assert pl.read_parquet(tmp_path / "lists.parquet").rows() == rows(expected)
        assert {len(one) for one in expected} == {7} and report["unknown_candidates"] == 2

    def test_metadata_names_version_run_and_request(self, run, tmp_path):
        report = batch(run, tmp_path / "lists.parquet", k=3)
        about = read_metadata(tmp_path / "lists.parquet")
        assert about["hellm"] == hellm.__version__ and about["run"] == report["run"] == run_hash(run)
        assert about["request"] | {"k": 3, "exclude_seen": True, "users": "all"} == about["request"]
        assert about["lists"] == DATA.num_users

    def test_there_is_a_row_group_for_each_part(self, run, tmp_path):
        parquet = pytest.importorskip("pyarrow.parquet")
        batch(run, tmp_path / "lists.parquet", k=3)
        file = parquet.ParquetFile(tmp_path / "lists.parquet")
        assert file.num_row_groups == -(-DATA.num_users // PART)
        assert file.metadata.row_group(0).num_rows == PART

    def test_other_tables_are_refused(self, tmp_path):
        pl.DataFrame({"user": ["a"]}).write_parquet(tmp_path / "other.parquet")
        with pytest.raises(DataError, match=r"other\.parquet: must be a file that hellm batch wrote"):
            read_metadata(tmp_path / "other.parquet")


class TestUsersFile:
    @pytest.mark.parametrize("name", ["users.txt", "users.parquet", "users.jsonl"])
    def test_users_of_a_file_in_its_order(self, run, tmp_path, name):
        users, file = ["u5", "nobody", "u2", "u5"], tmp_path / name
        if name == "users.parquet":
            pl.DataFrame({"user": users}).write_parquet(file)
        else:
            lines = [json.dumps({"user": one}) if name == "users.jsonl" else f" {one} " for one in users]
            file.write_text("\n\n".join(lines) + "\n")
        report = batch(run, tmp_path / "lists.parquet", file, k=3)
        recommender = Recommender.load(run)
        known = iter(recommender.recommend(["u5", "u2", "u5"], k=3))
        popular = recommender.recommend(histories=[[]], k=3)[0]
        expected = [popular if user == "nobody" else next(known) for user in users]
        assert pl.read_parquet(tmp_path / "lists.parquet").rows() == rows(expected, users)
        assert report["unknown_users"] == 1 and report["basis"] == {"popularity": 1, "user": 3}

    @pytest.mark.parametrize("form", ["parquet", "labelled parquet", "jsonl", "lists"])
    def test_histories_of_a_file(self, any_run, tmp_path, form):
        draw = np.random.default_rng(0)
        histories = [[f"p{item}" for item in draw.integers(0, DATA.num_items, size)] for size in range(2 * PART + 1)]
        labels = [f"visitor {place}" for place in range(len(histories))] if "labelled" in form else None
        given = [[*history[:1], "gone", *history[1:]] for history in histories]
        file = tmp_path / f"asked.{'parquet' if 'parquet' in form else 'jsonl'}"
        if "parquet" in form:
            pl.DataFrame({"history": given} | ({"user": labels} if labels else {})).write_parquet(file)
        else:
            values = [{"history": one} for one in given] if form == "jsonl" else given
            file.write_text("".join(json.dumps(value) + "\n" for value in values))
        report = batch(any_run, tmp_path / "lists.parquet", file, k=3)
        recommender = Recommender.load(any_run)
        expected = [
            one
            for start in range(0, len(histories), PART)
            for one in recommender.recommend(histories=histories[start : start + PART], k=3)
        ]
        assert pl.read_parquet(tmp_path / "lists.parquet").rows() == rows(expected, labels)
        assert report["unknown_items"] == len(histories) and report["basis"]["popularity"] == 1

    def test_no_users_are_an_empty_table(self, run, tmp_path):
        (tmp_path / "none.txt").write_text("\n")
        assert batch(run, tmp_path / "lists.parquet", tmp_path / "none.txt")["lists"] == 0
        assert len(pl.read_parquet(tmp_path / "lists.parquet")) == 0
        assert read_metadata(tmp_path / "lists.parquet")["lists"] == 0

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.jsonl", "{}\n", r"a\.jsonl: line 1 must be a list of item ids, or an object with user"),
            ("a.jsonl", '["p1"]\n{"user": "u1"}\n', r"line 2 must have history as the lines before, got user"),
            ("a.jsonl", '\n{"history": "p1"}\n', r"line 2 must have a list of item ids as history, got 'p1'"),
            ("a.jsonl", '{"history": [[1]]}\n', r"line 1 must have a list of item ids as history"),
            ("a.jsonl", '{"user": ["u1"]}\n', r"line 1 must have a text as user, got \['u1'\]"),
            ("a.jsonl", "p1\n", r"line 1 must be JSON"),
            ("a.jsonl", b"\xff\n", r"a\.jsonl: must be text in UTF-8"),
            ("a.txt", b"\xff\n", r"a\.txt: must be text in UTF-8"),
            ("a.parquet", b"no", r"a\.parquet: damaged"),
            ("a.parquet", {"item": ["p1"]}, r"must have a column user, or a column history .*got item \(String\)"),
            ("a.parquet", {"history": ["p1"]}, r"a column history of lists of item ids, got history \(String\)"),
            ("a.parquet", {"user": ["u1", None]}, r"row 2 must have a user without gaps, got None"),
            ("a.parquet", {"history": [["p1"], ["p2", None]]}, r"row 2 must have a history without gaps"),
        ],
    )
    def test_other_files_are_refused_by_line(self, run, tmp_path, name, content, message):
        file = tmp_path / name
        if isinstance(content, dict):
            pl.DataFrame(content).write_parquet(file)
        else:
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(DataError, match=message):
            batch(run, tmp_path / "lists.parquet", file)
        assert not (tmp_path / "lists.parquet").exists()

    def test_missing_file_is_named(self, run, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"gone\.txt does not exist: it must be a file of users"):
            batch(run, tmp_path / "lists.parquet", tmp_path / "gone.txt")


class Interrupted(Exception):
    pass


def interrupt(monkeypatch, at: int) -> None:
    """From now on, the list of a part is worked out `at` times, and then the batch ends."""
    answers, calls = hellm.recommend.batch._answers, iter(range(at))

    def stop(*args):
        if next(calls, None) is None:
            raise Interrupted
        return answers(*args)

    monkeypatch.setattr(hellm.recommend.batch, "_answers", stop)


class TestResuming:
    def test_interrupted_batch_goes_on_where_it_stopped(self, run, tmp_path, monkeypatch):
        batch(run, tmp_path / "whole.parquet", k=3)
        out = tmp_path / "lists.parquet"
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            interrupt(patch, 2)
            batch(run, out, k=3)
        assert not out.exists()
        with pytest.raises(FileExistsError, match=r"lists\.parquet\.parts holds the parts of an unfinished batch"):
            batch(run, out, k=3)
        with monkeypatch.context() as patch:
            interrupt(patch, -(-DATA.num_users // PART) - 2)
            report = batch(run, out, k=3, resume=True)
        assert report["resumed_at"] == 2 * PART and report["lists"] == DATA.num_users
        assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
        assert sorted(one.name for one in tmp_path.iterdir()) == ["lists.parquet", "whole.parquet"]

    def test_finished_batch_stays_as_it_is(self, run, tmp_path, monkeypatch):
        out = tmp_path / "lists.parquet"
        first = batch(run, out, k=3)
        before = out.stat().st_mtime_ns
        interrupt(monkeypatch, 0)
        assert batch(run, out, k=3, resume=True) == first | {"resumed_at": DATA.num_users}
        assert out.stat().st_mtime_ns == before
        with pytest.raises(FileExistsError, match=r"lists\.parquet is there; overwrite=True replaces it"):
            batch(run, out, k=3)
        with pytest.raises(ValueError, match="a resumed batch must keep its run and request; k was 3, got 4"):
            batch(run, out, k=4, resume=True)

    def test_parts_of_another_request_are_not_gone_on_with(self, run, tmp_path, monkeypatch):
        out, other = tmp_path / "lists.parquet", make_run(tmp_path, "sequence")
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            interrupt(patch, 1)
            batch(run, out, k=3)
        (tmp_path / "users.txt").write_text("u1\n")
        for options, name in (
            ({"run": other}, "run"),
            ({"exclude_seen": False}, "exclude_seen"),
            ({"candidates": ["p1", "p2"]}, "candidates"),
            ({"exclude": ["p1"]}, "exclude"),
            ({"users": tmp_path / "users.txt"}, "users"),
        ):
            with pytest.raises(ValueError, match=f"must keep its run and request; {name} was"):
                batch(**({"run": run, "out": out, "k": 3} | options), resume=True)
        assert batch(run, out, k=4, overwrite=True)["resumed_at"] == 0
        assert read_metadata(out)["request"]["k"] == 4

    def test_old_file_stays_until_the_new_one_is_whole(self, run, tmp_path, monkeypatch):
        out = tmp_path / "lists.parquet"
        batch(run, out, k=3)
        before = out.read_bytes()
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            interrupt(patch, 1)
            batch(run, out, k=4, overwrite=True)
        assert out.read_bytes() == before
        assert batch(run, out, k=4, resume=True)["resumed_at"] == PART
        assert read_metadata(out)["request"]["k"] == 4

    def test_killed_batch_goes_on(self, run, tmp_path):
        """A real kill, at the moment when a part has got its name."""
        out = tmp_path / "lists.parquet"
        program = (
            "import os, signal, sys, hellm.recommend.batch as b\n"
            f"b._PART = {PART}\n"
            "answers, calls = b._answers, iter(range(3))\n"
            "def kill(*args):\n"
            "    if next(calls, None) is None: os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return answers(*args)\n"
            "b._answers = kill\n"
            "b.batch(sys.argv[1], sys.argv[2], k=3)\n"
        )
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        killed = subprocess.run([sys.executable, "-c", program, run, out], env=environment, capture_output=True)
        assert killed.returncode == -signal.SIGKILL and not out.exists()
        assert batch(run, out, k=3, resume=True)["resumed_at"] == 3 * PART
        batch(run, tmp_path / "whole.parquet", k=3)
        assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()


class TestTarget:
    def test_only_files_of_batches_are_replaced(self, run, tmp_path):
        out = tmp_path / "lists.parquet"
        pl.DataFrame({"user": ["u1"]}).write_parquet(out)
        with pytest.raises(DataError, match="must be a file that hellm batch wrote"):
            batch(run, out, overwrite=True)
        with pytest.raises(FileExistsError, match="is read, so it is not replaced"):
            batch(run, out, out, overwrite=True)
        with pytest.raises(FileExistsError, match="is a folder; give the name of a parquet file"):
            batch(run, tmp_path)
        (tmp_path / "new.parquet.parts").mkdir()
        (tmp_path / "new.parquet.parts" / "mine").touch()
        with pytest.raises(FileExistsError, match=r"holds no \.hellm\.json"):
            batch(run, tmp_path / "new.parquet", resume=True)

    def test_wrong_requests_leave_nothing(self, run, tmp_path):
        out = tmp_path / "lists.parquet"
        with pytest.raises(ValueError, match=r"k must be in \[1, 18\]"):
            batch(run, out, k=19)
        with pytest.raises(ValueError, match="candidates less exclude must leave at least one of the 18 items"):
            batch(run, out, candidates=["p1"], exclude=["p1"])
        with pytest.raises(ValueError, match="resume and overwrite must not both be given"):
            batch(run, out, resume=True, overwrite=True)
        with pytest.raises(FileNotFoundError, match=r"holds no embeddings\.safetensors"):
            batch(tmp_path, out)
        assert list(tmp_path.iterdir()) == []

    def test_two_batches_do_not_write_one_file(self, run, tmp_path):
        out = tmp_path / "lists.parquet"
        with hold(f"{out}.parts", beside=True):
            program = (
                "import sys; from hellm.recommend.batch import batch\n"
                "try: batch(*sys.argv[1:])\n"
                "except Exception as error: sys.exit(type(error).__name__)"
            )
            environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
            other = subprocess.run([sys.executable, "-c", program, run, out], env=environment, capture_output=True)
        assert other.stderr.decode().strip() == FolderInUseError.__name__


class TestHash:
    def test_hash_is_of_what_answers(self, run, tmp_path):
        copy = Recommender.load(run).save(tmp_path / "copy")
        before = run_hash(copy)
        assert before == run_hash(run) and len(before) == 16
        (copy / "result.json").write_text("{}")
        assert run_hash(copy) == before
        events = pl.read_parquet(copy / "histories.parquet")
        events.reverse().write_parquet(copy / "histories.parquet")
        assert run_hash(copy) != before

    def test_towers_count(self, tmp_path):
        fused = make_run(tmp_path, "fused")
        before = run_hash(fused)
        tower = fused / "towers" / "sequence" / "embeddings.safetensors"
        tower.write_bytes(tower.read_bytes()[:-1] + b"\1")
        assert run_hash(fused) != before


class TestCommand:
    def test_command_writes_and_counts(self, run, tmp_path, call):
        out = tmp_path / "lists.parquet"
        (tmp_path / "users.txt").write_text("u1\nnobody\n")
        (tmp_path / "sold_out.txt").write_text("p1\np2\n")
        argv = ["batch", run, "--out", out, "--users", tmp_path / "users.txt", "-k", 4]
        code, printed, err = call(*argv, "--exclude", tmp_path / "sold_out.txt", "--json")
        assert code == 0 and "1 users are not known to the run and got the most popular items" in err
        report = last_json(printed)
        assert report["lists"] == 2 and report["unknown_users"] == 1
        assert not {"p1", "p2"} & set(pl.read_parquet(out)["items"].explode())
        code, _, err = call(*argv)
        assert code == 2 and "--overwrite replaces it" in err
        code, printed, _ = call(*argv, "--overwrite")
        assert code == 0 and "2 lists (1 by popularity, 1 by user)" in printed
        assert call("batch", run, "--out", out, "-k", 0)[2] == "hellm: error: -k must be >= 1, got 0\n"

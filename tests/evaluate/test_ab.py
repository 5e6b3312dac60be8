"""Experiments: who is in which arm, and what the arms are worth."""

from __future__ import annotations

from collections import Counter

import numpy as np
import polars as pl
import pytest
from support.command_line import last_json

from hellm._files import DataError
from hellm.evaluate.ab import arm_of, compare_arms, read_exposures, write_exposures

DAY = 86400.0
ARMS = {"new": 1.0, "old": 3.0}


def exposure(user: str, arm: str, time: float = 0.0, items=("p1", "p2"), propensity: float = 0.5) -> dict:
    names = ("user", "experiment", "arm", "propensity", "time", "items")
    return dict(zip(names, (user, "lamps", arm, propensity, time, list(items)), strict=True))


def events(*rows: tuple[str, str, float]) -> pl.DataFrame:
    return pl.DataFrame(list(rows), schema={"user": pl.String, "item": pl.String, "time": pl.Float64}, orient="row")


def table(*rows: dict) -> pl.DataFrame:
    return pl.DataFrame(list(rows))


class TestArms:
    def test_users_stay_in_their_arm(self):
        users = [f"user {number}" for number in range(4000)]
        arms = [arm_of(user, "lamps", ARMS) for user in users]
        assert arms == [arm_of(user, "lamps", ARMS) for user in users]
        # As sha256sum says of "lamps\0user 0", ...: the quarter of the hashes that begin below 0x40 is "new".
        assert [arm for arm, _ in arms[:8]] == ["old", "old", "new", "old", "old", "new", "old", "old"]
        assert {arm: share for arm, share in arms} == {"new": 0.25, "old": 0.75}
        assert Counter(arm for arm, _ in arms)["new"] / 4000 == pytest.approx(0.25, abs=0.03)

    def test_experiments_divide_users_independently(self):
        users = [str(number) for number in range(4000)]
        both = Counter(
            (arm_of(user, "a", {"x": 1, "y": 1})[0], arm_of(user, "b", {"x": 1, "y": 1})[0]) for user in users
        )
        assert all(count == pytest.approx(1000, abs=120) for count in both.values()) and len(both) == 4

    def test_wrong_arms_are_refused(self):
        with pytest.raises(ValueError, match="arms must be at least one, got none"):
            arm_of("a", "lamps", {})
        for weight in (0, -1, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=r"arms\['x'\] must be finite and > 0"):
                arm_of("a", "lamps", {"x": weight})


class TestFiles:
    def test_exposures_are_read_back_from_a_file_and_a_folder(self, tmp_path):
        write_exposures(tmp_path / "monday.parquet", [exposure("a", "new")])
        write_exposures(tmp_path / "tuesday.parquet", [exposure("b", "old", 5)])
        assert read_exposures(tmp_path / "monday.parquet").rows(named=True) == [exposure("a", "new")]
        assert read_exposures(tmp_path).rows(named=True) == [exposure("a", "new"), exposure("b", "old", 5)]

    def test_other_files_are_refused(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="must be a parquet file of exposures, or a folder with such files"):
            read_exposures(tmp_path)
        pl.DataFrame({"user": ["a"]}).write_parquet(tmp_path / "other.parquet")
        with pytest.raises(DataError, match=r"other\.parquet: must have the columns user, .* lacks experiment, arm"):
            read_exposures(tmp_path)
        (tmp_path / "other.parquet").write_bytes(b"no")
        with pytest.raises(DataError, match=r"other\.parquet: damaged"):
            read_exposures(tmp_path)
        write_exposures(tmp_path / "other.parquet", [exposure("a", "new", propensity=0.0)])
        with pytest.raises(DataError, match=r"propensity must lie in \(0, 1\]"):
            read_exposures(tmp_path)


class TestComparison:
    def test_outcomes_are_counted_after_the_exposure(self):
        shown = table(
            exposure("a", "new", 10), exposure("a", "new", 20), exposure("b", "new", 10), exposure("c", "old", 10)
        )
        done = events(
            ("a", "p1", 5), ("a", "p1", 30), ("a", "p2", 30 + DAY), ("a", "p9", 40), ("b", "p1", 10), ("c", "p9", 50)
        )  # fmt: skip
        values = {
            name: {arm: one["value"] for arm, one in compare_arms(shown, done, outcome=name)["arms"].items()}
            for name in ("converted", "events_on_shown", "events")
        }
        assert values == {
            "converted": {"new": 0.5, "old": 0},
            "events_on_shown": {"new": 1, "old": 0},
            "events": {"new": 1.5, "old": 1},
        }
        within = compare_arms(shown, done, outcome="events_on_shown", days=1)
        assert within["arms"]["new"]["value"] == 0.5
        assert within["arms"]["new"]["exposures"] == 3 and within["arms"]["new"]["users"] == 2

    def test_a_planted_difference_is_found_and_none_is_not(self):
        draw = np.random.default_rng(0)
        rows, done = [], []
        for number in range(4000):
            arm, share = arm_of(str(number), "lamps", ARMS)
            rows.append(exposure(str(number), arm, propensity=share))
            if draw.random() < (0.3 if arm == "new" else 0.2):
                done.append((str(number), "p1", 1.0))
            if draw.random() < 0.5:
                done.append((str(number), "p9", 1.0))
        report = compare_arms(table(*rows), events(*done), control="old")
        found = report["arms"]["new"]["difference"]
        assert found["low"] > 0 and found["low"] < 0.1 < found["high"] and found["high"] - found["low"] < 0.08
        assert report["arms"]["old"]["difference"] is None and not report["paired"]
        assert report["mismatch"] > 0.01 and report["notes"] == []
        assert report["arms"]["new"]["low"] < report["arms"]["new"]["value"] < report["arms"]["new"]["high"]
        nothing = compare_arms(table(*rows), events(*(row for row in done if row[1] == "p9")), outcome="events")
        assert nothing["arms"]["old"]["difference"]["low"] < 0 < nothing["arms"]["old"]["difference"]["high"]

    def test_users_weigh_by_their_propensity(self):
        shown = table(
            exposure("a", "new", propensity=0.25), exposure("b", "new", propensity=0.75), exposure("c", "old")
        )
        report = compare_arms(shown, events(("a", "p1", 1)))
        assert report["arms"]["new"]["value"] == pytest.approx(4 / (4 + 4 / 3))

    def test_users_who_were_in_both_arms_are_paired(self):
        """Users differ much more from each other than the arms do, which pairing takes out."""
        rows, done = [], []
        for number in range(200):
            user = str(number)
            rows += [exposure(user, "new", 0, ["n"]), exposure(user, "old", 0, ["o"])]
            count = number % 20
            done += [(user, "o", 1.0)] * count + [(user, "n", 1.0)] * (count + number % 2)
        report = compare_arms(table(*rows), events(*done), outcome="events_on_shown", control="old")
        found = report["arms"]["new"]["difference"]
        assert report["paired"] and report["mismatch"] is None and report["notes"] == []
        assert found["difference"] == pytest.approx(0.5) and found["high"] - found["low"] < 0.2

    def test_lost_exposures_are_told(self):
        rows = [exposure(str(number), "new" if number % 3 else "old") for number in range(3000)]
        report = compare_arms(table(*rows), events())
        assert (
            report["mismatch"] < 1e-6
            and "the arms have other numbers of users than their probabil" in report["notes"][0]
        )
        rows = [exposure("a", "new"), exposure("b", "new"), exposure("b", "old")]
        assert "users who were in several arms count in each" in compare_arms(table(*rows), events())["notes"][0]

    def test_wrong_questions_are_refused(self):
        shown = table(exposure("a", "new"), exposure("b", "old"))
        with pytest.raises(ValueError, match=r"outcome must be one of converted, .* got 'clicks'"):
            compare_arms(shown, events(), outcome="clicks")
        with pytest.raises(ValueError, match="control must be one of the arms new, old, got 'none'"):
            compare_arms(shown, events(), control="none")
        with pytest.raises(ValueError, match="must be of at least two arms, got new"):
            compare_arms(shown[:1], events())
        with pytest.raises(ValueError, match="must be of one experiment, got lamps, rugs"):
            compare_arms(table(exposure("a", "new"), exposure("b", "old") | {"experiment": "rugs"}), events())


class TestCommand:
    def test_arms_are_printed_with_their_difference(self, tmp_path, call):
        rows = [exposure(f"u{number}", "new" if number % 2 else "old", 100.0) for number in range(100)]
        write_exposures(tmp_path / "exposures.parquet", rows)
        lines = [f"u{number},p1,{200 if number % 4 == 1 else 50}" for number in range(100)]
        (tmp_path / "events.csv").write_text("user,item,timestamp\n" + "\n".join(lines) + "\n")
        argv = ["ab", tmp_path / "exposures.parquet", "--events", tmp_path / "events.csv", "--control", "old"]
        code, out, err = call(*argv)
        assert (code, err) == (0, "")
        assert "experiment lamps, converted" in out and "of independent users" in out and "+0.5000 [" in out
        code, out, _ = call(*argv, "--json")
        report = last_json(out)
        assert report["arms"]["new"]["value"] == 0.5 and report["arms"]["old"]["value"] == 0
        (tmp_path / "events.csv").write_text("user,item\nu1,p1\n")
        code, _, err = call(*argv)
        assert code == 2 and "must have times, as only what follows an exposure counts" in err

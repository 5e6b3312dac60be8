"""The researcher's pages as they come over HTTP, read and walked without scripts."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import threading
import time

import numpy as np
import polars as pl
import pytest
from html_page import Page, check_page, page
from served import same, save_run, serving

from hellm.artifact.test_users import read_test_users
from hellm.cli import main
from hellm.evaluate import paired_gain
from hellm.evaluate.agreement import overlap, rank_biased_overlap
from hellm.recommend import Recommender, ServedFused
from hellm.serve.page import studies
from hellm.serve.page.charts import Interval, Line, interval_chart, line_chart

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def shop(research_runs):
    return research_runs[0]


@pytest.fixture(scope="module")
def runs(research_runs):
    return research_runs[1]


@pytest.fixture(scope="module")
def client(runs, shop, tmp_path_factory, one_thread):
    store = tmp_path_factory.mktemp("store") / "store.sqlite"
    with serving(runs.graph, store, data=shop, source={"compared": runs.plain}) as client:
        yield client


@pytest.fixture(scope="module")
def one(runs):
    return Recommender.load(runs.graph)


@pytest.fixture(scope="module")
def other(runs):
    return Recommender.load(runs.plain)


PAGES = [
    *("/research", "/research/items", "/research/items?q=caf%C3%A9", "/research/items?q=nothing+like+it"),
    *("/research/item?id=i0", "/research/item?id=i5&user=u1", "/research/item?id=i5&user=u1&all=true"),
    *("/research/item?id=i5&modality=colour&name=blue", "/research/item?id=i99", "/research/item"),
    *("/research/users", "/research/users?by=overlap&page=2", "/research/users?by=nothing", "/research/user?id=u1"),
    *("/research/user?id=u99", "/research/slices", "/research/slices?metric=recall%405", "/research/training"),
    *("/research/map", "/research/map?item=i0", "/research/map?item=i99"),
]


@pytest.mark.parametrize("path", PAGES)
def test_a_page_needs_nothing_from_elsewhere_and_runs_no_title(client, path):
    response = client.get(path, headers={"accept": "text/html"})
    assert response.status_code == (404 if "99" in path else 422 if path.endswith(("item", "nothing")) else 200)
    check_page(response)


@pytest.mark.parametrize("path", [one for one in PAGES if "users" not in one])
def test_pages_stand_without_another_run(runs, path, plain_client):
    response = plain_client.get(path, headers={"accept": "text/html"})
    assert response.status_code in (200, 404, 422)
    check_page(response)


@pytest.fixture(scope="module")
def plain_client(tmp_path_factory, one_thread):
    """A run that was never trained, and no other."""
    with serving(save_run(tmp_path_factory.mktemp("run") / "run", "sequence")) as client:
        yield client


def test_titles_are_texts(client):
    for path in ("/research/items", "/research/item?id=i0", "/research/map?item=i0"):
        found = page(client, path)
        assert SCRIPT in found.text and len(found.attributes("script")) == 1


class TestRuns:
    def test_both_are_told_with_their_tests_and_the_paired_difference(self, client, runs):
        found = page(client, "/research")
        assert found.of("h1") == ["Two runs of the same data"]
        results = [json.loads((run / "result.json").read_text())["test"] for run in runs]
        rows = {cells[0]: cells[1:] for cells in table(found)}
        kept = [read_test_users(run)[1] for run in runs]
        for name in ("recall@5", "ndcg@10"):
            for cell, result in zip(rows[name], results, strict=False):
                low, high = result["confidence_intervals"][name]
                assert cell == f"{result['metrics'][name]:.4g} {low:.4g} to {high:.4g}"
            gain = paired_gain(kept[0][name], kept[1][name])
            signed = [f"{value:+.4f}".replace("-", "\N{MINUS SIGN}") for value in gain]
            assert rows[name][2] == f"{signed[0]} {signed[1]} to {signed[2]}"
        assert rows["coverage@5"][:2] == [f"{result['metrics']['coverage@5']:.4g}" for result in results]

    def test_no_difference_of_tests_that_were_not_alike(self, runs, tmp_path):
        other = tmp_path / "other"
        shutil.copytree(runs.plain, other)
        result = json.loads((other / "result.json").read_text())
        result["test"]["protocol"] = "official"
        (other / "result.json").write_text(json.dumps(result))
        with serving(runs.graph, source={"compared": other}) as client:
            found = page(client, "/research")
            assert "Difference" not in found.of("th") and "No paired difference" in found.text
            assert "ndcg@10 of each user" not in page(client, "/research/users").text

    def test_a_run_alone(self, plain_client):
        found = page(plain_client, "/research")
        assert found.of("h1") == ["The run that is served"] and "--compare OTHER" in found.text
        assert "No test is recorded." in found.text and "it is a sequence model" in found.text
        assert "--compare OTHER" in page(plain_client, "/research/users").text
        assert "--compare OTHER" in page(plain_client, "/research/user?id=u1").text


class TestHyperedges:
    def test_three_columns(self, client, one):
        found = page(client, "/research/item?id=i5")
        assert found.of("h2") == ["Item", "Hyperedges", "Members"]
        hyperedges = one.hyperedges("i5")
        links = [to for to in found.attributes("a") if to["href"].startswith("/research/item?id=i5&modality=")]
        assert [re.findall(r"modality=(\w+)&name=(\w+)$", to["href"])[0] for to in links] == [
            (edge.modality, edge.name) for edge in hyperedges
        ]
        assert [to.get("aria-current") for to in links] == ["true"] + [None] * (len(hyperedges) - 1)
        assert [edge.modality for edge in hyperedges[:4]] == [found.of("h3")[1].partition(" ")[0]] * 4
        for edge in hyperedges:
            number = len(edge.members)
            assert f"{number} member{'s' if number > 1 else ''}, weight {edge.weight:.4g}" in found.text
        # The members of the chosen one, with their cosines.
        assert members(found) == [one.item_ids.ids[row] for row in hyperedges[0].members.tolist()]
        assert f"{float(hyperedges[0].similarities[1]):.2f}" in found.text and "this item" in found.text
        last = page(client, links[-1]["href"])
        assert (
            members(last) == [f"i{row}" for row in range(18) if row % 3 == 2] and "Items with colour blue." in last.text
        )

    def test_a_rank_with_and_without(self, client, one):
        for edge in (one.hyperedges("i5")[1], one.hyperedges("i5")[-1]):
            asked = {"id": "i5", "user": "u1", "modality": edge.modality, "name": edge.name}
            found = page(client, "/research/item", params=asked)
            less = one.without_hyperedge(edge.modality, edge.name)
            before, after = (which.rank("i5", user="u1") for which in (one, less))
            said = next(text for text in found.of("p") if text.startswith("Without the"))
            moved = f"keeps rank {before}" if before == after else f"goes from rank {before} to {after}"
            assert f"this item {moved} for u1" in said
            scores = [score(which) for which in (one, less)]
            assert said.endswith(f"its score goes from {scores[0]:.4g} to {scores[1]:.4g}.")
            assert scores[0] != scores[1]
            assert lists(found) == [[item.item for item in which.recommend("u1", k=10)[0]] for which in (one, less)]

    def test_who_has_no_history_is_ranked_by_popularity(self, runs, tmp_path):
        folder = tmp_path / "run"
        shutil.copytree(runs.graph, folder)
        events = pl.read_parquet(folder / "histories.parquet")
        nobody = Recommender.load(folder).user_ids.index("u1")
        events.filter(pl.col("user") != nobody).write_parquet(folder / "histories.parquet")
        with serving(folder) as client:
            found = page(client, "/research/item?id=i5&user=u1")
            assert "there is nothing to go by but popularity, which no hyperedge changes." in found.text

    def test_each_in_turn(self, client, one):
        found = page(client, page(client, "/research/item?id=i5&user=u1").links["Take each away in turn"])
        before = one.rank("i5", user="u1")
        expected = []
        for edge in one.hyperedges("i5"):
            after = one.without_hyperedge(edge.modality, edge.name).rank("i5", user="u1")
            expected.append(f"stays {after}" if after == before else f"{before} → {after}")
        said = [text for text in found.of("span") if text.startswith("without it rank ")]
        assert [text.removeprefix("without it rank ") for text in said] == expected

    def test_what_there_was_no_time_for_is_said(self, client, monkeypatch):
        monkeypatch.setattr(studies, "_SECONDS", -1.0)
        found = page(client, "/research/item?id=i5&user=u1&all=true")
        assert re.search(r"There was no time for \d+ of them", found.text)

    def test_who_is_shown_it(self, client):
        found = page(client, "/research/item?id=i5")
        shown = next(text for text in found.of("p") if text.startswith("Among the first for"))
        user = re.search(r"(u\d+) \(place (\d+)\)", shown)
        answer = same(client.post("/recommend", {"users": [user[1]]}))["lists"][0]["items"]
        assert answer[int(user[2]) - 1]["item"] == "i5"

    def test_what_cannot_be_asked(self, client, plain_client):
        assert "i9" in page(client, "/research/item?id=i99", 404).of("code")
        assert "unknown user 'u99'" in page(client, "/research/item?id=i5&user=u99", 404).text.lower()
        wrong = page(client, "/research/item?id=i5&modality=colour&name=red", 404)
        assert "in no hyperedge 'red' of 'colour'" in wrong.text
        found = page(plain_client, "/research/item?id=i5&user=u1&all=true")
        assert "This run has no item hypergraph: it is a sequence model." in found.text
        assert "Take each away in turn" not in found.links and found.of("h3")[1].startswith("text")

    def test_in_a_sum_the_hypergraph_model_changes(self, one, other, runs, shop, tmp_path):
        towers = {"graph": one.model, "plain": other.model}
        tables = [pl.read_parquet(runs.graph / name) for name in ("ids.parquet", "histories.parquet")]
        fused = Recommender(ServedFused(towers, {"graph": 1.0, "plain": 0.5}), *tables, one.content)
        with serving(fused.save(tmp_path / "sum"), data=shop) as client:
            edge = one.hyperedges("i5")[1]
            asked = {"id": "i5", "user": "u1", "modality": edge.modality, "name": edge.name}
            found = page(client, "/research/item", params=asked)
            less = fused.without_hyperedge(edge.modality, edge.name)
            assert f"for u1; its score goes from {score(fused):.4g} to" in found.text
            assert lists(found)[1] == [item.item for item in less.recommend("u1", k=10)[0]]


class TestUsers:
    @pytest.mark.parametrize(("by", "measure"), [("rank", rank_biased_overlap), ("overlap", overlap)])
    def test_those_most_apart_come_first_with_both_lists(self, client, one, other, by, measure):
        found = page(client, f"/research/users?by={by}")
        assert "36 users that both runs know" in found.text
        users = ids_of(found, "/research/user?id=")
        apart = {}
        for user in one.user_ids.ids:
            both = [[item.item for item in which.recommend(user, k=10)[0]] for which in (one, other)]
            apart[user] = 1 - measure(*both)
            if user in users:
                place = users.index(user)
                assert lists(found)[2 * place : 2 * place + 2] == both
        assert [apart[user] for user in users] == pytest.approx(sorted(apart.values(), reverse=True)[: len(users)])
        assert f"mean {np.mean(list(apart.values())):.2f}" in found.text
        assert len(users) == 5 and page(client, found.links["Next"]).links["Back"].startswith(
            f"/research/users?by={by}&"
        )

    def test_values_are_those_of_the_tests(self, client, runs, one):
        found = page(client, "/research/user?id=u3")
        for name, run in zip(("graph", "plain"), runs, strict=True):
            users, values = read_test_users(run)
            value = values["ndcg@10"][users.tolist().index(one.user_ids.index("u3"))]
            assert f"{name} ndcg@10 {value:.3f}" in found.of("h2")

    def test_one_user(self, client, one, other):
        found = page(client, "/research/user?id=u3")
        assert lists(found) == [[item.item for item in which.recommend("u3", k=10)[0]] for which in (one, other)]
        assert f"{len(one.history('u3'))} events, the last first" in found.text
        assert page(client, "/research/user", params={"id": " u3 "}).of("h1") == ["User u3"]
        assert "u9" in page(client, "/research/user?id=u99", 404).of("code")

    def test_many_users_are_compared_a_few_at_a_time(self, client, monkeypatch):
        monkeypatch.setattr(studies, "_SECONDS", 0.0)
        monkeypatch.setattr(studies, "_CHUNK", 4)
        found = page(client, "/research/users?again=true")
        for number in range(4, 36, 4):
            assert f"Compared so far: {number} of 36 users." in found.text and len(lists(found)) == 2 * min(number, 5)
            found = page(client, found.links["Go on"])
        assert "36 users that both runs know" in found.text and "Go on" not in found.links

    def test_events_that_come_count_for_both(self, runs, tmp_path):
        with serving(runs.graph, tmp_path / "store.sqlite", source={"compared": runs.plain}) as client:
            assert "Compare again" not in page(client, "/research/users").text
            same(client.post("/events", {"events": [{"id": "1", "user": "new", "item": "i4"}]}))
            found = page(client, "/research/users")
            assert "36 users" in found.text
            assert "37 users" in page(client, found.links["Compare again, with what has come since"]).text
            both = [Recommender.load(run) for run in runs]
            for recommender in both:
                recommender.add_events(["new"], ["i4"])
            expected = [[item.item for item in which.recommend("new", k=10)[0]] for which in both]
            assert lists(page(client, "/research/user?id=new")) == expected
        # They are there again at the next start.
        with serving(runs.graph, tmp_path / "store.sqlite", source={"compared": runs.plain}) as client:
            assert lists(page(client, "/research/user?id=new")) == expected


class TestRecords:
    def test_slices_are_those_of_the_results(self, client, runs):
        found = page(client, "/research/slices?metric=recall%405")
        results = [json.loads((run / "result.json").read_text())["test"]["slices"] for run in runs]
        rows = {cells[0]: cells[1:] for cells in table(found)}
        for kind, parts in results[0].items():
            assert any(text.startswith(f"By {kind} recall@5") for text in found.of("h2"))
            for label, part in parts.items():
                cells = rows[f"{label}{part['what']}"]
                assert cells[0] == f"{part['num_users']}"
                for cell, result in zip(cells[1:], results, strict=True):
                    own = result[kind][label]
                    low, high = own["confidence_intervals"]["recall@5"]
                    assert cell == f"{own['metrics']['recall@5']:.4g} {low:.4g} to {high:.4g}"
        assert found.links["ndcg@10"] == "/research/slices?metric=ndcg%4010"

    def test_slices_that_nobody_recorded(self, plain_client, runs, tmp_path):
        assert "has recorded no slices" in page(plain_client, "/research/slices").text
        old = tmp_path / "old"
        shutil.copytree(runs.plain, old)
        result = json.loads((old / "result.json").read_text())
        del result["test"]["slices"]
        (old / "result.json").write_text(json.dumps(result))
        with serving(runs.graph, source={"compared": old}) as client:
            found = page(client, "/research/slices")
            assert "old has recorded no slices" in found.text and "graph has recorded no slices" not in found.text
            assert {cells[-1] for cells in table(found)} == {"none"}

    def test_courses_are_those_of_the_records(self, client, runs):
        found = page(client, "/research/training")
        records = [json.loads(line) for line in (runs.graph / "metrics.jsonl").read_text().splitlines()]
        rows = table(found)
        for record in records:
            if "valid_ndcg@10" in record:
                assert ["graph", f"{record['epoch']}", f"{record['valid_ndcg@10']:.4g}"] in rows
            assert ["bpr loss", f"{record['epoch']}", f"{record['bpr_loss_mean']:.4g}"] in rows
        titles = [one["aria-labelledby"] for one in found.attributes("svg") if one.get("role") == "img"]
        assert titles == ["valid-0-title", "valid-1-title", "loss-0-title", "loss-1-title"]
        first, last = (one["valid_ndcg@10"] for one in (records[1], records[-1]))
        assert any(f"graph: from {first:.4g} at 1 to {last:.4g} at 3" in text for text in found.of("desc"))

    def test_no_records(self, plain_client):
        assert "has no records of a training in epochs" in page(plain_client, "/research/training").text

    def test_a_sum_has_those_that_it_kept(self, one, other, runs, tmp_path):
        towers = {"graph": one.model, "plain": other.model}
        tables = [pl.read_parquet(runs.graph / name) for name in ("ids.parquet", "histories.parquet")]
        fused = Recommender(ServedFused(towers, {"graph": 1.0, "plain": 0.5}), *tables, one.content)
        run = fused.save(tmp_path / "sum")
        shutil.copy(runs.graph / "metrics.jsonl", run / "towers" / "graph")
        with serving(run) as client:
            found = page(client, "/research/training")
            assert found.of("strong")[0] == "Validation ndcg@10" and "sum: graph" in found.text
            assert "sum: plain" not in found.text


class TestMap:
    def test_points_are_the_items(self, client, one):
        found = page(client, "/research/map?item=i5")
        points = {
            to["href"].removeprefix("/research/item?id=") for to in found.attributes("a") if to.get("tabindex") == "-1"
        }
        assert points == set(one.item_ids.ids)
        rows = table(found)
        assert len(rows) == 18 and {row[0] for row in rows} >= {SCRIPT, "item 5"}
        counts = [int(row[1]) for row in rows]
        assert counts == sorted(counts, reverse=True) == sorted(one.popularity.int().tolist(), reverse=True)
        shares = np.linalg.svd(one.item - one.item.mean(0), compute_uv=False) ** 2
        assert (
            f"they hold {shares[0] / shares.sum():.0%} and {shares[1] / shares.sum():.0%} of the variance" in found.text
        )
        near = {row for edge in one.hyperedges("i5") if edge.modality == "text" for row in edge.members.tolist()} - {5}
        assert f"text: {len(near)}" in found.of("li")
        assert "i9" in page(client, "/research/map?item=i99", 404).of("code")


class TestCharts:
    def test_what_is_drawn_is_told(self):
        chart = line_chart("a", "<b>", [Line("one", [(0, 0.5), (1, 1.5)], best=1), Line("none", [])])
        assert "&lt;b&gt;" in chart and "<b>" not in chart
        assert "one: from 0.5 at 0 to 1.5 at 1, chosen 1.5 at 1." in chart
        path = re.search(r'class="line c0" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', chart)
        x0, y0, x1, y1 = map(float, path.groups())
        assert x0 < x1 and y0 > y1

    def test_one_point_and_equal_points_can_be_drawn(self):
        for points in ([(3, 0.0)], [(0, 2.0), (1, 2.0)], [(0, -1e-9), (1, 1e9)]):
            assert "nan" not in line_chart("a", "t", [Line("one", points)])

    def test_intervals(self):
        chart = interval_chart(
            "a", "t", [("rare", [Interval(0.2, 0.1, 0.4), None]), ("cold", [Interval(0.5)] * 2)], "AB"
        )
        assert "rare: A 0.2, 0.1 to 0.4." in chart and "cold: B 0.5." in chart
        assert chart.count('class="whisker') == 3


def test_studies_do_not_hold_up_lists(client):
    started, end = threading.Event(), threading.Event()

    def question(snapshot, requests):
        started.set()
        end.wait(20)
        return [None] * len(requests)

    loop = client.app.state.service._studies._task.get_loop()
    waiting = asyncio.run_coroutine_threadsafe(client.service.study(question, None), loop)
    try:
        assert started.wait(20)
        begun = time.monotonic()
        same(client.post("/recommend", {"users": ["u1"]}))
        assert time.monotonic() - begun < 10
    finally:
        end.set()
    waiting.result(20)


def test_the_other_run_is_an_option_of_the_command(runs, tmp_path, monkeypatch, capsys):
    apps = []
    monkeypatch.setattr("hellm.serve.server.serve", lambda app, *_, **__: apps.append(app) or 0)
    assert main(["serve", str(runs.graph), "--store", "none", "--compare", str(runs.plain)]) == 0
    assert apps[0].state.service.has_other
    assert main(["serve", str(runs.graph), "--store", "none", "--compare", str(tmp_path / "none")]) == 2
    assert "none holds no embeddings.safetensors" in capsys.readouterr().err


def table(found: Page) -> list[list[str]]:
    """Cells of the rows of all tables, without heads."""
    texts = iter(text for (tag,), text in found._texts if tag in ("td", "th"))
    rows: list[list[str]] = []
    in_head = False
    for tag, _ in found.tags:
        if tag in ("thead", "tbody"):
            in_head = tag == "thead"
        elif tag == "tr" and not in_head:
            rows.append([])
        elif tag in ("td", "th"):
            text = next(texts)
            if not in_head:
                rows[-1].append(text)
    return rows


def lists(found: Page) -> list[list[str]]:
    """Item ids of all ordered lists."""
    made: list[list[str]] = []
    inside = False
    for tag, attributes in found.tags:
        if tag == "ol":
            made.append([])
            inside = True
        elif tag in ("section", "ul", "article", "nav", "footer"):
            inside = False
        elif inside and tag == "a":
            made[-1].append(re.search(r"[?&]id=([^&]+)", attributes["href"])[1])
    return made


def members(found: Page) -> list[str]:
    """Item ids of the members of the chosen hyperedge."""
    ids, inside = [], False
    for tag, attributes in found.tags:
        if tag == "section":
            inside = attributes.get("class") == "members"
        elif inside and tag == "a":
            ids.append(re.search(r"[?&]id=([^&]+)", attributes["href"])[1])
    return ids


def score(recommender: Recommender) -> float:
    """Of item i5 for user u1."""
    return recommender.recommend("u1", k=1, candidates=["i5"], exclude_seen=False)[0].items[0].score


def ids_of(found: Page, address: str) -> list[str]:
    """Ids that links of a form lead to."""
    links = (to["href"] for to in found.attributes("a"))
    return [to.removeprefix(address) for to in links if to.startswith(address) and "&" not in to]

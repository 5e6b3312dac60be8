"""The researcher's pages in a real browser: what is clicked, read aloud, and seen; with scripts and without."""

from __future__ import annotations

import re

import pytest
from browsers import axe_script, tab, violations
from served import serving

from hellm.recommend import Recommender

pytestmark = pytest.mark.usefixtures("one_thread")
PAGES = (
    *("/research", "/research/items", "/research/item?id=i5&user=u1&all=true", "/research/users"),
    *("/research/slices", "/research/training", "/research/map?item=i5"),
)


@pytest.fixture(scope="module")
def client(browser, research_runs):
    shop, runs = research_runs
    with serving(runs.graph, data=shop, source={"compared": runs.plain}) as client:
        yield client


def test_from_an_item_to_its_rank_without_a_hyperedge(browser, client, research_runs):
    recommender = Recommender.load(research_runs[1].graph)
    edges = recommender.hyperedges("i5")
    with tab(browser, client.url) as page:
        page.goto("/research")
        page.get_by_role("searchbox", name="Item by title or id").fill("item 5")
        page.get_by_role("button", name="Search").click()
        page.get_by_role("link", name="item 5", exact=True).click()
        page.get_by_role("heading", name="Hyperedges of item 5").wait_for()
        page.get_by_label("Rank for the user").fill("u1")
        page.get_by_role("button", name="Rank").click()
        status, before = page.get_by_role("status"), recommender.rank("i5", user="u1")
        status.get_by_text("Without the image hyperedge").or_(
            status.get_by_text("Without the text hyperedge")
        ).wait_for()
        assert page.get_by_role("definition").filter(has_text="for u1").inner_text() == f"{before} for u1"
        # What is kept in the window stays, as only the graph is put in; the address is that of the hyperedge.
        page.evaluate("window.kept = true")
        last = page.get_by_role("region", name="colour").get_by_role("link")
        last.focus()
        page.keyboard.press("Enter")
        page.wait_for_url(re.compile("modality=colour&name=blue$"))
        after = recommender.without_hyperedge("colour", "blue").rank("i5", user="u1")
        moved = f"keeps rank {before}" if after == before else f"goes from rank {before} to {after}"
        status.get_by_text(f"Without the colour hyperedge of blue, this item {moved} for u1").wait_for()
        # The focus stays where it was, on what is current now.
        assert last.get_attribute("aria-current") == "true"
        assert last.evaluate("link => link === document.activeElement") and page.evaluate("window.kept")
        page.get_by_role("link", name="Take each away in turn").click()
        tried = page.get_by_role("region", name="Hyperedges", exact=True).get_by_role(
            "link", name=re.compile("without it")
        )
        tried.nth(len(edges) - 1).wait_for()
        assert page.evaluate("window.kept")
        page.go_back()
        page.wait_for_url(re.compile("name=blue$"))
        page.reload()
        status.get_by_text(f"this item {moved} for u1").wait_for()


def test_users_are_compared_while_somebody_looks(browser, client, monkeypatch):
    from hellm.serve.page import studies

    monkeypatch.setattr(studies, "_SECONDS", 0.0)
    with tab(browser, client.url) as page:
        page.goto("/research/users?again=true")
        page.get_by_text("36 users that both runs know.").wait_for()
        first = page.get_by_role("article").first
        assert first.get_by_role("list").count() == 2 and first.get_by_role("listitem").count() > 10
        page.get_by_role("link", name="By items").click()
        page.wait_for_url(re.compile("by=overlap"))
        page.get_by_role("article").first.get_by_role("heading").first.get_by_role("link").click()
        page.get_by_role("heading", name=re.compile("^User u")).wait_for()


def test_without_scripts_all_of_it_can_be_read(browser, client):
    with tab(browser, client.url, java_script_enabled=False) as page:
        page.goto("/research/item?id=i5&user=u1")
        page.get_by_role("region", name="colour").get_by_role("link").click()
        page.get_by_role("status").get_by_text("Without the colour hyperedge of blue").wait_for()
        page.goto("/research/training")
        page.get_by_role("img", name=re.compile("^Validation ndcg@10")).wait_for()
        page.get_by_text("As a table").first.click()
        assert page.get_by_role("table").first.get_by_role("row").count() > 2
        page.goto("/research/map")
        page.get_by_role("link", name="<script>alert(1)</script>").click()
        page.wait_for_url(re.compile("item=i0$"))
        # Who has a mouse can choose a point.
        page.goto("/research/map")
        page.locator(".points circle").first.click()
        page.wait_for_url("**/research/item?id=*")
        page.get_by_role("heading", name=re.compile("^Hyperedges of")).wait_for()


def test_everybody_can_read_it(browser, client, monkeypatch):
    """Nothing that axe-core finds on any page, and nothing is wider than a small screen."""
    # One pair of lists is like another, and axe-core takes seconds for many.
    monkeypatch.setattr("hellm.serve.page.research._USERS", 1)
    script = axe_script()
    with tab(browser, client.url, viewport={"width": 1280, "height": 800}) as page:
        for path in PAGES:
            page.set_viewport_size({"width": 1280, "height": 800})
            page.goto(path)
            page.evaluate("document.querySelectorAll('details').forEach((one, place) => (one.open = place === 0))")
            page.evaluate(script)
            assert not violations(page), path
            page.set_viewport_size({"width": 340, "height": 700})
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), path


def test_it_can_be_read_in_the_dark(browser, client):
    script = axe_script()
    with tab(browser, client.url, color_scheme="dark") as page:
        for path in ("/research/item?id=i5&user=u1&all=true", "/research/slices"):
            page.goto(path)
            page.evaluate(script)
            assert not violations(page, "{runOnly: ['color-contrast']}"), path

"""A page as a reader without scripts has it: tags and texts, links and forms that can be followed."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import httpx

VOID = {"img", "input", "link", "meta", "br", "rect"}


class Page(HTMLParser):
    """Attributes: `tags`, all as (name, attributes); `text`, blanks collapsed; `headings`, `links` by their texts."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__()
        self.response, self.tags, self._open = response, [], []
        self._texts: list[tuple[tuple[str, ...], str]] = []
        self.links: dict[str, str] = {}
        assert response.headers["content-type"].startswith("text/html"), response.text
        self.feed(response.text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        name, attributes, parts = self._open.pop()
        assert name == tag, (name, tag)
        text = " ".join("".join(parts).split())
        if tag == "a":
            self.links.setdefault(text, attributes["href"])
        self._texts.append(((tag,), text))
        if self._open:
            self._open[-1][2].append("".join(parts))

    def handle_data(self, data: str) -> None:
        if self._open:
            self._open[-1][2].append(data)

    def of(self, tag: str) -> list[str]:
        """Texts of all of a tag."""
        return [text for (name,), text in self._texts if name == tag]

    @property
    def text(self) -> str:
        return self.of("body")[-1]

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page(client: Any, path: str, status: int = 200, **options: Any) -> Page:
    """A page that was asked for as a browser does."""
    headers = {"accept": "text/html", **options.pop("headers", {})}
    response = client.get(path, headers=headers, **options)
    assert response.status_code == status, response.text
    return Page(response)


def check_page(response: httpx.Response) -> Page:
    """What holds for every page: nothing is loaded from elsewhere, no title is run, and everybody finds the way."""
    found = Page(response)
    # What htmx does is what the plain link or form does.
    for tag, attributes in found.tags:
        for name in ("href", "src", "action", "hx-get", "hx-post"):
            address = attributes.get(name)
            assert address is None or re.match(r"/(?!/)|#|data:image/webp;", address), (tag, address)
        assert not any(name.startswith("on") or name in ("style", "hx-on") for name in attributes), (tag, attributes)
        plain = attributes.get("href") or attributes.get("action")
        assert attributes.get("hx-get", plain) == plain and attributes.get("hx-post", plain) == plain
    assert [one.get("src") for one in found.attributes("script")] == ["/static/htmx.min.js"]
    assert not found.attributes("style") and not found.of("style")
    # Somebody who does not see it finds the way: a language, a title, one first heading, landmarks, a skip link.
    assert found.attributes("html")[0]["lang"] == "en" and found.of("title")[0].endswith("· hellm")
    assert len(found.of("h1")) == len(found.of("main")) == len(found.of("header")[:1]) == len(found.of("footer")) == 1
    assert found.links["Skip to content"] == "#content"
    assert all("alt" in one for one in found.attributes("img"))
    names = {one.get("for") for one in found.attributes("label")}
    asked = [one for one in found.attributes("input") if one.get("type") != "hidden"]
    assert all(one["id"] in names for one in asked)
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert response.headers["cache-control"] == "no-store"
    return found

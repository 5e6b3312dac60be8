"""A page as a reader without scripts has it: tags and texts, links and forms that can be followed."""

from __future__ import annotations

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

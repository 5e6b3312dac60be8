"""The pictures of the server's page: python docs/screenshots.py demo.

`demo` is what `hellm demo --out demo` made; nothing is stored in it. Needed are the package playwright, Chromium and,
for the letters of the pictures that are here, the font Inter (Debian: fonts-inter).
"""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import uvicorn
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from hellm import Recommender
from hellm.serve.app import create_app
from hellm.serve.service import Source
from hellm.serve.settings import Settings
from hellm.serve.store import Store

FIGURES = Path(__file__).resolve().parent / "figures"
DESKTOP, PHONE = {"width": 1200, "height": 820}, {"width": 390, "height": 820}
# Room between phones in one picture, as the page around it.
GAP, PAPER = 24, "#ffffff"


def main(demo: Path) -> None:
    with sync_playwright() as driver:
        program = shutil.which("chromium") or shutil.which("chromium-headless-shell")
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        shop(browser, demo)
        research(browser, demo)
        browser.close()


def shop(browser: Browser, demo: Path) -> None:
    """The pages of who has the shop."""
    with served(demo, "fused") as url:
        desktop = {"base_url": url, "viewport": DESKTOP}
        page = browser.new_page(**desktop)
        page.goto("/customer?id=u00003")
        write("page_customer", [shot(page)])
        # Encoders are loaded with the first look, which may take longer than a click waits.
        page.request.post("/new-product", multipart={"id": "N", "title": "Lamp"}, timeout=600_000)
        page.goto("/new-product")
        page.get_by_label("Id", exact=True).fill("N2001")
        page.get_by_label("Title").fill("Charcoal Dotted Star Lantern Nova")
        page.get_by_label("Category").fill("Lighting > Lanterns")
        page.get_by_label("Photo").set_input_files(demo / "shop" / "images" / "P1005.png")
        page.get_by_role("button", name="Who would see it?").click()
        page.get_by_role("heading", name="Who would see Charcoal").wait_for(timeout=300_000)
        page.evaluate("window.scrollTo(0, 0)")
        write("page_new_product", [shot(page)])
        page = browser.new_page(color_scheme="dark", **desktop)
        page.goto("/basket?item=P1005&item=P1003")
        write("page_basket", [shot(page)])
        phones = []
        page = browser.new_page(base_url=url, viewport=PHONE)
        for path in ("/", "/customer?id=u00003", "/never-shown"):
            page.goto(path)
            phones.append(shot(page))
        write("page_phone", phones)


def research(browser: Browser, demo: Path) -> None:
    """The pages of who made the model, stage 1 beside the same model without hypergraphs."""
    with served(demo, "stage1", "lightgcn") as url:
        page = browser.new_page(base_url=url, viewport={"width": 1200, "height": 1120})
        page.goto(f"/research/item?{urlencode(telling_hyperedge(demo / 'run' / 'stage1'))}&all=true")
        write("page_hyperedges", [shot(page)])
        page = browser.new_page(base_url=url, viewport={"width": 1200, "height": 960})
        page.goto("/research/users")
        page.get_by_text("users that both runs know").wait_for(timeout=300_000)
        write("page_users", [shot(page)])
        page = browser.new_page(base_url=url, viewport={"width": 1200, "height": 1010}, color_scheme="dark")
        page.goto(f"/research/map?{urlencode({'item': 'P1038'})}")
        write("page_map", [shot(page)], has_few_colours=False)


def telling_hyperedge(run: Path) -> dict[str, str]:
    """An item, a user, and the hyperedge without which the item falls furthest in the list of the user.

    Looked for among the lists of the first users.
    """
    recommender = Recommender.load(run)
    users = recommender.user_ids.ids[:40]
    lists = recommender.recommend(users, k=10)
    edges = {(one.modality, one.name) for items in lists for item in items for one in recommender.hyperedges(item.item)}
    best: tuple[int, dict[str, str]] = (0, {})
    for modality, name in sorted(edges):
        without = recommender.without_hyperedge(modality, name).recommend(users, k=40)
        for user, before, after in zip(users, lists, without, strict=True):
            places = {item.item: place for place, item in enumerate(after)}
            for place, item in enumerate(before):
                fall = places.get(item.item, len(after)) - place
                if fall > best[0]:
                    best = (fall, {"id": item.item, "user": user, "modality": modality, "name": name})
    return best[1]


@contextlib.contextmanager
def served(demo: Path, run: str, compared: str | None = None) -> Iterator[str]:
    """A run of the demo behind its page, with an empty store that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store.sqlite")
        settings = Settings(skip_selftest=True, encode_timeout=300, timeout=300, log_requests=False)
        source = Source(demo / "run" / run, compared=demo / "run" / compared if compared else None)
        app = create_app(source, store, settings, data=demo / "shop")
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="on"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not app.state.readiness.is_ready:
            time.sleep(0.1)
        try:
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
            store.close()


def shot(page: Page) -> Image.Image:
    """What is to be seen, once all pictures are there."""
    page.evaluate("document.querySelectorAll('img').forEach(one => one.loading = 'eager')")
    # Asked from outside: what a page would run to wait by itself, it forbids.
    while not page.evaluate("[...document.images].every(one => one.complete)"):
        page.wait_for_timeout(100)
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


def write(name: str, parts: list[Any], *, has_few_colours: bool = True) -> None:
    """Pictures side by side, in as many colours as fit a byte, or in all where small things differ by colour alone."""
    width = sum(part.width for part in parts) + GAP * (len(parts) - 1)
    whole = Image.new("RGB", (width, parts[0].height), PAPER)
    left = 0
    for part in parts:
        whole.paste(part, (left, 0))
        left += part.width + GAP
    if has_few_colours:
        whole = whole.quantize(256, Image.Quantize.MEDIANCUT, kmeans=3, dither=Image.Dither.NONE)
    whole.save(FIGURES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

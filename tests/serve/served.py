"""A server in this process, or one of its own, over runs that are there in a second."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import torch
from PIL import Image
from support.recommender_contract import planted_blocks

from hellm.data import ItemFeatures, load_dataset
from hellm.data.attributes import AttributeSet
from hellm.models import SASRec
from hellm.models.graph.content import ItemContent
from hellm.recommend import Recommender, ServedFused, ServedGraph, ServedSASRec
from hellm.serve.app import create_app
from hellm.serve.service import Source
from hellm.serve.settings import Settings
from hellm.serve.store import Store

DATA = planted_blocks()
WIDTH = 8
# What the encoder "colours" gives for a picture.
COLOUR_FEATURES = 240
COLOURS = ["red", "green", "blue"]


def features(count: int, seed: int = 0, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def graph(seed: int = 0) -> ServedGraph:
    draw = torch.Generator().manual_seed(seed)
    sizes = {"user": DATA.num_users, "item": DATA.num_items, "fold_in_source": DATA.num_items}
    return ServedGraph({name: torch.randn(size, 8, generator=draw) for name, size in sizes.items()}, 0.5)


def sasrec(seed: int = 0) -> ServedSASRec:
    torch.manual_seed(seed)
    return ServedSASRec(SASRec(DATA.num_items, embedding_dim=8, num_layers=1, num_heads=1, feedforward_dim=8).eval())


MODELS = {
    "graph": graph,
    "sequence": sasrec,
    "fused": lambda seed=0: ServedFused({"a": graph(seed), "b": sasrec(seed)}, {"a": 1.0, "b": 0.5}),
}


def save_run(
    folder: Path, kind: str = "graph", *, seed: int = 0, content: ItemContent | bool = True, pictures: bool = False
) -> Path:
    """A run with features "text", with `pictures` also "image", and attribute "colour", or the content given.

    Some titles are script.
    """
    sides = {"user": DATA.num_users, "item": DATA.num_items}
    title = {0: "<script>alert(1)</script>", 1: "Thé & café", 2: None}
    ids = pl.DataFrame(
        [
            (side, row, f"{side[0]}{row}", title.get(row, f"item {row}") if side == "item" else None)
            for side, count in sides.items()
            for row in range(count)
        ],
        schema={"side": pl.String, "index": pl.Int64, "id": pl.String, "title": pl.String},
        orient="row",
    )
    users, items = DATA.train
    events = pl.DataFrame({"user": users, "item": items, "split": np.zeros(len(users), np.int8)})
    known = None if content is False else content
    if content is True:
        colours = AttributeSet.of([[COLOURS[row % 3]] for row in range(DATA.num_items)])
        told = {"text": ItemFeatures.from_values(features(DATA.num_items))}
        encoders = {"text": {"encoder": "minilm"}}
        if pictures:
            told["image"] = ItemFeatures.from_values(features(DATA.num_items, 1, COLOUR_FEATURES))
            encoders["image"] = {"encoder": "colours"}
        known = ItemContent.of(told, k=4, attributes={"colour": colours}, encoders=encoders)
    return Recommender(MODELS[kind](seed), ids, events, known).save(folder)


def save_shop(folder: Path) -> Path:
    """The data of `save_run` as a shop has it: titles and colours, pictures but for some items, a repeated event."""
    (folder / "images").mkdir(parents=True)
    draw = np.random.default_rng(0)
    lines = ["item,title,colour,image"]
    for row in range(DATA.num_items):
        title = {0: "<script>alert(1)</script>", 1: "Thé & café", 2: ""}.get(row, f"item {row}")
        name = f"images/{row}.png" if row not in (1, 2) else ""
        if row == 3:
            # No picture, whatever it is called.
            (folder / name).write_text("secret", encoding="utf-8")
        elif name:
            shade = np.array([(row * 40) % 256, 120, 255 - (row * 25) % 256])
            pixels = np.clip(shade + draw.normal(0, 20, (40, 60, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name)
        lines.append(f"i{row},{title},{COLOURS[row % 3]},{name}")
    (folder / "items.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    pairs = zip(*DATA.train, strict=True)
    events = [f"u{user},i{item},{1_700_000_000 + 60 * place}" for place, (user, item) in enumerate(pairs)]
    events.append(events[0].rpartition(",")[0] + ",1800000000")
    (folder / "events.csv").write_text("user,item,timestamp\n" + "\n".join(events) + "\n", encoding="utf-8")
    return folder


def save_shop_run(folder: Path, shop: Path) -> Path:
    """A run of `save_shop` that knows items by the colours of their pictures and by attribute "colour"."""
    data = load_dataset(shop, features="simple", columns={"attribute": "colour"})
    content = ItemContent.of(
        {"image": data.item_features["image"]},
        k=4,
        attributes={"colour": data.attribute_sets["colour"]},
        encoders={"image": data.encoders["image"]},
    )
    return save_run(folder, content=content)


class Client:
    """A server of this process on a thread of its own, asked over loopback."""

    def __init__(
        self, run: Path, store: Store | None, settings: Settings, source: dict[str, Any], data: Path | None = None
    ) -> None:
        import uvicorn

        self.app = create_app(Source(run, **source), store, settings, data=data)
        config = uvicorn.Config(self.app, port=0, log_config=None, access_log=False, lifespan="on")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)

    @property
    def service(self):
        return self.app.state.service

    @property
    def recommender(self) -> Recommender:
        return self.service.snapshot.recommender

    def until_ready(self) -> Client:
        while self.http.get("/health/ready").status_code != 200:
            time.sleep(0.005)
        return self

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.http.get(path, **options)

    def close(self) -> None:
        self.http.close()
        self._server.should_exit = True
        self._thread.join()


@contextlib.contextmanager
def serving(
    run: Path,
    store: Path | None = None,
    *,
    source: dict[str, Any] | None = None,
    data: Path | None = None,
    **settings: Any,
):
    """A `Client` that is ready."""
    opened = None if store is None else Store(store)
    client = None
    try:
        client = Client(run, opened, Settings(skip_selftest=True, **settings), source or {}, data).until_ready()
        yield client
    finally:
        if client is not None:
            client.close()
        if opened is not None:
            opened.close()


class Process:
    """`hellm serve` in a process of its own, which listens after `limit` seconds at the latest."""

    def __init__(self, run: Path, *options: str, env: dict[str, str] | None = None, limit: float = 300.0) -> None:
        command = [sys.executable, "-m", "hellm", "serve", str(run), "--port", "0", "--skip-selftest", *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | (env or {})
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        late = threading.Timer(limit, self.process.kill)
        late.start()
        line = self.process.stdout.readline()
        late.cancel()
        if " on http://" not in line:
            raise RuntimeError(f"{line}{self.process.stderr.read()}")
        self.logs: list[str] = []
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()
        self.url = line.split(" on ")[1].strip()
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def _read(self) -> None:
        self.logs.extend(self.process.stderr)

    def until_ready(self) -> Process:
        while self.http.get("/health/ready").status_code != 200:
            time.sleep(0.01)
        return self

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(60)
        self.http.close()
        self._reading.join(10)
        self.process.stdout.close()
        self.process.stderr.close()
        return code


def same(answer: httpx.Response) -> dict[str, Any]:
    """What a good answer holds."""
    assert answer.status_code == 200, answer.text
    return json.loads(answer.text)

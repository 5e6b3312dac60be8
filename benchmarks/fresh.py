"""Items that a server takes while it runs: python -m benchmarks.fresh --data ITEM_COLD --run RUN [--out FILE].

ITEM_COLD is a data set built with `--split item-cold`; RUN was trained without its cold items, on what `--write FOLDER`
writes of it: their events left out, and the others split anew. `hellm serve RUN` takes each cold item by title, picture
and attributes, and is asked at once whether it ranks; after all of them, it is asked for the users of the test events,
who are found in the new items alone. What it answers must be what the library answers on the same state. Beside the
recall stand that of the most popular items and that of chance, and, where the lists are of the new items alone, chance
again. Without --data and --run, everything is made on the sample shop.
"""

from __future__ import annotations

import argparse
import base64
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.environment import environment, write_json
from benchmarks.load import Connection, request, run_loop, server

if TYPE_CHECKING:
    from hellm.data import Dataset
    from hellm.recommend import Recommender

K = 20
# Users in a request, and seconds that all requests may take.
USERS, PATIENCE = 64, 3600.0


def without_cold_items(data: Dataset) -> Dataset:
    """What was known before the items of an item-cold split came: the last two events of a user are held out."""
    from hellm.data import IdMap, splits

    kept = np.bincount(data.pairs("train")[1], minlength=data.num_items) > 0
    row, known = kept.cumsum() - 1, kept[data.items]
    users, items = data.users[known], row[data.items[known]]
    chosen = np.flatnonzero(kept)

    def of_kept(values: Sequence[str] | None) -> list[str] | None:
        return None if values is None else [values[place] for place in chosen]

    return replace(
        data,
        num_items=len(chosen),
        users=users,
        items=items,
        timestamps=None if data.timestamps is None else data.timestamps[known],
        split=splits.leave_two_out(users),
        split_name="leave-two-out",
        item_ids=IdMap(of_kept(data.item_ids.ids)),
        item_titles=of_kept(data.item_titles),
        item_fields={name: of_kept(texts) for name, texts in data.item_fields.items()},
        item_features={
            name: replace(one, values=one.values[chosen], mask=one.mask[chosen])
            for name, one in data.item_features.items()
        },
    )


def cold_items(data: Dataset, recommender: Recommender) -> list[int]:
    """Rows of the items without training events. Raises: ValueError, a run that knows one of them."""
    has_events = np.bincount(data.pairs("train")[1], minlength=data.num_items) > 0
    rows = [row for row in np.flatnonzero(~has_events).tolist() if np.any(data.items == row)]
    for row in rows:
        if data.item_ids.ids[row] in recommender.item_ids:
            raise ValueError(
                f"--run must be trained without the cold items of --data, got one that knows item "
                f"{data.item_ids.ids[row]!r}; train it on what --write FOLDER writes"
            )
    return rows


def bodies(data: Dataset, rows: Sequence[int], known: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What POST /items takes of items: title, description, attributes and picture, whichever they have."""
    lists = data.item_attributes
    for row in rows:
        body: dict[str, Any] = {"id": data.item_ids.ids[row]}
        if data.item_titles is not None and data.item_titles[row]:
            body["title"] = data.item_titles[row]
        if description := data.item_fields.get("description", {row: ""})[row]:
            body["description"] = description
        body["attributes"] = {name: list(one[row]) for name, one in lists.items() if one[row]}
        picture = data.item_fields.get("image", {row: ""})[row]
        if "image" in known and picture and Path(picture).is_file():
            body["picture"] = base64.b64encode(Path(picture).read_bytes()).decode()
        yield body


def asked(url: str, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[tuple[dict[str, Any], float]]:
    """Answers to POSTs that follow one another, and the seconds of each. Raises: RuntimeError, one that is refused."""

    async def ask_all() -> list[tuple[dict[str, Any], float]]:
        connection, found = await Connection.open(url), []
        for path, body in requests:
            started = time.perf_counter()
            answer = await connection.ask(request("POST", path, body))
            if answer.status != 200:
                raise RuntimeError(f"POST {path} is refused with {answer.status}: {answer.json()}")
            found.append((answer.json(), time.perf_counter() - started))
        connection.close()
        return found

    return run_loop(ask_all(), PATIENCE)


def taken(url: str, items: Sequence[Mapping[str, Any]], user: str) -> dict[str, Any]:
    """Post the items, and ask after each whether it ranks. Raises: RuntimeError, one that does not."""
    requests = []
    for item in items:
        requests += [("/items", item), ("/recommend", {"users": [user], "k": 1, "candidates": [item["id"]]})]
    answers = asked(url, requests)
    for item, (answer, _) in zip(items, answers[1::2], strict=True):
        if [one["item"] for one in answer["lists"][0]["items"]] != [item["id"]]:
            raise RuntimeError(f"item {item['id']!r} is not in the answer after it was taken")
    seconds = np.array([post[1] + ask[1] for post, ask in zip(answers[::2], answers[1::2], strict=True)])
    by = sorted({name for answer, _ in answers[::2] for name in answer["placed_by"]})
    return {
        "placed_by": by,
        "seconds": {"median": float(np.median(seconds)), "most": float(seconds.max()), "first": float(seconds[0])},
    }


def lists_of(url: str, users: Sequence[str], candidates: Sequence[str] | None) -> list[list[str]]:
    """The K best items of each user, as the server has them."""
    options = {"k": K} | ({} if candidates is None else {"candidates": list(candidates)})
    parts = [users[start : start + USERS] for start in range(0, len(users), USERS)]
    answers = asked(url, [("/recommend", {"users": list(part), **options}) for part in parts])
    return [[one["item"] for one in found["items"]] for answer, _ in answers for found in answer["lists"]]


def library(run: Path, store: Path) -> Recommender:
    """The run with what the server has stored, by the library alone."""
    from hellm.recommend import Recommender
    from hellm.serve.store import read_entries

    recommender = Recommender.load(run)
    for entry in read_entries(store):
        recommender.add_items(
            {name: values[None] for name, values in entry.features.items()},
            [entry.key],
            [entry.body["title"]],
            attributes={
                name: [values]
                for name, values in entry.body["attributes"].items()
                if name in recommender.content.attributes
            },
        )
    return recommender


def recall(lists: Sequence[Sequence[str]], wanted: Sequence[frozenset[str]]) -> dict[str, Any]:
    """Mean over users of the share of their items that are in their lists, with its interval (95%, users resampled)."""
    values = np.array([len(own.intersection(found)) / len(own) for found, own in zip(lists, wanted, strict=True)])
    draw = np.random.default_rng(0)
    means = [values[draw.integers(len(values), size=len(values))].mean() for _ in range(1000)]
    low, high = np.percentile(means, [2.5, 97.5])
    return {"recall": float(values.mean()), "low": float(low), "high": float(high)}


def chance(recommender: Recommender, users: Sequence[str], candidates: Sequence[str] | None) -> float:
    """Recall of K items drawn from those that may be recommended."""
    if candidates is not None:
        return min(1.0, K / len(candidates))
    seen = [len({one.item for one in recommender.history(user)}) for user in users]
    return float(np.mean([min(1.0, K / (recommender.num_items - count)) for count in seen]))


def measured(data: Dataset, run: Path, options: Sequence[str] = ()) -> dict[str, Any]:
    """Everything about the new items of a run.

    Args:
        data: Of an item-cold split.
        run: Trained without its cold items.
        options: For `hellm serve`.
    Raises: ValueError, a run that knows cold items or has no content. RuntimeError, a server that refuses.
    """
    from hellm.recommend import Recommender

    before = Recommender.load(run)
    rows = cold_items(data, before)
    if before.content is None:
        raise ValueError(f"--run must know what its items look or read like, got {run} without content")
    new, (users, items) = [data.item_ids.ids[row] for row in rows], data.pairs("test")
    targets: dict[str, set[str]] = {}
    for user, item in zip(users.tolist(), items.tolist(), strict=True):
        name = data.user_ids.ids[user]
        # Of others nothing is known that a list could come from.
        if name in before.user_ids and before.history(name):
            targets.setdefault(name, set()).add(data.item_ids.ids[item])
    asked_for, wanted = list(targets), [frozenset(one) for one in targets.values()]
    popular = [before.item_ids.ids[row] for row in np.argsort(-before.popularity.numpy(), kind="stable")]
    result: dict[str, Any] = {
        "k": K,
        "users": len(asked_for),
        "test_events": len(users),
        "known_items": before.num_items,
        "new_items": len(new),
    }
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder, "store.sqlite")
        with server(run, *options, store=store) as (url, _):
            posts = list(bodies(data, rows, before.content.modalities))
            result |= taken(url, posts, asked_for[0])
            found = {name: lists_of(url, asked_for, among) for name, among in (("all", None), ("new", new))}
        recommender = library(run, store)
    same = 0
    for name, among in (("all", None), ("new", new)):
        own = recommender.recommend(asked_for, k=K, candidates=among)
        same += sum([one.item for one in mine] == served for mine, served in zip(own, found[name], strict=True))
        result[f"among_{name}_items"] = recall(found[name], wanted) | {"chance": chance(recommender, asked_for, among)}
    seen = [{one.item for one in recommender.history(user)} for user in asked_for]
    by_popularity = [[item for item in popular if item not in own][:K] for own in seen]
    result["among_all_items"]["most_popular"] = recall(by_popularity, wanted)["recall"]
    return result | {"lists": 2 * len(asked_for), "lists_of_the_library": same}


def sample(folder: Path, num_users: int, num_items: int, epochs: int, **encoders: str | None) -> tuple[Dataset, Path]:
    """An item-cold split of the sample shop, and a sum of two models that was trained without its cold items.

    Args:
        folder: Where all of it is made.
        num_users, num_items: Of the shop.
        epochs: Of stage 1 and of the sequence model.
        encoders: See `hellm.features.add_features`.
    """
    from hellm.config import FuseConfig, PretrainConfig, SASRecConfig, load_config
    from hellm.data import load_dataset, save_dataset, write_sample_shop
    from hellm.features import add_features
    from hellm.recommend.fuse import fuse
    from hellm.training.pretrain import pretrain
    from hellm.training.sasrec import train_sasrec

    shop = write_sample_shop(folder / "shop", num_users=num_users, num_items=num_items)
    data = add_features(load_dataset(shop, split="item-cold"), cache=folder / "cache", **encoders)
    warm, settings = without_cold_items(data), [f"max_epochs={epochs}", "tensorboard=false", "num_threads=1"]
    save_dataset(warm, folder / "warm")
    pretrain(load_config(PretrainConfig, "demo", settings), warm, folder / "stage1")
    train_sasrec(load_config(SASRecConfig, "content", settings), warm, folder / "sequence")
    towers = {name: folder / name for name in ("stage1", "sequence")}
    fuse(towers, warm, folder / "fused", FuseConfig(num_threads=1))
    return data, folder / "fused"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="data set built with --split item-cold")
    parser.add_argument("--run", type=Path, help="run that was trained without its cold items")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write the data without the cold items, and stop")
    parser.add_argument("--encoder", action="append", default=[], metavar="MODALITY=NAME", help="see hellm serve")
    parser.add_argument("--users", type=int, default=2000, help="of the sample shop")
    parser.add_argument("--items", type=int, default=400, help="of the sample shop")
    parser.add_argument("--epochs", type=int, default=10, help="of models on the sample shop")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    from hellm.data import load_dataset, save_dataset

    if (args.data is None) != (args.run is None and args.write is None):
        parser.error("--data must come with --run or --write")
    options = [part for one in args.encoder for part in ("--encoder", one)]
    with tempfile.TemporaryDirectory() as folder:
        if args.write is not None:
            save_dataset(without_cold_items(load_dataset(args.data)), args.write)
            return 0
        if args.data is None:
            data, run = sample(Path(folder), args.users, args.items, args.epochs)
            about = f"sample shop, {args.users} users, {args.items} items"
        else:
            data, run, about = load_dataset(args.data), args.run, args.data.name
        result = {"data": about, **measured(data, run, options), "environment": environment()}
    if args.out is not None:
        write_json(args.out, result)
    print({name: value for name, value in result.items() if name != "environment"})
    if result["lists_of_the_library"] < result["lists"]:
        print("some lists of the server are not those of the library", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

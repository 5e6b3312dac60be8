"""`hellm demo`: the whole path on a made-up shop whose structure is known."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hellm.cli._output import duration, print_json, title
from hellm.cli._parser import new_parser, parse

__all__ = ["run"]

_NUM_GROUPS = 8
_MADE = {"shop", "built", "run", "planted_structure.png"}


def run(argv: Sequence[str]) -> int:
    parser = new_parser(
        "demo",
        "--out DIR [options]",
        "Make up a shop in which users like one or two of eight groups of products, then check, build, train, compare "
        "and recommend, saying at each step which command does it; last, a picture of what was found.",
    )
    parser.add_argument("--out", default="demo", metavar="DIR", help="folder for everything that is made")
    parser.add_argument("--num-users", type=int, default=600, metavar="N")
    parser.add_argument("--num-items", type=int, default=240, metavar="N", help="at least 160")
    parser.add_argument("--max-epochs", type=int, metavar="N", help="fewer is faster; default: that of the preset")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--overwrite", action="store_true", help="make the demo anew where it is already")
    parser.add_argument("--json", action="store_true", help="end with the comparison as one line of JSON")
    args = parse(parser, argv)
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; give another --out")
    if out.is_dir() and any(out.iterdir()) and not args.overwrite:
        raise FileExistsError(f"{out} is not empty; give --overwrite or another --out")
    foreign = sorted({one.name for one in out.iterdir()} - _MADE) if out.is_dir() else []
    if foreign:
        raise FileExistsError(f"{out} holds {foreign[0]!r}, which no demo made, so nothing there is overwritten")
    started = time.perf_counter()
    dataset = _prepare(out, args)
    _train(out, dataset, args)
    comparison = _compare(out, dataset)
    measured = _show_recommendations(out)
    _picture(out, measured)
    print(f"\nDone in {duration(time.perf_counter() - started)}. Next, with your own data: put events.csv (user, item,")
    print("timestamp), items.csv (item, title, image) and images/ into a folder; start with `hellm data check FOLDER`.")
    if args.json:
        print_json(comparison | {"planted": measured["shares"], "seconds": time.perf_counter() - started})
    return 0


def _step(number: int, text: str, command: str) -> None:
    print(f"\n[{number}/6] {text}\n      $ {command}", flush=True)


def _prepare(out: Path, args):
    from hellm.cli.data import print_report, summary
    from hellm.data import check_dataset, load_dataset, save_dataset, write_sample_shop

    shop, built = out / "shop", out / "built"
    _step(1, "Make up a shop: purchases, titles and pictures.", f"hellm data sample {shop}")
    write_sample_shop(
        shop,
        num_users=args.num_users,
        num_items=args.num_items,
        num_groups=_NUM_GROUPS,
        seed=args.seed,
        overwrite=args.overwrite,
    )
    dataset = load_dataset(shop)
    print(f"{args.num_users} users buy from {args.num_items} products, mostly from one or two of {_NUM_GROUPS} groups.")
    print("The groups show in titles and pictures, but nobody tells them to the model.")
    _step(2, "Look at the data before using them.", f"hellm data check {shop}")
    print_report(check_dataset(dataset))
    _step(3, "Turn titles and pictures into numbers, and hold out purchases.", f"hellm data build {shop} {built}")
    save_dataset(dataset, built, overwrite=args.overwrite)
    print(summary(dataset))
    print("Of each user the last purchase is kept for the test and the one before for validation.")
    return dataset


def _train(out: Path, dataset, args) -> None:
    from hellm.cli.pretrain import print_result
    from hellm.config import PRESETS, PretrainConfig
    from hellm.evaluate import evaluate_dataset
    from hellm.training.pretrain import pretrain

    folder = out / "run"
    command = f"hellm pretrain --data {out / 'built'} --preset demo --seed {args.seed} --num-threads 1 --out {folder}"
    _step(4, "Train the hypergraph recommender.", command)
    # So few numbers are fastest on one thread, and others may be using the machine.
    config = replace(PRESETS[PretrainConfig]["demo"], seed=args.seed, num_threads=1, tensorboard=False)
    if args.max_epochs is not None:
        config = replace(config, max_epochs=args.max_epochs)
    with _same_threads():
        result = pretrain(config, dataset, folder, evaluate=evaluate_dataset, overwrite=args.overwrite)
    print_result(result, folder, metrics=("recall@10", "ndcg@10"))
    print(f"Curves of the training are in {folder / 'curves.png'}.")


@contextlib.contextmanager
def _same_threads() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _compare(out: Path, dataset) -> dict[str, Any]:
    import importlib.util

    from hellm.cli.evaluate import compare, print_comparison

    models = [str(out / "run"), "popularity"]
    if importlib.util.find_spec("implicit") is not None:
        models.append("itemknn")
    command = f"hellm evaluate {' '.join(models)} --data {out / 'built'} --ks 10"
    _step(5, "Compare it with simpler recommenders, on purchases none of them has seen.", command)
    comparison = compare(models, dataset, ks=(10,))
    print_comparison(comparison)
    print("recall@10: the share of users whose held-out purchase is among the first 10 of their list.")
    if "itemknn" not in models:
        print('ItemKNN is left out, it needs: pip install "hellm[baselines]"')
    return comparison


def _show_recommendations(out: Path) -> dict[str, Any]:
    from hellm.recommend import Recommender

    recommender = Recommender.load(out / "run")
    group = _groups(recommender)
    shares = _shares(recommender, group)
    # The first user of one group and the first of two, so that both kinds are seen.
    users = [next((user for user, own in shares["own"].items() if len(own) == n), None) for n in (1, 2)]
    users = [user for user in users if user is not None]
    _step(6, "Recommend.", f"hellm recommend {out / 'run'} --users {' '.join(users)} -k 5")
    for one in recommender.recommend(users, k=5):
        print(f"user {one.user} bought")
        for item in recommender.history(one.user)[-6:]:
            print(f"    {title(item.item, item.title)}")
        print("  and is recommended")
        for item in one:
            print(f"    {title(item.item, item.title)}")
    values = {name: float(shares[name]) for name in ("model", "popularity", "chance")}
    print(
        f"Over all users, {values['model']:.0%} of the first 10 recommendations are from the groups a user likes; "
        f"popularity reaches {values['popularity']:.0%}, chance {values['chance']:.0%}."
    )
    print("(A group counts as liked if it holds at least a quarter of the user's purchases.)")
    return {"recommender": recommender, "group": group, "shares": values}


def _groups(recommender) -> np.ndarray:
    """[num_items] planted group of each item, from its id (see `hellm.data.write_sample_shop`)."""
    from hellm.data.sample import item_id

    number = {item_id(item): item for item in range(recommender.num_items)}
    return np.array([number[one] % _NUM_GROUPS for one in recommender.item_ids.ids])


def _shares(recommender, group: np.ndarray) -> dict[str, Any]:
    """Share of the first 10 recommendations that lie in the groups a user likes, and what chance would give.

    A user likes the groups of at least a quarter of the own purchases.
    """
    own, sizes = {}, np.bincount(group, minlength=_NUM_GROUPS)
    row_of = recommender.item_ids.index
    hits: dict[str, list[float]] = {"model": [], "popularity": [], "chance": []}
    by_popularity = np.argsort(-recommender.popularity.numpy(), kind="stable")
    for one in recommender.recommend(recommender.user_ids.ids, k=10):
        bought = np.array([row_of(item.item) for item in recommender.history(one.user)])
        counts = np.bincount(group[bought], minlength=_NUM_GROUPS)
        liked = own[one.user] = np.flatnonzero(counts >= len(bought) / 4)
        popular = by_popularity[~np.isin(by_popularity, bought)][:10]
        hits["model"].append(np.isin(group[[row_of(item.item) for item in one]], liked).mean())
        hits["popularity"].append(np.isin(group[popular], liked).mean())
        hits["chance"].append((sizes - counts)[liked].sum() / (len(group) - len(bought)))
    return {"own": own} | {name: np.mean(values) for name, values in hits.items()}


def _picture(out: Path, measured: dict[str, Any]) -> None:
    from hellm.cli._figure import plot_planted_structure

    recommender, group = measured["recommender"], measured["group"]
    names = []
    for one in range(_NUM_GROUPS):
        titles = [recommender.item_titles[row] for row in np.flatnonzero(group == one)]
        names.append(next(" ".join(text.split()[:-2]) for text in titles if text))
    path = out / "planted_structure.png"
    plot_planted_structure(path, recommender.item.numpy(), group, names, measured["shares"])
    print(f"\nThe picture {path} shows the groups that the model found.")

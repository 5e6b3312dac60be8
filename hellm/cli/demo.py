"""`hellm demo`: the whole path on a made-up shop whose structure is known."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hellm._folders import check_target, hold, mark_folder
from hellm.cli._output import duration, print_json
from hellm.cli._parser import new_parser, parse
from hellm.cli.features import CACHE_HELP
from hellm.cli.run import PrintedSteps, print_cost
from hellm.config import PRESETS, RunConfig
from hellm.pipeline import LAYOUT, Pipeline

__all__ = ["run"]

_NUM_GROUPS = 8
_LAYOUT = ("planted_structure.png", "shop/*", "shop/images/*", *(f"run/{file}" for file in LAYOUT))


def run(argv: Sequence[str]) -> int:
    parser = new_parser(
        "demo",
        "--out DIR [options]",
        "Make up a shop in which users like one or two of eight groups of products, look at its data, and take it the "
        "whole way of `hellm run`, saying at each step which command does it; last, a picture of what was found.",
    )
    parser.add_argument("--out", default="demo", metavar="DIR", help="folder for everything that is made")
    parser.add_argument("--num-users", type=int, default=600, metavar="N")
    parser.add_argument("--num-items", type=int, default=240, metavar="N", help="at least 160")
    parser.add_argument("--max-epochs", type=int, metavar="N", help="of every stage; default: those of the preset")
    parser.add_argument("--llm", default="smollm2-135m", metavar="NAME", help="language model, or none to leave it out")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--overwrite", action="store_true", help="make the demo anew where it is already")
    parser.add_argument("--cache", metavar="DIR", help=CACHE_HELP)
    parser.add_argument("--json", action="store_true", help="end with the comparison as one line of JSON")
    args = parse(parser, argv)
    check_target(args.out, kind="demo", overwrite=args.overwrite)
    with hold(args.out):
        mark_folder(args.out, "demo", layout=_LAYOUT)
        return _run(Path(args.out), args)


def _run(out: Path, args) -> int:
    started = time.perf_counter()
    _make_shop(out, args)
    pipeline = Pipeline(out / "run", _config(args), overwrite=args.overwrite, cache=args.cache, on_plan=print_cost)
    printed = PrintedSteps(pipeline)
    printed(pipeline.data(lambda: _load(out / "shop")))
    with _same_threads():
        printed.all(pipeline.training())
    comparison = printed(pipeline.comparison())
    print("recall@10: the share of users whose held-out purchase is among the first 10 of their list.")
    measured = _measure(pipeline)
    printed(pipeline.recommendations(measured["shown"]))
    _say(measured["shares"])
    _picture(out, measured)
    print(f"\nDone in {duration(time.perf_counter() - started)}. Next, with your own data: put events.csv (user, item,")
    print("timestamp), items.csv (item, title, image) and images/ into a folder; start with `hellm data check FOLDER`.")
    if args.json:
        print_json(comparison | {"planted": measured["shares"], "seconds": time.perf_counter() - started})
    return 0


def _make_shop(out: Path, args) -> None:
    from hellm.cli.data import print_report
    from hellm.data import check_dataset, write_sample_shop

    shop = out / "shop"
    print(f"\nMake up a shop: purchases, titles and pictures.\n    $ hellm data sample {shop}", flush=True)
    write_sample_shop(
        shop,
        num_users=args.num_users,
        num_items=args.num_items,
        num_groups=_NUM_GROUPS,
        seed=args.seed,
        overwrite=args.overwrite,
    )
    print(f"{args.num_users} users buy from {args.num_items} products, mostly from one or two of {_NUM_GROUPS} groups.")
    print("The groups show in titles and pictures, but nobody tells them to the model.")
    print(f"\nLook at the data before using them.\n    $ hellm data check {shop}", flush=True)
    print_report(check_dataset(_load(shop)))


def _load(shop: Path):
    from hellm.data import load_dataset

    return load_dataset(shop)


def _config(args) -> RunConfig:
    config = PRESETS[RunConfig]["demo"]
    stages = {}
    for name in ("pretrain", "sasrec", "content", "finetune"):
        changes = {"seed": args.seed, "tensorboard": False}
        if args.max_epochs is not None:
            changes["max_epochs"] = args.max_epochs
        # So few numbers are fastest on one thread, and others may be using the machine.
        changes["num_threads"] = os.cpu_count() if name == "finetune" else 1
        stages[name] = replace(getattr(config, name), **changes)
    if args.llm != "none":
        stages["finetune"] = replace(stages["finetune"], llm=args.llm)
    return replace(config, language_model=args.llm != "none", **stages)


@contextlib.contextmanager
def _same_threads() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measure(pipeline: Pipeline) -> dict[str, Any]:
    """What the hypergraph recommender found of the groups, and users to show: of one group and of two."""
    from hellm.recommend import Recommender

    recommender = Recommender.load(pipeline.path("stage1"))
    group = _groups(recommender)
    shares = _shares(recommender, group)
    shown = [next((user for user, own in shares["own"].items() if len(own) == n), None) for n in (1, 2)]
    values = {name: float(shares[name]) for name in ("model", "popularity", "chance")}
    shown = [user for user in shown if user is not None]
    return {"recommender": recommender, "group": group, "shares": values, "shown": shown}


def _say(shares: dict[str, float]) -> None:
    print(
        f"Over all users, {shares['model']:.0%} of the first 10 recommendations of stage 1 are from the groups a user "
        f"likes; popularity reaches {shares['popularity']:.0%}, chance {shares['chance']:.0%}."
    )
    print("(A group counts as liked if it holds at least a quarter of the user's purchases.)")


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

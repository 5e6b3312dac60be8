"""`hellm recommend`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from hellm.cli._output import one_line, print_json, table, title
from hellm.cli._parser import new_parser, parse

__all__ = ["print_lists", "run"]

logger = logging.getLogger(__name__)


def run(argv: Sequence[str]) -> int:
    parser = new_parser(
        "recommend",
        "RUN (--users ID ... | --history ITEM ... | --similar-to ITEM) [options]",
        "Recommend from a finished run directory alone, of any stage: to known users, to a bare history of items, or "
        "items like an item. Users without any history, unknown ones among them, are given the most popular items, and "
        "that is marked. Unknown items in a history or among the candidates are left out, with a count.",
    )
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--users", nargs="+", type=str, metavar="ID", help="ids of users")
    parser.add_argument("--history", nargs="*", type=str, metavar="ITEM", help="item ids of one history; may be empty")
    parser.add_argument("--similar-to", type=str, metavar="ITEM", help="item id")
    parser.add_argument("-k", type=int, default=10, metavar="N", help="length of each list")
    parser.add_argument("--candidates", nargs="+", type=str, metavar="ITEM", help="choose from these items only")
    parser.add_argument("--candidates-file", metavar="FILE", help="the same, one item id per line (what is in stock)")
    parser.add_argument("--include-seen", action="store_true", help="also recommend items of the history")
    parser.add_argument(
        "--explain",
        action="store_true",
        help="name the history items that each item hangs together with, and by what, and what each model of a fused "
        "run says",
    )
    parser.add_argument("--llm", metavar="PATH", help="where the language model of a fine-tuning run is, if moved")
    parser.add_argument("--device", default="auto", metavar="NAME", help="reads histories: auto, cpu, cuda or cuda:N")
    parser.add_argument("--json", action="store_true", help="print the lists as one line of JSON")
    args = parse(parser, argv)
    given = [name for name in ("users", "history", "similar_to") if args[name] is not None]
    if len(given) != 1:
        raise ValueError(f"give one of --users, --history and --similar-to, got {len(given)} of them")
    from hellm._devices import resolve_device
    from hellm.recommend import Recommender

    candidates = _candidates(args)
    recommender = Recommender.load(args.run, device=resolve_device(args.device), language_model=args.llm)
    if args.similar_to is not None:
        return _similar(recommender, args)
    if args.k < 1:
        raise ValueError(f"-k must be >= 1, got {args.k}")
    left_out = {}
    if candidates is not None:
        candidates, left_out["unknown_candidates"] = _known(recommender.item_ids, candidates, "candidates")
        if not candidates:
            raise ValueError(f"none of the candidates is among the {recommender.num_items} items of {args.run}")
    history = args.history
    if history is not None:
        history, left_out["unknown_history"] = _known(recommender.item_ids, history, "items of the history")
    lists = _lists(recommender, args, history, candidates)
    reasons = _reasons(recommender, lists, history) if args.explain else None
    lifts = _lifts(recommender, lists, history) if args.explain else None
    if args.json:
        values = [one.to_dict() | {name: number for name, number in left_out.items() if number} for one in lists]
        for value, of_list in zip(values, reasons or [], strict=False):
            for item, why in zip(value["items"], of_list, strict=True):
                item["because"] = [reason.to_dict() for reason in why]
        for value, of_list in zip(values, lifts or [], strict=False):
            for item, lift in zip(value["items"], of_list, strict=True):
                item |= {"towers": lift} if lift else {}
        print_json(values)
    else:
        print_lists(lists, reasons, lifts)
    return 0


def _known(ids, given: Sequence[str], what: str) -> tuple[list[str], int]:
    """Those of `given` that the run knows, and how many it does not, which are told of."""
    unknown = [one for one in given if one not in ids]
    if unknown:
        logger.warning(
            "%d of %d %s are not known to the run and left out: %s", len(unknown), len(given), what, _some(unknown, ids)
        )
    return [one for one in given if one in ids], len(unknown)


def _some(unknown: Sequence[str], ids) -> str:
    from hellm.recommend.catalogue import nearest_names

    shown = ", ".join(map(repr, unknown[:3])) + (", ..." if len(unknown) > 3 else "")
    nearest = nearest_names(unknown[0], ids.ids)
    return shown + (f" (like {unknown[0]!r}: {', '.join(nearest)})" if nearest else "")


def _lists(recommender, args, history: list[str] | None, candidates: list[str] | None) -> list:
    """One list for each user or the history, in their order; unknown users have what an empty history has."""
    options = {
        "k": min(args.k, recommender.num_items),
        "exclude_seen": not args.include_seen,
        "candidates": candidates,
    }
    if history is not None:
        return recommender.recommend(histories=[history], **options)
    known = [user for user in args.users if user in recommender.user_ids]
    unknown = [user for user in args.users if user not in recommender.user_ids]
    lists = iter(recommender.recommend(known, **options) if known else [])
    if not unknown:
        return list(lists)
    logger.warning(
        "%d of %d users are not known to the run and get the most popular items: %s",
        len(unknown),
        len(args.users),
        _some(unknown, recommender.user_ids),
    )
    (popular,) = recommender.recommend(histories=[[]], **options)
    return [
        next(lists) if user in recommender.user_ids else dataclasses.replace(popular, user=user) for user in args.users
    ]


def print_lists(lists, reasons=None, lifts=None) -> None:
    """Lists of recommendations for people.

    `reasons` are those of `Recommender.explain`, `lifts` those of `Recommender.lifts`, both per list and item.
    """
    for number, one in enumerate(lists):
        owner = f"user {one_line(one.user)}" if one.user is not None else "this history"
        how = "the most popular items, as there is no history to go by" if one.basis == "popularity" else "best first"
        print(f"{owner}: {how}")
        # A history may leave fewer candidates than asked for, or none.
        rows = [(str(rank), title(item.item, item.title), f"{item.score:.3f}") for rank, item in enumerate(one, 1)]
        width = max((len(row[1]) for row in rows), default=0)
        for place, (rank, name, score) in enumerate(rows):
            print(f"  {rank:>3}. {name:<{width}}  {score}")
            for line in _because(reasons[number][place]) if reasons else []:
                print(f"         {line}")
            if lifts and lifts[number][place]:
                print(f"         {_by_tower(lifts[number][place])}")
        if not rows:
            print("       nothing is left to recommend")


def _by_tower(lifts) -> str:
    """What each tower says of an item, in a line."""
    total = sum(lifts.values())
    parts = ", ".join(f"{one_line(name)} {lift:+.2f}" for name, lift in lifts.items())
    return f"{abs(total):.2f} {'above' if total >= 0 else 'below'} the mean item: {parts}"


def _because(reasons) -> list[str]:
    """One line for each hyperedge kind that ties an item to one of the history: shared users, then each modality."""
    lines = []
    for reason in reasons:
        if reason.shared_users or reason.content is None:
            users = f"{reason.shared_users} users have both"
            lines.append(f"near {title(reason.item, reason.title)}: {users}")
    linked = [(name, reason, link) for reason in reasons for name, link in (reason.content or {}).items()]
    for name in dict.fromkeys(name for name, _, _ in linked):
        own = [(reason, link) for other, reason, link in linked if other == name]
        # Where no neighbourhood is shared, the most alike item is still worth a line.
        most = max(own, key=lambda one: one[1].similarity)
        for reason, link in own:
            if link.shared_hyperedges or ((reason, link) == most and link.similarity > 0):
                number = link.shared_hyperedges
                shared = f", {number} nearest item{'s' if number > 1 else ''} in common" if number else ""
                lines.append(
                    f"alike in {name}: {title(reason.item, reason.title)}, cosine {link.similarity:.2f}{shared}"
                )
    return lines


def _similar(recommender, args) -> int:
    items = recommender.similar_items(args.similar_to, max(1, min(args.k, recommender.num_items - 1)))
    if args.json:
        print_json([vars(item) for item in items])
        return 0
    rows = [[title(item.item, item.title), f"{item.score:.3f}"] for item in items]
    print(table((f"items like {args.similar_to}", "cosine"), rows))
    return 0


def _candidates(args) -> list[str] | None:
    if args.candidates_file is None:
        return args.candidates
    if args.candidates is not None:
        raise ValueError("give either --candidates or --candidates-file, got both")
    from hellm.recommend.user_files import read_lines

    return read_lines(args.candidates_file)


def _reasons(recommender, lists, history) -> list:
    def of_list(one) -> list:
        if one.basis == "popularity":
            return [[] for _ in one]
        owner = {"user": one.user} if one.user is not None else {"history": history}
        return [recommender.explain(item.item, **owner, k=2) for item in one]

    return [of_list(one) for one in lists]


def _lifts(recommender, lists, history) -> list:
    def of_list(one) -> list:
        if one.basis == "popularity":
            return [{} for _ in one]
        owner = {"user": one.user} if one.user is not None else {"history": history}
        return recommender.lifts([item.item for item in one], **owner)

    return [of_list(one) for one in lists]

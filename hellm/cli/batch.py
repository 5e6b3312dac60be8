"""`hellm batch`: the lists of many users into one file."""

from __future__ import annotations

import time
from collections.abc import Sequence

from hellm.cli._output import count, duration, print_json
from hellm.cli._parser import add_engine, new_parser, parse

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    parser = new_parser(
        "batch",
        "RUN --out lists.parquet [--users FILE] [options]",
        "Recommend to every user of a finished run, or to those in a file, and write the lists into one parquet file: "
        "a row for each user with basis, item ids and scores. Memory does not grow with the number of users, and "
        "--resume goes on where a killed batch stopped.",
    )
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--out", required=True, metavar="FILE", help="parquet file to write")
    parser.add_argument(
        "--users",
        metavar="FILE",
        help="whom to recommend to: a user id per line; or .parquet or .jsonl with user, history (item ids) or both",
    )
    parser.add_argument("-k", type=int, default=10, metavar="N", help="length of each list")
    parser.add_argument("--candidates", metavar="FILE", help="choose from these items only, an id per line")
    parser.add_argument("--exclude", metavar="FILE", help="leave these items out, an id per line (what is sold out)")
    parser.add_argument("--include-seen", action="store_true", help="also recommend items of the history")
    parser.add_argument("--llm", metavar="PATH", help="where the language model of a fine-tuning run is, if moved")
    parser.add_argument("--device", default="auto", metavar="NAME", help="reads histories: auto, cpu, cuda or cuda:N")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted batch, or start one")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    add_engine(parser)
    parser.add_argument("--json", action="store_true", help="print the counts as one line of JSON")
    args = parse(parser, argv)
    if args.k < 1:
        raise ValueError(f"-k must be >= 1, got {args.k}")
    from hellm._devices import resolve_device
    from hellm.engines import engine_of
    from hellm.recommend.batch import batch
    from hellm.recommend.user_files import read_lines

    started, device = time.perf_counter(), resolve_device(args.device)
    report = batch(
        args.run,
        args.out,
        args.users,
        k=args.k,
        exclude_seen=not args.include_seen,
        candidates=None if args.candidates is None else read_lines(args.candidates),
        exclude=None if args.exclude is None else read_lines(args.exclude),
        resume=args.resume,
        overwrite=args.overwrite,
        device=device,
        language_model=args.llm,
        engine=engine_of(args.engine, args.workers, device),
    )
    if args.json:
        print_json(report)
        return 0
    bases = ", ".join(f"{count(number)} by {basis}" for basis, number in report["basis"].items())
    before = f", {count(report['resumed_at'])} of them from before" if report["resumed_at"] else ""
    lists = f"{count(report['lists'])} lists{before} ({bases or 'none'})"
    print(f"{report['out']}: {lists} of run {report['run']}, {duration(time.perf_counter() - started)}")
    return 0

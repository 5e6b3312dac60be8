"""`hellm export`: a run in a form that other programs read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hellm.cli._output import count, print_json
from hellm.cli._parser import new_parser, parse

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    parser = new_parser(
        "export",
        "RUN --to onnx | usearch | parquet --out DIR",
        "Write a finished run in another form, and report how well it stands for the run: onnx, what turns histories "
        "into queries and scores, compared with torch; usearch, an index for approximate search, compared with exact "
        'search; parquet, the vectors of users and items. Needs pip install "hellm[export]".',
    )
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--to", required=True, metavar="FORM", help="onnx, usearch or parquet")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is there")
    parser.add_argument("--llm", metavar="PATH", help="where the language model of a fine-tuning run is, if moved")
    parser.add_argument("--device", default="auto", metavar="NAME", help="reads histories: auto, cpu, cuda or cuda:N")
    parser.add_argument("--json", action="store_true", help="print the report as one line of JSON")
    args = parse(parser, argv)
    from hellm._devices import resolve_device
    from hellm.export import export

    options = {"overwrite": args.overwrite, "device": resolve_device(args.device), "language_model": args.llm}
    report = export(args.run, args.out, args.to, **options)
    if args.json:
        print_json(report)
    else:
        print(f"{args.out}: {', '.join(report['files'])} of run {report['run']}")
        print("\n".join(f"  {line}" for line in _LINES[args.to](report) + report["notes"]))
    return 0


def _onnx(report: Mapping[str, Any]) -> list[str]:
    return [
        f"{output}: at most {value:.2g} from torch on {count(report['histories'])} histories of up to "
        f"{report['longest']} items (allowed: {report['tolerance']:g})"
        for output, value in report["largest_difference"].items()
    ] + [f"the same ten best items for {report['same_top_10']:.1%} of them"]


def _usearch(report: Mapping[str, Any]) -> list[str]:
    recall = ", ".join(f"{name} {value:.4f}" for name, value in report["recall"].items())
    return [
        f"{recall} of exact search over {count(report['items'])} items, on {count(report['queries'])} users "
        f"(wanted: {report['target']:g})",
        f"{report['index_ms']:.3g} ms a query, exact search {report['exact_ms']:.3g} ms: the index "
        f"{'pays' if report['pays'] else 'does not pay'} here",
    ]


def _parquet(report: Mapping[str, Any]) -> list[str]:
    return [
        f"{count(report['items'])} items and {count(report['users'])} users, by {report['basis']}, of width "
        f"{report['width']}; {count(report['users_left_out'])} users have nothing to go by"
    ]


_LINES = {"onnx": _onnx, "usearch": _usearch, "parquet": _parquet}

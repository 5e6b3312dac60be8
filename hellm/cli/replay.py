"""`hellm replay`: logged answers of a server computed again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hellm.cli._output import count, one_line, print_json
from hellm.cli._parser import new_parser, parse
from hellm.cli.serve import store_of

__all__ = ["run"]

# Reasons that are printed.
_MOST = 20


def run(argv: Sequence[str]) -> int:
    parser = new_parser(
        "replay",
        "ANSWERS RUN [RUN ...]",
        "Compute answers of hellm serve again, from the run that gave them and the events and items that had come by "
        "then: the same bits, or the reason why not. The exit code is 0 where all are the same, and 1 otherwise. "
        'Needs pip install "hellm[serve]".',
    )
    parser.add_argument(
        "answers", metavar="ANSWERS", help="what hellm serve --answer-log wrote, or lines of it; or a .json file"
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory; several where runs took over")
    parser.add_argument(
        "--store",
        metavar="FILE",
        help="events and items of the server, or none; default: RUN.events.sqlite of the first",
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="reads histories: auto, cpu, cuda or cuda:N")
    parser.add_argument("--llm", metavar="PATH", help="where the language model of a fine-tuning run is, if moved")
    parser.add_argument(
        "--onnx", nargs="+", type=str, metavar="DIR", help="what hellm serve --onnx had of each run that is to answer"
    )
    parser.add_argument("--json", action="store_true", help="print what came of each, with the answers, as one line")
    args = parse(parser, argv)
    try:
        from hellm.serve.replay import replay
    except ImportError as error:
        raise ImportError(f'replaying needs the package {error.name}: pip install "hellm[serve]"') from None
    from hellm._devices import resolve_device

    store = store_of(args.runs[0], args.store)
    outcomes = replay(
        args.answers,
        args.runs,
        store,
        device=resolve_device(args.device),
        language_model=args.llm,
        onnx=args.onnx or (),
    )
    verdicts = Counter(one.verdict for one in outcomes)
    if args.json:
        counts = {name: verdicts[name] for name in ("same", "different", "impossible")}
        print_json({**counts, "answers": [one._asdict() for one in outcomes]})
    else:
        print(f"{count(verdicts['same'])} of {count(len(outcomes))} answers have the same bits")
        others = [one for one in outcomes if one.verdict != "same"]
        for one in others[:_MOST]:
            what = "has other bits" if one.verdict == "different" else "cannot be computed again"
            print(f"  {args.answers}:{one.place}: {one.question or 'it'} {what}: {one_line(one.reason, 500)}")
        if len(others) > _MOST:
            print(f"  and {count(len(others) - _MOST)} more")
    return 0 if verdicts["same"] == len(outcomes) else 1

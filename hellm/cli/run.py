"""`hellm run`: from raw data to recommendations in one command."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hellm._folders import hold
from hellm.cli._output import duration, print_json, title
from hellm.cli._training import parse_settings, settings_parser
from hellm.cli.data import reading_options, summary
from hellm.cli.features import CACHE_HELP
from hellm.config import RunConfig
from hellm.pipeline import Pipeline, Step, check_pipeline

__all__ = ["PrintedSteps", "print_cost", "run"]

# Latest events of a user that are shown.
_HISTORY = 5


def run(argv: Sequence[str]) -> int:
    parser = settings_parser(
        "run",
        "From raw data to recommendations: item features, stage 1, sequence models, the language model, their sum as "
        "far as each is shown to help, a comparison with simpler recommenders, and sample recommendations with "
        "reasons. Every stage leaves a folder in --out, and --resume goes on where it stopped. It needs "
        'pip install "hellm[encoders,smollm2]": encoders where items have texts or pictures (without: text=none '
        "image=none), smollm2 for the language model (without: language_model=false); baselines adds itemknn, bpr and "
        "als to the comparison.",
        RunConfig,
        dry_run="stop when the data are read and encoded",
        json="print the comparison as one line of JSON, the last of the output",
    )
    parser.add_argument("--cache", metavar="DIR", help=CACHE_HELP)
    args, config = parse_settings(parser, argv, RunConfig)
    if args.out is None:
        raise ValueError("missing: --out (the folder to make)")
    check_pipeline(args.out, resume=args.resume, overwrite=args.overwrite, inputs=[args.data])
    with hold(args.out):
        return _run(args, config)


def _run(args, config: RunConfig) -> int:
    from hellm.data import load_dataset

    started = time.perf_counter()
    pipeline = Pipeline(
        args.out, config, resume=args.resume, overwrite=args.overwrite, cache=args.cache, on_plan=print_cost
    )
    printed = PrintedSteps(pipeline)
    printed(pipeline.data(lambda: load_dataset(args.data, **reading_options(args))))
    if args.dry_run:
        print(f"Nothing was trained (--dry-run); the data with their features are in {pipeline.path('data')}.")
        print("Go on with --resume; what a stage would take: its command above with --dry-run.")
        return 0
    printed.all(pipeline.training())
    comparison = printed(pipeline.comparison())
    printed(pipeline.recommendations())
    print(f"\nDone in {duration(time.perf_counter() - started)}.")
    if args.json:
        print_json(comparison)
    return 0


class PrintedSteps:
    """Runs steps of a pipeline, and prints each with its command and what came of it."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.number, self.noted = pipeline, 0, 0

    def __call__(self, step: Step) -> Any:
        self.number += 1
        print(f"\n[{self.number}] {step.text}\n    $ {step.command}", flush=True)
        value = step.run()
        show = {"data": self._data, "compare": self._comparison, "recommend": self._lists, "fused": self._fusion}
        show.get(step.name, self._stage)(step, value)
        for note in self.pipeline.notes[self.noted :]:
            print(f"  note: {note}")
        self.noted = len(self.pipeline.notes)
        return value

    def all(self, steps: Iterable[Step]) -> None:
        """Every one of them, in order."""
        for step in steps:
            self(step)

    def _data(self, step: Step, dataset: Any) -> None:
        print(f"{dataset.name}: {summary(dataset)}")
        for note in dataset.notes:
            print(f"  note: {note}")

    def _stage(self, step: Step, result: dict[str, Any]) -> None:
        from hellm.cli._training import print_result

        ks = self.pipeline.ks
        k = ks[len(ks) // 2]
        print_result(result, self.pipeline.path(step.name), metrics=(f"recall@{k}", f"ndcg@{k}"))

    def _fusion(self, step: Step, result: dict[str, Any]) -> None:
        from hellm.cli.fuse import print_fusion

        print_fusion(result, self.pipeline.path(step.name))

    def _comparison(self, step: Step, comparison: dict[str, Any]) -> None:
        from hellm.cli.evaluate import print_comparison
        from hellm.evaluate.slices import ITEM_POPULARITY

        print_comparison(comparison, slices=[ITEM_POPULARITY])

    def _lists(self, step: Step, answers: list[dict[str, Any]]) -> None:
        for answer in answers:
            print(f"user {answer['user']} had")
            for item in answer["history"][-_HISTORY:]:
                print(f"    {title(item['item'], item['title'])}")
            print("  and is recommended")
            for item in answer["items"]:
                print(f"    {title(item['item'], item['title'])}{_because(item['reasons'])}")


def print_cost(name: str, plan: Mapping[str, Any]) -> None:
    """What a stage is likely to cost, before it starts."""
    from hellm.cli.fuse import print_plan

    if name == "fused":
        print_plan(plan)
        return
    print(
        f"About {duration(plan['expected_seconds_per_epoch'])} an epoch, at most {duration(plan['expected_seconds'])}, "
        "and validations on top.",
        flush=True,
    )


def _because(reasons: list[dict[str, Any]]) -> str:
    if not reasons:
        return ""
    reason = reasons[0]
    parts = [f"{reason['shared_users']} bought both"] if reason["shared_users"] else []
    parts += [f"alike in {name}" for name, link in (reason["content"] or {}).items() if link["shared_hyperedges"]]
    return f"  (because of {title(reason['item'], reason['title'])}{': ' + ', '.join(parts) if parts else ''})"

"""Stage 2 as `hellm` runs it beside the published loop, on the same language model: python -m benchmarks.llm.

The published loop: one history per target, 7 at a time in random order, left-padded behind the whole prompt, graph
prefix per history, plain softmax attention, a frozen random head; and one user at a time when scoring. That is
`compat="official"` here, whose forward and gradients the tests hold to a reference of their own. `hellm` is the
default: all targets of a user in one pass behind one instruction, histories of similar length together. Both see the
same histories of made-up items, with lengths as in a 5-core data set.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import ROOT, environment, write_json
from hellm.config import OFFICIAL_LLM
from hellm.evaluate import HistoryScorer
from hellm.models import RecommenderLLM
from hellm.models.llm.language_model import load_language_model
from hellm.training.finetune import finetune_loss
from hellm.training.history_sampler import HistorySampler

TRAINING_AT_LEAST, SCORING_AT_LEAST = 2.0, 15.0
NUM_USERS, NUM_ITEMS, WIDTH = 2000, 4000, 64
BATCH_TOKENS, PUBLISHED_BATCH = 512, 7


def made_up_events(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Users and items of events, 3 to about 30 a user and 6 on average, users in order."""
    rng = np.random.default_rng(seed)
    count = 3 + rng.geometric(1 / 4, NUM_USERS) - 1
    return np.repeat(np.arange(NUM_USERS), count), rng.integers(0, NUM_ITEMS, count.sum())


def build(llm: str, official: bool) -> RecommenderLLM:
    model, tokenizer = load_language_model(llm)
    model.set_attn_implementation("eager" if official else "sdpa")
    generator = torch.Generator().manual_seed(0)
    tables = {name: torch.randn(NUM_ITEMS, WIDTH, generator=generator) for name in ("graph", "sequence")}
    settings = {"compat": "official", **OFFICIAL_LLM} if official else {}
    torch.manual_seed(0)
    return RecommenderLLM(model, tokenizer, tables, **settings)


def sampler_of(model: RecommenderLLM, official: bool) -> HistorySampler:
    if not official:
        return HistorySampler(*made_up_events(), NUM_USERS, batch_tokens=BATCH_TOKENS)
    around = len(model.instruction) + len(model.response)
    options = {"per_target": True, "batch_size": PUBLISHED_BATCH, "sort": False, "tokens_around": around}
    return HistorySampler(*made_up_events(), NUM_USERS, **options)


def training_step(model: RecommenderLLM, sampler: HistorySampler) -> Callable[[], dict[str, int]]:
    """Forward, backward and AdamW of the next batch; gives what it worked through."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.train()
    step = 0

    def run() -> dict[str, int]:
        nonlocal step
        batch = sampler.sample(0, step % sampler.num_steps)
        step += 1
        finetune_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        lengths = np.diff(batch.indptr)
        return {"targets": len(batch.targets), "tokens": len(lengths) * sampler.tokens_of(int(lengths.max()))}

    return run


def scoring(model: RecommenderLLM, users_at_once: int) -> Callable[[], dict[str, int]]:
    """Scores of the whole catalogue for the next users."""
    users, items = made_up_events()
    indptr = np.concatenate([[0], np.bincount(users, minlength=NUM_USERS).cumsum()])
    scorer = HistoryScorer(model, indptr, items)
    start = 0

    def run() -> dict[str, int]:
        nonlocal start
        model.eval()
        chosen = torch.arange(start, start + users_at_once) % NUM_USERS
        start += users_at_once
        scorer.scores(chosen)
        return {"users": users_at_once}

    return run


def rates(run: Callable[[], dict[str, int]], times: int) -> list[dict[str, float]]:
    """Work per second, each time."""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        done = run()
        seconds = time.perf_counter() - started
        found.append({name: value / seconds for name, value in done.items()})
    return found


def measure(llm: str, rounds: int, published_users: int = 3) -> dict[str, Any]:
    """Both loops in turns, round by round in one process, after a round to warm up.

    Args:
        published_users: whom the published loop scores in a round, one by one.
    """
    models = {"hellm": build(llm, False), "published": build(llm, True)}
    work = {
        ("hellm", "training"): (training_step(models["hellm"], sampler_of(models["hellm"], False)), 1),
        ("published", "training"): (training_step(models["published"], sampler_of(models["published"], True)), 1),
        ("hellm", "scoring"): (scoring(models["hellm"], 512), 1),
        ("published", "scoring"): (scoring(models["published"], 1), published_users),
    }
    found: dict[tuple[str, str], list[dict[str, float]]] = {place: [] for place in work}
    for round_ in range(rounds + 1):
        for place, (run, times) in work.items():
            done = rates(run, times)
            found[place] += done if round_ else []
    entries = {name: {what: _summary(found[name, what]) for what in ("training", "scoring")} for name in models}
    ratio = {
        "training": _ratio(entries, "training", "targets"),
        "scoring": _ratio(entries, "scoring", "users"),
    }
    return {
        "kind": "llm",
        "environment": environment(),
        "llm": llm,
        "parameters": {"num_items": NUM_ITEMS, "batch_tokens": BATCH_TOKENS, "published_batch": PUBLISHED_BATCH},
        "entries": entries,
        "targets": [
            {"what": what, "at_least": least, "value": ratio[what], "met": ratio[what] >= least}
            for what, least in (("training", TRAINING_AT_LEAST), ("scoring", SCORING_AT_LEAST))
        ],
    }


def _summary(rounds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    summary = {}
    for name in rounds[0]:
        values = sorted(one[name] for one in rounds)
        spread = {"p20": values[len(values) // 5], "p80": values[-1 - len(values) // 5]}
        summary[name] = {"median": statistics.median(values), **spread, "rounds": len(values)}
    return summary


def _ratio(entries: dict[str, Any], what: str, unit: str) -> float:
    return entries["hellm"][what][unit]["median"] / entries["published"][what][unit]["median"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.llm", description=__doc__)
    parser.add_argument("--llm", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "llm.json")
    options = parser.parse_args(arguments)
    result = measure(options.llm, options.rounds)
    write_json(options.out, result)
    for target in result["targets"]:
        print(f"{target['what']}: {target['value']:.1f}x the published loop (at least {target['at_least']:g}x)")
    return 0


if __name__ == "__main__":
    sys.exit(main())

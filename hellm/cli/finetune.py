"""`hellm finetune`: a language model that ranks the catalogue, into a run directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hellm.cli._output import count, duration
from hellm.cli._training import run_training
from hellm.cli.data import summary
from hellm.config import FinetuneConfig, config_to_dict

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    return run_training(
        argv,
        verb="finetune",
        description="Fine-tune a language model on histories whose items are tokens made of stage-1 and SASRec "
        "embeddings; choose the best epoch by validation, score the test split once, and leave a run directory. "
        "Started by torchrun or accelerate launch, several processes share the histories of every step.",
        plan=_plan,
        print_plan=_print_plan,
        train=_train,
    )


def _train(config: FinetuneConfig, dataset, out: str, **options) -> dict[str, Any]:
    import sys

    from hellm.training.finetune import finetune

    def show(plan: Mapping[str, Any]) -> None:
        for line in _plan_lines(plan, config.max_epochs):
            print(line, file=sys.stderr)

    return finetune(config, dataset, out, on_plan=show, **options)


def _plan(config: FinetuneConfig, dataset, **runs) -> dict[str, Any]:
    """What a run would do, from one timed step, without touching the disk."""
    import torch

    from hellm.training.finetune import (
        MEMORY_ADVICE,
        build_history_sampler,
        build_recommender_llm,
        plan_finetuning,
        resolve_finetune_config,
    )
    from hellm.training.item_inputs import load_item_inputs
    from hellm.training.stage import readable_memory_errors

    config, notes = resolve_finetune_config(config, dataset)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    inputs = load_item_inputs(config, dataset, **runs)
    with readable_memory_errors("a step of fine-tuning", MEMORY_ADVICE):
        model = build_recommender_llm(config, dataset, inputs).to(config.device)
        plan = plan_finetuning(config, model, build_history_sampler(config, dataset, model))
    return {"dataset": dataset.summary(), "config": config_to_dict(config), **plan, "notes": notes}


def _print_plan(plan: dict[str, Any], dataset) -> None:
    config = plan["config"]
    print(f"{dataset.name}: {summary(dataset)}")
    print(
        f"  model            {config['llm']} in {config['dtype']}, item tokens from {', '.join(config['item_inputs'])}"
    )
    for line in _plan_lines(plan, config["max_epochs"]):
        print(line)
    for note in plan["notes"]:
        print(f"  note             {note}")
    print("Nothing was trained or written (--dry-run).")


def _plan_lines(plan: Mapping[str, Any], max_epochs: int) -> list[str]:
    gigabytes = ", ".join(f"{value / 1e9:.1f} GB ({name})" for name, value in plan["memory_bytes"].items())
    return [
        f"  parameters       {count(plan['num_trained_parameters'])} trained of {count(plan['num_parameters'])}",
        f"  training         {count(plan['histories'])} histories with {count(plan['targets_per_epoch'])} targets, "
        f"{count(plan['tokens_per_epoch'])} tokens ({plan['padding_share']:.0%} padding) in "
        f"{count(plan['steps_per_epoch'])} steps per epoch, at most {count(max_epochs)} epochs",
        f"  memory           about {gigabytes}",
        f"  time             about {duration(plan['expected_seconds_per_epoch'])} an epoch and "
        f"{duration(plan['expected_seconds'])} in all, without validation, by one step that took "
        f"{plan['seconds_of_step']:.1f} s",
    ]

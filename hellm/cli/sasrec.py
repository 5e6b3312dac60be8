"""`hellm sasrec`: the sequence model into a run directory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hellm.cli._output import count, duration
from hellm.cli._training import run_training
from hellm.cli.data import summary
from hellm.config import SASRecConfig, config_to_dict

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    return run_training(
        argv,
        verb="sasrec",
        description="Train SASRec, the sequence model, on what each user did next; choose the best epoch by "
        "validation, score the test split once, and leave a run directory.",
        plan=_plan,
        print_plan=_print_plan,
    )


def _plan(config: SASRecConfig, dataset) -> dict[str, Any]:
    """What a run would do, from one timed step, without touching the disk."""
    import torch

    from hellm.training.sasrec import build_sasrec, build_sequence_sampler, resolve_sasrec_config, sasrec_losses
    from hellm.training.stage import plan_of_steps, seconds_of_step

    config, notes = resolve_sasrec_config(config, dataset)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    sampler, model = build_sequence_sampler(config, dataset), build_sasrec(config, dataset).to(config.device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    batch = sampler.sample(0, 0)
    seconds = seconds_of_step(model, lambda: sasrec_losses(model, batch, config.loss)[config.loss])
    return {
        "dataset": dataset.summary(),
        "config": config_to_dict(config),
        "positions_per_epoch": sampler.num_positions,
        **plan_of_steps(seconds, sampler.num_steps, config.max_epochs),
        "num_parameters": parameters,
        # Weights, gradients and Adam's two moments in float32.
        "parameter_memory_bytes": 16 * parameters,
        "notes": notes,
    }


def _print_plan(plan: dict[str, Any], dataset) -> None:
    config = plan["config"]
    loss = "cross-entropy over all items" if config["loss"] == "cross_entropy" else "one sampled negative per position"
    print(f"{dataset.name}: {summary(dataset)}")
    print(
        f"  model            SASRec, {config['num_layers']} layers of width {config['embedding_dim']}, the last "
        f"{config['max_length']} items, {loss}"
    )
    print(
        f"  parameters       {count(plan['num_parameters'])} "
        f"({plan['parameter_memory_bytes'] / 2**20:.0f} MiB with gradients and optimiser)"
    )
    print(
        f"  training         {count(plan['positions_per_epoch'])} positions in {count(plan['steps_per_epoch'])} steps "
        f"per epoch, at most {count(config['max_epochs'])} epochs, on {config['device']}"
    )
    print(
        f"  time             about {duration(plan['expected_seconds_per_epoch'])} an epoch and "
        f"{duration(plan['expected_seconds'])} in all, without validation, by one step that took "
        f"{plan['seconds_of_step']:.2f} s"
    )
    for note in plan["notes"]:
        print(f"  note             {note}")
    print("Nothing was trained or written (--dry-run).")

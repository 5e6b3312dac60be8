"""`hellm pretrain`: stage 1 into a run directory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hellm.cli._output import count
from hellm.cli._training import print_result, run_training
from hellm.cli.data import summary
from hellm.config import PretrainConfig, config_to_dict

__all__ = ["print_result", "run"]


def run(argv: Sequence[str]) -> int:
    return run_training(
        argv,
        verb="pretrain",
        description="Train the graph encoder, choose the best epoch by validation, score the test split once, and "
        "leave a run directory.",
        plan=_plan,
        print_plan=_print_plan,
    )


def _plan(config: PretrainConfig, dataset) -> dict[str, Any]:
    """What a run would do, without building graphs or touching the disk."""
    from hellm.training.pretrain import build_sampler, resolve_config

    config, notes = resolve_config(config, dataset)
    model = config.model
    sampler = build_sampler(config, dataset)
    rows = (1 + model.user_hypergraph) * dataset.num_users + (1 + model.item_hypergraph) * dataset.num_items
    return {
        "dataset": dataset.summary(),
        "config": config_to_dict(config),
        "steps_per_epoch": sampler.num_steps,
        "max_steps": sampler.num_steps * config.max_epochs,
        "num_embedding_parameters": rows * model.embedding_dim,
        # Weights, gradients and Adam's two moments in float32.
        "parameter_memory_bytes": 16 * rows * model.embedding_dim,
        "notes": notes,
    }


def _print_plan(plan: dict[str, Any], dataset) -> None:
    config = plan["config"]
    model = config["model"]
    graphs = [f"{model['backbone']} on the user-item graph"]
    graphs += ["a user hypergraph"] if model["user_hypergraph"] else []
    graphs += [f"an item hypergraph from {', '.join(model['modalities'])}"] if model["item_hypergraph"] else []
    print(f"{dataset.name}: {summary(dataset)}")
    print(f"  model            {', '.join(graphs)}")
    print(
        f"  parameters       {count(plan['num_embedding_parameters'])} in embeddings "
        f"({plan['parameter_memory_bytes'] / 2**20:.0f} MiB with gradients and optimiser)"
    )
    print(
        f"  training         {count(plan['steps_per_epoch'])} steps per epoch, at most {count(config['max_epochs'])} "
        f"epochs, on {config['device']}"
    )
    for note in plan["notes"]:
        print(f"  note             {note}")
    print("Nothing was trained or written (--dry-run).")

"""From data to recommendations in Python: make a small shop, train stage 1, compare it with baselines, recommend."""

from __future__ import annotations

import argparse
from pathlib import Path

import hellm
from hellm.config import PretrainConfig, load_config
from hellm.data import load_dataset, write_sample_shop
from hellm.training.pretrain import pretrain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("first-run"))
    parser.add_argument("--max-epochs", type=int, default=20)
    args = parser.parse_args()

    # Your own folder with events.csv, items.csv and images/ is read in the same way.
    shop = write_sample_shop(args.out / "shop", num_users=300, num_items=160)
    data = load_dataset(shop)
    print(f"{data.num_users} users, {data.num_items} items, features: {', '.join(data.item_features)}")

    config = load_config(PretrainConfig, "demo", [f"max_epochs={args.max_epochs}", "tensorboard=false"])
    run = args.out / "stage1"
    result = pretrain(config, data, run)
    print(f"best epoch {result['best_epoch']} of {result['num_epochs']}, chosen on validation")

    # On the validation split, which is for choosing; the test split is for the last look.
    comparison = hellm.compare([run, "popularity"], data, split="valid", metrics=("recall",), ks=(10,))
    for model in comparison["models"]:
        low, high = model["confidence_intervals"]["recall@10"]
        print(f"{Path(model['name']).name:<12} recall@10 {model['metrics']['recall@10']:.3f} [{low:.3f}, {high:.3f}]")

    recommender = hellm.Recommender.load(run)
    for answer in recommender.recommend(users=recommender.user_ids.ids[:2], k=3):
        print(answer.user, "->", [item.title or item.item for item in answer])


if __name__ == "__main__":
    main()

"""Which encoder of item texts serves the sequence model best, by validation alone.

    python -m benchmarks.encoders DATA --out encoders.json [--rows minilm-title mpnet-title]

The test events are taken out before anything is encoded or trained. Every row is trained twice with the settings of
`hellm sasrec`: with item ids, and by content alone (`--preset content`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from hellm._files import atomic_path
from hellm.config import SASRecConfig, load_config
from hellm.data import Dataset, load_dataset
from hellm.features import add_features
from hellm.features.cache import default_cache
from hellm.training.sasrec import train_sasrec

TITLE = {"text_fields": ("title",)}
LLM = {"text": "llm", **TITLE}
# Row -> what `add_features` is called with, one call after the other; attributes are named like their columns.
ROWS: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "minilm": [{"text": "minilm"}],
    "minilm-title": [{"text": "minilm", **TITLE}],
    "mpnet-title": [{"text": "mpnet", **TITLE}],
    "llm-4-title": [LLM | {"num_layers": 4}],
    "llm-28-title": [LLM | {"num_layers": 28}],
    "minilm-title, llm-4-title": [{"text": "minilm", **TITLE}, LLM | {"num_layers": 4, "text_name": "llm"}],
    "minilm, attributes": [{"text": "minilm"}],
}
METRICS = ("ndcg@10", "recall@10", "recall@20")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--override", nargs="*", default=[], metavar="KEY=VALUE", help="settings of `hellm sasrec`")
    args = parser.parse_args()
    dataset, rows = without_test(load_dataset(args.data)), []
    for name in args.rows:
        encoded = replace(dataset, item_features={})
        for call in ROWS[name]:
            encoded = add_features(encoded, image=None, bfloat16=True, cache=default_cache(), **call)
        content = [*encoded.item_features, *(encoded.attribute_sets if "attributes" in name else ())]
        for preset in ("default", "content") if content else ("default",):
            settings = [f"content={json.dumps(content)}", "num_threads=1", "tensorboard=false", *args.override]
            config = load_config(SASRecConfig, preset, settings)
            with tempfile.TemporaryDirectory() as folder:
                train_sasrec(config, encoded, Path(folder, "run"))
                records = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
            best = max((one for one in records if "valid_ndcg@10" in one), key=lambda one: one["valid_ndcg@10"])
            rows.append({"encoder": name, "preset": preset, "overrides": args.override, "epoch": best["epoch"]})
            rows[-1] |= {metric: round(best[f"valid_{metric}"], 4) for metric in METRICS}
            print(rows[-1], flush=True)
            with atomic_path(args.out) as temporary:
                temporary.write_text(
                    json.dumps({"data": dataset.name, "split": "valid", "rows": rows}, indent=1) + "\n"
                )


def without_test(dataset: Dataset) -> Dataset:
    """Its test events taken out."""
    kept = dataset.split != 2
    times = None if dataset.timestamps is None else dataset.timestamps[kept]
    return replace(
        dataset, users=dataset.users[kept], items=dataset.items[kept], split=dataset.split[kept], timestamps=times
    )


if __name__ == "__main__":
    main()

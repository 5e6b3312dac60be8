"""The names of what a run holds, in one place, and what kind of model it is.

config.yaml             resolved settings
metrics.jsonl           one record per epoch, and one per validation within an epoch
result.json             test metrics, protocol, counts, seconds, peak memory, versions; there when the run is finished
embeddings.safetensors  final embeddings or weights, with the kind of the model and the version of this format
ids.parquet             which id each embedding row belongs to
histories.parquet       the events, as embedding rows
content.safetensors     what the items look and read like, where the data have features
test_evaluations.jsonl  every evaluation on the test split, training's own first (`hellm.artifact.evaluation_log`)
test_users.safetensors  the test metrics of every user (`hellm.artifact.test_users`)
checkpoint/             last.safetensors (to go on from) and best.safetensors (what is tested)
model/                  what was trained of a language model
sequence_model/         the sequence model that a language model starts from, where it has one
towers/NAME/            the models that a fused one adds up, each with the metrics.jsonl of its training
refit.json              how it compares with the run that it continues (`hellm.upkeep.refit`)
curves.png              losses and validation metrics over epochs
events.out.tfevents.*   TensorBoard, if asked for
.hellm.json             the mark of a folder that this program made, see `hellm._folders`
"""

from __future__ import annotations

__all__ = [
    "CHECKPOINT",
    "CONFIG",
    "CONTENT",
    "CURVES",
    "EMBEDDINGS",
    "HISTORIES",
    "IDS",
    "LANGUAGE_MODEL",
    "METRICS",
    "REFIT",
    "RESULT",
    "RUN_LAYOUT",
    "SEQUENCE_MODEL",
    "TEST_EVALUATIONS",
    "TEST_USERS",
    "TOWERS",
]

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
RESULT = "result.json"
REFIT = "refit.json"
EMBEDDINGS = "embeddings.safetensors"
IDS = "ids.parquet"
HISTORIES = "histories.parquet"
CONTENT = "content.safetensors"
TEST_EVALUATIONS = "test_evaluations.jsonl"
TEST_USERS = "test_users.safetensors"
CURVES = "curves.png"
CHECKPOINT = "checkpoint"
LANGUAGE_MODEL = "model"
SEQUENCE_MODEL = "sequence_model"
TOWERS = "towers"

_MODEL_LAYOUT = (
    EMBEDDINGS,
    f"{SEQUENCE_MODEL}/{EMBEDDINGS}",
    *(
        f"{LANGUAGE_MODEL}/{name}"
        for name in (
            "config.json",
            "model.safetensors",
            "adapter_config.json",
            "adapter_model.safetensors",
            "README.md",
        )
    ),
)
RUN_LAYOUT = (
    *(CONFIG, METRICS, RESULT, REFIT, TEST_EVALUATIONS, IDS, HISTORIES, CONTENT, CURVES, TEST_USERS),
    "events.out.tfevents.*",
    *(f"{CHECKPOINT}/{name}" for name in ("last.safetensors", "best.safetensors", "data.json", "language_model.json")),
    *_MODEL_LAYOUT,
    *(f"{TOWERS}/*/{name}" for name in (*_MODEL_LAYOUT, METRICS)),
)
"""Files of a run of any stage, as `hellm._folders.mark_folder` takes them."""

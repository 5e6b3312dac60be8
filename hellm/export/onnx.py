"""A run as ONNX: what makes queries of histories, and what scores all items, each checked against torch.

B = histories, T = width of the padded batch, I = items, D = embedding width.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hellm.data import Histories
from hellm.evaluate import history_scores, top_items
from hellm.export.encoders import ExportError, encoder_of, scorer_of, without_queries
from hellm.export.sample import ITEM_IDS, sample_histories
from hellm.models.histories import pad_histories
from hellm.recommend import Recommender, ServedFused, ServedTransitions

__all__ = ["ENCODER", "KEYS", "TOLERANCE", "export_onnx", "open_session"]

TOLERANCE = 1e-4
"""Most by which a query or a score of onnxruntime may differ from that of torch."""
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
ENCODER, KEYS = "encoder.onnx", "keys.npy"
"""What makes queries of histories, and the keys of the items; absent for models without queries."""
_SCORES = "scores.onnx"
_BATCH, _MAX_ELEMENTS = 64, 1 << 26
_TOP = 10


def export_onnx(recommender: Recommender, folder: Path, *, num_histories: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Write the model as ONNX, run it on histories of the run's users, and compare.

    Both graphs take "items" [B, T] int64, rows of the items in time order with any row as padding at the end, and
    "lengths" [B] int64.

        encoder.onnx  query [B, D] float32; left out where the model has no queries
        keys.npy      [I, D] float32; the score of an item is <query, key>
        items.json    ids of the items by row
        scores.onnx   scores [B, I] float32; those of an empty history are how often items were bought in training

    Args:
        recommender: Of a run of stage 1, SASRec, transitions, or a sum of these.
        folder: Where to write.
        num_histories: Compared, at most: the shortest, the longest and some between, and an empty one.
        seed: Of their choice.
    Returns: "files", "histories" (how many were compared), "longest", "largest_difference" (of "query" and "scores"),
        "tolerance", "same_top_10" (share of histories with the same ten best items), and "notes".
    Raises: ExportError, a language model, or a graph that is further from torch than `TOLERANCE`. ImportError, without
        the extra "export".
    """
    _check_installed()
    model = recommender.model
    scores = _WithPopularity(scorer_of(model), recommender.popularity)
    graphs: dict[str, nn.Module | None] = {"query": encoder_of(model), "scores": scores}
    files = {"query": ENCODER, "scores": _SCORES}
    for output, graph in graphs.items():
        if graph is not None:
            _write(graph, folder / files[output], output)
    if graphs["query"] is not None:
        np.save(folder / KEYS, recommender.item.numpy())
    (folder / ITEM_IDS).write_text(json.dumps(recommender.item_ids.ids), encoding="utf-8")
    histories = sample_histories(recommender, num_histories, seed)
    sessions = {output: open_session(folder / files[output]) for output, graph in graphs.items() if graph is not None}
    report = _compared(recommender, histories, sessions)
    for output, difference in report["largest_difference"].items():
        if not difference <= TOLERANCE:
            raise ExportError(
                f"{files[output]}: {output} must be within {TOLERANCE} of torch, got {difference:.2g} on "
                f"{report['histories']} histories"
            )
    written = sorted(one.name for one in folder.iterdir())
    return {"files": written, **report, "tolerance": TOLERANCE, "notes": _notes(recommender, "query" in sessions)}


class _WithPopularity(nn.Module):
    """Scores, and for empty histories the popularity of the items, as `Recommender.recommend` does."""

    def __init__(self, scorer: nn.Module, popularity: Tensor) -> None:
        super().__init__()
        self.popularity: Tensor
        self.scorer = scorer
        self.register_buffer("popularity", popularity)

    def forward(self, items: Tensor, lengths: Tensor) -> Tensor:
        return torch.where(lengths.unsqueeze(1) > 0, self.scorer(items, lengths), self.popularity)


def _check_installed() -> None:
    for name in PACKAGES:
        if not _is_installed(name):
            raise ImportError(f'ONNX needs the package {name}: pip install "hellm[export]"')


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _write(graph: nn.Module, file: Path, output: str) -> None:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    example = (torch.zeros(3, 7, dtype=torch.int64), torch.tensor([7, 2, 0]))
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            graph.eval(),
            example,
            input_names=["items", "lengths"],
            output_names=[output],
            dynamic_shapes=({0: batch, 1: length}, {0: batch}),
            verbose=False,
        )
        assert program is not None
        program.save(file)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps to itself what the exporter says of packages that are not there and of names of axes."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def open_session(file: Path) -> Any:
    """A graph that is ready to run on the CPU, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _compared(recommender: Recommender, histories: Histories, sessions: dict[str, Any]) -> dict[str, Any]:
    model, keys = recommender.model, recommender.item
    worst, same, size = dict.fromkeys(sessions, 0.0), 0, _batch_size(recommender)
    for start in range(0, histories.num_users, size):
        part = histories.take(np.arange(start, min(start + size, histories.num_users)))
        indptr, items = (torch.from_numpy(one) for one in part)
        with torch.no_grad():
            expected = {"scores": history_scores(model, keys, indptr, items)}
            if "query" in sessions:
                expected["query"] = model.embed(indptr, items)
        expected["scores"][torch.from_numpy(part.lengths == 0)] = recommender.popularity
        padded, _ = pad_histories(indptr, items)
        padded = padded if padded.shape[1] else padded.new_zeros(len(padded), 1)
        given = {"items": padded.numpy(), "lengths": part.lengths}
        for output, session in sessions.items():
            found = torch.from_numpy(session.run([output], given)[0])
            worst[output] = max(worst[output], float((found - expected[output]).abs().max()))
            if output == "scores":
                k = min(_TOP, found.shape[1])
                same += int((top_items(found, k) == top_items(expected[output], k)).all(1).sum())
    return {
        "histories": histories.num_users,
        "longest": int(histories.lengths.max(initial=0)),
        "largest_difference": worst,
        "same_top_10": same / max(1, histories.num_users),
    }


def _batch_size(recommender: Recommender) -> int:
    """Histories at once: the graph of transitions has a row of them for every pair of items."""
    model = recommender.model
    towers = model.towers.values() if isinstance(model, ServedFused) else [model]
    pairs = [len(tower.model.following.weight) for tower in towers if isinstance(tower, ServedTransitions)]
    return max(1, min(_BATCH, _MAX_ELEMENTS // max([1, *pairs])))


def _notes(recommender: Recommender, has_query: bool) -> list[str]:
    notes = ["the items of a history are not left out: whoever ranks the scores does that"]
    model = recommender.model
    if model.user is not None:
        notes.append(
            "known users of this run have trained embeddings, which hellm export --to parquet writes; the graphs fold "
            "in histories, as for people whom the run has never seen"
        )
    scored = without_queries(model)
    if scored and has_query:
        notes.append(f"query and keys are without {', '.join(scored)}, which has scores only; scores.onnx has all")
    return notes

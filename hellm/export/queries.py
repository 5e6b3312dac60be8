"""Queries of histories by onnxruntime, for a run that serves.

B = histories, D = embedding width.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hellm._files import DataError, read_json, reading
from hellm.evaluate import history_scores
from hellm.export.encoders import ExportError, encoder_of
from hellm.export.onnx import ENCODER, KEYS, TOLERANCE, open_session
from hellm.export.sample import sample_histories
from hellm.recommend import Recommender

__all__ = ["OnnxEncoder"]

# Histories that are compared with torch.
_COMPARED = 64


class OnnxEncoder:
    """The query encoder that `hellm export --to onnx` wrote, see `hellm.recommend.Recommender.encode_with`.

    A history is encoded by itself, so that its query has the same bits whoever else is asked for.

    Args:
        folder: The export.

    Attributes:
        run: Hash of the run that was exported.
        num_items: Of that run.

    Raises: FileNotFoundError, no such folder, or no export. ExportError, an export in another form, or of a model
        without queries. DataError, damaged files. ImportError, without onnxruntime.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        folder = Path(folder)
        report = read_json(folder / "export.json")
        if report.get("to") != "onnx":
            raise ExportError(f"{folder} must be an export to onnx, got {report.get('to')}")
        if not (folder / ENCODER).is_file():
            raise ExportError(f"{folder} holds no {ENCODER}: the model that was exported has no queries")
        with reading(folder / KEYS):
            self.num_items = len(np.load(folder / KEYS, mmap_mode="r"))
        self.folder, self.run = folder, str(report.get("run"))
        try:
            self._session = open_session(folder / ENCODER)
        except ImportError:
            raise ImportError('queries by ONNX need the package onnxruntime: pip install "hellm[export]"') from None
        except Exception as error:
            raise DataError(f"{folder / ENCODER}: damaged, or not of hellm export ({error})") from None

    @classmethod
    def of_run(cls, folder: str | Path, recommender: Recommender, run_hash: str) -> OnnxEncoder:
        """The encoder of a run that is loaded, tried on some of its histories.

        Args:
            folder: The export.
            recommender: Of the run.
            run_hash: Of the run, see `hellm.artifact.run_hash`.
        Raises: As the class; ExportError, a model that cannot be exported or has no queries, an export of another run,
            or a query or score that is further from torch than `TOLERANCE`.
        """
        if encoder_of(recommender.model) is None:
            raise ExportError("transitions have no queries that ONNX could make: they rank by what followed what")
        encoder = cls(folder)
        if encoder.run != run_hash:
            raise ExportError(
                f"{encoder.folder} must be exported from run {run_hash}, got an export of {encoder.run}; hellm export "
                "RUN --to onnx makes another"
            )
        worst = encoder._largest_difference(recommender)
        if not worst <= TOLERANCE:
            raise ExportError(
                f"{encoder.folder}: queries and scores must be within {TOLERANCE} of torch, got {worst:.2g}"
            )
        return encoder

    def __call__(self, indptr: Tensor, items: Tensor) -> Tensor:
        """Queries [B, D] float32 of histories in time order, given as CSR."""
        rows, lengths, found = items.numpy(), np.diff(indptr.numpy()), []
        for place, (start, stop) in enumerate(itertools.pairwise(indptr.tolist())):
            # An empty one has a row that does not count.
            part = rows[start:stop] if stop > start else np.zeros(1, np.int64)
            found += self._session.run(["query"], {"items": part[None], "lengths": lengths[place : place + 1]})
        return torch.from_numpy(np.concatenate(found))

    def _largest_difference(self, recommender: Recommender) -> float:
        """Between queries and scores of this encoder and of torch, on some histories of the run."""
        indptr, items = (torch.from_numpy(one) for one in sample_histories(recommender, _COMPARED))
        model, keys, queries = recommender.model, recommender.item, self(indptr, items)
        pairs = (
            (queries, model.embed(indptr, items)),
            (history_scores(model, keys, indptr, items, queries), history_scores(model, keys, indptr, items)),
        )
        return max(float((found - expected).abs().max()) for found, expected in pairs)

"""What is served at a moment, and how it is read from a run directory."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hellm._files import read_json
from hellm.artifact.files import CHECKPOINT, RESULT
from hellm.artifact.run_hash import run_hash
from hellm.data import DataError
from hellm.recommend import Recommender
from hellm.serve.nearest import Nearest

__all__ = ["BY_ONNX", "Snapshot", "load_snapshot"]

BY_ONNX = "-onnx"
"""At the end of the version of a model whose queries onnxruntime makes: their bits are others than those of torch."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A recommender and whose it is. Nothing of it ever changes; `changed` gives another.

    Attributes:
        recommender: Not to be written to.
        folder: Where it was read from.
        run_hash: Of the run directory, see `hellm.artifact.run_hash`.
        model_version: Kind of the model and the beginning of the hash, and `BY_ONNX` where that makes the queries.
        data_fingerprint: Of the data that the run was trained on; None where the folder does not say.
        state: Of the run and of the entries that were taken up, see `hellm.serve.store.state_after`.
        learned: Number of the last entry of the store that the run was trained with; what came later is taken up.
        revision: Number of the last entry of the store that is taken up; `learned` is the run as it was trained.
        nearest_users, nearest_items: What unknown ids look like, of those in the run.
        is_row_exact: Whether an answer has the same bits whoever else is asked for in the same call.
    """

    recommender: Recommender
    folder: Path
    run_hash: str
    model_version: str
    data_fingerprint: str | None
    nearest_users: Nearest
    nearest_items: Nearest
    state: str
    learned: int = 0
    revision: int = 0
    is_row_exact: bool = False

    def receipt(self) -> dict[str, Any]:
        """What every answer says of its origin."""
        return {
            "model_version": self.model_version,
            "run_hash": self.run_hash,
            "data_fingerprint": self.data_fingerprint,
            "learned": self.learned,
            "revision": self.revision,
            "state": self.state,
        }

    def learned_up_to(self, number: int) -> Snapshot:
        """The run as it was trained, for a store whose entries up to a number it was trained with."""
        return replace(self, learned=number, revision=number)

    def changed(self, change: Callable[[Recommender], None]) -> Snapshot:
        """With a recommender that `change` has written to. Raises: What that raises."""
        recommender = copy.copy(self.recommender)
        change(recommender)
        return replace(self, recommender=recommender)


def load_snapshot(
    run: str | os.PathLike[str],
    *,
    device: str = "cpu",
    language_model: str | os.PathLike[str] | None = None,
    onnx: str | os.PathLike[str] | None = None,
) -> Snapshot:
    """What a finished run, or a folder that `Recommender.save` wrote, gives to serve.

    Args:
        run: The folder.
        device, language_model: As in `Recommender.load`.
        onnx: What `hellm export --to onnx` made of the run, to read histories; None is torch.
    Raises: As `Recommender.load` and `hellm.export.OnnxEncoder.of_run`; DataError, a folder that changes meanwhile.
    """
    # A link that is given another target must not mix two runs.
    folder = Path(os.path.realpath(run))
    before = run_hash(folder)
    recommender = Recommender.load(folder, device=device, language_model=language_model)
    if onnx is not None:
        from hellm.export import OnnxEncoder

        recommender.encode_with(OnnxEncoder.of_run(os.path.realpath(onnx), recommender, before))
    if not torch.isfinite(recommender.item).all():
        # JSON has no such numbers, and nothing can be ranked by them.
        raise DataError(f"{run}: item keys must be finite, got NaN or infinity among them")
    if run_hash(folder) != before:
        raise DataError(f"{run} has changed while it was read; try again when nobody writes there")
    return Snapshot(
        recommender,
        folder,
        before,
        f"{recommender.model.kind}-{before[:12]}{'' if onnx is None else BY_ONNX}",
        _data_fingerprint(folder),
        Nearest(recommender.user_ids.ids),
        Nearest(recommender.item_ids.ids),
        state=before,
    )


def _data_fingerprint(folder: Path) -> str | None:
    for file in (folder / CHECKPOINT / "data.json", folder / RESULT):
        if file.is_file() and isinstance(found := read_json(file).get("fingerprint"), str):
            return found
    return None

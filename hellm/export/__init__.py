"""A finished run in forms that other programs read: ONNX, an index for approximate search, vectors in parquet."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hellm._folders import new_folder
from hellm.artifact.run_hash import run_hash
from hellm.export.encoders import ExportError
from hellm.export.index import ItemIndex, export_usearch
from hellm.export.onnx import export_onnx
from hellm.export.queries import OnnxEncoder
from hellm.export.vectors import export_parquet
from hellm.recommend import Recommender
from hellm.recommend.card import write_card

__all__ = ["FORMATS", "ExportError", "ItemIndex", "OnnxEncoder", "export"]

FORMATS: dict[str, Callable[..., dict[str, Any]]] = {
    "onnx": export_onnx,
    "usearch": export_usearch,
    "parquet": export_parquet,
}
"""Format -> (recommender, folder) -> report."""
_REPORT = "export.json"


def export(
    run: str | Path,
    out: str | Path,
    to: str,
    *,
    overwrite: bool = False,
    device: str = "cpu",
    language_model: str | Path | None = None,
) -> dict[str, Any]:
    """Write a finished run in another form, with a report of how well it stands for the run in export.json and a card.

    Args:
        run: Run directory, or what `Recommender.save` wrote.
        out: Folder to make; it appears whole or not at all.
        to: One of `FORMATS`, see `export_onnx`, `export_usearch` and `export_parquet`.
        overwrite: Replace an export that is there.
        device, language_model: See `Recommender.load`.
    Returns: What export.json holds: "to", "hellm" (version), "run" (its hash) and what the format says.

    Raises:
        ExportError: The model cannot be exported in this form, or what was written is not equal to it.
        FileExistsError: The folder holds something, and `overwrite` is False.
        ValueError: Another format.
        ImportError: Without the extra "export".
    """
    from hellm import __version__

    if to not in FORMATS:
        raise ValueError(f"to must be one of {', '.join(FORMATS)}, got {to!r}")
    with new_folder(out, kind="export", overwrite=overwrite, inputs=[run]) as folder:
        recommender = Recommender.load(run, device=device, language_model=language_model)
        report = {"to": to, "hellm": __version__, "run": run_hash(run), **FORMATS[to](recommender, folder)}
        write_card(folder, recommender, report)
        (folder / _REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report

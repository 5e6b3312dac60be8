"""embeddings.safetensors: the tensors of a model, what kind of model it is, and the version of the format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hellm._files import atomic_path, reading
from hellm.artifact.files import EMBEDDINGS, LANGUAGE_MODEL
from hellm.data import DataError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FORMAT", "Embeddings", "read_embeddings", "write_embeddings"]

FORMAT = 1
"""Of what is written. Files of version 0.1 have none, and are read as well."""
# What a file that names no kind is known by.
_MARKS = {"sasrec": "sequence", "fusion": "fused", "fold_in_exponent": "graph"}


class Embeddings(NamedTuple):
    """What embeddings.safetensors holds.

    Attributes:
        kind: The name of the kind of model.
        tensors: By name.
        metadata: What the kind of model notes beside them, as texts.
    """

    kind: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def write_embeddings(
    folder: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write embeddings.safetensors into `folder`, whole or not at all."""
    from safetensors.torch import save_file

    # An owned copy each: safetensors refuses tables that share memory.
    owned = {name: one.detach().cpu().contiguous().clone() for name, one in tensors.items()}
    with atomic_path(Path(folder) / EMBEDDINGS) as temporary:
        save_file(owned, temporary, metadata={**metadata, "kind": kind, "format": str(FORMAT)})


def read_embeddings(folder: str | os.PathLike[str]) -> Embeddings:
    """What `write_embeddings` wrote, of this or an earlier version.

    Raises:
        FileNotFoundError: There is no such file.
        DataError: It is damaged, of no kind, or of a later version of the format.
    """
    from safetensors import safe_open

    path = Path(folder) / EMBEDDINGS
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {folder} is no run directory, or the run is not finished")
    with reading(path), safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
        # A copy is aligned, so that sums come out to the last bit as before.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    version, kind = metadata.pop("format", "0"), metadata.pop("kind", None)
    if not version.isdecimal() or int(version) > FORMAT:
        raise DataError(f"{path}: must be of format {FORMAT} or earlier, got {version}; a later version wrote it")
    kind = kind or next((kind for mark, kind in _MARKS.items() if mark in metadata), None)
    if kind is None and (Path(folder) / LANGUAGE_MODEL).is_dir():
        kind = "llm"
    if kind is None:
        raise DataError(
            f"{path}: must be of a stage-1, SASRec, transition, fine-tuning or fused run, got "
            f"{', '.join(sorted(tensors)[:4]) or 'nothing'}"
        )
    return Embeddings(kind, tensors, metadata)

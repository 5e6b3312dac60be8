"""Loading of pre-trained models: no code of theirs runs, nothing is asked, and one thread loads at a time."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["LOADING", "NO_CODE", "NO_PICKLES", "CodeRefusedError", "safe_loading"]

# While transformers builds a model, torch's default dtype and initialisers are its own, in every thread.
LOADING = threading.RLock()
# For configurations, tokenizers, processors and models; without it, transformers asks on standard input.
NO_CODE: dict[str, Any] = {"trust_remote_code": False}
# For models: pickles are not read at all. PyTorch before 2.10 is not safe from them even where it reads tensors alone.
NO_PICKLES: dict[str, Any] = {"use_safetensors": True}


class CodeRefusedError(ValueError):
    """A model cannot be loaded without running code that comes with it."""


@contextlib.contextmanager
def safe_loading(what: str) -> Iterator[None]:
    """A block that loads `what` with `NO_CODE`: alone, and with progress bars on terminals only.

    Raises: CodeRefusedError, naming `what`.
    """
    from transformers.utils import logging

    with LOADING:
        quiet = logging.is_progress_bar_enabled() and not (sys.stderr is not None and sys.stderr.isatty())
        if quiet:
            logging.disable_progress_bar()
        try:
            yield
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise CodeRefusedError(
                f"{what} must be one that transformers knows by itself: it needs code of its own (auto_map in its "
                "configuration), which is never run"
            ) from None
        finally:
            if quiet:
                logging.enable_progress_bar()

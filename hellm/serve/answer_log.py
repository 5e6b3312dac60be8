"""What was asked of a server, and by which state it was answered: enough to compute every answer again.

A line of the file is

    {"question": "recommend", "request": {"users": ["u1"], "k": 5}, "receipt": {"run_hash": ..., "state": ..., ...},
     "sha256": ..., "computed_by": {"hellm": ..., "torch": ..., "threads": 1, ...}}

The answer itself is not there, as it may tell more of a person than was asked, and neither is who asked or when; but
`hellm.serve.replay` computes it from these, and by the digest knows it for the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

import hellm
from hellm._files import WriteError, append_line, writing
from hellm.info import processor
from hellm.serve.schema import Receipt

__all__ = ["AnswerLog", "computed_by"]

logger = logging.getLogger(__name__)

# Ids of people: for nobody but the account that serves.
_PRIVATE = 0o600


def computed_by(device: str, *, by_onnx: bool) -> dict[str, Any]:
    """What the bits of an answer may depend on beside the state: versions, threads, processor and device."""
    cpu, onnx = processor(), {}
    if by_onnx:
        import onnxruntime

        onnx = {"onnxruntime": onnxruntime.__version__}
    return {
        "hellm": hellm.__version__,
        "torch": torch.__version__,
        **onnx,
        "threads": torch.get_num_threads(),
        "processor": cpu["model"],
        "instruction_set": cpu["in_use"],
        "device": device,
    }


class AnswerLog:
    """A file that grows by a line for each answer. It may be moved away at any time; a new one is begun then.

    Args:
        path: The file; what is there stays.
        computed_by: See the function.

    Raises: WriteError.
    """

    def __init__(self, path: str | os.PathLike[str], computed_by: dict[str, Any]) -> None:
        self.path, self.is_complete, self._computed_by = Path(path), True, computed_by
        with writing(self.path):
            os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, _PRIVATE))

    def add(self, question: str, asked: BaseModel, answer: dict[str, Any], written: bytes) -> None:
        """Note an answer. One that cannot be noted is given all the same, and the server's log says so once.

        Args:
            question: Name in `hellm.serve.answers.QUESTIONS`.
            asked: The request.
            answer: With its receipt.
            written: The answer as it is sent.
        """
        line = {
            "question": question,
            "request": asked.model_dump(mode="json", exclude_unset=True),
            "receipt": {name: answer[name] for name in Receipt.model_fields},
            "sha256": hashlib.sha256(written).hexdigest(),
            "computed_by": self._computed_by,
        }
        try:
            append_line(self.path, json.dumps(line, ensure_ascii=False), mode=_PRIVATE)
        except WriteError as error:
            if self.is_complete:
                logger.error("answers are missing in the answer log: %s", error)
            self.is_complete = False
            return
        self.is_complete = True

"""Logs of a server: an object of JSON a line, on stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator

__all__ = ["json_logs"]


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "about", {}),
        }
        if record.exc_info:
            # Where it happened, without the values that the message of an error may hold.
            error, trace = record.exc_info[1], record.exc_info[2]
            line["error"] = type(error).__name__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            if trace is not None:
                line["at"] = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        return json.dumps(line)


@contextlib.contextmanager
def json_logs() -> Iterator[None]:
    """While it lasts, what the package and uvicorn log is written as JSON, from INFO upwards."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter())
    loggers = {logging.getLogger("hellm"): logging.INFO, logging.getLogger("uvicorn.error"): logging.WARNING}
    # What no line shows is not looked for.
    unused = ("logThreads", "logProcesses", "logMultiprocessing", "_srcfile")
    shown = {name: getattr(logging, name) for name in unused}
    before = {one: (one.level, one.propagate, one.handlers[:]) for one in loggers}
    for one, level in loggers.items():
        one.setLevel(level)
        one.propagate, one.handlers[:] = False, [handler]
    for name in unused:
        setattr(logging, name, None)
    try:
        yield
    finally:
        for name, value in shown.items():
            setattr(logging, name, value)
        for one, (level, propagate, handlers) in before.items():
            one.setLevel(level)
            one.propagate, one.handlers[:] = propagate, handlers

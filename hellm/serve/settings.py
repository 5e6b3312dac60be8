"""Limits and choices of a server."""

from __future__ import annotations

import os
from dataclasses import dataclass

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """What can be chosen beside the run.

    Attributes:
        api_key: What a request must bring; None is open to all who can connect.
        allowed_hosts: Names that a request may be for (`Host`), without port; None is any. A page on the web can make a
            browser connect to 127.0.0.1, but only under its own name.
        log_requests: A line for each request, beside those for what goes wrong.
        answer_log: Where to note what was asked, see `hellm.serve.answer_log`; None does not.
        max_batch: Requests that one turn of the model takes.
        max_wait: Seconds that a turn may wait for more of them.
        max_queue: Requests that may wait; one more is answered with 503.
        timeout: Seconds from a request to its answer; then 503.
        encode_timeout: The same for a new item, whose encoder may have to be loaded first.
        study_timeout: The same for what a researcher asks, which may take long.
        max_body: Bytes of a request.
        body_timeout: Seconds in which a request must have been sent.
        skip_selftest: Serve without having checked the operators.
    """

    api_key: str | None = None
    allowed_hosts: tuple[str, ...] | None = None
    log_requests: bool = True
    answer_log: str | os.PathLike[str] | None = None
    max_batch: int = 32
    max_wait: float = 0.0
    max_queue: int = 1024
    timeout: float = 10.0
    encode_timeout: float = 60.0
    study_timeout: float = 60.0
    max_body: int = 16 << 20
    body_timeout: float = 20.0
    skip_selftest: bool = False

"""Short docstrings write `Returns: text` on one line; the pages show them like the blocks of the others."""

from __future__ import annotations

import re
from typing import Any

import griffe

_INLINE = re.compile(r"^(?P<indent> *)(?P<kind>Returns|Raises): (?P<text>\S.*(?:\n(?P=indent) +\S.*)*)", re.MULTILINE)
_NEXT_ERROR = re.compile(r"(?:[;.,] |\s)(?=[A-Z]\w*Error[,: ])")


class InlineSections(griffe.Extension):
    """`Raises: ValueError, why; DataError, why` as two entries of a block, `Returns: what` as one."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = _INLINE.sub(_block, obj.docstring.value)


def _block(match: re.Match[str]) -> str:
    text = " ".join(match["text"].split())
    entries = [text.replace(": ", "&#58; ")]  # what stands before a colon would be taken for the type
    if match["kind"] == "Raises":
        parts = _NEXT_ERROR.split(text)
        if not all(re.match(r"[A-Z]\w*Error\b", part) for part in parts):
            return match[0]
        entries = [re.sub(r"^(\w+)[,:]? ?", r"\1: ", part) for part in parts]
    indent = match["indent"]
    return "\n".join([f"\n{indent}{match['kind']}:", *(f"{indent}    {entry}" for entry in entries)])

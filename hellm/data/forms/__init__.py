"""The forms in which data sets come.

To add a form: write a module here with `FORM = Form(...)` (see `_base.py`: a `find` that recognises the main file, a
`read` that returns a `Source`, and a `write` if the form can be written), and put the module into `_MODULES` below.
Detection goes through the list in order, so a form that could be mistaken for another stands before it.
"""

from __future__ import annotations

from pathlib import Path

from hellm.data.dataset import DataError
from hellm.data.forms import amazon, built, json_pair, lattice, mmrec, recbole, sasrec, shop
from hellm.data.forms._base import Form, Source

_MODULES = (built, recbole, mmrec, json_pair, lattice, amazon, shop, sasrec)
FORMS: dict[str, Form] = {module.FORM.name: module.FORM for module in _MODULES}

__all__ = ["FORMS", "Form", "Source", "detect", "form_names", "get_form"]


def form_names(*, writable: bool = False) -> list[str]:
    """Names of the known forms; only those that can be written, if `writable`."""
    return [name for name, form in FORMS.items() if form.write or not writable]


def get_form(name: str) -> Form:
    """A form by its name. Raises ValueError for an unknown one."""
    if name not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {name!r}")
    return FORMS[name]


def detect(path: Path, form: str | None = None) -> tuple[Form, Path]:
    """The form of a file or folder, and its main file.

    Args:
        path: Folder, or main file where a folder holds several data sets.
        form: Look for this form only.

    Raises:
        DataError: Nothing there, or nothing of a known form; the message lists what was found and what is known.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    for candidate in [get_form(form)] if form else FORMS.values():
        main = candidate.find(path)
        if main is not None:
            return candidate, main
    found = sorted(one.name for one in path.iterdir()) if path.is_dir() else [path.name]
    listed = ", ".join(found[:12]) + (f" and {len(found) - 12} more" if len(found) > 12 else "")
    known = "\n".join(f"  {one.name}: {one.files}" for one in FORMS.values())
    wanted = f"form {form!r} not found" if form else "unknown form"
    raise DataError(f"{path}: {wanted}; found {listed or 'an empty folder'}. Known forms:\n{known}")

"""The forms in which data sets come.

Each is a module here with `FORM = Form(...)` (see `_base.py`: a `find` that recognises the main file, a `read` that
returns a `Source`, and a `write` if the form can be written); that is all there is to do for a new one. Where a data
set could be taken for one of two forms, the first names the other in `before`.
"""

from __future__ import annotations

import graphlib
import importlib
import pkgutil
from pathlib import Path

from hellm.data.dataset import DataError
from hellm.data.forms._base import Form, Source

__all__ = ["FORMS", "Form", "Source", "detect", "form_names", "get_form"]


def _discovered() -> dict[str, Form]:
    """The forms of all modules here by name, in the order in which they are looked for."""
    names = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
    found = [importlib.import_module(f"{__name__}.{name}").FORM for name in names]
    forms: dict[str, Form] = {form.name: form for form in found}
    earlier = {name: [form.name for form in found if name in form.before] for name in forms}
    return {name: forms[name] for name in graphlib.TopologicalSorter(earlier).static_order()}


FORMS = _discovered()
"""By name, in the order in which they are looked for."""


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

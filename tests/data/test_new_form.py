"""A form of one's own is one module, and nothing else names it."""

from __future__ import annotations

import pytest

from hellm.data import forms, load_dataset

MODULE = """
import numpy as np

from hellm.data.dataset import IdMap
from hellm.data.forms._base import Form, Source, find_one


def _read(path):
    rows = [line.split("|") for line in path.read_text().splitlines()]
    users, items = IdMap(sorted({user for user, _ in rows})), IdMap(sorted({item for _, item in rows}))
    return Source(users.indices([user for user, _ in rows]), items.indices([item for _, item in rows]), users, items)


FORM = Form("pipes", "{name}.csv (user|item)", lambda path: find_one(path, "*.csv"), _read, before=("shop",))
"""


@pytest.fixture
def with_pipes(tmp_path, monkeypatch):
    """Its module among those of the forms."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "pipes.py").write_text(MODULE)
    monkeypatch.setattr(forms, "__path__", [*forms.__path__, str(tmp_path / "modules")])
    monkeypatch.setattr(forms, "FORMS", forms._discovered())


def test_a_form_is_recognised_from_its_module_alone(with_pipes, tmp_path):
    (tmp_path / "data").mkdir()
    # By its name, a shop could be meant as well.
    (tmp_path / "data" / "events.csv").write_text("a|x\na|y\na|z\nb|y\n")
    dataset = load_dataset(tmp_path / "data")
    assert dataset.form == "pipes"
    assert dataset.item_ids.ids == ["x", "y", "z"] and dataset.num_users == 2
    with pytest.raises(ValueError, match="those that can: hellm"):
        from hellm.data import save_dataset

        save_dataset(dataset, tmp_path / "again", form="pipes")


def test_forms_stand_before_those_that_would_take_their_files(with_pipes):
    order = list(forms.FORMS)
    assert all(order.index(form.name) < order.index(later) for form in forms.FORMS.values() for later in form.before)
    assert order.index("pipes") < order.index("shop") < order.index("sasrec")

"""The model card: what a recommender is, what it was made of and what is known of its worth, in Markdown and JSON.

It says what was measured and recorded; what is not known is said to be unknown.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hellm._files import DataError, atomic_path, read_json
from hellm.artifact.evaluation_log import read_test_evaluations
from hellm.artifact.files import RESULT
from hellm.recommend.served import SERVED, ServedFused, ServedLLM, ServedModel

if TYPE_CHECKING:
    from hellm.recommend.recommender import Recommender

__all__ = ["CARD", "MODEL_CARD", "card_of", "training_facts", "write_card"]

CARD, MODEL_CARD = "card.json", "MODEL_CARD.md"
_UNKNOWN = "unknown"
_WORDS = {one.label: one.words for one in SERVED.values()}
_SPLITS = {0: "train", 1: "valid", 2: "test", 3: "history", 4: "arrived"}


def training_facts(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What is recorded of a training: by the run itself, or by the card of what was saved from it.

    Returns: "stage", "data" (name, split, fingerprint), "test" (metrics, intervals, protocol), "test_evaluations",
        "seconds", "seconds_per_1000_users", "peak_memory_bytes", "environment"; only what is there. A card or result
        that cannot be read says nothing.
    """
    folder = Path(folder)
    try:
        if (folder / RESULT).is_file():
            result = read_json(folder / RESULT)
            data = {name: result.get("dataset", {}).get(name) for name in ("name", "split", "fingerprint")}
            names = ("stage", "test", "seconds", "seconds_per_1000_users", "peak_memory_bytes", "environment")
            facts = {name: result[name] for name in names if result.get(name) is not None}
            return facts | {"data": data, "test_evaluations": len(read_test_evaluations(folder))}
        if (folder / CARD).is_file():
            return dict(read_json(folder / CARD).get("training") or {})
    except (DataError, AttributeError, TypeError, ValueError):
        pass
    return {}


def card_of(recommender: Recommender, export: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Everything that a card says, as plain values.

    Args:
        recommender: Whose card it is; what is known of its training was read when it was loaded.
        export: The report of an export, if it is one.
    Returns: "hellm" (version), "date" (UTC), "model", "data" (counts), "training" (see `training_facts`) and "export".
    """
    from hellm import __version__

    histories, content = recommender.histories, recommender.content
    labels, counts = np.unique(recommender.events["split"].to_numpy(), return_counts=True)
    return {
        "hellm": __version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "model": _model(recommender.model),
        "data": {
            "users": recommender.num_users,
            "users_without_events": int((histories.lengths == 0).sum()),
            "items": recommender.num_items,
            "items_with_title": sum(title is not None for title in recommender.item_titles),
            "items_without_training_events": int((recommender.popularity == 0).sum()),
            "events": {_SPLITS[int(label)]: int(count) for label, count in zip(labels, counts, strict=True)},
            "content": None if content is None else sorted(content.features),
        },
        "training": recommender.training,
        "export": None if export is None else dict(export),
    }


def write_card(folder: Path, recommender: Recommender, export: Mapping[str, Any] | None = None) -> None:
    """Write MODEL_CARD.md and card.json, see `card_of`."""
    card = card_of(recommender, export)
    for name, text in ((CARD, json.dumps(card, indent=1) + "\n"), (MODEL_CARD, _markdown(card))):
        with atomic_path(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _model(model: ServedModel) -> dict[str, Any]:
    facts: dict[str, Any] = {"kind": model.label}
    if isinstance(model, ServedFused):
        towers = {name: {"weight": model.weights[name], **_model(tower)} for name, tower in model.towers.items()}
        return facts | {"towers": towers}
    facts["width"] = model.item_keys().shape[1] if hasattr(model, "embed") else None
    if isinstance(model, ServedLLM):
        identity: Mapping[str, Any] = model.model.prompted.identity
        facts["language_model"] = {"name": identity["name"], **_licence(str(identity["name"]))}
    return facts


def _licence(name: str) -> dict[str, str | None]:
    """What the packaging of a language model says of its licence, and where."""
    from hellm.models.llm.language_model import PACKAGED

    if name in PACKAGED:
        package = PACKAGED[name][1]
        try:
            metadata = importlib.metadata.metadata(package)
        except importlib.metadata.PackageNotFoundError:
            return {"licence": None, "licence_from": None}
        named = next((metadata[key] for key in ("License-Expression", "License") if metadata[key]), None)
        return {"licence": named, "licence_from": f"package {package} {metadata['Version']}" if named else None}
    readme = Path(name) / "README.md"
    if readme.is_file():
        found = re.search(
            r"\A---\n(?:(?!---).*\n)*?license:\s*(\S+)", readme.read_text(encoding="utf-8", errors="replace")
        )
        if found:
            return {"licence": found[1], "licence_from": "README.md of the model"}
    return {"licence": None, "licence_from": None}


def _markdown(card: Mapping[str, Any]) -> str:
    sections = [_head(card), _model_section(card["model"]), _data_section(card), _test_section(card["training"])]
    sections += [_cost_section(card["training"])] + ([_export_section(card["export"])] if card["export"] else [])
    return "\n\n".join(sections) + "\n"


def _head(card: Mapping[str, Any]) -> str:
    kind = _WORDS.get(card["model"]["kind"], card["model"]["kind"])
    return (
        "# Model card\n\n"
        f"{kind[:1].upper()}{kind[1:]}, written by hellm {card['hellm']} on "
        f"{card['date']} (UTC). What is not known is said to be unknown; card.json has the same values for programs."
    )


def _model_section(model: Mapping[str, Any]) -> str:
    lines = ["## Model", ""]
    parts = model.get("towers") or {"": model}
    for name, part in parts.items():
        weight = f"weight {part['weight']:.4g} of `{_plain(name)}`: " if "weight" in part else ""
        width = "" if part.get("width") is None else f", vectors of width {part['width']}"
        lines.append(f"- {weight}{_WORDS.get(part['kind'], part['kind'])}{width}")
        if "language_model" in part:
            base = part["language_model"]
            licence = f"{base['licence']}, as the {base['licence_from']} says" if base["licence"] else _UNKNOWN
            lines.append(f"- language model `{_plain(base['name'])}`, licence: {_plain(licence)}")
    return "\n".join(lines)


def _data_section(card: Mapping[str, Any]) -> str:
    data, known = card["data"], card["training"].get("data") or {}
    events = ", ".join(f"{count:,} {split}" for split, count in data["events"].items()) or "none"
    content = ", ".join(data["content"]) if data["content"] else "none"
    rows = {
        "data set": known.get("name") or _UNKNOWN,
        "fingerprint": known.get("fingerprint") or _UNKNOWN,
        "split": known.get("split") or _UNKNOWN,
        "users": f"{data['users']:,}, {data['users_without_events']:,} of them without events",
        "items": f"{data['items']:,}, {data['items_with_title']:,} of them with a title, "
        f"{data['items_without_training_events']:,} without training events",
        "events": events,
        "content of items": content,
    }
    return "## Data\n\n" + _table(("what", "value"), rows.items())


def _test_section(training: Mapping[str, Any]) -> str:
    test = training.get("test")
    if not test:
        return "## Test\n\nUnknown: no result of a test is recorded."
    level = test.get("confidence_level")
    about = (
        f"Protocol {test.get('protocol') or _UNKNOWN}: {test.get('protocol_description') or _UNKNOWN}. "
        f"{test.get('num_users', 0):,} users; metrics of the training itself, on events held out from it."
    )
    times = training.get("test_evaluations")
    about += f" Evaluations on the test split so far: {times}." if times else ""
    intervals = test.get("confidence_intervals") or {}
    rows = []
    for name, value in test.get("metrics", {}).items():
        low, high = intervals.get(name) or (None, None)
        rows.append((name, f"{value:.4f}", "none" if low is None else f"{low:.4f} to {high:.4f}"))
    interval = "interval" if level is None else f"{level:.0%} interval"
    return f"## Test\n\n{about}\n\n" + _table(("metric", "value", interval), rows)


def _cost_section(training: Mapping[str, Any]) -> str:
    environment, memory = training.get("environment") or {}, training.get("peak_memory_bytes") or {}
    seconds, speed = training.get("seconds"), training.get("seconds_per_1000_users")
    # The seconds of a sum are those of choosing and weighing its models.
    what = "choosing and weighing" if training.get("stage") == "fuse" else "training"
    rows = {what: _UNKNOWN if seconds is None else f"{seconds:,.3g} s"}
    rows |= {"training of its models": _UNKNOWN} if training.get("stage") == "fuse" else {}
    rows |= {
        "device": environment.get("device_name") or environment.get("device") or _UNKNOWN,
        "peak memory": ", ".join(f"{value / 2**30:.2f} GiB ({where})" for where, value in memory.items()) or _UNKNOWN,
        "scoring": _UNKNOWN if speed is None else f"{speed:.3g} s for 1,000 users",
        "trained with": f"hellm {environment['hellm']}" if "hellm" in environment else _UNKNOWN,
    }
    return "## Cost\n\n" + _table(("what", "value"), rows.items())


def _export_section(export: Mapping[str, Any]) -> str:
    shown = {name: value for name, value in export.items() if name not in ("notes", "files")}
    rows = [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in shown.items()]
    notes = "".join(f"\n- {note}" for note in export.get("notes", ()))
    return "## This export\n\n" + _table(("what", "value"), rows) + ("\n" + notes if notes else "")


def _table(header: tuple[str, ...], rows: Any) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(_plain(str(cell)) for cell in line) + " |" for line in lines)


def _plain(text: str) -> str:
    """What stands in a cell, whatever a data set is called."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")

"""Load, save and convert data sets of any known form."""

from __future__ import annotations

import inspect
import os
import warnings
from pathlib import Path

import numpy as np

from hellm._folders import check_target, new_folder
from hellm.data import splits
from hellm.data.dataset import DataError, Dataset, IdMap, ItemFeatures
from hellm.data.forms import Form, Source, detect, form_names, get_form
from hellm.data.forms._times import remarks

FEATURES = ("auto", "simple", "none")
# Events that are looked at once.
_EVENTS = 1 << 20


def load_dataset(
    path: str | os.PathLike[str],
    *,
    split: str | None = None,
    seed: int = 0,
    form: str | None = None,
    features: str = "auto",
    ratios: tuple[float, float, float] = (0.8, 0.1, 0.1),
    cold_share: float = 0.2,
    user_ids: IdMap | None = None,
    item_ids: IdMap | None = None,
    **options,
) -> Dataset:
    """Read a data set; the form is recognised by its files.

    Args:
        path: Folder, or main file where a folder holds several data sets.
        split: "given", "leave-two-out", "ratio", "time", "item-cold" or "user-cold" (see `hellm.data.splits` for each,
            and for how ties are kept). None: the given label if the source has one, else leave-two-out.
        seed: Of the item-cold or user-cold choice.
        form: Read it as this form; None detects it.
        features: "simple" adds the built-in text and image features (`hellm.data.simple_features`) for modalities
            that the source brings no features for; "auto" does so for the form "shop" only; "none" leaves out all.
        ratios: Shares of train, validation and test, for "ratio" and "time".
        cold_share: Share of items or users out of train, for "item-cold" and "user-cold".
        user_ids: Id map of an earlier load: its ids keep their indices, new ids follow.
        item_ids: The same for items.
        **options: Of the form's reader, where it has them:
            missing_items: events on items that the item table lacks: "error", "keep" or "drop".
            columns: role -> name of a column, where its name is not a usual one, e.g. {"time": "sold_at"}; the roles
                are user, item, time, split, label, quantity, rating and type, of a shop's items also title,
                description, brand, category, image and attribute (a name or a list of names).
            separator: of the fields of a table: one character, or tab, comma, semicolon, pipe or space.
            encoding: of text, as Python calls it, e.g. "latin-1"; by default UTF-8, or what a byte order mark says.
            event_types: events of these types only (shop).
            items: the table of items, where it does not stand beside the events (shop); pictures are looked for beside
                it.
            min_rating: leaves out events rated lower.

    Returns: The data set; `notes` says what had to be assumed.

    Raises:
        DataError: A file that does not hold what it must, or an unknown form.
        ValueError: Wrong arguments.
    """
    if split is not None and split not in splits.SPLIT_NAMES:
        raise ValueError(f"split must be one of {', '.join(splits.SPLIT_NAMES)}, got {split!r}")
    if features not in FEATURES:
        raise ValueError(f"features must be one of {', '.join(FEATURES)}, got {features!r}")
    path = Path(path)
    kind, main = detect(path, form)
    allowed = [one.name for one in inspect.signature(kind.read).parameters.values()][1:]
    unknown = [name for name in options if name not in allowed]
    if unknown:
        raise ValueError(f"form {kind.name!r} takes {', '.join(allowed) or 'no options'}, got {', '.join(unknown)}")
    source = kind.read(main, **options)
    if path.is_dir() and kind.name != "hellm":
        _note_other_files(main, source)
    if user_ids is not None or item_ids is not None:
        _keep_indices(source, user_ids, item_ids)
    if features == "none":
        source.item_features = {}
    elif features == "simple" or kind.name == "shop":
        _add_simple_features(source)
    return _build(source, kind, _name(source, main), split, seed, ratios, cold_share)


def save_dataset(dataset: Dataset, path: str | Path, *, form: str = "hellm", overwrite: bool = False) -> Path:
    """Write a data set as a new folder; on failure nothing is left behind.

    Args:
        dataset: What to write.
        path: Folder to make.
        form: Any writable form (`form_names(writable=True)`). "hellm" keeps everything; "sasrec" and "json" have no
            place for a split and imply leave-two-out, of which a warning tells where the split is another.
        overwrite: Replace a folder that is there.

    Returns: The folder.

    Raises:
        ValueError: The form cannot be written, does not exist, or has no place for the split.
        FileExistsError: The folder is not empty and `overwrite` is False, or it is not one that hellm wrote as data.
    """
    kind = get_form(form)
    if kind.write is None:
        raise ValueError(f"form {form!r} cannot be written; those that can: {', '.join(form_names(writable=True))}")
    if not kind.keeps_split and not np.array_equal(dataset.split, splits.leave_two_out(dataset.users)):
        warnings.warn(
            f"form {form!r} stores no split: the {dataset.split_name!r} split of {dataset.name!r} is lost and will be "
            "read back as leave-two-out",
            stacklevel=2,
        )
    if kind.keeps_split and kind.name != "hellm" and dataset.has_cold_users:
        raise ValueError(
            f"form {form!r} has no place for events that are only history, and the {dataset.split_name!r} split of "
            f"{dataset.name!r} has {dataset.split_counts()['history']}; write form 'hellm', or another split"
        )
    with new_folder(path, overwrite=overwrite) as folder:
        kind.write(dataset, folder)
    return Path(path)


def convert(
    source: str | Path, target: str | Path, form: str = "hellm", *, overwrite: bool = False, **options
) -> Dataset:
    """Read a data set of any form and write it in another.

    Args:
        source: As `load_dataset`.
        target: Folder to make.
        form: Form to write.
        overwrite: Replace `target` if it is there.
        **options: Of `load_dataset`.

    Returns: What was read.
    Raises: As `load_dataset` and `save_dataset`.
    """
    check_target(target, kind="data", overwrite=overwrite, inputs=[source])
    dataset = load_dataset(source, **options)
    save_dataset(dataset, target, form=form, overwrite=overwrite)
    return dataset


def _note_other_files(main: Path, source: Source) -> None:
    """Say which files of a data folder play no part."""
    read = {main.name, "u_id_mapping.csv", "i_id_mapping.csv", *source.files}
    others = sorted(
        one.name for one in main.parent.iterdir()
        if one.name not in read and not one.name.startswith(".") and not one.name.endswith("_feat.npy")
    )  # fmt: skip
    if others:
        some = ", ".join(others[:8]) + (f" and {len(others) - 8} more" if len(others) > 8 else "")
        source.notes.append(f"not read: {some}")


def _name(source: Source, main: Path) -> str:
    return source.name or main.name.split(".")[0] or main.parent.resolve().name


def _keep_indices(source: Source, user_ids: IdMap | None, item_ids: IdMap | None) -> None:
    """Renumber a source so that the ids of earlier maps keep their indices and new ids follow."""
    if user_ids is not None:
        kept = user_ids.copy()
        source.users = kept.add(source.user_ids.ids)[source.users]
        source.user_ids = kept
    if item_ids is None:
        return
    kept = item_ids.copy()
    moved = kept.add(source.item_ids.ids)
    source.items = moved[source.items]
    source.item_ids = kept

    def place(texts: list[str]) -> list[str]:
        placed = [""] * len(kept)
        for index, text in zip(moved.tolist(), texts, strict=True):
            placed[index] = text
        return placed

    if source.item_titles is not None:
        source.item_titles = place(source.item_titles)
    source.item_fields = {name: place(texts) for name, texts in source.item_fields.items()}
    for modality, old in source.item_features.items():
        values = np.zeros((len(kept), old.values.shape[1]), np.float32)
        mask = np.zeros(len(kept), bool)
        values[moved], mask[moved] = old.values, old.mask
        source.item_features[modality] = ItemFeatures(values, mask)


def _add_simple_features(source: Source) -> None:
    from hellm.data import simple_features

    texts = simple_features.item_texts(source.item_titles, source.item_fields)
    if "text" not in source.item_features and texts is not None:
        source.item_features["text"] = simple_features.text_features(texts)
        source.encoders["text"] = {"encoder": "hashed"}
    images = source.item_fields.get("image")
    if "image" not in source.item_features and images is not None:
        unreadable: list[str] = []
        source.item_features["image"] = simple_features.image_features(
            images, on_unreadable=lambda path, error: unreadable.append(f"{path} ({error})")
        )
        source.encoders["image"] = {"encoder": "colours"}
        if unreadable:
            some = "; ".join(unreadable[:3]) + ("; ..." if len(unreadable) > 3 else "")
            source.notes.append(f"{len(unreadable)} images cannot be read and count as missing: {some}")
    # A modality that no item has would only make empty hyperedges.
    source.item_features = {name: one for name, one in source.item_features.items() if one.mask.any()}
    source.encoders = {name: one for name, one in source.encoders.items() if name in source.item_features}


def _build(source: Source, kind: Form, name: str, split, seed, ratios, cold_share) -> Dataset:
    if not len(source.users):
        raise DataError(f"{name}: there are no events")
    if source.timestamps is not None and kind.name != "hellm":
        source.notes += remarks(source.timestamps)
    order = _time_order(source.users, source.timestamps)

    users, items = (np.asarray(_taken(source, name, order), np.int64) for name in ("users", "items"))
    timestamps, labels = (_taken(source, name, order) for name in ("timestamps", "labels"))
    del order
    split_name = split or ("given" if labels is not None else "leave-two-out")
    if split_name == "given":
        if labels is None:
            raise ValueError(f'split="given" needs a label per event, and form {kind.name!r} of {name!r} has none')
        assigned, split_name = labels.astype(np.int8, copy=False), source.split_name
    elif split_name == "leave-two-out":
        assigned = splits.leave_two_out(users)
    elif split_name == "ratio":
        assigned = splits.ratio(users, ratios)
    elif split_name == "time":
        assigned = splits.time_cut(timestamps, ratios)
    elif split_name == "user-cold":
        assigned = splits.user_cold(users, share=cold_share, seed=seed)
    else:
        assigned = splits.item_cold(items, len(source.item_ids), share=cold_share, seed=seed)
    return Dataset(
        name=name,
        num_users=len(source.user_ids),
        num_items=len(source.item_ids),
        users=users,
        items=items,
        timestamps=timestamps,
        split=assigned,
        user_ids=source.user_ids,
        item_ids=source.item_ids,
        item_features=source.item_features,
        item_titles=source.item_titles,
        split_name=split_name,
        form=kind.name,
        item_fields=source.item_fields,
        notes=source.notes,
        columns=source.columns,
        encoders=source.encoders,
    )


def _taken(source: Source, name: str, order: np.ndarray | None) -> np.ndarray | None:
    """A column in order; the source lets go of it, so that no more than one is there twice at any time."""
    values = getattr(source, name)
    setattr(source, name, None)
    return values if values is None or order is None else values[order]


def _time_order(users: np.ndarray, timestamps: np.ndarray | None) -> np.ndarray | None:
    """Stable order by user, then time; None if the events stand so already."""
    grouped = ordered = True
    for start in range(0, len(users), _EVENTS):
        block = slice(start, start + _EVENTS + 1)
        before, after = users[block][:-1], users[block][1:]
        grouped &= not (after < before).any()
        if timestamps is not None and grouped and ordered:
            ordered = not ((timestamps[block][1:] < timestamps[block][:-1]) & (before == after)).any()
        if not grouped:
            break
    if grouped and ordered:
        return None
    return np.argsort(users, kind="stable") if timestamps is None else np.lexsort((timestamps, users))

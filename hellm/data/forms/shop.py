"""What a shop has: `events.csv|tsv|parquet`, optional `items.csv|tsv|parquet`, optional `images/`. Ids are strings.

Columns are found by their usual names (`EVENT_COLUMNS`, `ITEM_COLUMNS`). Items stand in the order of the item table;
ids that it lacks are an error unless `missing_items` says otherwise. `*_feat.npy` with row = line of the item table are
read too.
"""

from __future__ import annotations

from pathlib import Path

from hellm.data.dataset import DataError, Dataset, IdMap
from hellm.data.forms import _tables as tables
from hellm.data.forms._base import Form, Source, check_ids_known, load_table_features, save_features

SUFFIXES = (".csv", ".tsv", ".parquet")
EVENT_COLUMNS = {
    "user": ("user", "user_id", "userid", "customer", "customer_id", "customerid", "client", "client_id", "visitor",
             "visitor_id", "visitorid", "account_id", "member_id", "reviewerid"),
    "item": ("item", "item_id", "itemid", "product", "product_id", "productid", "sku", "article", "article_id", "asin",
             "parent_asin", "movieid", "movie_id"),
    "time": ("timestamp", "time", "ts", "datetime", "date", "event_time", "created_at", "order_date", "purchased_at",
             "t_dat", "unixreviewtime"),
    "type": ("type", "event", "event_type", "action"),
    "split": ("split", "x_label"),
}  # fmt: skip
ITEM_COLUMNS = {
    "item": (*EVENT_COLUMNS["item"], "id"),
    "title": ("title", "name", "item_title", "product_title", "product_name", "prod_name"),
    "description": ("description", "desc", "detail_desc", "text"),
    "brand": ("brand", "store", "manufacturer", "vendor"),
    "category": ("category", "categories", "genres", "product_type", "product_type_name"),
    "image": ("image", "image_path", "image_file", "img", "picture", "photo"),
}
LABELS = {"train": 0, "valid": 1, "validation": 1, "val": 1, "test": 2, "0": 0, "1": 1, "2": 2}
_SPLIT: tables.Rule = (LABELS.__contains__, "train, valid or test")


def _find(path: Path) -> Path | None:
    if path.is_file():
        return path if path.suffix in SUFFIXES and path.stem not in ("items", "users") else None
    return next((path / f"events{suffix}" for suffix in SUFFIXES if (path / f"events{suffix}").exists()), None)


def _roles(
    path: Path, columns: list[str], synonyms: dict[str, tuple[str, ...]], required: tuple[str, ...]
) -> dict[str, str]:
    """Role -> column; the earlier of two synonyms wins."""
    plain = {column.strip().lower().replace(" ", "_").replace("-", "_"): column for column in reversed(columns)}
    roles = {role: next((plain[name] for name in names if name in plain), None) for role, names in synonyms.items()}
    for role in required:
        if roles[role] is None:
            raise DataError(
                f"{path}: no column for the {role} (one of {', '.join(synonyms[role])}); found {', '.join(columns)}"
            )
    return {role: column for role, column in roles.items() if column is not None}


def _read(path: Path, *, missing_items: str = "error", event_types: list[str] | None = None) -> Source:
    import polars as pl

    notes: list[str] = []
    frame = tables.scan(path)
    roles = _roles(path, tables.columns_of(frame), EVENT_COLUMNS, ("user", "item"))
    user, item = roles["user"], roles["item"]
    frame = tables.without_blank_lines(frame, (user, item))
    frame = frame.with_columns(pl.col(user, item).cast(pl.String))
    if event_types is not None:
        frame = _choose_types(path, frame, roles.get("type"), event_types)
    elif "type" in roles:
        kinds = frame.select(pl.col(roles["type"]).cast(pl.String).unique()).collect(engine="streaming").to_series()
        some = ", ".join(map(str, kinds.sort().to_list()[:8]))
        notes.append(f"events of all types in column {roles['type']!r} are used: {some}")

    candidates = [path.with_name(f"items{suffix}") for suffix in SUFFIXES]
    item_path = next((one for one in candidates if one.exists()), candidates[0])
    listed, fields = _read_items(item_path, notes) if item_path.exists() else ([], {})
    item_ids = tables.index_ids(frame, item, listed)
    if listed:
        missing = item_ids.ids[len(listed) :]
        check_ids_known(path, missing, item_path.name, missing_items)
        if missing and missing_items == "drop":
            frame = frame.filter(pl.col(item).is_in(listed) | pl.col(item).is_null())
            item_ids = IdMap(listed)
    user_ids = tables.index_ids(frame, user)
    chosen = [tables.to_index(user, user_ids), tables.to_index(item, item_ids)]
    rules = {user: tables.ID, item: tables.ID}
    if "time" in roles:
        chosen.append(tables.time_expression(frame, roles["time"]).alias(roles["time"]))
        rules[roles["time"]] = tables.TIME
    if "split" in roles:
        text = pl.col(roles["split"]).cast(pl.String).str.to_lowercase()
        chosen.append(text.replace_strict(LABELS, default=None, return_dtype=pl.Int8))
        rules[roles["split"]] = _SPLIT
    table = tables.collect(frame.select(chosen), path, rules)
    pad = [""] * (len(item_ids) - len(listed))
    fields = {name: texts + pad for name, texts in fields.items()}
    images = _find_images(path.parent, item_ids, fields.get("image"), notes)
    if images is not None:
        fields["image"] = images
    return Source(
        table[user].to_numpy(),
        table[item].to_numpy(),
        user_ids,
        item_ids,
        timestamps=tables.to_seconds(table[roles["time"]].to_numpy(), notes) if "time" in roles else None,
        labels=table[roles["split"]].to_numpy() if "split" in roles else None,
        item_titles=fields.pop("title", None),
        item_fields=fields,
        item_features=load_table_features(path, item_path, len(item_ids), notes),
        notes=notes,
        name=path.parent.resolve().name if path.stem == "events" else None,
    )


def _choose_types(path: Path, frame, column: str | None, event_types: list[str]):
    import polars as pl

    if column is None:
        raise DataError(f"{path}: event_types needs a column for the type (one of {', '.join(EVENT_COLUMNS['type'])})")
    kinds = frame.select(pl.col(column).cast(pl.String).unique()).collect(engine="streaming").to_series().to_list()
    unknown = [one for one in event_types if one not in kinds]
    if unknown:
        known = ", ".join(sorted(filter(None, kinds)))
        raise ValueError(f"event_types must be among {known}, got {', '.join(unknown)}")
    return frame.filter(pl.col(column).cast(pl.String).is_in(event_types))


def _read_items(path: Path, notes: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Item ids in file order, and the texts that the table has of them."""
    import polars as pl

    frame = tables.scan(path)
    roles = _roles(path, tables.columns_of(frame), ITEM_COLUMNS, ("item",))
    frame = tables.without_blank_lines(frame, roles.values())
    chosen = [
        pl.col(column).cast(pl.String) if not isinstance(frame.collect_schema()[column], pl.List)
        else pl.col(column).cast(pl.List(pl.String)).list.join(", ")
        for column in dict.fromkeys(roles.values())
    ]  # fmt: skip
    table = tables.collect(frame.select(chosen), path, {roles["item"]: tables.ID})
    distinct = table.unique(subset=roles["item"], keep="first", maintain_order=True)
    if distinct.height < table.height:
        notes.append(f"{path.name}: {table.height - distinct.height} rows repeat an item id; the first row counts")
    fields = {role: distinct[column].fill_null("").to_list() for role, column in roles.items() if role != "item"}
    return distinct[roles["item"]].to_list(), fields


def _find_images(folder: Path, item_ids: IdMap, named: list[str] | None, notes: list[str]) -> list[str] | None:
    """Path of each item's picture, "" where there is none: as the item table names it, else `images/{id}.*`."""
    folder = folder.resolve()
    pictures = folder / "images"
    if named is None:
        if not pictures.is_dir():
            return None
        files = {file.stem: str(file) for file in sorted(pictures.iterdir()) if file.is_file()}
        return [files.get(one, "") for one in item_ids.ids]
    found, absent, addresses = [], 0, 0
    for name in named:
        if name.startswith(("http://", "https://")):
            addresses += 1
            found.append("")
            continue
        path = next((str(place / name) for place in (folder, pictures) if name and (place / name).is_file()), "")
        absent += bool(name and not path)
        found.append(path)
    if absent:
        notes.append(f"{absent} images named in the item table are not there")
    if addresses:
        notes.append(f"{addresses} images are web addresses, which are not fetched; save them under images/")
    return found


def _write(dataset: Dataset, folder: Path) -> None:
    import polars as pl

    columns = {
        "user": pl.Series(dataset.user_ids.ids).gather(dataset.users),
        "item": pl.Series(dataset.item_ids.ids).gather(dataset.items),
    }
    if dataset.timestamps is not None:
        columns["timestamp"] = dataset.timestamps
    columns["split"] = pl.Series(["train", "valid", "test"]).gather(dataset.split)
    pl.DataFrame(columns).write_csv(folder / "events.csv")
    items = {"item": dataset.item_ids.ids}
    if dataset.item_titles is not None:
        items["title"] = dataset.item_titles
    items |= {name: texts for name, texts in dataset.item_fields.items() if name in ITEM_COLUMNS}
    if "image" in items:
        items["image"] = [str(Path(one).resolve()) if one else "" for one in items["image"]]
    pl.DataFrame(items).write_csv(folder / "items.csv")
    save_features(dataset, folder)


FORM = Form(
    "shop",
    "events.csv|tsv|parquet (user, item, time), optional items.csv|tsv|parquet (item, title, ...) and images/",
    _find,
    _read,
    _write,
)

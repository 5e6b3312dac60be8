"""What a shop has: `events.csv|tsv|parquet`, optional `items.csv|tsv|parquet`, optional `images/`. Ids are strings.

Columns are found by their usual names (`EVENT_COLUMNS`, `ITEM_COLUMNS`), or named by the option `columns`. Items stand
in the order of the item table; ids that it lacks are an error unless `missing_items` says otherwise. `*_feat.npy` with
row = line of the item table are read too.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from hellm.data.attributes import NOT_ATTRIBUTES
from hellm.data.dataset import DataError, Dataset, IdMap
from hellm.data.forms import _events as events
from hellm.data.forms import _tables as tables
from hellm.data.forms import _times as times
from hellm.data.forms._base import Form, Source, check_ids_known, distinct_ids, load_table_features, save_features
from hellm.data.forms._ids import check_ids_writable, clean, read_ids, without_unused
from hellm.data.forms._pictures import FOLDER, find_pictures

SUFFIXES = (".csv", ".tsv", ".parquet")
EVENT_COLUMNS = {
    "user": ("user", "user_id", "userid", "customer", "customer_id", "customerid", "client", "client_id", "visitor",
             "visitor_id", "visitorid", "account_id", "member_id", "reviewerid", "uid", "user_name", "username",
             "shopper_id", "buyer_id", "session_id"),
    "item": ("item", "item_id", "itemid", "product", "product_id", "productid", "sku", "article", "article_id", "asin",
             "parent_asin", "movieid", "movie_id", "iid", "stockcode", "stock_code", "product_sku", "variant_id"),
    "time": events.TIMES,
    "split": ("split", "x_label"),
    **events.MEANINGS,
}  # fmt: skip
ITEM_COLUMNS = {
    "item": (*EVENT_COLUMNS["item"], "id"),
    "title": ("title", "name", "item_title", "product_title", "product_name", "prod_name"),
    "description": ("description", "desc", "detail_desc", "text"),
    "brand": ("brand", "store", "manufacturer", "vendor"),
    "category": ("category", "categories", "genres", "product_type", "product_type_name"),
    "image": ("image", "image_path", "image_file", "img", "picture", "photo", "image_name", "filename", "image_url",
              "imageurl", "img_url", "imurl", "image_link", "picture_url", "photo_url", "thumbnail", "image_src",
              "images"),
}  # fmt: skip
ROLES = tuple(dict.fromkeys((*EVENT_COLUMNS, *ITEM_COLUMNS, "attribute")))
LABELS = {"train": 0, "valid": 1, "validation": 1, "val": 1, "test": 2, "0": 0, "1": 1, "2": 2}
_SPLIT: tables.Rule = (LABELS.__contains__, "train, valid or test")


def _find(path: Path) -> Path | None:
    if path.is_file():
        return path if path.suffix.lower() in SUFFIXES and path.stem not in ("items", "users") else None
    return next((path / f"events{suffix}" for suffix in SUFFIXES if (path / f"events{suffix}").exists()), None)


def _read(
    path: Path,
    *,
    missing_items: str = "error",
    event_types: Sequence[str] | None = None,
    columns: Mapping[str, str | Sequence[str]] | None = None,
    separator: str | None = None,
    encoding: str | None = None,
    min_rating: float | None = None,
    items: str | Path | None = None,
) -> Source:
    chosen = events.columns_argument(columns, ROLES)
    table = tables.Table(path, separator=separator, encoding=encoding)
    notes = table.notes
    roles = events.find_roles(table, EVENT_COLUMNS, ("user", "item"), chosen, elsewhere=("item",))
    _explode_lists(table, roles["item"], notes)
    candidates = [path.with_name(f"items{suffix}") for suffix in SUFFIXES]
    item_path = next((one for one in candidates if one.exists() and one != path), candidates[0])
    if items is not None:
        item_path = Path(items)
        if not item_path.is_file():
            raise DataError(f"{item_path}: no such file; items must be the table of items that goes with {path.name}")
    listed: list[str] = []
    fields: dict[str, list[str]] = {}
    if item_path.exists() and item_path != path:
        listed, fields, item_column = _read_items(item_path, chosen, separator, encoding, notes)
    else:
        item_column = None
        for role, names in chosen.items():
            if role not in EVENT_COLUMNS:
                raise DataError(f"{path}: columns names {', '.join(names)} for {role}, but there is no table of items")
    if "item" in chosen and chosen["item"][0] not in (roles["item"], item_column):
        raise DataError(f"{path}: no column {chosen['item'][0]!r} for the item; found {', '.join(table.columns)}")
    ids = {"user": read_ids(table, roles["user"], notes), "item": read_ids(table, roles["item"], notes, listed)}
    item_ids = ids["item"].ids
    read = events.read_events(
        table, roles, ids=ids, notes=notes, labels=(LABELS, _SPLIT), event_types=event_types, min_rating=min_rating
    )  # fmt: skip
    hint = "; columns={role: NAME} (--columns ROLE=NAME) uses one"
    events.unused_note(table, list(roles.values()), notes, option=hint)
    if "time" not in roles:
        events.order_note(table, list(roles.values()), notes)
    seconds = (
        None if read.times is None or read.plain is None else times.to_seconds(read.times, notes, plain=read.plain)
    )
    labels = read.split
    user_ids, users = without_unused(ids["user"].ids, 0, read.users)
    item_ids, item_rows = without_unused(item_ids, len(listed), read.items)
    if listed:
        missing = item_ids.ids[len(listed) :]
        check_ids_known(path, missing, item_path.name, missing_items)
        if missing and missing_items == "drop":
            keep = item_rows < len(listed)
            notes.append(f"{int((~keep).sum())} events on items that {item_path.name} lacks are left out")
            users, item_rows = users[keep], item_rows[keep]
            labels, seconds = (None if values is None else values[keep] for values in (labels, seconds))
            item_ids = IdMap(listed)
    pad = [""] * (len(item_ids) - len(listed))
    fields = {name: texts + pad for name, texts in fields.items()}
    images = find_pictures(item_path.parent, item_ids.ids, fields.pop("image", None), notes)
    if images is not None:
        fields["image"] = images
    return Source(
        users,
        item_rows,
        user_ids,
        item_ids,
        timestamps=seconds,
        labels=labels,
        item_titles=fields.pop("title", None),
        item_fields=fields,
        item_features=load_table_features(path, item_path, len(item_ids), notes),
        notes=notes,
        name=path.parent.resolve().name if path.stem == "events" else None,
        columns=roles,
        files={item_path.name, FOLDER},
    )


def _explode_lists(table: tables.Table, column: str, notes: list[str]) -> None:
    import polars as pl

    if table.dtype(column) in (pl.List, pl.Array):
        table.explode(column)
        notes.append(f"{table.path.name}: column {column!r} holds lists; each entry counts as an event of its row")


def _read_items(
    path: Path, chosen: Mapping[str, list[str]], separator: str | None, encoding: str | None, notes: list[str]
) -> tuple[list[str], dict[str, list[str]], str]:
    """Item ids in file order, the texts that the table has of them, and the column of the ids."""
    import polars as pl

    table = tables.Table(path, separator=separator, encoding=encoding)
    notes += table.notes
    mine = {role: names for role, names in chosen.items() if role in ITEM_COLUMNS}
    roles = events.find_roles(table, ITEM_COLUMNS, ("item",), mine, elsewhere=("item",))
    for name in chosen.get("attribute", ()):
        if name not in table.columns:
            raise DataError(f"{path}: no column {name!r} for the attribute; found {', '.join(table.columns)}")
        if name in NOT_ATTRIBUTES:
            raise ValueError(f"columns must not name {name!r} as an attribute; it is a field of its own")
        roles.setdefault(name, name)
    events.unused_note(
        table, list(roles.values()), notes, option='; columns={"attribute": NAME} (--columns attribute=NAME) keeps one'
    )
    rows = table.collect(lambda frame: frame.select(_cell(table, name).alias(role) for role, name in roles.items()))
    where = f"{path.name}: column {roles['item']!r}"
    ids = clean(rows["item"], where, notes)
    without = int(ids.null_count())
    without -= table.num_blank() if without else 0
    if without:
        notes.append(f"{where}: {without} rows without item id are left out")
    rows = rows.with_columns(item=ids).filter(pl.col("item").is_not_null())
    if not rows.height:
        raise DataError(f"{path}: the table has a header but no rows")
    distinct = rows.unique(subset="item", keep="first", maintain_order=True)
    if distinct.height < rows.height:
        notes.append(f"{path.name}: {rows.height - distinct.height} rows repeat an item id; the first row counts")
    fields = {role: distinct[role].fill_null("").to_list() for role in roles if role != "item"}
    return list(distinct_ids(path, distinct["item"].to_list()).ids), fields, roles["item"]


def _cell(table: tables.Table, column: str):
    """A cell of any type as text, lists joined by commas."""
    import polars as pl

    dtype = table.dtype(column)
    if isinstance(dtype, (pl.List, pl.Array)):
        entry = dtype.inner
        if entry.is_nested():
            raise DataError(f"{table.path}: column {column!r} must hold text or lists of text, got {dtype}")
        return pl.col(column).cast(pl.List(entry)).cast(pl.List(pl.String)).list.drop_nulls().list.join(", ")
    return table.text(column)


def _write(dataset: Dataset, folder: Path) -> None:
    import polars as pl

    check_ids_writable(dataset, "shop")
    columns = {
        "user": pl.Series(dataset.user_ids.ids).gather(dataset.users),
        "item": pl.Series(dataset.item_ids.ids).gather(dataset.items),
    }
    if dataset.timestamps is not None:
        columns["timestamp"] = pl.Series(dataset.timestamps)
    columns["split"] = pl.Series(["train", "valid", "test"]).gather(dataset.split)
    pl.DataFrame(columns).write_csv(folder / "events.csv")
    items = {"item": dataset.item_ids.ids}
    if dataset.item_titles is not None:
        items["title"] = dataset.item_titles
    items |= {name: texts for name, texts in dataset.item_fields.items() if name not in items and name != "image_url"}
    if "image" in items:
        items["image"] = _copy_pictures(items["image"], folder)
    pl.DataFrame(items, schema=dict.fromkeys(items, pl.String)).write_csv(folder / "items.csv")
    save_features(dataset, folder)


def _copy_pictures(paths: Sequence[str], folder: Path) -> list[str]:
    """Copy pictures to `images/`, numbered as the items; gives the names for the table, "" where there is no file."""
    names = []
    for index, path in enumerate(paths):
        name = ""
        if path and Path(path).is_file():
            name = f"{FOLDER}/{index}{Path(path).suffix.lower()}"
            (folder / FOLDER).mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)
        names.append(name)
    return names


FORM = Form(
    "shop",
    "events.csv|tsv|parquet (user, item, time), optional items.csv|tsv|parquet (item, title, ...) and images/",
    _find,
    _read,
    _write,
    before=("sasrec",),
)

"""Tables of events: which column means what, which rows are events, when they happened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from hellm.data.dataset import DataError
from hellm.data.forms import _times
from hellm.data.forms._ids import IdColumn
from hellm.data.forms._tables import NON_NEGATIVE_INTEGER, Rule, Table

if TYPE_CHECKING:
    import polars as pl

Synonyms = Mapping[str, tuple[str, ...]]

# Columns that say more of an event than who, what and when; forms of their own names take these too.
MEANINGS = {
    "label": ("label", "is_positive", "is_click", "clicked"),
    "quantity": ("quantity", "qty", "num_items", "units", "item_quantity", "order_quantity"),
    "rating": ("rating", "ratings", "stars", "overall", "score", "review_score"),
    "type": ("type", "event", "event_type", "event_name", "action", "action_type", "behavior", "behavior_type",
             "behaviour"),
}  # fmt: skip
TIMES = ("timestamp", "time", "ts", "datetime", "date", "event_time", "event_timestamp", "event_date", "event_datetime",
         "created_at", "created", "occurred_at", "order_date", "order_time", "ordered_at", "order_timestamp",
         "purchased_at", "purchase_date", "purchase_time", "purchase_timestamp", "order_purchase_timestamp",
         "invoicedate", "invoice_date", "transaction_date", "transaction_time", "t_dat", "unixreviewtime", "unix_time",
         "unixtime", "epoch", "visited_at", "clicked_at", "viewed_at", "click_time", "view_time", "date_time", "when",
         "day")  # fmt: skip
UNDONE = frozenset({"refund", "refunded", "return", "returned", "cancel", "cancelled", "canceled", "cancellation",
                    "remove", "removed", "remove_from_cart", "removefromcart", "unlike", "dislike"})  # fmt: skip


def plain_name(column: str) -> str:
    """A column's name as it is compared: lower case, with underscores."""
    return column.strip().lower().replace(" ", "_").replace("-", "_").replace(".", "_")


def columns_argument(columns: Mapping[str, str | Sequence[str]] | None, roles: Sequence[str]) -> dict[str, list[str]]:
    """The option `columns` as role -> names. Raises ValueError for a role that there is not."""
    given = {role: [names] if isinstance(names, str) else list(names) for role, names in (columns or {}).items()}
    for role, names in given.items():
        if role not in roles:
            raise ValueError(f"columns must name roles among {', '.join(roles)}, got {role!r}")
        if role != "attribute" and len(names) != 1:
            raise ValueError(f"columns must name one column for {role}, got {', '.join(names) or 'none'}")
    return given


def find_roles(
    table: Table,
    synonyms: Synonyms,
    required: Sequence[str],
    chosen: Mapping[str, list[str]] | None = None,
    *,
    elsewhere: Sequence[str] = (),
) -> dict[str, str]:
    """Role -> column of a table: the one that was chosen, else the first of the usual names.

    Args:
        table: The table.
        synonyms: Role -> usual names.
        required: Roles without which the table cannot be read.
        chosen: Role -> names, of `columns_argument`.
        elsewhere: Roles whose chosen column may stand in another table instead.

    Raises:
        DataError: A required or chosen role has no column, or one that the header names twice; lists what was found.
    """
    chosen = chosen or {}
    plain = {plain_name(column): column for column in reversed(table.columns)}
    roles: dict[str, str] = {}
    for role in synonyms:
        if role in chosen:
            name = chosen[role][0]
            if name in table.columns:
                roles[role] = name
            elif role not in elsewhere:
                raise DataError(f"{table.path}: no column {name!r} for the {role}; found {_listed(table.columns)}")
    for role, names in synonyms.items():
        free = (plain[name] for name in names if name in plain and plain[name] not in roles.values())
        if role not in roles and (column := next(free, None)) is not None:
            roles[role] = column
    for role in required:
        if role not in roles:
            raise DataError(_no_column(table, role, synonyms[role]))
    for role, column in roles.items():
        if column in table.repeated:
            raise DataError(f"{table.path}: the header names {column!r} twice, and it is the column for the {role}")
    return roles


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _no_column(table: Table, role: str, names: Sequence[str]) -> str:
    text = (
        f"{table.path}: no column for the {role} (one of {', '.join(names)}); found {_listed(table.columns)}; "
        f'name it with columns={{"{role}": NAME}} (--columns {role}=NAME)'
    )
    if any(NON_NEGATIVE_INTEGER[0](column) or _times.parse_time(column) is not None for column in table.columns):
        text += "; the first line looks like data: add a header such as user,item,timestamp above it"
    return text


@dataclass
class Events:
    """Events of one table in the order of its rows, those that are none left out.

    Attributes:
        users, items: [n] int32 indices, or the int64 numbers of a form that numbers its rows.
        times: [n] float64, None where the table has none.
        plain: [n] bool, which times are plain numbers rather than seconds.
        split: [n] int8, or None.
    """

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray | None
    plain: np.ndarray | None
    split: np.ndarray | None


def read_events(
    table: Table,
    roles: Mapping[str, str],
    *,
    ids: Mapping[str, IdColumn],
    notes: list[str],
    labels: tuple[Mapping[str, int], Rule] | None = None,
    event_types: Sequence[str] | None = None,
    min_rating: float | None = None,
) -> Events:
    """Read a table of events.

    Rows that are no event are left out with a note: label 0, a quantity of 0 or less, an undone type, no user or item.

    Args:
        table: The table.
        roles: Role -> column, "user" and "item" among them.
        ids: "user" and "item" -> ids of the columns; a role that is not there holds the numbers of rows.
        notes: Gains what was left out and why.
        labels: Of the split: lower-case text -> 0, 1 or 2, and the rule for messages.
        event_types: Only events of these types; None takes all but the undone.
        min_rating: Leaves out lower ratings.

    Raises:
        DataError: Naming line and column of a cell that is not what it must be.
        ValueError: `event_types` or `min_rating` without such a column, or types that do not occur.
    """
    import polars as pl

    where = table.path.name
    rules: dict[str, Rule] = {}
    chosen: list[pl.Expr] = []
    for role in ("user", "item"):
        text = table.text(roles[role])
        if role in ids:
            chosen.append(ids[role].position(text).alias(role))
        else:
            rules[roles[role]] = NON_NEGATIVE_INTEGER
            chosen.append(text.str.strip_chars().cast(pl.Int64, strict=False).alias(role))
    plain_times = True
    if "time" in roles:
        expressions, plain_times = _time_expressions(table, roles["time"])
        chosen += expressions
    if "split" in roles and labels is not None:
        text = table.text(roles["split"]).str.strip_chars().str.to_lowercase()
        chosen.append(text.replace_strict(dict(labels[0]), default=None, return_dtype=pl.Int8).alias("split"))
        rules[roles["split"]] = labels[1]
    chosen += [table.numbers(roles[role]).alias(role) for role in ("label", "quantity", "rating") if role in roles]
    if "type" in roles:
        chosen.append(table.text(roles["type"]).cast(pl.Categorical).alias("type"))
    rows = table.collect(lambda frame: frame.select(chosen))
    if not rows.height:
        raise DataError(f"{table.path}: the table has a header but no rows")

    kept = _kept(table, rows, roles, notes, event_types, min_rating)
    columns = {}
    for role in ("user", "item"):
        columns[role] = ids[role].indices(rows[role]) if role in ids else rows[role].fill_null(-1).to_numpy()
        if len(ids) == 2:
            rows = rows.drop(role)
    for role in ids:
        missing = columns[role] < 0
        if role == "user":
            # A line without anything in it is no row without an id.
            both = missing & (columns["item"] < 0)
            blank = table.num_blank() if both.any() else 0
            kept &= ~both
            missing &= ~both
            if int(both.sum()) > blank:
                notes.append(f"{where}: {int(both.sum()) - blank} rows without user and item are left out")
        _leave_out(
            kept, missing, notes,
            f"{where}: {{}} events without {role} id in column {roles[role]!r} are left out ({ids[role].missing()})",
        )  # fmt: skip
    if not kept.any():
        raise DataError(f"{table.path}: no row is left that is an event ({'; '.join(notes) or 'no ids'})")
    for role in ("user", "item"):
        bad = kept & (columns[role] < 0)
        if role not in ids and (bad & ~_blank(rows)).any():
            table.refuse(rules, f"row {int(bad.argmax()) + 1}: column {roles[role]!r} must be {rules[roles[role]][1]}")
        kept &= columns[role] >= 0
    if not kept.any():
        raise DataError(f"{table.path}: the table has a header but no rows")
    split = None
    if labels is not None and "split" in rows.columns:
        bad = rows["split"].is_null().to_numpy() & kept
        if bad.any():
            otherwise = f"row {int(bad.argmax()) + 1}: column {roles['split']!r} must be {labels[1][1]}"
            table.refuse(rules, otherwise)
        split = _taken(rows["split"].fill_null(0).to_numpy(), kept)
    times = plain = None
    if "time" in roles:
        times, plain = _times_of(table, roles["time"], rows, kept, plain_times)
    return Events(_taken(columns.pop("user"), kept), _taken(columns.pop("item"), kept), times, plain, split)


def _taken(values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Those that are kept; not a copy where they are all."""
    return values if kept.all() else values[kept]


def _blank(rows: pl.DataFrame) -> np.ndarray:
    """Rows in which nothing stands that was read, as blank lines are, [n] bool."""
    import polars as pl

    return rows.select(pl.all_horizontal(pl.all().is_null())).to_series().to_numpy()


def _leave_out(kept: np.ndarray, which: np.ndarray, notes: list[str], note: str) -> None:
    number = int((kept & which).sum())
    if number:
        notes.append(note.replace("{}", str(number), 1))
    kept &= ~which


def _kept(table: Table, rows: pl.DataFrame, roles, notes: list[str], event_types, min_rating) -> np.ndarray:
    """Which rows tell of something that happened, [n] bool."""
    where, kept = table.path.name, np.ones(rows.height, dtype=bool)
    if event_types is not None or "type" in roles:
        kept &= _of_types(table, rows, roles.get("type"), notes, event_types)
    if "label" in roles:
        values = rows["label"].drop_nulls().unique().to_list()
        if set(values) <= {0.0, 1.0} and values:
            which = (rows["label"] == 0).fill_null(False).to_numpy()
            _leave_out(kept, which, notes, f"{where}: {{}} events of label 0 in column {roles['label']!r} are left out")
        else:
            notes.append(f"{where}: column {roles['label']!r} is not used, as it is not of 0 and 1")
    if "quantity" in roles:
        which = (rows["quantity"] <= 0).fill_null(False).to_numpy()
        _leave_out(
            kept, which, notes,
            f"{where}: {{}} events of quantity 0 or less in column {roles['quantity']!r} are left out as returns",
        )  # fmt: skip
    if min_rating is not None:
        if "rating" not in roles:
            raise ValueError(
                f"min_rating needs a column for the rating (one of {', '.join(MEANINGS['rating'])}), and {table.path} "
                f"has {', '.join(table.columns)}"
            )
        which = (rows["rating"] < min_rating).fill_null(True).to_numpy()
        _leave_out(kept, which, notes, f"{where}: {{}} events rated below {min_rating:g} are left out")
    elif "rating" in roles and rows["rating"].drop_nulls().n_unique() > 1:
        notes.append(
            f"{where}: every event counts, however low its rating in column {roles['rating']!r} (from "
            f"{rows['rating'].min():g} to {rows['rating'].max():g}); min_rating=X (--min-rating X) leaves out lower"
        )
    return kept


def _of_types(table: Table, rows: pl.DataFrame, column: str | None, notes: list[str], event_types) -> np.ndarray:
    import polars as pl

    if column is None:
        raise DataError(f"{table.path}: event_types needs a column for the type (one of {', '.join(MEANINGS['type'])})")
    kinds = sorted(rows["type"].cast(pl.String).drop_nulls().unique().to_list())
    types = rows["type"].cast(pl.String)
    if event_types is not None:
        unknown = [one for one in event_types if one not in kinds]
        if unknown:
            raise ValueError(f"event_types must be among {', '.join(kinds)}, got {', '.join(unknown)}")
        return types.is_in(list(event_types)).fill_null(False).to_numpy()
    some = ", ".join(kinds[:8]) + (", ..." if len(kinds) > 8 else "")
    undone = [one for one in kinds if plain_name(one) in UNDONE]
    out = types.is_in(undone).fill_null(False).to_numpy()
    if undone:
        notes.append(
            f"{table.path.name}: {int(out.sum())} events of type {', '.join(undone)} in column {column!r} undo others "
            "and are left out"
        )
    if len(kinds) - len(undone) > 1:
        used = f"events of all types in column {column!r} are used: {some}"
        notes.append(f"{used}; event_types (--event-types) chooses among them")
    return ~out


def _time_expressions(table: Table, column: str):
    """Expressions for the times that polars reads, and for whether a text has any; whether times are numbers."""
    import polars as pl

    dtype, source = table.dtype(column), pl.col(column)
    if _is_time(dtype) and not dtype.is_numeric():
        return [(source.cast(pl.Datetime("us")).dt.epoch("us") / 1e6).alias("time")], False
    if dtype.is_numeric():
        value = source.cast(pl.Float64)
        return [pl.when(value.is_finite()).then(value).alias("time")], True
    if dtype.is_temporal() or dtype == pl.Boolean:
        raise DataError(f"{table.path}: column {column!r} must be {_times.WANTED}, got {dtype}")
    text = table.text(column)
    head = table.collect(lambda frame: frame.select(text.alias("time")).head(1000))["time"]
    parsed, numbers = _times.fast_expression(head, text)
    return [parsed.alias("time"), pl.when(text.is_not_null()).then(True).alias("time is given")], numbers


def _is_time(dtype: pl.DataType) -> bool:
    """Whether polars has read the times, and leaves over none."""
    import polars as pl

    return dtype in (pl.Date, pl.Datetime) or dtype.is_numeric()


def _other_times(table: Table, column: str, unread: np.ndarray, left: np.ndarray) -> list[str | None]:
    """Texts of the times that polars did not read, [n] bool, in some of those rows."""
    if not len(left) or _is_time(table.dtype(column)):
        return [None] * len(left)
    (parsed, _), _ = _time_expressions(table, column)
    texts = table.collect(lambda frame: frame.filter(parsed.is_null()).select(table.text(column).alias("time")))["time"]
    return texts.gather((np.cumsum(unread) - 1)[left]).to_list()


def _times_of(
    table: Table, column: str, rows: pl.DataFrame, kept: np.ndarray, numbers: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Times of the kept rows, and which of them are plain numbers."""
    unread = rows["time"].is_null().to_numpy()
    left = np.flatnonzero(unread & kept)
    texts = _other_times(table, column, unread, left)
    times = rows["time"].fill_null(np.nan).to_numpy()
    # Where nothing was null, what polars gives is its own.
    times = times.copy() if not times.flags.writeable else times
    plain = np.full(len(times), numbers)
    day_first, how = _times.day_order([text for text in texts if text])
    hint = "; 1/2/2024 may be two days" if how == "undecided" else ""

    def rule(text: str) -> bool:
        return _times.parse_time(text, day_first=day_first) is not None

    def refuse(row: int) -> NoReturn:
        otherwise = f"row {row + 1}: column {column!r} must be {_times.WANTED}"
        table.refuse({column: (rule, _times.WANTED + hint)}, otherwise)

    with np.errstate(invalid="ignore"):
        odd = kept & ~unread & ~_times.plausible(times, plain=numbers)
    if odd.any():
        refuse(int(odd.argmax()))
    for row, text in zip(left.tolist(), texts, strict=True):
        value = None if text is None else _times.parse_time(text, day_first=day_first)
        if text is None or value is None:
            refuse(row)
        times[row], plain[row] = value, _times.is_number(text.strip())
    return _taken(times, kept), _taken(plain, kept)


def unused_note(table: Table, used: Sequence[str], notes: list[str], *, option: str = "") -> None:
    """Say which columns of a table play no part."""
    left = [column for column in table.columns if column not in used]
    if left:
        notes.append(f"{table.path.name}: columns not used: {_listed(left)}{option}")


def order_note(table: Table, used: Sequence[str], notes: list[str]) -> None:
    """Say that a table has no times, and which of its other columns look like some."""
    import polars as pl

    like = []
    for column in table.columns:
        dtype = table.dtype(column)
        if column in used or dtype.is_nested():
            continue
        if dtype in (pl.Date, pl.Datetime):
            like.append(column)
            continue
        text = table.text(column)
        head = table.collect(lambda frame, text=text: frame.select(text.alias("cell")).head(20))["cell"].drop_nulls()
        values = [_times.parse_time(cell, day_first=True) for cell in head.to_list()]
        numbers = [_times.is_number(cell.strip()) for cell in head.to_list()]
        if values and all(
            value is not None and (not number or value > 6e8) for value, number in zip(values, numbers, strict=True)
        ):
            like.append(column)
    hint = ""
    if like:
        hint = f'; {", ".join(like)} may hold times: columns={{"time": "{like[0]}"}} (--columns time={like[0]})'
    notes.append(f"{table.path.name}: no column of times, so the events of a user count as standing oldest first{hint}")

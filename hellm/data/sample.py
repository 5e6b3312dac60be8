"""A small made-up shop with a known structure, for demonstrations and tests."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hellm._folders import new_folder

# kind: words for the title, category, number of corners of its drawn outline (0 = round), how far the outline caves in
_KINDS = (
    ("Mug", "Kitchen > Mugs", 0, 1.0),
    ("Desk Lamp", "Lighting > Desk Lamps", 3, 1.0),
    ("Cushion", "Living > Cushions", 4, 1.0),
    ("Wall Clock", "Living > Clocks", 12, 0.8),
    ("Plant Pot", "Garden > Pots", 6, 1.0),
    ("Star Lantern", "Lighting > Lanterns", 10, 0.45),
    ("Coaster Set", "Kitchen > Coasters", 8, 1.0),
    ("Wind Spinner", "Garden > Spinners", 8, 0.5),
)
# style: name, colour, second colour, pattern
_STYLES = (
    ("Crimson Striped", (190, 30, 45), (245, 200, 200), "stripes"),
    ("Ocean Dotted", (20, 90, 170), (190, 220, 250), "dots"),
    ("Forest Plain", (30, 120, 60), (30, 120, 60), "plain"),
    ("Sunny Chequered", (230, 170, 20), (255, 240, 190), "checks"),
    ("Violet Striped", (120, 50, 150), (220, 195, 240), "stripes"),
    ("Charcoal Dotted", (60, 60, 65), (200, 200, 205), "dots"),
)
_BRANDS = ("Arlo", "Bergen", "Calla", "Dune", "Elba", "Fjord", "Gale", "Hygge", "Isla", "Juno", "Kite", "Luma")
_PIXELS = 64
_START = 1_700_000_000
_DAYS = 180
_NEW_DAYS = 7


def write_sample_shop(
    path: str | Path,
    *,
    num_users: int = 600,
    num_items: int = 240,
    num_groups: int = 8,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write `events.csv`, `items.csv` and `images/` of a made-up shop.

    Planted: item i belongs to group i % num_groups, a kind of product in a style, which shows in title, category and
    picture. A user buys 5 to 16 different items, about 9 in 10 of them from the one or two groups that the user likes,
    and there mostly from two brands that the user likes; 1 in 3 purchases is the item that follows the one
    before in its group, so that order tells something too. The last 1 in 20 items are new: they are sold in the last
    week only, where they are 1 in 3 purchases. 1 in 40 items has no picture, 1 in 40 no title, and every second of the
    latter neither brand nor category.

    Args:
        path: Folder to make.
        num_users: > 0.
        num_items: At least 20 per group.
        num_groups: 1 to 48.
        seed: Same seed, same files.
        overwrite: Replace a folder that is there.

    Returns: The folder.

    Raises:
        ValueError: A count out of range.
        FileExistsError: The folder is not empty and `overwrite` is False, or it is not one that hellm wrote as data.
    """
    if num_users <= 0:
        raise ValueError(f"num_users must be > 0, got {num_users}")
    if not 1 <= num_groups <= len(_KINDS) * len(_STYLES):
        raise ValueError(f"num_groups must lie in 1..{len(_KINDS) * len(_STYLES)}, got {num_groups}")
    if num_items < 20 * num_groups:
        raise ValueError(f"num_items must be at least 20 per group ({20 * num_groups}), got {num_items}")
    rng = np.random.default_rng(seed)
    with new_folder(path, overwrite=overwrite) as folder:
        _write_items(folder, num_items, num_groups, rng)
        _write_events(folder, num_users, num_items, num_groups, rng)
    return Path(path)


def item_id(item: int) -> str:
    """External id of the item with this number."""
    return f"P{1000 + item}"


def group_style(group: int) -> tuple[int, int]:
    """Kind and style of a group; neighbouring groups differ in both, groups 8 apart share the kind only."""
    return group % len(_KINDS), (group + group // len(_KINDS)) % len(_STYLES)


def _brand(item: int | np.ndarray, num_groups: int) -> int | np.ndarray:
    """Number of the brand: four items of a group that follow each other are of one."""
    return item // num_groups // 4 % len(_BRANDS)


def _write_items(folder: Path, num_items: int, num_groups: int, rng: np.random.Generator) -> None:
    (folder / "images").mkdir()
    lacking = rng.permutation(num_items)
    few = max(2, num_items // 40)
    without_image, without_title = set(lacking[:few].tolist()), lacking[few : 2 * few].tolist()
    with (folder / "items.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["item", "title", "brand", "category", "image"])
        for item in range(num_items):
            kind, style = group_style(item % num_groups)
            number = item // num_groups
            brand = _BRANDS[_brand(item, num_groups)]
            title = f"{_STYLES[style][0]} {_KINDS[kind][0]} {brand} {number + 1}"
            category, image = _KINDS[kind][1], f"images/{item_id(item)}.png"
            if item in without_title:
                title = ""
                if without_title.index(item) % 2:
                    brand = category = ""
            if item in without_image:
                image = ""
            else:
                _draw(kind, style, rng).save(folder / image)
            writer.writerow([item_id(item), title, brand, category, image])


def _draw(kind: int, style: int, rng: np.random.Generator):
    """Picture of one product: the outline of its kind filled with the pattern of its style, moved, turned and noisy."""
    from PIL import Image, ImageDraw

    _, _, corners, cave = _KINDS[kind]
    _, colour, second, pattern = _STYLES[style]
    angle = np.arange(corners or 40) * 2 * np.pi / (corners or 40) + rng.normal(0, 0.15) - np.pi / 2
    radius = _PIXELS * rng.uniform(0.36, 0.44) * np.where(np.arange(len(angle)) % 2, cave, 1.0)
    centre = _PIXELS / 2 + rng.normal(0, 2, 2)
    corner = centre + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    mask = Image.new("L", (_PIXELS, _PIXELS))
    ImageDraw.Draw(mask).polygon([tuple(one) for one in corner.tolist()], fill=255)
    y, x = np.mgrid[:_PIXELS, :_PIXELS] + rng.integers(0, 8)
    marks = {
        "plain": np.zeros_like(x, dtype=bool),
        "stripes": (x + y) % 12 < 4,
        "dots": (x % 10 - 5) ** 2 + (y % 10 - 5) ** 2 < 8,
        "checks": (x // 8 + y // 8) % 2 == 0,
    }[pattern]
    filling = np.where(marks[..., None], second, colour) + rng.normal(0, 12, 3)
    inside = np.asarray(mask)[..., None] > 0
    pixels = np.where(inside, filling, 246) + rng.normal(0, 6, (_PIXELS, _PIXELS, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _write_events(folder: Path, num_users: int, num_items: int, num_groups: int, rng: np.random.Generator) -> None:
    shop = _Shelves(num_items, num_groups)
    rows = []
    for user in range(num_users):
        taste = _Taste(
            groups=rng.choice(num_groups, size=min(num_groups, 1 + int(rng.random() < 0.5)), replace=False),
            brands=rng.choice(shop.brands, size=2, replace=False),
        )
        length = int(rng.integers(5, 17))
        times = np.sort(rng.choice(_DAYS * 24 * 60, size=length, replace=False)) * 60
        bought = _history(shop, taste, times >= (_DAYS - _NEW_DAYS) * 24 * 3600, rng)
        named = zip((times + _START).tolist(), bought, strict=True)
        rows += [(time, f"u{user + 1:05d}", item_id(item)) for time, item in named]
    rows.sort()
    with (folder / "events.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["user", "item", "timestamp"])
        writer.writerows((user, item, time) for time, user, item in rows)


class _Taste(NamedTuple):
    """What a user likes."""

    groups: np.ndarray
    brands: np.ndarray


class _Shelves:
    """The items of each group, older ones and new ones."""

    def __init__(self, num_items: int, num_groups: int) -> None:
        self.num_groups = num_groups
        self.num_old = num_items - max(num_groups, num_items // 20)
        self.old = [np.arange(group, self.num_old, num_groups) for group in range(num_groups)]
        self.brands = np.unique(_brand(np.arange(self.num_old), num_groups))
        new = np.arange(self.num_old, num_items)
        self.new = [new[new % num_groups == group] for group in range(num_groups)]

    def following(self, item: int) -> int:
        """The next item of the group; after the last and after a new one its first."""
        following = item + self.num_groups
        return following if following < self.num_old else item % self.num_groups

    def of_brands(self, group: int, brands: np.ndarray) -> np.ndarray:
        """The older items of a group that are of these brands; all of it where none is."""
        items = self.old[group]
        chosen = items[np.isin(_brand(items, self.num_groups), brands)]
        return chosen if len(chosen) else items


def _history(shop: _Shelves, taste: _Taste, in_last_days: np.ndarray, rng: np.random.Generator) -> list[int]:
    """Different items in order of purchase, one for each of `in_last_days`."""
    bought: list[int] = []
    while len(bought) < len(in_last_days):
        group, draw = int(rng.choice(taste.groups)), rng.random()
        if in_last_days[len(bought)] and rng.random() < 1 / 3:
            item = int(rng.choice(shop.new[group]))
        elif bought and draw < 0.35:
            item = shop.following(bought[-1])
        elif draw < 0.9:
            items = shop.of_brands(group, taste.brands) if rng.random() < 0.8 else shop.old[group]
            # The square favours the first items of a group: popularity is uneven, as in a real shop.
            item = int(items[int(rng.random() ** 2 * len(items))])
        else:
            item = int(rng.integers(shop.num_old))
        if item in bought:
            item = int(rng.choice(shop.old[group]))
        if item not in bought:
            bought.append(item)
    return bought

"""Pictures of items: by the id of an item only, made small here, and a neutral drawing where there is none."""

from __future__ import annotations

import asyncio
import base64
import io
import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from markupsafe import Markup

from hellm.data.pictures import open_picture
from hellm.serve.page.catalogue import Catalogue
from hellm.serve.store import Store

__all__ = ["SIDES", "Picture", "Pictures", "data_url"]

# Longer side in pixels, twice what is shown, for screens that are that fine.
SIDES = {"small": 256, "large": 720}
# Bytes of finished pictures that are kept.
_KEPT = 64 << 20


class Picture(NamedTuple):
    """A finished picture: its bytes and their media type."""

    content: bytes
    media_type: str


class Pictures:
    """Makes pictures of items, two at a time, and keeps the last ones.

    What goes out has been decoded and written anew, so a file that is no picture never does; neither do the place where
    it was taken nor what else a camera notes.

    Args:
        catalogue: Where the files are; None has none.
        store: What items that came since have brought; None has none.
    """

    def __init__(self, catalogue: Catalogue | None, store: Store | None) -> None:
        self._catalogue, self._store = catalogue, store
        self._executor = ThreadPoolExecutor(2, thread_name_prefix="pictures")
        self._kept: OrderedDict[tuple[str, str], Picture] = OrderedDict()
        self._size = 0

    async def of(self, item: str, title: str | None, size: str) -> Picture:
        """The picture of an item that the run knows; `size` is of `SIDES`."""
        key = (item, size)
        if key not in self._kept:
            made = await asyncio.get_running_loop().run_in_executor(self._executor, self._made, item, SIDES[size])
            if made is None:
                return _drawing(title)
            self._keep(key, made)
        self._kept.move_to_end(key)
        return self._kept[key]

    def close(self) -> None:
        """Nothing is made any more."""
        self._executor.shutdown(cancel_futures=True)

    def _made(self, item: str, side: int) -> Picture | None:
        file = self._catalogue.picture(item) if self._catalogue is not None else None
        if file is not None:
            return small_picture(file, side)
        came = self._store.picture(item) if self._store is not None else None
        return None if came is None else small_picture(io.BytesIO(came), side)

    def _keep(self, key: tuple[str, str], picture: Picture) -> None:
        if key not in self._kept:
            self._size += len(picture.content)
        self._kept[key] = picture
        while self._size > _KEPT and len(self._kept) > 1:
            _, old = self._kept.popitem(last=False)
            self._size -= len(old.content)


def small_picture(file: str | os.PathLike[str] | io.BytesIO, side: int) -> Picture | None:
    """A picture no longer than `side` pixels as WebP; None where it cannot be read."""
    try:
        picture = open_picture(file, side)
        picture.thumbnail((side, side))
        content = io.BytesIO()
        picture.save(content, "WEBP", quality=82)
    except Exception:
        # Whatever Pillow meets in a broken file; `hellm data check` tells of it.
        return None
    return Picture(content.getvalue(), "image/webp")


def data_url(content: bytes, side: int = SIDES["small"]) -> str | None:
    """A picture that is not stored, as an address that holds it; None where it cannot be read."""
    made = small_picture(io.BytesIO(content), side)
    if made is None:
        return None
    return f"data:{made.media_type};base64,{base64.b64encode(made.content).decode()}"


def _drawing(title: str | None) -> Picture:
    """A quiet square with the first letter of a title, or a box, in greys that fit light and dark pages."""
    letter = next((sign for sign in title or "" if sign.isalnum()), None)
    inside = (
        Markup(
            '<text x="32" y="41" font-family="system-ui,sans-serif" font-size="26" font-weight="600" {}>{}</text>'
        ).format(Markup('text-anchor="middle" fill="#878b84"'), letter.upper())
        if letter
        else Markup('<path d="M32 17l14 7v16l-14 7-14-7V24zM18 24l14 7 14-7M32 31v16" {}/>').format(
            Markup('fill="none" stroke="#878b84" stroke-width="2" stroke-linejoin="round"')
        )
    )
    drawing = Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64" width="256" height="256">'
        '<rect width="64" height="64" fill="#878b84" fill-opacity=".14"/>{}</svg>'
    ).format(inside)
    return Picture(str(drawing).encode(), "image/svg+xml")

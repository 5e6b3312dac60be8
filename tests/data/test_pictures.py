"""Pictures of every mode and size, where they are found, and how much memory they may take."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from support.datasets import write

from hellm.data import load_dataset
from hellm.data import pictures as pictures_module
from hellm.data.pictures import open_picture
from hellm.data.simple_features import image_features


@pytest.fixture(scope="module")
def grey() -> np.ndarray:
    y, x = np.mgrid[:40, :60]
    return (x * 4 + y // 8).astype(np.uint8)


def twins(grey: np.ndarray) -> dict[str, Image.Image]:
    eight = Image.fromarray(grey)
    wide = grey.astype(np.uint16)
    return {
        "16 bits by 257": Image.fromarray(wide * 257),
        "16 bits by 256": Image.fromarray(wide * 256),
        "RGB": eight.convert("RGB"),
        "RGBA": eight.convert("RGBA"),
        "LA": eight.convert("LA"),
        "palette": eight.convert("P"),
        "32 bits": Image.fromarray(wide.astype(np.int32) * 257),
        "32 bits of 8": Image.fromarray(wide.astype(np.int32)),
        "float": Image.fromarray(grey.astype(np.float32)),
        "float of 1": Image.fromarray(grey.astype(np.float32) / 255),
        "CMYK": eight.convert("RGB").convert("CMYK"),
    }


@pytest.mark.parametrize("small", [True, False], ids=["whole", "in strips"])
def test_every_mode_is_as_its_8_bit_twin(tmp_path, grey, monkeypatch, small):
    if not small:
        monkeypatch.setattr(pictures_module, "_SMALL", 100)
    Image.fromarray(grey).save(tmp_path / "eight.png")
    expected = np.asarray(open_picture(tmp_path / "eight.png", 8)).astype(int)
    assert expected.std() > 50
    for name, picture in twins(grey).items():
        path = tmp_path / f"{name}.tif"
        picture.save(path)
        found = np.asarray(open_picture(path, 8)).astype(int)
        assert np.abs(found - expected).max() <= 1, name
        if picture.mode in ("I;16", "P", "LA", "RGBA", "1"):
            picture.save(tmp_path / "x.png")
            assert np.abs(np.asarray(open_picture(tmp_path / "x.png", 8)).astype(int) - expected).max() <= 1, name


@pytest.mark.parametrize("small", [True, False], ids=["whole", "in strips"])
def test_transparent_parts_are_white(tmp_path, monkeypatch, small):
    if not small:
        monkeypatch.setattr(pictures_module, "_SMALL", 100)
    for mode, colour in (("RGBA", (10, 20, 30, 0)), ("LA", (10, 0))):
        Image.new(mode, (30, 30), colour).save(tmp_path / "x.png")
        assert np.asarray(open_picture(tmp_path / "x.png", 4)).min() == 255
    palette = Image.new("P", (30, 30), 3)
    palette.putpalette([9] * 768)
    palette.save(tmp_path / "p.png", transparency=3)
    assert np.asarray(open_picture(tmp_path / "p.png", 4)).min() == 255
    Image.new("RGB", (30, 30), (1, 2, 3)).save(tmp_path / "t.png", transparency=(1, 2, 3))
    assert np.asarray(open_picture(tmp_path / "t.png", 4)).min() == 255


@pytest.mark.parametrize("small", [True, False], ids=["whole", "in strips"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_pictures_are_turned_as_their_exif_says(tmp_path, suffix, small, monkeypatch):
    if not small:
        monkeypatch.setattr(pictures_module, "_SMALL", 100)
    upright = Image.new("RGB", (64, 32), "white")
    upright.paste("red", (0, 0, 32, 32))
    upright.paste("blue", (0, 0, 16, 16))
    turns = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    for orientation, turn in turns.items():
        stored = upright if turn is None else upright.transpose(Image.Transpose(turn))
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored.save(tmp_path / f"x.{suffix}", exif=exif, **({"quality": 95} if suffix in ("jpg", "webp") else {}))
        found = open_picture(tmp_path / f"x.{suffix}", 8).resize((16, 8))
        difference = np.asarray(found).astype(int) - np.asarray(upright.resize((16, 8)))
        assert np.abs(difference).mean() < 12, orientation


def test_large_pictures_are_reduced_and_bombs_refused(tmp_path, monkeypatch):
    Image.new("L", (4000, 2001), 77).save(tmp_path / "large.png")
    found = open_picture(tmp_path / "large.png", 100)
    assert found.size == (400, 201) and np.asarray(found).std() == 0
    monkeypatch.setattr(pictures_module, "MAX_PIXELS", 8_000_000)
    told = {}
    features = image_features([tmp_path / "large.png"], on_unreadable=lambda path, error: told.update({path: error}))
    assert not features.mask.any()
    assert "must have at most 8 megapixels, got 4000 x 2001" in str(next(iter(told.values())))


MEMORY = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
from PIL import Image
import numpy, hellm.data.simple_features
from hellm.data.pictures import open_picture
open_picture(sys.argv[1], 16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with ThreadPoolExecutor(8) as pool:
    list(pool.map(lambda _: open_picture(sys.argv[2], 224), range(10)))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_ten_large_pictures_take_the_memory_of_one(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "small.png")
    Image.new("RGBA", (4000, 4000), (200, 10, 10, 255)).save(tmp_path / "large.png", compress_level=1)
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "small.png"), str(tmp_path / "large.png")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    # One picture of 16 megapixels is 61 MiB.
    assert grown < 150


def shop(folder, table: str | None, *pictures: str):
    write(folder, events_csv="user,item\nu,A\nu,B\nu,c\n")
    if table is not None:
        write(folder, items_csv=table)
    for number, name in enumerate(pictures):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number * 40, 9, 9)).save(path)
    dataset = load_dataset(folder)
    found = [os.path.relpath(path, folder.resolve()) if path else "" for path in dataset.item_fields.get("image", [])]
    return dict(zip(dataset.item_ids.ids, found, strict=False)), dataset.notes


@pytest.mark.parametrize("column", ["image", "image_url", "Image URL", "picture_url", "image_link", "photo"])
def test_addresses_leave_room_for_saved_pictures(tmp_path, column):
    table = f"item,{column}\nA,https://x/1.jpg\nB,https://x/2.jpg\nc,\n"
    found, notes = shop(tmp_path, table, "images/A.png", "images/C.JPEG")
    assert found == {"A": "images/A.png", "B": "", "c": "images/C.JPEG"}
    assert any("2 images are web addresses, which are not fetched; save them under images/" in note for note in notes)
    assert any("1 of 3 items have no picture: B)" in note for note in notes)


@pytest.mark.parametrize(
    "name", ["images\\A.png", " A.png", "a.PNG", "images/a.png", ".\\images\\A.png", "Images/A.png"]
)
def test_names_as_other_systems_write_them(tmp_path, name):
    found, notes = shop(tmp_path, f"item,image\nA,{name}\nB,\nc,\n", "images/A.png")
    assert found["A"] == "images/A.png" and not any("not there" in note for note in notes)


def test_absent_and_unused_pictures_are_named(tmp_path):
    table = "item,image\nA,x1.png\nB,x2.png\nc,x3.png\nd,x4.png\n"
    _, notes = shop(tmp_path, table, "images/zz.png", "images/yy.jpg")
    assert "4 images named in the item table are not there: x1.png, x2.png, x3.png, ..." in notes
    assert "2 pictures in images/ belong to no item, or to one that has another: yy.jpg, zz.png" in notes
    (tmp_path / "images" / "list.txt").write_text("x")
    _, notes = shop(tmp_path, None)
    assert any(note.startswith("1 files in images/ are not read") and "list.txt" in note for note in notes)


@pytest.mark.parametrize("name", ["../outside.png", "/etc/passwd", "C:\\x.png", "images/../../outside.png", "link.png"])
def test_nothing_outside_the_folder_is_read(tmp_path, name):
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    folder = tmp_path / "shop"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "images" / "B.png").symlink_to(tmp_path / "outside.png")
    found, notes = shop(folder, f"item,image\nA,{name}\nB,\nc,\n")
    assert found == {"A": "", "B": "", "c": ""}
    assert any(
        "1 images named in the item table lie outside the data folder and are not read" in note for note in notes
    )
    assert any("files in images/ are not read, as they are no pictures or lie outside" in note for note in notes)


def test_pictures_go_with_a_shop_that_is_written(tmp_path):
    from hellm.data import save_dataset

    shop(tmp_path / "shop", "item,image\nA,A.png\nB,\nc,x/y.png\n", "images/A.png", "x/y.png")
    dataset = load_dataset(tmp_path / "shop")
    back = load_dataset(save_dataset(dataset, tmp_path / "out", form="shop"))
    assert [bool(path) for path in back.item_fields["image"]] == [True, False, True]
    assert all(str(tmp_path / "out") in path for path in back.item_fields["image"] if path)
    assert np.array_equal(back.item_features["image"].values, dataset.item_features["image"].values)


def test_formats_that_start_programs_are_not_opened(tmp_path):
    (tmp_path / "x.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    with pytest.raises(OSError, match="cannot identify image file"):
        open_picture(tmp_path / "x.png", 8)

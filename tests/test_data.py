import io
import logging
import os
import struct
import zipfile
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from brics_diffusers.data import (
    ImageCollection,
    UnreadableImageError,
    UnreadableLog,
    center_crop_resize,
    collate_images,
    image_loader,
    load_collection,
    read_image,
)


EMOJI = Path(__file__).parents[2] / "shared/data/noto-emoji-64"
COLORS = [(250, 10, 20), (30, 240, 50), (60, 70, 230), (80, 90, 100), (200, 210, 20), (5, 5, 5)]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def load(tmp_path):
    def load(source, *args, **kwargs):
        return load_collection(source, *args, cache_dir=tmp_path / "cache", **kwargs)

    return load


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "images"
    path.mkdir()
    return path


def save(path, color=(10, 20, 30), size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(color_type, bit_depth, size, rows):
    """A PNG in a form that Pillow does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bit_depth, color_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def pixels(data):
    image = read_image({"bytes": data, "path": None})
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def first_colors(dataset):
    return {tuple(np.asarray(read_image(row["image"]))[0, 0].tolist()) for row in dataset}


# read_image


def test_gray_and_one_bit():
    assert pixels(encoded(Image.new("L", (3, 2), 77))).tolist() == [[[77] * 3] * 3] * 2
    one_bit = Image.new("1", (2, 1))
    one_bit.putpixel((1, 0), 1)
    assert pixels(encoded(one_bit)).tolist() == [[[0] * 3, [255] * 3]]


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled(format):
    values = np.array([[0, 257, 128 * 257, 65535, 1000]], np.uint16)
    expected = [0, 1, 128, 255, 4]  # 1000 / 257 = 3.89
    assert pixels(encoded(Image.fromarray(values), format))[0, :, 0].tolist() == expected


def test_big_endian_and_32_bit_gray():
    big = Image.frombytes("I;16B", (2, 1), struct.pack(">2H", 0, 200 * 257))
    assert pixels(encoded(big, "TIFF"))[0, :, 1].tolist() == [0, 200]
    wide = Image.fromarray(np.array([[0, 65535, 514]], np.int32))
    assert pixels(encoded(wide, "TIFF"))[0, :, 2].tolist() == [0, 255, 2]
    with pytest.raises(UnreadableImageError, match=r"values in \[0, 70000\], expected \[0, 65535\]"):
        pixels(encoded(Image.fromarray(np.array([[0, 70000]], np.int32)), "TIFF"))


def test_16_bit_rgb_png():
    row = b"\0" + struct.pack(">6H", 0, 128 * 257, 65535, 64 * 257, 257, 0)
    result = pixels(png(2, 16, (2, 1), row))
    assert result.tolist() == [[[0, 128, 255], [64, 1, 0]]]


def test_float_tiff():
    values = np.array([[0.0, 0.2, 1.0]], np.float32)
    assert pixels(encoded(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 51, 255]
    for bad in (2.0, -0.5, np.nan):
        with pytest.raises(UnreadableImageError, match=r"expected \[0, 1.0\]"):
            pixels(encoded(Image.fromarray(np.array([[0.5, bad]], np.float32)), "TIFF"))


def test_palette():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert pixels(encoded(image)).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert pixels(encoded(image, transparency=1)).tolist() == [[[10, 20, 30], [255] * 3]]
    assert pixels(encoded(image, transparency=bytes([0, 255]))).tolist() == [[[255] * 3, [200, 100, 50]]]
    assert pixels(encoded(image, "GIF", transparency=0)).tolist() == [[[255] * 3, [200, 100, 50]]]


def test_alpha_is_composited_on_white():
    half = [round((100 * 128 + 255 * 127) / 255)] * 3
    gray = Image.new("LA", (1, 1), (100, 128))
    assert np.abs(pixels(encoded(gray)) - half).max() <= 1
    color = Image.new("RGBA", (2, 1), (200, 0, 50, 0))
    color.putpixel((1, 0), (200, 0, 50, 255))
    assert pixels(encoded(color)).tolist() == [[[255] * 3, [200, 0, 50]]]
    keyed = Image.new("RGB", (2, 1), (1, 2, 3))
    keyed.putpixel((1, 0), (9, 9, 9))
    assert pixels(encoded(keyed, transparency=(1, 2, 3))).tolist() == [[[255] * 3, [9, 9, 9]]]


def test_palette_with_alpha_and_premultiplied_modes(monkeypatch):
    palette = Image.new("RGBA", (1, 1), (255, 0, 0, 0)).convert("PA")
    premultiplied = Image.new("LA", (1, 1), (0, 0)).convert("La")
    for image in (palette, premultiplied):  # no file format holds these, so they are handed over opened
        monkeypatch.setattr(Image, "open", lambda file, image=image: image.copy())
        assert pixels(b"").tolist() == [[[255] * 3]]


def test_cmyk_jpeg():
    for color in [(220, 30, 40), (20, 200, 60), (10, 20, 30), (240, 240, 240)]:
        data = encoded(Image.new("RGB", (16, 16), color).convert("CMYK"), "JPEG", quality=95)
        assert Image.open(io.BytesIO(data)).mode == "CMYK"
        assert np.abs(pixels(data) - color).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    # What the camera stores, so that the operation of each EXIF orientation gives the upright image.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    assert np.array_equal(pixels(data)[:, :, 0], upright)


def test_exif_orientation_of_jpeg_and_16_bit():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored a quarter turn counterclockwise
    image = Image.new("RGB", (32, 16), (255, 0, 0))
    image.paste((0, 0, 255), (16, 0, 32, 16))
    result = pixels(encoded(image, "JPEG", quality=95, exif=exif))
    assert result.shape == (32, 16, 3)
    assert np.abs(result[4, 8] - [255, 0, 0]).max() < 8 and np.abs(result[28, 8] - [0, 0, 255]).max() < 8
    deep = Image.fromarray(np.array([[10 * 257, 20 * 257]], np.uint16))
    assert pixels(encoded(deep, exif=exif))[:, :, 0].tolist() == [[10], [20]]


def test_first_frame():
    frames = [Image.new("RGB", (4, 4), color) for color in COLORS[:3]]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(data)[0, 0].tolist() == list(COLORS[0])


def test_read_image_from_paths(tmp_path):
    save(tmp_path / "a.png", (1, 2, 3))
    for data in (tmp_path / "a.png", str(tmp_path / "a.png"), {"bytes": None, "path": str(tmp_path / "a.png")}):
        assert read_image(data).getpixel((0, 0)) == (1, 2, 3)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as file:
        file.write(tmp_path / "a.png", "inner/a.png")
    assert read_image({"path": f"zip://inner/a.png::{tmp_path}/b.zip"}).getpixel((0, 0)) == (1, 2, 3)


def test_unreadable_images(tmp_path, monkeypatch):
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), "JPEG")
    for data in (whole[: len(whole) // 2], b"hello", b""):
        with pytest.raises(UnreadableImageError, match="not readable as an image"):
            read_image({"bytes": data, "path": "x.jpg"})
    for data in (tmp_path / "missing.png", {"bytes": None, "path": None}):
        with pytest.raises(UnreadableImageError, match="not readable as an image"):
            read_image(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImageError, match="decompression bomb"):
        read_image({"bytes": encoded(Image.new("L", (64, 64))), "path": None})


# center_crop_resize


def test_crop_is_centered_and_identity_at_size():
    values = np.random.default_rng(0).integers(0, 256, (8, 14, 3), np.uint8)
    image = Image.fromarray(values)
    assert np.array_equal(np.asarray(center_crop_resize(image, 8)), values[:, 3:11])
    square = Image.fromarray(values[:, :8])
    assert np.array_equal(np.asarray(center_crop_resize(square, 8)), values[:, :8])
    assert np.array_equal(np.asarray(center_crop_resize(image.rotate(90, expand=True), 8)).shape, (8, 8, 3))


def test_resize_of_gradient_and_antialiasing():
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (256, 256, 3))
    small = np.asarray(center_crop_resize(Image.fromarray(np.ascontiguousarray(ramp)), 32)).astype(float)
    centers = np.arange(32) * 8 + 3.5
    assert np.abs(small[:, 2:-2, 0] - centers[None, 2:-2]).max() <= 1
    checkers = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    flat = np.asarray(center_crop_resize(Image.fromarray(checkers).convert("RGB"), 16))[2:-2, 2:-2]
    assert np.abs(flat.astype(float) - 127.5).max() < 3


# load_collection


def test_folder(folder, load):
    save(folder / "b.PNG", COLORS[0])
    save(folder / "nested/deep/a.jpg.png", COLORS[1])
    save(folder / "with [glob] *.png", COLORS[2])
    save(folder / "train.png", COLORS[3])  # a name like a split's, but not a folder
    save(folder / ".hidden/x.png", COLORS[4])
    (folder / "notes.txt").write_text("notes")
    (folder / "Thumbs.db").write_bytes(b"\0\1")
    (folder / "a.png.txt").write_text("caption")
    (folder / "metadata.csv").write_text("wrong,columns\n1,2\n")
    (folder / "nested/loop").symlink_to(folder, target_is_directory=True)
    dataset = load(folder)
    assert dataset.column_names == ["image"]
    assert dataset.features["image"] == datasets.Image(decode=False)
    assert first_colors(dataset) == set(COLORS[:4])
    assert len(load(str(folder), max_images=2)) == 2 and len(load(folder, max_images=99)) == 4
    with pytest.raises(ValueError, match="max_images is 0; give at least 1"):
        load(folder, max_images=0)


def test_folder_paths_are_relative_or_home(folder, load, monkeypatch):
    save(folder / "a.png", COLORS[0])
    monkeypatch.chdir(folder.parent)
    assert first_colors(load("images")) == {COLORS[0]}
    monkeypatch.setenv("HOME", str(folder.parent))
    assert first_colors(load("~/images")) == {COLORS[0]}


def test_split_folders(folder, load, caplog):
    save(folder / "train/cats/a.png", COLORS[0])
    save(folder / "Val/b.png", COLORS[1])
    assert first_colors(load(folder)) == {COLORS[0]}
    assert first_colors(load(folder, "validation")) == {COLORS[1]}
    with pytest.raises(ValueError, match="no split 'test'; available splits: train, validation"):
        load(folder, "test")
    save(folder / "cover.png", COLORS[2])
    assert first_colors(load(folder)) == {COLORS[0]}
    assert "1 file(s) of" in caplog.text and "outside its split folders" in caplog.text


def test_class_folder_named_like_a_split(folder, load):
    save(folder / "train/a.png", COLORS[0])
    save(folder / "bus/b.png", COLORS[1])
    assert first_colors(load(folder)) == {COLORS[0], COLORS[1]}
    with pytest.raises(ValueError, match="no split 'validation'; available splits: train"):
        load(folder, "validation")


def write_zip(path, members):
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)


def test_zip(tmp_path, load, monkeypatch):
    good = [encoded(Image.new("RGB", (4, 4), color)) for color in COLORS]
    archive = tmp_path / "photos.zip"
    write_zip(archive, {"a.png": good[0], "in/b.png": good[1], "notes.txt": b"x", "__MACOSX/._a.png": b"x"})
    save(tmp_path / "elsewhere/a.png", COLORS[5])
    monkeypatch.chdir(tmp_path / "elsewhere")  # a file with the name of a member must not be read in its place
    assert first_colors(load(archive)) == set(COLORS[:2])
    write_zip(archive, {"train/a.png": good[2], "test/b.png": good[3]})
    assert first_colors(load(archive)) == {COLORS[2]}
    assert first_colors(load(archive, "test")) == {COLORS[3]}


def test_zip_with_damaged_member(tmp_path, load):
    archive = tmp_path / "photos.zip"
    good = encoded(Image.new("RGB", (4, 4), COLORS[0]))
    write_zip(archive, {"a.png": good, "b.png": good})
    data = bytearray(archive.read_bytes())
    data[data.index(b"IDAT") + 6] ^= 255  # the checksum of a.png no longer holds
    archive.write_bytes(data)
    items = [ImageCollection(load(archive), 4)[row] for row in range(2)]
    assert items[0]["unreadable"] == ["a.png (row 0)"] and items[1]["unreadable"] == []


def write_parquet(path, rows, image=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    features = {"id": datasets.Value("int32"), **(image or {"image": datasets.Image()})}
    name = list(features)[1]
    values = {"id": list(range(len(rows))), name: rows}
    datasets.Dataset.from_dict(values, features=datasets.Features(features)).to_parquet(path)


def image_rows(colors):
    return [{"bytes": encoded(Image.new("RGB", (4, 4), color)), "path": None} for color in colors]


def test_parquet_folder(folder, load):
    folder = folder.rename(folder.with_name("with [glob] 1"))
    write_parquet(folder / "train-00000-of-00002.parquet", image_rows(COLORS[:1]))
    write_parquet(folder / "train-00001-of-00002.parquet", image_rows(COLORS[1:2]))
    write_parquet(folder / "extra-00000-of-00001.parquet", image_rows(COLORS[2:3]))
    (folder / "README.md").write_text("# Emoji")
    for number in range(6):
        (folder / f"notes{number}.txt").write_text("notes")
    dataset = load(folder)
    assert dataset.column_names == ["image"] and dataset.features["image"] == datasets.Image(decode=False)
    assert first_colors(dataset) == set(COLORS[:2])
    assert first_colors(load(folder, "extra")) == {COLORS[2]}
    assert first_colors(load(folder / "train-00001-of-00002.parquet")) == {COLORS[1]}
    with pytest.raises(ValueError, match="no split 'validation'; available splits: extra, train"):
        load(folder, "validation")


def test_parquet_names(folder, load):
    write_parquet(folder / "data.parquet", image_rows(COLORS[:1]))
    assert first_colors(load(folder)) == {COLORS[0]}
    write_parquet(folder / "val/part_1.parquet", image_rows(COLORS[1:2]))
    (folder / "data.parquet").rename(folder / "my_train.parquet")
    assert first_colors(load(folder)) == {COLORS[0]}
    assert first_colors(load(folder, "validation")) == {COLORS[1]}


STRUCT = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}


@pytest.mark.parametrize("kind", ["struct", "bytes_only", "binary"])
def test_image_columns_without_image_feature(folder, load, kind):
    rows = image_rows(COLORS[:2])
    if kind == "bytes_only":
        rows, feature = [{"bytes": row["bytes"]} for row in rows], {"bytes": datasets.Value("binary")}
    elif kind == "binary":
        rows, feature = [row["bytes"] for row in rows], datasets.Value("binary")
    else:
        feature = STRUCT
    write_parquet(folder / "a.parquet", rows, {"picture": feature})
    assert first_colors(load(folder)) == set(COLORS[:2])
    assert first_colors(load(folder, image_column="picture")) == set(COLORS[:2])


def test_column_choice_and_errors(folder, load):
    columns = {"thumb": image_rows(COLORS[:1]), "raw": [b"x"], "photo": image_rows(COLORS[1:2]), "name": ["a"]}
    features = {"thumb": STRUCT, "raw": datasets.Value("binary"), "photo": datasets.Image()}
    features = datasets.Features({**features, "name": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "a.parquet")
    assert first_colors(load(folder)) == {COLORS[1]}
    assert first_colors(load(folder, image_column="thumb")) == {COLORS[0]}
    with pytest.raises(ValueError, match="no column 'pixels'; available columns: thumb, raw, photo, name"):
        load(folder, image_column="pixels")
    datasets.Dataset.from_dict({"id": [1], "text": ["a"]}).to_parquet(folder / "a.parquet")
    with pytest.raises(ValueError, match="no image column; choose one with image_column from: id, text"):
        load(folder)
    with pytest.raises(ValueError, match="column 'id' of .* holds no images"):
        load(folder, image_column="id")


def test_missing_sources(tmp_path, load):
    for source in (tmp_path / "missing", "./missing", "a/b/c", "photos.zip", "~no-such-user/images"):
        with pytest.raises(FileNotFoundError, match="does not exist; give a folder of images"):
            load(source)
    for source in ("someone/no-such-collection", "no-such-collection"):
        with pytest.raises(FileNotFoundError, match="neither a local folder nor a dataset that the Hub"):
            load(source)


def test_sources_without_images(tmp_path, folder, load):
    with pytest.raises(ValueError, match="folder '.*' is empty; expected images"):
        load(folder)
    (folder / "notes.txt").write_text("notes")
    (folder / "Makefile").write_text("all:")
    with pytest.raises(ValueError, match=r"has no images \(found: .txt, no extension\); expected files such as"):
        load(folder)
    with pytest.raises(ValueError, match="is a single '.txt' file; give a folder"):
        load(folder / "notes.txt")
    write_zip(tmp_path / "a.zip", {"notes.txt": b"notes"})
    with pytest.raises(ValueError, match=r"zip '.*' has no images \(found: .txt\)"):
        load(tmp_path / "a.zip")
    write_zip(tmp_path / "b.zip", {})
    with pytest.raises(ValueError, match="zip '.*' is empty"):
        load(tmp_path / "b.zip")
    (tmp_path / "c.zip").write_text("no zip")
    with pytest.raises(ValueError, match="not a valid zip file"):
        load(tmp_path / "c.zip")
    with pytest.raises(ValueError, match="no split 'validation'; available splits: train"):
        save(folder / "a.png")
        load(folder, "validation")


def test_damaged_and_empty_parquet(folder, load):
    (folder / "a.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="parquet files in .* cannot be read"):
        load(folder)
    write_parquet(folder / "a.parquet", [])
    with pytest.raises(ValueError, match="has no rows"):
        load(folder)


def test_changed_sources_are_seen(tmp_path, folder, load):
    save(folder / "a.png", COLORS[0])
    assert first_colors(load(folder)) == {COLORS[0]}
    save(folder / "a.png", COLORS[1])
    save(folder / "b.png", COLORS[2])
    assert first_colors(load(folder)) == {COLORS[1], COLORS[2]}
    (folder / "b.png").unlink()
    assert first_colors(load(folder)) == {COLORS[1]}

    shards = tmp_path / "shards"
    for color in COLORS[:2]:
        write_parquet(shards / "a.parquet", image_rows([color]))
        assert first_colors(load(shards)) == {color}
    for color in COLORS[:2]:
        write_zip(tmp_path / "a.zip", {"a.png": encoded(Image.new("RGB", (4, 4), color))})
        assert first_colors(load(tmp_path / "a.zip")) == {color}


@pytest.mark.skipif(not EMOJI.is_dir(), reason="the noto-emoji-64 collection is not beside this checkout")
def test_emoji_collection(load):
    train, validation = load(EMOJI), load(EMOJI, "validation")
    assert (len(train), len(validation)) == (3281, 147)
    batch = next(iter(image_loader(validation, 64, 16)))
    assert batch["pixel_values"].shape == (16, 3, 64, 64) and batch["unreadable"] == []
    assert batch["pixel_values"].max() == 1.0


# ImageCollection and image_loader


@pytest.fixture
def mixed(folder, load):
    """Rows 0 and 3 readable; 1 a truncated JPEG, 2 text under an image's name; notes.txt is no row at all."""
    save(folder / "a.png", COLORS[0])
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encoded(Image.fromarray(noise), "JPEG")
    (folder / "b.jpg").write_bytes(data[: len(data) // 2])
    (folder / "c.png").write_text("no image")
    save(folder / "d.png", COLORS[1])
    (folder / "notes.txt").write_text("notes")
    return load(folder)


def names(paths):
    return [os.path.basename(path) for path in paths]


def test_items(mixed):
    collection = ImageCollection(mixed, 4)
    item = collection[0]
    assert item["pixel_values"].shape == (3, 4, 4) and item["pixel_values"].dtype == torch.float32
    expected = torch.tensor(COLORS[0]) / 127.5 - 1
    torch.testing.assert_close(item["pixel_values"][:, 2, 1], expected)
    assert item["index"] == 0 and item["unreadable"] == []
    assert collection[1]["pixel_values"] is None and names(collection[1]["unreadable"]) == ["b.jpg"]
    assert len(collection) == 4
    with pytest.raises(IndexError):
        collection[4]
    with pytest.raises(ValueError, match="resolution is 0"):
        ImageCollection(mixed, 0)


def test_white_and_black_are_the_ends_of_the_range(folder, load):
    save(folder / "a.png", (255, 0, 255))
    values = ImageCollection(load(folder), 8)[0]["pixel_values"]
    assert values[0].unique().tolist() == [1.0] and values[1].unique().tolist() == [-1.0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_rows_are_dropped(mixed, num_workers):
    batches = list(image_loader(mixed, 4, 2, num_workers=num_workers))
    assert [batch["index"].tolist() for batch in batches] == [[0], [3]]
    assert [names(batch["unreadable"]) for batch in batches] == [["b.jpg"], ["c.png"]]
    assert batches[0]["pixel_values"].shape == (1, 3, 4, 4) and batches[0]["index"].dtype == torch.int64


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_rows_are_replaced(mixed, num_workers):
    batches = list(image_loader(mixed, 4, 2, replace_unreadable=True, num_workers=num_workers))
    assert [batch["index"].tolist() for batch in batches] == [[0, 3], [3, 3]]
    assert [names(batch["unreadable"]) for batch in batches] == [["b.jpg", "c.png"], ["c.png"]]
    assert all(batch["pixel_values"].shape == (2, 3, 4, 4) for batch in batches)


def test_replacement_wraps_around(folder, load):
    save(folder / "a.png")
    (folder / "b.png").write_text("no image")
    assert ImageCollection(load(folder), 4, replace_unreadable=True)[1]["index"] == 0


def test_batch_without_images(mixed):
    batch = collate_images([ImageCollection(mixed, 4)[row] for row in (1, 2)])
    assert batch["pixel_values"].shape == (0, 3, 4, 4) and batch["index"].shape == (0,)
    assert batch["index"].dtype == torch.int64 and names(batch["unreadable"]) == ["b.jpg", "c.png"]


@pytest.mark.parametrize("replace", [False, True])
def test_nothing_readable(folder, load, replace):
    for name in ("a.png", "b.png"):
        (folder / name).write_text("no image")
    with pytest.raises(ValueError, match=r"none of the 2 images is readable \(.*a.png, .*b.png\)"):
        list(image_loader(load(folder), 4, 2, replace_unreadable=replace))


def test_names_of_rows(folder, load):
    rows = [{"bytes": b"x", "path": None}, {"bytes": b"x", "path": "same.png"}, {"bytes": b"x", "path": "same.png"}]
    write_parquet(folder / "a.parquet", [*rows, None], {"image": STRUCT})
    collection = ImageCollection(load(folder), 4)
    found = [collection[row]["unreadable"] for row in range(4)]
    assert found == [["row 0"], ["same.png (row 1)"], ["same.png (row 2)"], ["row 3"]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_flips_are_reproducible(folder, load, num_workers):
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(1, 64).repeat(64, 0)).convert("RGB")
    for number in range(16):
        image.save(folder / f"{number:02}.png")
    dataset = load(folder)

    def epoch(seed):
        torch.manual_seed(seed)
        batches = list(image_loader(dataset, 64, 4, random_flip=True, num_workers=num_workers))
        return torch.cat([batch["pixel_values"] for batch in batches])

    first = epoch(0)
    assert torch.equal(first, epoch(0)) and not torch.equal(first, epoch(1))
    plain = ImageCollection(dataset, 64)[0]["pixel_values"]
    flipped = [torch.equal(values, plain.flip(-1)) for values in first]
    kept = [torch.equal(values, plain) for values in first]
    assert 0 < sum(flipped) < 16 and sum(flipped) + sum(kept) == 16


def test_shuffle_and_drop_last(folder, load):
    for number in range(10):
        save(folder / f"{number}.png")
    dataset = load(folder)

    def order(seed):
        generator = torch.Generator().manual_seed(seed)
        loader = image_loader(dataset, 4, 4, shuffle=True, drop_last=True, generator=generator)
        return [batch["index"].tolist() for batch in loader]

    assert order(0) == order(0) != order(1)
    assert [len(batch) for batch in order(0)] == [4, 4]
    with pytest.raises(ValueError, match="10 images do not fill one batch of 16; lower batch_size"):
        image_loader(dataset, 4, 16, drop_last=True)


def test_unreadable_log(caplog):
    log = UnreadableLog()
    assert log.count == 0 and log.summary() == "skipped 0 unreadable files"
    with caplog.at_level(logging.WARNING, logger="brics_diffusers.data"):
        log.add(["a.jpg"])
        assert log.summary() == "skipped 1 unreadable file: a.jpg"
        log.add(["b.png", "a.jpg"])
        log.add(["a.jpg"])
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert log.count == 2 and log.summary() == "skipped 2 unreadable files: a.jpg, b.png"
    log.add(str(number) for number in range(10))
    assert log.summary().endswith("7 and 2 more")

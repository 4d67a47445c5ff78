import io
import itertools
import logging
import os
import struct
import traceback
import zipfile
import zlib

import datasets
import numpy as np
import pytest
import torch
from image_files import COLORS, encoded, save
from PIL import Image

from brics_diffusers.data import (
    ImageCollection,
    InfiniteBatchSampler,
    UnreadableImageError,
    UnreadableLog,
    center_crop_resize,
    collate_images,
    evaluation_loader,
    image_name,
    image_size,
    read_image,
    training_loader,
)


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


def test_size_and_name_without_decoding(tmp_path):
    save(tmp_path / "a.png", size=(9, 7))
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[:50])  # its header is whole
    assert image_size(tmp_path / "a.png") == image_size(tmp_path / "cut.png") == image_size({"bytes": data}) == (9, 7)
    (tmp_path / "text.png").write_text("no image")
    for wrong in (tmp_path / "text.png", tmp_path / "missing.png", {"bytes": b""}, {"path": None}):
        with pytest.raises(UnreadableImageError, match="not readable as an image"):
            image_size(wrong)
    assert image_name({"bytes": None, "path": "a.png"}, 3) == "a.png"
    assert image_name({"bytes": data, "path": "a.png"}, 3) == "a.png (row 3)"
    assert image_name({"bytes": data, "path": None}, 3) == image_name(None, 3) == "row 3"


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


# ImageCollection


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


def test_replacement_wraps_around(folder, load):
    save(folder / "a.png")
    (folder / "b.png").write_text("no image")
    assert ImageCollection(load(folder), 4, replace_unreadable=True)[1]["index"] == 0


def test_batch_without_images(mixed):
    batch = collate_images([ImageCollection(mixed, 4)[row] for row in (1, 2)])
    assert batch["pixel_values"].shape == (0, 3, 4, 4) and batch["index"].shape == (0,)
    assert batch["index"].dtype == torch.int64 and names(batch["unreadable"]) == ["b.jpg", "c.png"]


def test_names_of_rows():
    rows = [{"bytes": b"x", "path": None}, {"bytes": b"x", "path": "same.png"}, {"bytes": b"x", "path": "same.png"}]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    collection = ImageCollection(datasets.Dataset.from_dict({"image": [*rows, None]}, features=features), 4)
    found = [collection[row]["unreadable"] for row in range(4)]
    assert found == [["row 0"], ["same.png (row 1)"], ["same.png (row 2)"], ["row 3"]]


@pytest.fixture
def photos(folder, load):
    """Five readable rows of noise, none like its mirror image."""
    for number in range(5):
        noise = np.random.default_rng(number).integers(0, 256, (8, 11, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return load(folder)


@pytest.mark.parametrize("resolution", [8, 5])
def test_flips(photos, resolution):
    plain, flipped = ImageCollection(photos, resolution), ImageCollection(photos, resolution, random_flip=True)
    assert (len(plain), len(flipped)) == (5, 10)
    for row in range(5):
        values = plain[row]["pixel_values"]
        assert torch.equal(flipped[row]["pixel_values"], values)
        assert torch.equal(flipped[5 + row]["pixel_values"], values.flip(-1))
        assert not torch.equal(values, values.flip(-1))
        assert flipped[5 + row]["index"] == row
    with pytest.raises(IndexError):
        flipped[10]


def test_flips_of_unreadable_rows(mixed):
    item = ImageCollection(mixed, 4, random_flip=True)[5]
    assert item["pixel_values"] is None and item["index"] == 1 and names(item["unreadable"]) == ["b.jpg"]
    item = ImageCollection(mixed, 4, random_flip=True, replace_unreadable=True)[5]
    assert item["index"] == 3 and names(item["unreadable"]) == ["b.jpg", "c.png"]


# InfiniteBatchSampler


def batches(count, *args, **kwargs):
    return list(itertools.islice(InfiniteBatchSampler(*args, **kwargs), count))


@pytest.mark.parametrize("num_items, batch_size", [(12, 4), (10, 4), (3, 8), (1, 2)])
def test_every_item_once_per_epoch(num_items, batch_size):
    found = batches(num_items * 3, num_items, batch_size)  # batch_size * 3 epochs
    assert {len(batch) for batch in found} == {batch_size}
    epochs = np.array(found).reshape(-1, num_items)
    assert len(epochs) == batch_size * 3
    assert (np.sort(epochs, axis=1) == np.arange(num_items)).all()


def test_epochs_and_seeds_differ():
    first = batches(2, 50, 50, seed=0)
    assert first == batches(2, 50, 50, seed=0)
    assert first[0] != first[1]
    assert first[0] != batches(1, 50, 50, seed=1)[0] != first[1]
    assert first[0] != list(range(50))


@pytest.mark.parametrize("num_items", [3, 10])
@pytest.mark.parametrize("num_processes", [1, 3])
def test_resuming_equals_the_tail(num_items, num_processes):
    for process in range(num_processes):
        options = {"seed": 7, "process_index": process, "num_processes": num_processes}
        whole = batches(20, num_items, 4, **options)
        for start in (1, 6, 17):
            assert batches(20 - start, num_items, 4, start=start, **options) == whole[start:]


@pytest.mark.parametrize("num_items", [3, 10, 100])
def test_processes_share_the_batches_of_one(num_items):
    one = batches(15, num_items, 8, seed=3, start=2)
    first, second = (batches(15, num_items, 4, 3, 2, process, num_processes=2) for process in range(2))
    assert [a + b for a, b in zip(first, second, strict=True)] == one


# training_loader and evaluation_loader


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_batches_keep_their_size(mixed, num_workers):
    collection = ImageCollection(mixed, 4, replace_unreadable=True)
    loader = training_loader(collection, 3, num_workers=num_workers, collate_fn=collate_images)
    found = list(itertools.islice(loader, 8))
    assert all(batch["pixel_values"].shape == (3, 3, 4, 4) and batch["index"].shape == (3,) for batch in found)
    for order, batch in zip(batches(8, 4, 3), found, strict=True):
        assert batch["index"].tolist() == [0 if row == 0 else 3 for row in order]  # row 3 stands in for 1 and 2
        skipped = {0: [], 1: ["b.jpg", "c.png"], 2: ["c.png"], 3: []}
        assert names(batch["unreadable"]) == [name for row in order for name in skipped[row]]
    assert {name for batch in found for name in names(batch["unreadable"])} == {"b.jpg", "c.png"}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loaders_leave_the_random_state_alone(photos, num_workers):
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    collection = ImageCollection(photos, 4, random_flip=True)
    training = training_loader(collection, 4, seed=5, num_workers=num_workers, collate_fn=collate_images)
    assert len(list(itertools.islice(training, 4))) == 4
    assert len(list(evaluation_loader(photos, 4, 2, num_workers=num_workers))) == 3
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


def test_training_does_not_depend_on_workers_or_random_state(photos):
    def epochs(num_workers, default_seed, **options):
        torch.manual_seed(default_seed)
        collection = ImageCollection(photos, 4, random_flip=True)
        loader = training_loader(collection, 4, num_workers=num_workers, collate_fn=collate_images, **options)
        return torch.cat([batch["pixel_values"] for batch in itertools.islice(loader, 5)])

    with torch.random.fork_rng():
        first = epochs(0, 0)
        assert torch.equal(first, epochs(2, 1))
        assert torch.equal(first[8:], epochs(0, 2, start=2)[:12])
        assert not torch.equal(first, epochs(0, 0, seed=1))
    images = ImageCollection(photos, 4, random_flip=True)
    expected = torch.stack([images[row]["pixel_values"] for row in range(10)])
    for epoch in first.split(10):  # every image and every mirror image once
        matches = (epoch[:, None] == expected).flatten(2).all(2)
        assert matches.sum(0).tolist() == [1] * 10 and matches.sum(1).tolist() == [1] * 10


def test_training_over_other_data_sets():
    dataset = torch.utils.data.TensorDataset(torch.arange(6) * 10)
    loaders = [training_loader(dataset, 2, seed=1, process_index=process, num_processes=2) for process in range(2)]
    streams = [[values.tolist() for (values,) in itertools.islice(loader, 3)] for loader in loaders]
    both = [value for pair in zip(*streams, strict=True) for values in pair for value in values]
    assert sorted(both[:6]) == sorted(both[6:]) == [0, 10, 20, 30, 40, 50]


@pytest.fixture
def nothing_readable(folder, load):
    for name in ("a.png", "b.png", "c.png"):
        (folder / name).write_text("no image")
    return load(folder)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_with_nothing_readable(nothing_readable, num_workers):
    collection = ImageCollection(nothing_readable, 4, random_flip=True, replace_unreadable=True)
    loader = training_loader(collection, 2, num_workers=num_workers, collate_fn=collate_images)
    with pytest.raises(
        ValueError, match=r"none of the 3 images is readable \(.*[abc].png, .*\); give a collection"
    ) as error:
        next(iter(loader))
    traceback.clear_frames(error.tb)  # releases the iterator now: its workers outlast garbage collection by seconds


def test_evaluation_with_nothing_readable(nothing_readable):
    # No error: whether a result without images is one is the caller's to judge, by the sizes and the names.
    found = list(evaluation_loader(nothing_readable, 4, 2))
    assert [batch["pixel_values"].shape for batch in found] == [(0, 3, 4, 4)] * 2
    assert [batch["index"].tolist() for batch in found] == [[], []]
    assert [names(batch["unreadable"]) for batch in found] == [["a.png", "b.png"], ["c.png"]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_drops_unreadable_rows(mixed, num_workers):
    found = list(evaluation_loader(mixed, 4, 2, num_workers=num_workers))
    assert [batch["index"].tolist() for batch in found] == [[0], [3]]
    assert [names(batch["unreadable"]) for batch in found] == [["b.jpg"], ["c.png"]]
    assert found[0]["pixel_values"].shape == (1, 3, 4, 4) and found[0]["index"].dtype == torch.int64


def test_evaluation_of_a_part(photos):
    whole = torch.cat([batch["pixel_values"] for batch in evaluation_loader(photos, 8, 4, random_flip=True)])
    assert whole.shape == (10, 3, 8, 8) and torch.equal(whole[5:], whole[:5].flip(-1))
    for rows in (range(1, 4), range(1, 10, 3), range(7, 10), range(10)):
        found = list(evaluation_loader(photos, 8, 2, random_flip=True, rows=rows))
        assert torch.equal(
            torch.cat([batch["pixel_values"] for batch in found]), whole[rows.start : rows.stop : rows.step]
        )
        assert torch.cat([batch["index"] for batch in found]).tolist() == [row % 5 for row in rows]
    assert list(evaluation_loader(photos, 8, 2, rows=range(0))) == []
    with pytest.raises(IndexError, match="item 5 of a collection of 5 images"):
        list(evaluation_loader(photos, 8, 2, rows=range(4, 6)))


# UnreadableLog


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

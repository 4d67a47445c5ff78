"""Crops, flips, the order of batches, and the loaders of training and evaluation."""

import itertools
import logging
import os
import traceback

import datasets
import numpy as np
import pytest
import torch
from image_files import COLORS, encoded, save
from PIL import Image

from brics_diffusers.data import (
    ImageCollection,
    InfiniteBatchSampler,
    UnreadableLog,
    center_crop_resize,
    collate_images,
    evaluation_loader,
    training_loader,
)


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
    assert list(batch["reasons"]) == batch["unreadable"]
    assert "truncated" in batch["reasons"][batch["unreadable"][0]]


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
        log.add(["b.png", "a.jpg"], {"b.png": "the file is empty"})
        log.add(["a.jpg"])
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "a.jpg is not readable as an image and is skipped." in caplog.text
    assert "b.png is not readable as an image (the file is empty) and is skipped." in caplog.text
    assert log.count == 2 and log.summary() == "skipped 2 unreadable files: a.jpg, b.png"
    log.add(str(number) for number in range(10))
    assert log.summary().endswith("7 and 2 more")

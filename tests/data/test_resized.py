"""Resized images that are kept on disk: the same values, also after interruptions."""

import itertools
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from brics_diffusers.data import ImageCollection, ResizedImages, collate_images, images, training_loader


@pytest.fixture
def photos(folder, load):
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 21, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "4.png").write_text("no image")
    return load(folder)


def values(photos, resized=None):
    collection = ImageCollection(photos, 8, random_flip=True, resized=resized)
    return torch.stack([collection[row]["pixel_values"] for row in (0, 1, 2, 3, 5, 6, 7, 8)])


def test_the_same_values_without_reading(photos, tmp_path, monkeypatch):
    expected = values(photos)
    assert torch.equal(values(photos, ResizedImages(tmp_path / "kept", "key", 8)), expected)
    monkeypatch.setattr(images, "read_image", lambda *args: pytest.fail("is not read again"))
    for _ in range(2):
        assert torch.equal(values(photos, ResizedImages(tmp_path / "kept", "key", 8)), expected)
    for other in (ResizedImages(tmp_path / "kept", "other", 8), ResizedImages(tmp_path / "kept", "key", 4)):
        assert other.get(0) is None


def test_unreadable_images_stay_so(photos, tmp_path):
    collection = ImageCollection(photos, 8, resized=ResizedImages(tmp_path, "key", 8))
    for _ in range(2):
        assert (
            collection[4]["pixel_values"] is None
            and "no format" in collection[4]["reasons"][photos[4]["image"]["path"]]
        )


@pytest.mark.parametrize("place", [0, 3, 100])
def test_what_is_incomplete_is_read_again(photos, tmp_path, place):
    expected = values(photos)
    resized = ResizedImages(tmp_path, "key", 8)
    assert torch.equal(values(photos, resized), expected)
    data = bytearray(resized.path.read_bytes())
    data[place] ^= 255  # in the checksum of the first image, or in its pixels
    resized.path.write_bytes(data[:-5])  # and the last one is cut off
    assert resized.get(0) is None and resized.get(1) is not None and resized.get(3) is None
    assert torch.equal(values(photos, resized), expected)
    assert resized.get(0) is not None and resized.get(3) is not None


def test_rows_that_are_not_there_yet(tmp_path):
    resized = ResizedImages(tmp_path, "key", 8)
    resized.put(2, np.zeros((8, 8, 3), np.uint8))
    assert (
        resized.get(0) is None and resized.get(5) is None and resized.get(2).tolist() == np.zeros((8, 8, 3)).tolist()
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers(photos, tmp_path, num_workers):
    def batches(resized):
        collection = ImageCollection(photos, 8, replace_unreadable=True, resized=resized)
        loader = training_loader(collection, 3, num_workers=num_workers, collate_fn=collate_images)
        return [batch["pixel_values"] for batch in itertools.islice(loader, 8)]

    resized = ResizedImages(tmp_path, "key", 8)
    resized.get(0)  # open before workers start
    for found, expected in zip(batches(resized) + batches(resized), batches(None) * 2, strict=True):
        assert torch.equal(found, expected)
    assert all(resized.get(row) is not None for row in range(4)) and resized.get(4) is None


def test_a_full_disk(photos, tmp_path, caplog, monkeypatch):
    class Full:
        def __init__(self, file):
            self.seek, self.read = file.seek, file.read

        def write(self, data):
            raise OSError(28, "No space left on device")

    resized = ResizedImages(tmp_path, "key", 8)
    resized.get(0)
    resized._file = Full(resized._file)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(values(photos, resized), values(photos))
    assert caplog.text.count("no longer kept in") == 1 and "No space left" in caplog.text

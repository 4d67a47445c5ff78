"""Collections that are read as streams: order, resuming, several processes, held-out images."""

import io
import itertools
import tarfile

import datasets
import pytest
import torch
from image_files import encoded, save
from PIL import Image

from brics_diffusers.data import load_collection
from brics_diffusers.data.streaming import (
    StreamedImages,
    StreamPosition,
    first_images,
    load_stream,
    read_shard,
    shard_batches,
    split_stream,
    stream_loader,
)


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_tars(folder, shards=3, images=7):
    """Webdataset's tars; image i of shard s is of the gray 40 * s + 5 * i."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"train-{shard:05d}.tar", "w") as tar:
            for index in range(images):
                gray = 40 * shard + 5 * index
                add(tar, f"{shard}{index:03d}.png", encoded(Image.new("RGB", (8, 8), (gray,) * 3)))
                add(tar, f"{shard}{index:03d}.json", b'{"caption": "gray"}')
    return folder


@pytest.fixture
def tars(tmp_path):
    return write_tars(tmp_path / "tars")


def images_of(stream, process=0, processes=1, workers=0, state=None, **options):
    position = StreamPosition(process, processes, workers)
    if state is not None:
        position.load_state_dict(state)
    return StreamedImages(stream, 8, 4, position, **{"block": 5} | options)


def grays(batch):
    return [round((image[0, 0, 0].item() + 1) * 127.5) for image in batch["pixel_values"]]


ALL = sorted(40 * shard + 5 * index for shard in range(3) for index in range(7))


def test_sources(tars, tmp_path):
    for name in ("a/x.png", "a/y.png", "z.png"):
        save(tmp_path / "pictures" / name)
    rows = [{"image": {"bytes": encoded(Image.new("RGB", (8, 8))), "path": None}, "label": 3}] * 4
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
    (tmp_path / "parquet").mkdir()
    datasets.Dataset.from_list(rows, features).to_parquet(tmp_path / "parquet/train-00000-of-00001.parquet")
    for source, shards, count in ((tars, 3, 21), (tmp_path / "pictures", 3, 3), (tmp_path / "parquet", 1, 4)):
        stream = load_stream(source, cache_dir=tmp_path / "cache")
        assert stream.num_shards == shards
        found = list(itertools.chain.from_iterable(read_shard(stream, shard) for shard in range(shards)))
        assert len(found) == count and all(set(image) == {"bytes", "path"} for image in found)
        assert len(first_images(stream, 2)) == 2
    with pytest.raises(ValueError, match="has no split 'test'; available splits: train"):
        load_stream(tars, "test", cache_dir=tmp_path / "cache")


def test_metadata_beside_tars(tars, tmp_path):
    """As img2dataset writes them: a parquet and a JSON file for each tar, which have no images."""
    for shard in range(3):
        metadata = datasets.Dataset.from_dict({"url": ["x"] * 7, "sha256": [b"x"] * 7})
        metadata.to_parquet(tars / f"train-{shard:05d}.parquet")
        (tars / f"train-{shard:05d}_stats.json").write_text("{}")
    stream = load_stream(tars, cache_dir=tmp_path / "cache")
    assert stream.num_shards == 3 and len(first_images(stream, 100)) == 21
    assert len(load_collection(tars, cache_dir=tmp_path / "cache")) == 21
    assert len(load_collection(tars / "train-00001.tar", cache_dir=tmp_path / "cache")) == 7
    for source in (load_stream, load_collection):
        with pytest.raises(ValueError, match="has no split 'test'; available splits: train"):
            source(tars, "test", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(("processes", "lanes"), [(1, 1), (2, 2), (5, 5)])
def test_an_epoch_has_every_image_once(tars, processes, lanes):
    """Also where there are more processes than shards."""
    stream, found = load_stream(tars), []
    for process in range(processes):
        images = images_of(stream, process, processes)
        share = itertools.takewhile(lambda example: example[3][0] == 0, images._examples(process, (0, 0, 0, 0)))
        found.append([round(Image.open(io.BytesIO(image["bytes"])).getpixel((0, 0))[0]) for image, *_ in share])
    assert sorted(itertools.chain.from_iterable(found)) == ALL and all(found)
    assert processes > 1 or found[0] != ALL


def test_epochs_and_seeds_differ_and_images_are_mirrored(tars):
    def examples(seed):
        images = images_of(load_stream(tars), seed=seed, random_flip=True)
        found = [
            (image["path"], mirror) for image, _, mirror, _ in itertools.islice(images._examples(0, (0,) * 4), 42)
        ]
        return found[:21], found[21:]

    first, second = examples(0)
    assert examples(0) == (first, second) and sorted(first) != sorted(second) and examples(1)[0] != first
    assert {mirror for _, mirror in first} == {True, False}


@pytest.mark.parametrize(("workers", "taken"), [(0, 4), (0, 7), (2, 5)])
def test_a_resumed_stream_equals_an_uninterrupted_one(tars, workers, taken):
    """Stopped inside a block, and in a later epoch; the workers have read further than what was used."""
    stream = load_stream(tars)
    images = images_of(stream, workers=workers)
    batches = list(itertools.islice(stream_loader(images, workers), 12))
    for batch in batches[:taken]:
        images.position.add(batch)
    state = images.position.state_dict()
    resumed = images_of(stream, workers=workers, state=state)
    again = list(itertools.islice(stream_loader(resumed, workers), 12 - taken))
    assert [grays(batch) for batch in again] == [grays(batch) for batch in batches[taken:]]
    assert [batch["position"] for batch in again] == [batch["position"] for batch in batches[taken:]]


def test_other_processes_go_on_with_the_next_epoch(tars, caplog):
    images = images_of(load_stream(tars))
    for batch in itertools.islice(images, 7):  # 28 of 21 images
        images.position.add(batch)
    resumed = images_of(load_stream(tars), 1, 2, state=images.position.state_dict())
    assert resumed.position.lanes == {1: (2, 0, 0, 0)}
    assert "read by 1 processes, 1 workers in all, and now by 2, 2: it goes on with epoch 2" in caplog.text


def test_unreadable_images(tmp_path):
    folder = write_tars(tmp_path / "tars", 1)
    with tarfile.open(folder / "train-00001.tar", "w") as tar:
        add(tar, "a.png", b"no image")
        add(tar, "b.png", b"")
    stream = load_stream(folder)
    batches = list(itertools.islice(images_of(stream), 6))
    assert all(batch["pixel_values"].shape == (4, 3, 8, 8) for batch in batches)
    names = {name for batch in batches for name in batch["unreadable"]}
    assert len(names) == 2 and all(name.endswith("(shard 1)") for name in names)
    assert torch.cat(list(shard_batches(stream, 0, 8, 4))).shape == (7, 3, 8, 8)
    assert list(shard_batches(stream, 1, 8, 4)) == []
    (folder / "train-00000.tar").unlink()
    with pytest.raises(ValueError, match="images is readable .*; give a collection of images"):
        next(iter(images_of(load_stream(folder))))


@pytest.mark.parametrize("count", [1, 5])
def test_what_is_held_out_is_never_trained_on(tmp_path, count):
    """Shards of 25 images give up two each at most, ones of 7 none."""
    folder = write_tars(tmp_path / "tars", 3, 25)
    names = [f"{shard}{index:03d}.png" for shard in range(3) for index in range(25)]
    shares = [f"{shard}{index:03d}.png" for shard in range(3) for index in (9, 19)[: -(-count // 3)]]

    def paths(images):
        return [image["path"].rpartition("/")[2] for image in images]

    rest, held_out = split_stream(load_stream(folder), count)
    assert paths(held_out["image"]) == shares[:count] and rest.num_shards == 3
    left = sorted(set(names) - set(shares))
    for processes in (1, 5):  # also where a shard is shared by processes
        found = []
        for process in range(processes):
            examples = images_of(rest, process, processes)._examples(process, (0, 0, 0, 0))
            found += paths(image for image, *_ in itertools.takewhile(lambda example: example[3][0] == 0, examples))
        assert sorted(found) == left
    assert sum(len(batch) for shard in range(3) for batch in shard_batches(rest, shard, 8, 4)) == len(left)
    assert paths(split_stream(load_stream(folder), count)[1]["image"]) == shares[:count]
    stream = load_stream(write_tars(tmp_path / "small"))
    assert split_stream(stream, count) == (stream, None)

"""Loading of collections: folders, zips, parquet, the choice of columns, fingerprints."""

import os
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from image_files import COLORS, encoded, save
from PIL import Image

from brics_diffusers.data import ImageCollection, collection_fingerprint, evaluation_loader, read_image


EMOJI = Path(__file__).parents[3] / "shared/data/noto-emoji-64"


def first_colors(dataset):
    return {tuple(np.asarray(read_image(row["image"]))[0, 0].tolist()) for row in dataset}


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
    table = datasets.Dataset.from_dict(values, features=datasets.Features(features)).data.table
    pyarrow.parquet.write_table(table, path)  # `to_parquet` of some versions of datasets writes no empty ones


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
    with pytest.raises(ValueError, match="has no rows|parquet files in .* cannot be read"):  # older datasets can't
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
    batch = next(iter(evaluation_loader(validation, 64, 16)))
    assert batch["pixel_values"].shape == (16, 3, 64, 64) and batch["unreadable"] == []
    assert batch["pixel_values"].max() == 1.0


def test_fingerprint_is_of_contents_and_order(tmp_path, load):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    for index in range(2):
        save(here / f"{index}.bmp", color=(index, 0, 0))
    before = collection_fingerprint(load(here))
    there.mkdir()
    for index in range(2):
        (there / f"{index}.bmp").write_bytes((here / f"{index}.bmp").read_bytes())
        os.utime(there / f"{index}.bmp", (1, 1))
    assert collection_fingerprint(load(there)) == before
    datasets.Dataset.from_list([{"image": {"bytes": (here / f"{i}.bmp").read_bytes()}} for i in range(2)]).to_parquet(
        tmp_path / "there.parquet"
    )
    assert collection_fingerprint(load(tmp_path / "there.parquet")) == before

    kept = os.stat(there / "1.bmp")
    save(there / "1.bmp", color=(1, 2, 3))
    os.utime(there / "1.bmp", ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert os.stat(there / "1.bmp").st_size == kept.st_size
    changed = collection_fingerprint(load(there))
    assert changed != before
    (there / "0.bmp").rename(there / "2.bmp")
    assert collection_fingerprint(load(there)) not in (before, changed)


def test_fingerprint_of_a_part_and_of_a_lost_file(tmp_path, load):
    for index in range(3):
        save(tmp_path / f"{index}.png", color=(index, 0, 0))
    whole = load(tmp_path)
    part = collection_fingerprint(load(tmp_path, max_images=2))
    assert part != collection_fingerprint(whole)
    assert collection_fingerprint(whole.select([1, 2])) not in (part, collection_fingerprint(whole))
    before = collection_fingerprint(whole)
    (tmp_path / "1.png").unlink()
    assert collection_fingerprint(whole) != before

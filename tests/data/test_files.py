"""Which files of folders and archives are images: odd names, trash, links, HEIC, unreadable ones."""

import os
import zipfile

import datasets
import pytest
from image_files import COLORS, encoded, save
from PIL import Image

from brics_diffusers.data import files, load_collection


def names(dataset):
    return [os.path.basename(row["image"]["path"]) for row in dataset]


def test_trash_and_thumbnails_are_not_data(folder, load):
    save(folder / "a.png")
    save(folder / "@user/b.png")  # a folder of data, whatever its first letter
    junk = ("@eaDir/a.png", "album/@eaDir/SYNOPHOTO_THUMB_M.jpg", "$RECYCLE.BIN/c.png", "#recycle/d.png")
    for name in (*junk, "lost+found/e.png", "System Volume Information/f.png", "__MACOSX/g.png", ".Trash-1000/h.png"):
        save(folder / name)
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as file:
        for path in sorted(folder.rglob("*.*g")):
            file.write(path, path.relative_to(folder))
    for source in (folder, folder.with_suffix(".zip")):
        assert sorted(names(load(source))) == ["a.png", "b.png"]


def test_names_that_are_not_utf8(folder, load, caplog):
    save(folder / "a.png")
    (folder / "caf\N{LATIN SMALL LETTER E WITH ACUTE}.png").write_bytes((folder / "a.png").read_bytes())
    try:
        with open(os.fsencode(folder) + b"/caf\xe9.png", "wb") as file:
            file.write((folder / "a.png").read_bytes())
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    assert len(load(folder)) == 2
    assert "1 file(s) of" in caplog.text and r"not UTF-8 and are left out, rename them: b'caf\xe9.png'." in caplog.text


def test_a_folder_whose_name_is_not_utf8(folder, load):
    try:
        odd = folder.rename(os.fsdecode(os.fsencode(folder) + b"\xe9"))
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    save(odd / "a.png")
    with pytest.raises(ValueError, match=r"the path b'.*\\xe9' is not UTF-8, .*; rename the folder"):
        load(odd)


def test_images_that_cannot_be_read_are_counted_and_named(folder, load, caplog, monkeypatch):
    monkeypatch.setattr(files, "IMAGE_EXTENSIONS", files.IMAGE_EXTENSIONS - files.HEIF_EXTENSIONS)
    monkeypatch.setattr(files, "OTHER_IMAGES", files.OTHER_IMAGES | files.HEIF_EXTENSIONS)
    for name in ("IMG_1.HEIC", "IMG_2.heic", "raw/3.cr2"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no images \(found: .cr2, .heic\); .*, or install pillow-heif to read HEIC"):
        load(folder)
    save(folder / "a.png")
    (folder / "notes.txt").write_text("notes")
    assert names(load(folder)) == ["a.png"]
    expected = "are of formats that can't be read and are left out, install pillow-heif to read HEIC: IMG_1.HEIC, "
    assert "3 image(s) of" in caplog.text and f"{expected}IMG_2.heic, raw/3.cr2." in caplog.text
    assert "notes.txt" not in caplog.text


def test_heic_files(folder, load):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(Image.new("RGB", (64, 64), COLORS[0])).save(folder / "IMG_1.HEIC")
    assert names(load(folder)) == ["IMG_1.HEIC"]


def test_links_are_followed(folder, load, tmp_path):
    save(tmp_path / "elsewhere/a.png")
    (folder / "train").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    save(folder / "val/b.png")
    assert names(load(folder)) == ["a.png"] and names(load(folder, "validation")) == ["b.png"]


def test_metadata_beside_images_does_not_hide_them(folder, tmp_path):
    for shard in ("00000", "00001"):  # as img2dataset writes
        save(folder / shard / f"{shard}0000.jpg")
        (folder / shard / f"{shard}0000.json").write_text("{}")
        rows = {"url": ["https://a/b.jpg"], "key": [f"{shard}0000"], "digest": [b"\x00\x01"]}
        datasets.Dataset.from_dict(rows).to_parquet(folder / f"{shard}.parquet")
    assert names(load_collection(folder)) == ["000000000.jpg", "000010000.jpg"]

    pictures = {"image": [{"bytes": encoded(Image.new("RGB", (4, 4))), "path": None}] * 3}
    for feature in (datasets.Image(), {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}):
        features = datasets.Features({"image": feature})
        datasets.Dataset.from_dict(pictures, features=features).to_parquet(folder / "data-0.parquet")
        assert len(load_collection(folder, cache_dir=tmp_path / "cache")) == 3  # images for a card, beside data
    plain = {"image": [row["bytes"] for row in pictures["image"]]}
    datasets.Dataset.from_dict(plain).to_parquet(folder / "data-0.parquet")
    assert len(load_collection(folder, cache_dir=tmp_path / "cache")) == 3

import io
import itertools
import tarfile
import zipfile

import datasets
import pytest
from image_files import encoded, save
from PIL import Image

from brics_diffusers.data.streaming import load_stream, read_shard


PNG, JPG = encoded(Image.new("RGB", (8, 8))), encoded(Image.new("RGB", (8, 8)), "JPEG")
OTHERS = {"./._0.jpg": b"x", "./.DS_Store": b"x", "./README.txt": b"x"}


def write_tar(path, members, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_zip(path, members):
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)


@pytest.fixture
def names(load, tmp_path):
    """Of the images of a collection and of the stream of it, which are the same."""

    def names(source, *args):
        stream = load_stream(source, *args, cache_dir=tmp_path / "cache")
        streamed = itertools.chain.from_iterable(read_shard(stream, shard) for shard in range(stream.num_shards))
        found = [[image["path"] for image in images] for images in (load(source, *args)["image"], streamed)]
        assert found[0] == found[1]
        return found[0]

    return names


@pytest.mark.parametrize(
    "members",
    [
        {"./0.jpg": JPG, **OTHERS, "./1.jpg": JPG},
        {f"{i}.{'png' if i % 2 else 'jpg'}": PNG if i % 2 else JPG for i in range(12)},
        {f"{i}.{'png' if i < 6 else 'jpg'}": PNG if i < 6 else JPG for i in range(12)},
        {f"photo.{i}.final.jpg": JPG for i in range(4)},
        {f"cats/{i}.png": PNG for i in range(4)} | {"caf\udce9.png": PNG},
    ],
)
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_tars_of_images(folder, names, members, mode):
    write_tar(folder / "a.tar", members, mode)
    write_tar(folder / "b.tar", {"0.jpg": JPG}, mode)
    images = [name.removeprefix("./").replace("\udce9", "\ufffd") for name in members if name not in OTHERS]
    assert names(folder) == [f"a/{name}" for name in images] + ["b/0.jpg"]
    assert sorted(names(folder / "a.tar")) == sorted(images)


def test_splits_and_classes_of_tars(folder, names, load):
    write_tar(folder / "one.tar", {"./train/cat/1.png": PNG, "./train/dog/1.png": PNG, "./val/dog/2.png": PNG})
    assert names(folder / "one.tar", "validation") == ["val/dog/2.png"]
    assert load(folder / "one.tar", with_labels=True).features["label"].names == ["cat", "dog"]
    (folder / "one.tar").unlink()
    for name in ("train/cat", "train/dog", "val/cat"):
        write_tar(folder / f"{name}.tar", {"1.png": PNG})
    assert names(folder, "validation") == ["val/cat/1.png"]
    assert load(folder, with_labels=True).features["label"].names == ["cat", "dog"]


def test_tars_that_cannot_be_read_whole(folder, names, caplog):
    write_tar(folder / "a.tar", {f"{i}.jpg": JPG for i in range(4)})
    whole = (folder / "a.tar").read_bytes()
    for name, data in {"cut": whole[:3000], "empty": b"", "none": bytes(10240), "text": b"text" * 999}.items():
        (folder / f"{name}.tar").write_bytes(data)
    assert names(folder) == [f"a/{i}.jpg" for i in range(4)] + ["cut/0.jpg", "cut/1.jpg"]
    assert "1 tar(s) of" in caplog.text and "only what precedes is read, copy them again: cut.tar" in caplog.text
    assert "3 tar(s) of" in caplog.text and "create them again: empty.tar, none.tar, text.tar" in caplog.text
    damaged = bytearray(whole)
    third = whole.index(b"2.jpg")
    damaged[third : third + 512] = b"x" * 512
    (folder / "cut.tar").write_bytes(damaged)
    assert names(folder)[4:] == ["cut/0.jpg", "cut/1.jpg"]
    assert f"cut.tar' is damaged (no header at byte {third}): what follows is left out" in caplog.text
    (folder / "a.tar").unlink(), (folder / "cut.tar").unlink()
    with pytest.raises(ValueError, match="no tar of .* has a whole file in it .empty.tar, none.tar, text.tar."):
        names(folder)


def samples(*extensions):
    return {f"{i}.{end}": JPG if end != "json" else b"{}" for i, end in extensions}


def test_samples_of_several_files(folder, names, caplog):
    members = samples(*itertools.product(range(4), ("jpg", "json")))
    write_tar(folder / "a.tar", members)
    write_tar(folder / "b.tar", members)
    whole = (folder / "b.tar").read_bytes()
    assert len(names(folder)) == 8 and not caplog.text
    (folder / "b.tar").write_bytes(whole[: whole.index(b"2.jpg")])
    assert len(names(folder)) == 6 and "copy them again: b.tar" in caplog.text
    (folder / "b.tar").write_bytes(whole[: whole.index(b"2.jpg") + 600])
    with pytest.raises(ValueError, match="break off within a file .b.tar.; copy or remove them"):
        names(folder)
    (folder / "b.tar").unlink()
    write_tar(folder / "a.tar", samples((0, "jpg"), (0, "json"), (1, "png"), (1, "json")))
    with pytest.raises(ValueError, match="no extension in common .jpg, png., .*; pack them anew"):
        names(folder)
    write_tar(folder / "a.tar", {"README.txt": b"x"} | members)
    with pytest.raises(ValueError, match="each sample's files must follow one another, .*; pack anew"):
        names(folder)


def test_folder_of_zips(folder, names, load):
    write_zip(folder / "x0.zip", {"c0/a0.jpg": JPG, "notes.txt": b"x"})
    write_zip(folder / "x1.zip", {"c1/a0.jpg": JPG})
    assert names(folder) == ["x0/c0/a0.jpg", "x1/c1/a0.jpg"]
    assert load(folder, with_labels=True).features["label"].names == ["c0", "c1"]
    write_zip(folder / "x1.zip", {"metadata.csv": b"file_name,label\na.jpg,x\nb.jpg,y\n", "a.jpg": JPG, "b.jpg": JPG})
    (folder / "x0.zip").unlink()
    assert load(folder, with_labels=True).features["label"].names == ["x", "y"]
    (folder / "x0.zip").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="x0.zip' is not a valid zip file"):
        names(folder)


def test_several_kinds_in_a_folder(folder, names, caplog):
    for name in ("0.tar", "1.tar"):
        write_tar(folder / name, {"0.jpg": JPG})
    write_zip(folder / "2.zip", {"0.jpg": JPG})
    (folder / "3.tar.gz").write_bytes(b"")
    assert names(folder) == ["0/0.jpg", "1/0.jpg"]
    assert "only the 2 file(s) like 0.tar are read; 2 other(s) are left out, put them" in caplog.text
    save(folder / "preview.png")
    caplog.clear()
    assert names(folder) == [str(folder / "preview.png")]
    assert "only the 1 file(s) like preview.png are read; 4 other(s) are left out" in caplog.text
    assert caplog.text.rstrip().endswith("0.tar, 1.tar, 2.zip, 3.tar.gz.")
    rows = {"image": [{"bytes": PNG, "path": "a.png"}]}
    datasets.Dataset.from_dict(rows, datasets.Features({"image": datasets.Image()})).to_parquet(folder / "a.parquet")
    caplog.clear()
    assert names(folder) == ["a.png"]
    assert "only the 1 file(s) like a.parquet are read; 5 other(s) are left out" in caplog.text

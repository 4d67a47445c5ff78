"""Which files belong to which split, by the names of folders and files."""

import logging
import zipfile

import pytest
from image_files import encoded, save
from PIL import Image

from brics_diffusers.data.splits import choose_split


def split(*names):
    found = {}
    for wanted in ("train", "validation", "test"):
        try:
            found[wanted] = choose_split("here", sorted(names), wanted)
        except ValueError as error:
            assert f"'here' has no split '{wanted}'; available splits:" in str(error)
    return found


@pytest.mark.parametrize(
    "train, validation",
    [
        ("train2017/1.jpg", "val2017/2.jpg"),
        ("images_train/1.jpg", "images-val/2.jpg"),
        ("a/train/b/1.jpg", "a/valid/b/2.jpg"),
        ("training set/1.jpg", "dev set/2.jpg"),
        ("coco.train.1/cats/1.jpg", "coco.val.1/cats/2.jpg"),
        ("Train/1.jpg", "VALIDATION/2.jpg"),
        ("my test photos/train/1.jpg", "my test photos/val/2.jpg"),
        ("train/test tubes/1.jpg", "val/test tubes/2.jpg"),
        ("train/1.jpg", "val/train_1.jpg"),
        ("train_001.jpg", "val_001.jpg"),
        ("images/001-train.jpg", "images/001-validation.jpg"),
        ("my_train.parquet", "val/part_1.parquet"),
    ],
)
def test_names_of_splits(train, validation):
    assert split(train, validation) == {"train": [train], "validation": [validation]}


@pytest.mark.parametrize(
    "names",
    [
        ("valley/1.jpg", "trains/2.jpg", "latest/3.jpg"),  # words within words
        ("bus/1.jpg", "train/2.jpg"),  # one folder among others is a class
        ("test.jpg", "1.jpg", "2.jpg"),
        ("eval-1.jpg", "my-train-ride.jpg", "1.jpg", "2.jpg", "3.jpg"),
        ("trainA/1.jpg", "testA/2.jpg"),
    ],
)
def test_no_splits(names, caplog):
    assert split(*names) == {"train": sorted(names)}
    warned = "is read as one split, 'train', though" in caplog.text
    assert warned == (names[0] != "valley/1.jpg")


def test_one_split_that_has_all():
    assert split("test/1.jpg", "test/2.jpg") == {"test": ["test/1.jpg", "test/2.jpg"]}
    assert split("train/cats/1.jpg", "train/test tubes/2.jpg") == {
        "train": ["train/cats/1.jpg", "train/test tubes/2.jpg"]
    }


def test_what_was_taken_is_logged(caplog):
    caplog.set_level(logging.INFO)
    choose_split("here", ["train2017/1.jpg", "train2017/2.jpg", "val2017/3.jpg"], "train")
    assert "Splits of 'here' are train: 2 files such as train2017/1.jpg; validation: 1 files such as" in caplog.text
    assert not any(record.levelno > logging.INFO for record in caplog.records)
    found = split("train/1.jpg", "val/2.jpg", *(f"unlabelled/{number}.jpg" for number in range(9)))
    assert found == {"train": ["train/1.jpg"], "validation": ["val/2.jpg"]}
    assert "9 file(s) of 'here', such as unlabelled/0.jpg, lie outside its split folders" in caplog.text
    found = split("train_1.jpg", "val_2.jpg", "cover.jpg")
    assert found == {"train": ["train_1.jpg"], "validation": ["val_2.jpg"]}
    assert "such as cover.jpg" in caplog.text


def test_a_folder_as_a_split():
    names = ["train2014/1.jpg", "train2017/2.jpg", "val2014/3.jpg", "val2017/4.jpg"]
    assert choose_split("here", names, "val2017") == ["val2017/4.jpg"]
    assert choose_split("here", names, "train2014") == ["train2014/1.jpg"]
    assert choose_split("here", names, "val") == choose_split("here", names, "validation") == names[2:]
    assert choose_split("here", ["trainA/1.jpg", "trainB/2.jpg", "testA/3.jpg"], "trainA") == ["trainA/1.jpg"]
    for wrong in ("val2012", "test2017", "images", "trainA"):
        with pytest.raises(ValueError, match=f"no split '{wrong}'; available splits: train, validation"):
            choose_split("here", names, wrong)


def test_validation_images_are_not_trained_on(folder, load, tmp_path):
    for number, name in enumerate(("train2017/a.png", "train2017/b.png", "val2017/c.png")):
        save(folder / name, (number, 0, 0))
    with zipfile.ZipFile(tmp_path / "same.zip", "w") as file:
        for name in ("train2017/a.png", "train2017/b.png", "val2017/c.png"):
            file.writestr(name, encoded(Image.new("RGB", (4, 4))))
    for source in (folder, tmp_path / "same.zip"):
        assert [len(load(source, name)) for name in ("train", "validation", "val2017")] == [2, 1, 1]

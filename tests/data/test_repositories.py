"""Splits and configurations from a data set's card, archives in folders, saved data sets, choice of columns."""

import argparse
import io
import logging
import os
import tarfile
import zipfile

import datasets
import pytest
from image_files import COLORS, encoded, save
from PIL import Image

from brics_diffusers.commands.shared import add_collection_arguments, read_collection
from brics_diffusers.data import load_collection
from brics_diffusers.data.repositories import load_hub
from brics_diffusers.data.streaming import load_stream
from brics_diffusers.training_utils.arguments import add_common_arguments
from brics_diffusers.training_utils.run import load_splits


CARD = """---
license: mit
configs:
{configs}
---
# Pictures
"""
ONE = """- config_name: default
  data_files:
  - split: train
    path: pictures/*
  - split: validation
    path: held_out/*"""
SEVERAL = """- config_name: large
  data_files: pictures/*
- config_name: small
  data_dir: held_out"""


@pytest.fixture
def repository(folder):
    for name in ("pictures/a.png", "pictures/b.png", "held_out/c.png", "drafts/d.png"):
        save(folder / name)
    return folder


def write_card(folder, configs):
    (folder / "README.md").write_text(CARD.format(configs=configs))


def test_splits_of_a_card(repository, load):
    assert len(load(repository)) == 4
    write_card(repository, ONE)
    assert len(load(repository)) == 2 and len(load(repository, "validation")) == 1
    with pytest.raises(ValueError, match="has no split 'test'; available splits: train, validation"):
        load(repository, "test")
    save(repository / "pictures/e.png")
    assert len(load(repository)) == 3


def test_configurations(repository, load):
    write_card(repository, SEVERAL)
    with pytest.raises(ValueError, match=r"by config_name \(--dataset_config_name\) one of .*\['large', 'small'\]"):
        load(repository)
    assert len(load(repository, config_name="large")) == 2 and len(load(repository, config_name="small")) == 1
    with pytest.raises(ValueError, match=r"'medium' not found. Available: \['large', 'small'\]"):
        load(repository, config_name="medium")
    write_card(repository, SEVERAL + "\n  default: true")
    assert len(load(repository)) == 1
    with pytest.raises(ValueError, match="is a file, which has no configuration 'large'; leave config_name out"):
        load(repository / "pictures/a.png", config_name="large")


def test_path_that_datasets_takes_for_a_pattern(repository, load):
    write_card(repository, ONE)
    repository = repository.rename(repository.with_name("my [set] x"))
    for source in (load, load_stream):
        with pytest.raises(
            ValueError, match=r"my \[set\] x' has one of the characters .* in it, .*; rename the folder"
        ):
            source(repository)
    (repository / "README.md").unlink()
    assert len(load(repository)) == 4


def test_metadata_of_pairs(repository, load, caplog):
    text = '{"image_file_name": "%s.png", "conditioning_image_file_name": "%s.png", "text": "x"}\n'
    (repository / "pictures/metadata.jsonl").write_text(text % ("a", "b"))
    images = load(repository)["image"]
    assert [image["path"] for image in images] == [str(repository / "pictures/a.png")]
    assert "are those of column 'image', of columns: image, conditioning_image, text" in caplog.text
    assert len(load(repository, image_column="conditioning_image")) == len(list(load_stream(repository))) == 1


def test_flags(repository, tmp_path):
    write_card(repository, SEVERAL)
    parser = argparse.ArgumentParser()
    add_common_arguments(parser)
    parser.add_argument("--validation_split", default="train")
    parser.add_argument("--num_validation_images", type=int, default=9)
    flags = [f"--dataset_name={repository}", f"--cache_dir={tmp_path / 'cache'}", "--dataset_config_name=large"]
    assert [len(split) for split in load_splits(parser.parse_args(flags))] == [2, 2]
    parser = argparse.ArgumentParser()
    add_collection_arguments(parser, "train")
    assert len(read_collection(parser.parse_args(flags))) == 2


def test_a_name_that_is_not_utf8_beside_a_card(repository, load):
    write_card(repository, ONE)
    try:
        with open(os.fsencode(repository) + b"/pictures/caf\xe9.png", "wb") as file:
            file.write((repository / "pictures/a.png").read_bytes())
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    assert len(load(repository)) == 2


def test_parquet_of_a_card(repository, load):
    rows = [{"bytes": encoded(Image.new("RGB", (4, 4), color)), "path": None} for color in COLORS]
    features = datasets.Features({"image": datasets.Image()})
    for name, part in (("first", rows[:2]), ("second", rows[2:])):
        datasets.Dataset.from_dict({"image": part}, features=features).to_parquet(repository / f"{name}.parquet")
    write_card(repository, ONE.replace("pictures/*", "first*").replace("held_out/*", "second*"))
    assert len(load(repository)) == 2 and len(load(repository, "validation")) == 4


def test_card_that_is_no_yaml(repository, load):
    write_card(repository, "- [")
    with pytest.raises(ValueError, match="the header of '.*README.md' is no valid YAML .*; mend or remove it"):
        load(repository)
    for text in ("# Pictures", "---\nlicense: mit\n---\n"):
        (repository / "README.md").write_text(text)
        assert len(load(repository)) == 4


def test_folders_of_archives(folder, load):
    data = encoded(Image.new("RGB", (4, 4)))
    for split, count in (("train2017", 3), ("val2017", 2)):
        with zipfile.ZipFile(folder / f"{split}.zip", "w") as file:
            for number in range(count):
                file.writestr(f"{number}.png", data)
    assert len(load(folder)) == 3 and len(load(folder, "validation")) == 2
    for path in folder.iterdir():
        path.unlink()
    with tarfile.open(folder / "images-000.tar", "w") as file:  # as of webdataset
        for name, content in (("1.jpg", data), ("1.txt", b"text"), ("2.jpg", data), ("2.txt", b"text")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    assert len(load(folder)) == 2


@pytest.fixture
def rows():
    image = {"bytes": encoded(Image.new("RGB", (4, 4))), "path": None}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return datasets.Dataset.from_dict({"image": [image] * 3, "text": list("abc")}, features=features)


def test_saved_to_disk(rows, folder, load):
    rows.with_format("numpy").save_to_disk(str(folder / "one"))
    assert len(load(folder / "one")) == 3 and load(folder / "one")[0]["image"]["bytes"] is not None
    with pytest.raises(ValueError, match="has no split 'validation'; available splits: train"):
        load(folder / "one", "validation")
    datasets.DatasetDict(train=rows, validation=rows.select([0])).save_to_disk(str(folder / "both"))
    assert len(load(folder / "both")) == 3
    assert len(load(folder / "both", "validation")) == len(load(folder / "both/validation")) == 1
    with pytest.raises(ValueError, match="has no split 'test'; available splits: train, validation"):
        load(folder / "both", "test")
    datasets.DatasetDict(train=rows, val=rows.select([0])).save_to_disk(str(folder / "val"))
    assert len(load(folder / "val", "validation")) == len(load(folder / "val", "val")) == 1
    (folder / "one/data-00000-of-00001.arrow").unlink()
    with pytest.raises(ValueError, match="cannot be read as save_to_disk wrote it .*; save again"):
        load(folder / "one")


def test_configuration_on_the_hub(monkeypatch, rows):
    def load_dataset(name, config, split, cache_dir, streaming):
        if config is None:
            text = (
                "Config name is missing.\nPlease pick one among the available configs: ['a', 'b']\nExample of usage:\n"
            )
            raise ValueError(text + "\t`load_dataset('me/pictures', 'a')`")
        assert (name, config, split) == ("me/pictures", "b", "train")
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_collection("me/pictures", config_name="b")) == 3
    with pytest.raises(ValueError, match=r"'me/pictures' .*Choose by config_name .*: \['a', 'b'\]$"):
        load_hub("me/pictures", "train", None, None)


def pictures(*names):
    image = {"bytes": encoded(Image.new("RGB", (4, 4))), "path": None}
    return datasets.Dataset.from_list(
        [dict.fromkeys(names, image)], features=datasets.Features(dict.fromkeys(names, datasets.Image()))
    )


def test_columns(folder, load, caplog):
    caplog.set_level(logging.INFO)
    pictures("conditioning_image", "image").to_parquet(folder / "a.parquet")
    assert load(folder)[0]["image"]["bytes"] is not None
    assert "are those of column 'image', of columns: conditioning_image, image" in caplog.text
    pictures("conditioning_image").add_column("image", ["a.png"]).to_parquet(folder / "a.parquet")
    caplog.clear()
    assert len(load(folder)) == 1 and [record.levelname for record in caplog.records] == ["WARNING"]
    pictures("before", "after").to_parquet(folder / "a.parquet")
    with pytest.raises(ValueError, match="several image columns; choose one with image_column from: before, after"):
        load(folder)
    assert len(load(folder, image_column="after")) == 1
    pictures("photo").add_column("text", ["a"]).to_parquet(folder / "a.parquet")
    assert len(load(folder)) == 1 and "are those of column 'photo', of columns: photo, text" in caplog.text

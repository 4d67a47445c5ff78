"""Classes of collections: folders, columns, metadata files."""

import json
import logging
import shutil

import datasets
import numpy as np
import pytest
from PIL import Image

from brics_diffusers.data import load_collection
from brics_diffusers.data.images import InfiniteBatchSampler, balanced_order


def write_images(root, names) -> None:
    for index, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (index, 0, 0)).save(root / name)


def classes(dataset) -> list[str]:
    """The name of each row's class."""
    return [dataset.features["label"].names[label] for label in dataset["label"]]


@pytest.fixture
def load(tmp_path):
    """Loads with labels."""

    def load_here(source, **options):
        return load_collection(source, cache_dir=tmp_path / "cache", with_labels=True, **options)

    return load_here


@pytest.fixture
def load_table(load, tmp_path):
    """Loads a parquet file of images and a column `kind`."""

    def load_column(values, feature=None, name="kind", **options):
        features = datasets.Features({"image": datasets.Image(), name: feature or datasets.Value("string")})
        images = [Image.new("RGB", (4, 4), (index, 0, 0)) for index in range(len(values))]
        path = tmp_path / "table.parquet"
        datasets.Dataset.from_dict({"image": images, name: values}, features=features).to_parquet(str(path))
        return load(path, **options)

    return load_column


class TestFolders:
    def test_a_folder_is_a_class(self, load, tmp_path):
        root = tmp_path / "images"
        write_images(root, ["dog/1.png", "cat/1.png", "cat/more/cat/2.png"])
        dataset = load(root)
        assert dataset.column_names == ["image", "label"] and dataset.features["label"].names == ["cat", "dog"]
        assert classes(dataset) == ["cat", "cat", "dog"]
        assert load_collection(root).column_names == ["image"]

    def test_splits_are_no_classes(self, load, tmp_path):
        root = tmp_path / "images"
        write_images(root, ["train/cat/1.png", "train/dog/2.png", "test/cat/3.png", "test/dog/4.png"])
        assert classes(load(root, split="test")) == ["cat", "dog"] and len(load(root)) == 2

    def test_a_zip(self, load, tmp_path):
        write_images(tmp_path / "images", ["cat/1.png", "dog/2.png"])
        archive = shutil.make_archive(str(tmp_path / "images"), "zip", tmp_path / "images")
        assert classes(load(archive)) == ["cat", "dog"]

    def test_images_without_a_folder_are_named(self, load, tmp_path):
        root = tmp_path / "images"
        write_images(root, ["cat/1.png", "dog/2.png", "3.png"])
        with pytest.raises(ValueError, match=r"1 image\(s\) of .* have no class \(.*3.png\); give each one or remove"):
            load(root)

    def test_one_folder_is_no_choice(self, load, tmp_path):
        root = tmp_path / "images"
        write_images(root, ["cat/1.png"])
        with pytest.raises(ValueError, match=r"has 1 class\(es\) of at least 1 image\(s\) \(cat\); two are needed"):
            load(root)
        with pytest.raises(ValueError, match="has no column 'kind'; its classes can only be the folders"):
            load(root, class_column="kind")


class TestMetadata:
    @pytest.mark.parametrize("kind", ["csv", "jsonl"])
    def test_a_file_beside_the_images(self, load, tmp_path, kind):
        root = tmp_path / "images"
        write_images(root, ["a/1.png", "a/2.png", "3.png"])
        rows = [("a/1.png", "cat", 3), ("a/2.png", "dog", 2), ("3.png", "cat", 3)]
        text = "file_name,label,number\n" + "".join(f"{name},{label},{n}\n" for name, label, n in rows)
        if kind == "jsonl":
            keys = ("file_name", "label", "number")
            text = "".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows)
        (root / f"metadata.{kind}").write_text(text)
        dataset = load(root)
        assert classes(dataset) == ["cat", "cat", "dog"]  # in the order of files: 3.png comes first
        assert classes(load(root, class_column="number")) == ["3", "3", "2"]

    def test_faults(self, load, tmp_path):
        root = tmp_path / "images"
        write_images(root, ["1.png", "2.png", "3.png"])
        (root / "metadata.csv").write_text("file_name,label\n1.png,cat\n2.png,dog\n")
        with pytest.raises(ValueError, match=r"have no class \(.*3.png\)"):
            load(root)
        (root / "metadata.csv").write_text("name,label\n1.png,cat\n")
        with pytest.raises(ValueError, match="has no column 'file_name'; add one"):
            load(root)


class TestColumns:
    def test_names(self, load_table):
        assert classes(load_table(["b", "a", "b"])) == ["b", "a", "b"]

    def test_integers_are_in_their_own_order(self, load_table):
        dataset = load_table([10, 9, 10], datasets.Value("int64"), "label")
        assert dataset.features["label"].names == ["9", "10"] and classes(dataset) == ["10", "9", "10"]

    def test_a_class_label_keeps_its_order(self, load_table):
        feature = datasets.ClassLabel(names=["z", "a", "m"])
        assert load_table([1, 0, 2], feature).features["label"].names == ["z", "a", "m"]
        with pytest.raises(ValueError, match=r"1 image\(s\) of .* have no class \(.*\)"):
            load_table([1, 0, -1], feature)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"class_column": "other"}, "has no column 'other'; available columns: kind"),
            ({"class_column": "image"}, "column 'image' of .* holds no classes, which are names or integers"),
            ({"class_names": ["a", "c"]}, r"has classes that the model does not know \(b\); it knows a, c, so leave"),
        ],
    )
    def test_faults(self, load_table, options, message):
        with pytest.raises(ValueError, match=message):
            load_table(["a", "b"], **options)

    def test_numbers_with_a_point_are_no_classes(self, load_table):
        with pytest.raises(ValueError, match="has no column of classes; choose one with class_column .* from: kind"):
            load_table([0.5, 1.5], datasets.Value("float32"))

    def test_numbers_of_a_model_stay(self, load_table):
        dataset = load_table(["b", "c", "b"], class_names=["a", "b", "c"])
        assert dataset["label"][:] == [1, 2, 1] and dataset.features["label"].names == ["a", "b", "c"]

    def test_rare_classes_are_left_out_by_name(self, load_table, caplog):
        with caplog.at_level(logging.WARNING):
            dataset = load_table(["a", "rare", "b", "a", "b"], min_class_images=2)
        assert "with less than 2 image(s) are left out: rare (1)." in caplog.text
        assert classes(dataset) == ["a", "b", "a", "b"] and dataset.features["label"].names == ["a", "b"]
        assert len(load_table(["a", "b", "a", "b"], max_images=2)) == 2


class TestBalance:
    def test_classes_are_equally_frequent(self):
        labels = np.array([0] * 90 + [1] * 7 + [2] * 3)
        order = balanced_order(labels, np.random.default_rng(0))
        counts = np.bincount(labels[order])
        assert len(order) == 100 and counts.min() >= 32 and counts.max() <= 34
        repeated = np.bincount(order, minlength=100)[90:97]
        assert repeated.min() >= 2 and repeated.max() <= 5  # 32 to 34 draws of 7 images

    def test_processes_and_resumed_runs_see_the_same(self):
        labels = np.array([0] * 9 + [1] * 3)

        def batches(size, count, **options):
            sampler = iter(InfiniteBatchSampler(12, size, seed=3, balance=labels, **options))
            return [next(sampler) for _ in range(count)]

        whole = batches(6, 8)
        assert whole[3:] == batches(6, 5, start=3)
        halves = [batches(3, 8, process_index=rank, num_processes=2) for rank in (0, 1)]
        assert whole == [first + second for first, second in zip(*halves, strict=True)]

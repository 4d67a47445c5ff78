"""Image collections from the Hub, folders, parquet files or zip archives, loaded without decoding."""

import glob
import hashlib
import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pyarrow.parquet

from .archives import load_archives
from .classes import METADATA_READERS, add_labels, read_classes
from .decoding import image_size
from .files import IMAGE_EXTENSIONS, extension, list_files, only_images, warn_of_others
from .repositories import (
    KINDS,
    has_configs,
    is_saved,
    load_files,
    load_hub,
    load_repository,
    load_saved,
    with_features,
)
from .splits import choose_split


logger = logging.getLogger(__name__)

FINGERPRINT_THREADS = 8  # enough for drives on a network, which answer late
EXPECTED = "a folder of images or of parquet files, a zip or a tar of images, or the name of a dataset on the Hub"


def load_collection(
    source: str | os.PathLike,
    split: str = "train",
    image_column: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    max_images: int | None = None,
    config_name: str | None = None,
    with_labels: bool = False,
    class_column: str | None = None,
    min_class_images: int = 1,
    class_names: Sequence[str] | None = None,
) -> datasets.Dataset:
    r"""
    Load one split of an image collection, without decoding any image.

    Local sources need no network and follow every change of their files. A folder that `save_to_disk` wrote is loaded
    as such, and one whose README.md has `configs` as the same repository on the Hub. Any other is searched to any
    depth, hidden files and files of other types are passed over; splits are told apart as [`choose_split`] says,
    parquet files also as `<split>-00000-of-00001.parquet`. A folder that has both parquet files and images is read as
    parquet if the former hold images. One of zips or tars of images is read as if these were folders, and webdataset's
    tars and Arrow files as `datasets` reads them. Of several kinds in a folder one is read, and a warning says which.

    Args:
        source (`str` or `os.PathLike`):
            A folder of images, of archives or of parquet files, a `.parquet` file, a `.zip` or `.tar` of images, or a
            dataset name on the Hub. What exists locally comes first.
        split (`str`, *optional*, defaults to `"train"`):
            The split to load; of splits that lie in folders, the name of one folder too ("val2017").
        image_column (`str`, *optional*):
            The column that holds the images. By default `"image"`, or else the only `datasets.Image` column, or else
            the only one of image bytes, as a struct or as plain binary.
        cache_dir (`str` or `os.PathLike`, *optional*):
            Where `datasets` keeps what it prepares; its own default when `None`. Image folders are read in place.
        max_images (`int`, *optional*):
            Keep only this many images, the first ones.
        config_name (`str`, *optional*):
            The configuration of a dataset that has several, on the Hub or in a folder.
        with_labels (`bool`, *optional*, defaults to `False`):
            Add the column `"label"`.
        class_column (`str`, *optional*):
            The column that holds the classes; by default, and for files, as [`read_classes`] says.
        min_class_images (`int`, *optional*, defaults to 1):
            Leave the images of rarer classes out.
        class_names (`Sequence[str]`, *optional*):
            The classes of a trained model, in the order of their numbers; by default those of the collection.

    Returns:
        `datasets.Dataset`: one column, `"image"`, of `{"bytes", "path"}` dictionaries, and with labels a second,
        `"label"`, a `ClassLabel`.

    Raises:
        FileNotFoundError: the source does not exist, or the Hub could not provide it.
        ValueError: no images, no such split, configuration or column, several columns to choose from, an unreadable
            archive, or `max_images` below 1; with labels, also images without a class, classes that are not among
            `class_names`, or less than two classes.
    """
    if max_images is not None and max_images < 1:
        raise ValueError(f"max_images is {max_images}; give at least 1, or None for all images.")
    path = Path(os.path.expanduser(source))
    if config_name is not None and path.is_file():
        raise ValueError(f"'{source}' is a file, which has no configuration '{config_name}'; leave config_name out.")
    if path.is_dir():
        dataset = load_folder(path, split, config_name, cache_dir)
    elif path.suffix.lower() in (".zip", ".tar") and path.is_file():
        dataset = load_archives(path, [path.name], split, cache_dir)
    elif path.suffix.lower() == ".parquet" and path.is_file():
        dataset = _load_parquet(path.parent, [path.name], split, cache_dir)
    elif path.is_file():
        raise ValueError(f"'{source}' is a single '{path.suffix}' file; give {EXPECTED}.")
    elif looks_like_path(str(source)):
        raise FileNotFoundError(f"'{source}' does not exist; give {EXPECTED}.")
    else:
        dataset = load_hub(str(source), split, config_name, cache_dir)

    column = find_image_column(dataset.features, image_column, source)
    classes, names = read_classes(dataset, column, source, class_column) if with_labels else (None, None)
    dataset = dataset.select_columns(column)
    if column != "image":
        dataset = dataset.rename_column(column, "image")
    dataset = dataset.cast_column("image", datasets.Image(decode=False))
    if len(dataset) == 0:
        raise ValueError(f"split '{split}' of '{source}' has no rows; give a split with at least one image.")
    if max_images is not None:
        dataset = dataset.select(range(min(max_images, len(dataset))))
    if classes is None:
        return dataset
    return add_labels(dataset, classes[: len(dataset)], names, source, min_class_images, class_names)


def collection_fingerprint(dataset: datasets.Dataset) -> str:
    r"""
    A digest of the images' bytes in their order: the same wherever a collection lies and however old its files are.

    All of them are read, files by several threads at once, which takes a small part of the time of decoding them.

    Args:
        dataset (`datasets.Dataset`): The result of [`load_collection`].

    Returns:
        `str`: hexadecimal digits.
    """
    digest = hashlib.sha256(str(len(dataset)).encode())
    rows = (row["image"] for row in dataset)
    with ThreadPoolExecutor(FINGERPRINT_THREADS) as pool:
        while turn := list(itertools.islice(rows, 1024)):
            for image in pool.map(_digest_of_image, turn):
                digest.update(image)
    return digest.hexdigest()


def _digest_of_image(image: dict) -> bytes:
    if image["bytes"] is not None:
        return hashlib.sha256(image["bytes"]).digest()
    try:
        with open(image["path"], "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:  # one unreadable image, as everywhere else
        return hashlib.sha256(repr(error.errno).encode()).digest()


def looks_like_path(source: str) -> bool:
    # A Hub name is "name" or "user/name"; anything of another form can only be a path.
    is_hub_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", source)
    return not is_hub_name or source.lower().endswith((".zip", ".tar", ".parquet"))


def load_folder(
    folder: Path, split: str, config_name: str | None, cache_dir, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """One split of a folder with all its columns; as a stream only what consists of shards."""
    if is_saved(folder):
        return load_saved(folder, split)
    if config_name is not None or has_configs(folder):
        return load_repository(folder, split, config_name, cache_dir, streaming)
    names = list_files(folder)
    if found := parquet_files(folder, names) or find_archives(names):
        warn_of_others(folder, found, names)
        load = _load_parquet if extension(found[0]) == ".parquet" else load_archives
        return load(folder, found, split, cache_dir, streaming)
    images = only_images(folder, names)
    warn_of_others(folder, images, names)
    if metadata := [name for name in names if _names_several_images(folder / name)]:
        return load_files(folder, choose_split(folder, metadata, split), "imagefolder", cache_dir)
    names = choose_split(folder, images, split)
    paths = [str((folder / name).absolute()) for name in names]
    return datasets.Dataset.from_dict({"image": paths}, features=datasets.Features({"image": datasets.Image()}))


def _names_several_images(file: Path) -> bool:
    """Whether it is a metadata file with columns such as `image_file_name`, so that not each image is a row."""
    if file.name not in METADATA_READERS:
        return False
    try:
        if file.suffix == ".parquet":
            columns = pyarrow.parquet.read_schema(file).names
        else:
            columns = METADATA_READERS[file.name](file, nrows=1).columns
    except Exception:  # whatever the readers of damaged files raise
        return False
    return any(column.endswith("_file_name") for column in map(str, columns))


def parquet_files(folder: Path, names: list[str]) -> list[str]:
    """Those that hold images; or all, if nothing else does."""
    parquet = [name for name in names if extension(name) == ".parquet"]
    kinds = {re.sub(r"\d+", "0", name): name for name in parquet}  # one of many shards
    kinds = {kind for kind, name in kinds.items() if _holds_images(folder / name)}
    holding = [name for name in parquet if re.sub(r"\d+", "0", name) in kinds]
    has_others = any(extension(name) in IMAGE_EXTENSIONS | KINDS.keys() for name in names)
    return holding if holding or has_others else parquet


def find_archives(names: list[str]) -> list[str]:
    """Tars, zips or Arrow files among a folder's, those of the most frequent kind, if there are no images."""
    kinds = Counter(kind for name in names if (kind := extension(name)) in KINDS)
    if not kinds or any(extension(name) in IMAGE_EXTENSIONS for name in names):
        return []
    (kind, _), *_ = kinds.most_common(1)
    return [name for name in names if extension(name) == kind]


def _holds_images(file: Path) -> bool:
    """Whether a parquet file is more than metadata of images beside it, as img2dataset writes."""
    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            features = datasets.Features.from_arrow_schema(opened.schema_arrow)
            ranks = {name: _image_rank(feature) for name, feature in features.items()}
            if {0, 1} & set(ranks.values()):
                return True
            binary = [name for name, rank in ranks.items() if rank is not None]  # or digests, or embeddings
            (row,) = next(opened.iter_batches(1, columns=binary)).to_pylist() if binary else ({},)
        return any(image_size({"bytes": value}) for value in row.values())
    except Exception:  # whatever the readers of damaged files and of no images raise
        return False


def _load_parquet(
    folder: Path, names: list[str], split: str, cache_dir, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    names = choose_split(folder, names, split)
    files = [glob.escape(str((folder / name).resolve())) for name in names]  # `datasets` takes each for a pattern
    options = {"data_files": {"train": files}, "split": "train", "cache_dir": cache_dir, "streaming": streaming}
    try:
        dataset = datasets.load_dataset("parquet", **options)
        return with_features(dataset) if streaming else dataset
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:  # ArrowInvalid is a ValueError
        if "corresponds to no data" in str(error):
            raise ValueError(f"split '{split}' of '{folder}' has no rows; give one with images.") from error
        reason = error.__cause__ or error
        raise ValueError(f"parquet files in '{folder}' cannot be read ({reason}); repair them.") from error


def find_image_column(features: datasets.Features, wanted: str | None, source) -> str:
    """The column that holds the images: see [`load_collection`]."""
    listing = ", ".join(features) or "none"
    if wanted is not None:
        if wanted not in features:
            raise ValueError(f"'{source}' has no column '{wanted}'; available columns: {listing}.")
        if _image_rank(features[wanted]) is None and getattr(features[wanted], "dtype", None) != "string":
            raise ValueError(f"column '{wanted}' of '{source}' holds no images; available columns: {listing}.")
        return wanted
    ranks = {name: rank for name, feature in features.items() if (rank := _image_rank(feature)) is not None}
    if not ranks:
        raise ValueError(f"'{source}' has no image column; choose one with image_column from: {listing}.")
    best = ["image"] if "image" in ranks else [name for name in ranks if ranks[name] == min(ranks.values())]
    if len(best) > 1:
        best = ", ".join(best)
        raise ValueError(f"'{source}' has several image columns; choose one with image_column from: {best}.")
    if len(features) > 1:
        level = logging.WARNING if len(ranks) > 1 or "image" in features and best != ["image"] else logging.INFO
        logger.log(level, "Images of '%s' are those of column '%s', of columns: %s.", source, best[0], listing)
    return best[0]


def _image_rank(feature) -> int | None:
    if isinstance(feature, datasets.Image):
        return 0
    if isinstance(feature, dict) and "bytes" in feature:
        return 1
    return 2 if getattr(feature, "dtype", None) in ("binary", "large_binary") else None

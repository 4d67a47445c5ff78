"""The class of each image of a collection: from a column, a metadata file, or the folders that images lie in."""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import datasets
import pandas
import pyarrow.compute

from .decoding import image_name
from .files import list_files


logger = logging.getLogger(__name__)

# What `datasets` reads beside the images of a folder; its column `file_name` says which image a row is of.
METADATA_READERS = {
    "metadata.csv": pandas.read_csv,
    "metadata.jsonl": partial(pandas.read_json, lines=True),
    "metadata.parquet": pandas.read_parquet,
}


def read_classes(
    dataset: datasets.Dataset, image_column: str, source: str | os.PathLike, wanted: str | None = None
) -> tuple[list[str | None], list[str]]:
    r"""
    The class of each row by name.

    Args:
        dataset (`datasets.Dataset`): One split, with all its columns.
        image_column (`str`): The column that holds its images.
        source (`str` or `os.PathLike`): Where it was loaded from.
        wanted (`str`, *optional*):
            The column of classes: names, integers or a `ClassLabel`. By default `"label"`, or else the only
            `ClassLabel`, or else the only column of strings. Where there are only files, a metadata file's column as
            `datasets` reads it (`metadata.csv`, `.jsonl` or `.parquet`, with `file_name`), or else the name of the
            folder that an image lies in.

    Returns:
        `tuple[list[str | None], list[str]]`: the name of each row's class, `None` where there is none, and all names
        in the order of their numbers.

    Raises:
        ValueError: no such column, one that holds no classes, several to choose from, or images in no folder.
    """
    if len(dataset.features) > 1:
        return _of_column(dataset, _find_class_column(dataset.features, wanted, source, image_column))
    folder = Path(os.path.expanduser(source))
    paths = [_relative(path, folder) for path in _paths(dataset, image_column)]
    metadata = _read_metadata(folder) if folder.is_dir() else None
    if metadata is not None:
        column = _find_class_column(metadata.features, wanted, source, "file_name")
        values, names = _of_column(metadata, column)
        by_file = dict(zip(metadata["file_name"], values, strict=True))
        return [by_file.get(path) for path in paths], names
    if wanted not in (None, "label"):
        raise ValueError(f"'{source}' has no column '{wanted}'; its classes can only be the folders of its images.")
    values = [os.path.basename(os.path.dirname(path)) or None for path in paths]
    return values, sorted(set(filter(None, values)))


def add_labels(
    dataset: datasets.Dataset,
    classes: Sequence[str | None],
    names: Sequence[str],
    source: str | os.PathLike,
    min_images: int = 1,
    known: Sequence[str] | None = None,
) -> datasets.Dataset:
    r"""
    Adds the column `"label"`, and leaves out the rows of rare classes, which a warning names.

    Args:
        dataset (`datasets.Dataset`): One column, `"image"`.
        classes (`Sequence[str | None]`): The name of each row's class.
        names (`Sequence[str]`): All names in the order of their numbers.
        source (`str` or `os.PathLike`): What to call the collection in messages.
        min_images (`int`, *optional*, defaults to 1): Images that a class must have.
        known (`Sequence[str]`, *optional*): The classes of a trained model, whose numbers are kept.

    Returns:
        `datasets.Dataset`: with the further column `"label"`, a `ClassLabel`.

    Raises:
        ValueError: rows without a class, classes that are not `known`, or less than two classes.
    """
    missing = [row for row, name in enumerate(classes) if name is None]
    if missing:
        found = _shorten([image_name(dataset[row]["image"], row) for row in missing[:6]], len(missing))
        raise ValueError(f"{len(missing)} image(s) of '{source}' have no class ({found}); give each one or remove it.")
    counts = Counter(classes)
    new = [name for name in names if counts[name] and known is not None and name not in known]
    if new:
        raise ValueError(
            f"'{source}' has classes that the model does not know ({_shorten(new, len(new))}); it knows "
            f"{', '.join(known)}, so leave the others out or train a new model."
        )
    rare = [name for name in names if counts[name] < min_images and (known is None or counts[name])]
    if rare:
        found = ", ".join(f"{name} ({counts[name]})" for name in rare)
        logger.warning("Classes of '%s' with less than %d image(s) are left out: %s.", source, min_images, found)
    kept = [name for name in known or names if name not in rare]
    if known is None and len(kept) < 2:
        raise ValueError(
            f"'{source}' has {len(kept)} class(es) of at least {min_images} image(s) ({', '.join(kept) or 'none'}); "
            "two are needed: give folders or a column of classes, or train without classes."
        )
    final = list(known or kept)
    numbers = {name: number for number, name in enumerate(final)}
    rows = [row for row, name in enumerate(classes) if name not in rare]
    labels = [numbers.get(name, -1) for name in classes]
    dataset = dataset.add_column("label", labels, feature=datasets.ClassLabel(names=final))
    return dataset if len(rows) == len(dataset) else dataset.select(rows)


def _is_class(feature) -> bool:
    kind = getattr(feature, "dtype", "")
    return isinstance(feature, datasets.ClassLabel) or (
        isinstance(feature, datasets.Value) and kind.startswith(("int", "uint", "string", "large_string", "bool"))
    )


def _find_class_column(features: datasets.Features, wanted: str | None, source, other: str) -> str:
    listing = ", ".join(name for name in features if name != other) or "none"
    fitting = [name for name, feature in features.items() if name != other and _is_class(feature)]
    if wanted is None:
        labels = [name for name in fitting if isinstance(features[name], datasets.ClassLabel)]
        strings = [name for name in fitting if "string" in features[name].dtype]
        candidates = ["label"] if "label" in features else labels or strings
        if len(candidates) != 1:
            found = "several columns of classes" if candidates else "no column of classes"
            raise ValueError(f"'{source}' has {found}; choose one with class_column (--class_column) from: {listing}.")
        wanted = candidates[0]
    if wanted not in features:
        raise ValueError(f"'{source}' has no column '{wanted}'; available columns: {listing}.")
    if wanted not in fitting:
        raise ValueError(
            f"column '{wanted}' of '{source}' holds no classes, which are names or integers; available: {listing}."
        )
    return wanted


def _of_column(dataset: datasets.Dataset, column: str) -> tuple[list[str | None], list[str]]:
    feature, values = dataset.features[column], list(dataset[column])
    if isinstance(feature, datasets.ClassLabel):  # -1 stands for no label
        return [None if value in (None, -1) else feature.names[value] for value in values], list(feature.names)
    values = [None if value in (None, "") else value for value in values]
    return [None if value is None else str(value) for value in values], list(
        map(str, sorted({value for value in values if value is not None}))
    )


def _read_metadata(folder: Path) -> datasets.Dataset | None:
    tables = []
    for name in list_files(folder):
        read = METADATA_READERS.get(os.path.basename(name))
        if read is not None:
            table = read(folder / name)
            if "file_name" not in table.columns:
                raise ValueError(f"'{folder / name}' has no column 'file_name'; add one, of the images' paths.")
            table["file_name"] = [os.path.normpath(os.path.join(os.path.dirname(name), f)) for f in table["file_name"]]
            tables.append(table)
    if not tables:
        return None
    table = pandas.concat(tables).convert_dtypes()  # integers stay integers where some are missing
    return datasets.Dataset.from_pandas(table, preserve_index=False)


def _paths(dataset: datasets.Dataset, column: str) -> Iterable[str]:
    stored = dataset.flatten_indices().data.column(column)
    return pyarrow.compute.struct_field(stored, "path").to_pylist()


def _relative(path: str | None, folder: Path) -> str:
    if path is None:
        return ""
    return os.path.relpath(path, folder.absolute()) if os.path.isabs(path) else os.path.normpath(path)


def _shorten(names: list[str], count: int, limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {count - limit} more" if count > limit else "")

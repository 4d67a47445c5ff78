"""Loads collections in the formats of `datasets`: from the Hub, a local repository's folder, or `save_to_disk`."""

import glob
import os
from pathlib import Path

import datasets
import huggingface_hub
from datasets.data_files import DataFilesList

from .files import printable
from .splits import SPLIT_WORDS


KINDS = {".arrow": "arrow", ".tar": "webdataset", ".zip": "imagefolder"}  # by the builders of `datasets`


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return (folder / "dataset_dict.json").is_file() or {"dataset_info.json", "state.json"} <= set(os.listdir(folder))


def load_saved(folder: Path, split: str) -> datasets.Dataset:
    """One split of what `save_to_disk` wrote; a `ValueError` if there is none, or the folder can't be read."""
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise ValueError(f"'{folder}' cannot be read as save_to_disk wrote it ({error}); save again.") from error
    if isinstance(saved, datasets.Dataset):
        saved = {str(saved.split or "train"): saved}
    return saved[_find_split(folder, saved, split)].with_format(None)


def _find_split(source: Path, splits: dict, split: str) -> str:
    """A split's name among others, by the words of `choose_split`: "val" stands for "validation"."""
    words = {SPLIT_WORDS.get(name.lower(), name): name for name in map(str, splits)}
    found = split if split in splits else words.get(SPLIT_WORDS.get(split.lower()))
    if found is None:
        raise ValueError(f"'{source}' has no split '{split}'; available splits: {', '.join(sorted(words.values()))}.")
    return found


def has_configs(folder: Path) -> bool:
    """Whether the card of a folder says which files make its splits; a `ValueError` if that is no YAML."""
    card = folder / "README.md"
    try:
        metadata = huggingface_hub.metadata_load(card) if card.is_file() else None
    except Exception as error:
        raise ValueError(f"the header of '{card}' is no valid YAML ({_line(error)}); mend or remove it.") from error
    return "configs" in (metadata or {}) or (folder / datasets.config.REPOYAML_FILENAME).is_file()


def load_repository(
    folder: Path, split: str, config_name: str | None, cache_dir, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """One split of a folder as `datasets` finds it; a `ValueError` for what it can't load or has no files of."""
    path = str(folder.resolve())
    if glob.escape(path) != path:
        raise ValueError(
            f"the path '{path}' has one of the characters *?[ in it, which make it a pattern where `datasets` looks "
            "for the files of configs; rename the folder."
        )
    try:
        builder = datasets.load_dataset_builder(str(folder.absolute()), config_name, cache_dir=cache_dir)
    except Exception as error:
        raise _not_loaded(folder, config_name, error) from error
    splits, kind = builder.config.data_files, type(builder).__module__.rpartition(".")[2]
    split = _find_split(folder, splits, split)
    try:
        if streaming:
            return with_features(builder.as_streaming_dataset(split=split))
        # Given as files, whose changes the cache follows; those of a card's patterns it does not.
        files = DataFilesList(printable(folder, splits[split]), splits[split].origin_metadata)
        return datasets.load_dataset(kind, data_files={split: files}, split=split, cache_dir=cache_dir)
    except Exception as error:
        raise _not_loaded(folder, config_name, error) from error


def _not_loaded(folder: Path, config_name: str | None, error: Exception) -> ValueError:
    reason = _line(error.__cause__ or error)
    return ValueError(f"'{folder}' cannot be loaded with config_name {config_name!r}: {reason}")


def load_files(
    folder: Path, names: list[str], builder: str, cache_dir, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """All rows of files, such as a `builder` of `datasets` reads; a `ValueError` if it can't."""
    files = [glob.escape(str((folder / name).resolve())) for name in names]  # `datasets` takes each for a pattern
    # Not by the split's name: "val-2017" is a folder's, but none that `datasets` takes.
    options = {"data_files": {"train": files}, "split": "train", "cache_dir": cache_dir, "streaming": streaming}
    try:
        dataset = datasets.load_dataset(builder, **options)
        return with_features(dataset) if streaming else dataset
    except Exception as error:
        reason = _line(error.__cause__ or error)
        if "in WebDataset format" in reason:
            reason = "each sample's files must follow one another, with the same extensions in all samples; pack anew."
        raise ValueError(f"files of '{folder}' such as {names[0]} cannot be loaded: {reason}") from error


def with_features(stream: datasets.IterableDataset) -> datasets.IterableDataset:
    """A stream that knows its columns, if need be from its first rows."""
    return stream if stream.features is not None else stream._resolve_features()


def _line(error: Exception) -> str:
    # What `datasets` says of a missing configuration ends with an example in code.
    line = " ".join(str(error).partition("Example of usage")[0].split())
    return line.replace("Please pick one among", "Choose by config_name (--dataset_config_name) one of")


def load_hub(
    name: str, split: str, config_name: str | None, cache_dir, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """One split of a dataset on the Hub; a `FileNotFoundError` if that provides none, else a `ValueError`."""
    try:
        dataset = datasets.load_dataset(name, config_name, split=split, cache_dir=cache_dir, streaming=streaming)
        return with_features(dataset) if streaming else dataset
    except ValueError as error:  # an unknown split, a missing or unknown configuration: the message lists the choices
        what = f"dataset '{name}' with split '{split}' and config_name {config_name!r}"
        raise ValueError(f"{what} cannot be loaded: {_line(error)}") from error
    except Exception as error:  # whatever the network, the Hub or a proxy may raise
        raise FileNotFoundError(
            f"'{name}' is neither a local folder nor a dataset that the Hub could provide "
            f"({type(error).__name__}: {error}); check the path, or the name and the network."
        ) from error

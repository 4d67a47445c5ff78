"""Which files of a collection make which split, by the names of folders and files."""

import functools
import logging
import os
import re
from pathlib import Path

from datasets.data_files import NON_WORDS_CHARS, SPLIT_KEYWORDS


logger = logging.getLogger(__name__)

# `datasets` finds splits by these words between separators or digits: "train2017", "my-val.png".
SPLIT_WORDS = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}
ANY_WORD = f"(?i:{'|'.join(SPLIT_WORDS)})"
SPLIT_NAME = re.compile(f"(?:^|[{NON_WORDS_CHARS}])({ANY_WORD})(?=[{NON_WORDS_CHARS}]|$)")
NEARLY_A_SPLIT = re.compile(f"{ANY_WORD}(?:[A-Z]|set)")  # "trainA", "testset"
SHARD_NAME = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")  # "train-00000-of-00001", what `push_to_hub` writes


def choose_split(source: str | os.PathLike, names: list[str], split: str) -> list[str]:
    r"""
    The files of one split. What was taken for what is logged: as a warning where it is not clear.

    Words and separators are those of `datasets`, but a file has one split only, by its outermost folder that is named
    after one, or else by its own name. There must be two splits, which cover half of the files if they are told apart
    by the names of files, or one that has all: a single folder "test" among others is a class. Otherwise all files
    are of the split "train".

    Args:
        source (`str` or `os.PathLike`): What to call the collection in messages.
        names (`list[str]`): At least one path relative to the collection.
        split (`str`): The split, or one of the folders of a split ("val2017"), or one that is nearly named
            after one ("trainA").

    Returns:
        `list[str]`: some of `names`.

    Raises:
        ValueError: no such split.
    """
    groups = _group(source, names)
    members = names if NEARLY_A_SPLIT.match(split) else groups.get(_split_in_word(split), ())
    in_folder = [name for name in members if split in _folders(name)]
    found = groups.get(split) or in_folder or groups.get(SPLIT_WORDS.get(split.lower()))
    if not found:
        raise ValueError(f"'{source}' has no split '{split}'; available splits: {', '.join(sorted(groups))}.")
    return found


def _group(source: str | os.PathLike, names: list[str]) -> dict[str, list[str]]:
    folders = {name: _folders(name) for name in names}
    shared = len(
        os.path.commonprefix(list(folders.values()))
    )  # "my test photos/train/1.png", "my test photos/val/..."
    ways = (
        lambda name: _split_in(_folders(name)[shared:]),
        lambda name: _split_in(_folders(name)),
        lambda name: _split_in(_folders(name)) or _split_in_file_name(name),
    )
    for way in ways:
        groups: dict[str | None, list[str]] = {}
        for name in names:
            groups.setdefault(way(name), []).append(name)
        outside = groups.pop(None, [])
        if not outside or len(groups) > 1 and (way is not ways[-1] or 2 * len(outside) <= len(names)):
            break
    else:
        alike = [name for found in groups.values() for name in found]
        alike += [name for name in outside if any(map(NEARLY_A_SPLIT.match, _folders(name)))]
        if alike:
            text = (
                "'%s' is read as one split, 'train', though %d of its %d files, such as %s, are named like a split; "
                "for splits, sort all files into folders such as train and validation, or name a folder as the split."
            )
            logger.warning(text, source, len(alike), len(names), alike[0])
        return {"train": names}
    found = "; ".join(f"{split}: {len(files)} files such as {files[0]}" for split, files in sorted(groups.items()))
    logger.info("Splits of '%s' are %s.", source, found)
    if outside:
        text = "%d file(s) of '%s', such as %s, lie outside its split folders and are left out. Splits are %s."
        logger.warning(text, len(outside), source, outside[0], found)
    return groups


def _folders(name: str) -> tuple[str, ...]:
    return _parts(os.path.dirname(name))


@functools.lru_cache(2**16)
def _parts(folder: str) -> tuple[str, ...]:
    return Path(folder).parts


@functools.lru_cache(2**16)
def _split_in(words: tuple[str, ...]) -> str | None:
    return next(filter(None, map(_split_in_word, words)), None)


def _split_in_word(word: str) -> str | None:
    found = SPLIT_NAME.search(word)
    return SPLIT_WORDS[found[1].lower()] if found else None


def _split_in_file_name(name: str) -> str | None:
    name = os.path.basename(name)
    shard = SHARD_NAME.match(name) if name.lower().endswith(".parquet") else None
    return shard[1] if shard else _split_in_word(name)

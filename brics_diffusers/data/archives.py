"""Zips and tars of images are read as folders; webdataset's tars, Arrow files and zips with metadata by `datasets`."""

import contextlib
import gzip
import io
import logging
import lzma
import os
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import datasets

from .classes import METADATA_READERS
from .files import IMAGE_EXTENSIONS, extension, is_hidden, only_images, shorten
from .repositories import KINDS, load_files
from .splits import choose_split


logger = logging.getLogger(__name__)

FIRST_MEMBERS = 256  # of a tar, which tell what the others are like
TAR_BLOCK = 512  # bytes; zeros stand for the end
DAMAGED = (tarfile.TarError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, EOFError)
# Plain binary and string: encoding as `datasets.Image` would prefer a local file that bears a member's name.
FEATURES = datasets.Features({"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})


def load_archives(
    source: Path, names: list[str], split: str, cache_dir, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    r"""
    One split of the archives of a folder, or of one archive. Those that have only images are read as if each were a
    folder of its name.

    Args:
        source (`Path`): The folder, or the archive.
        names (`list[str]`): Archives of one kind in it, or the archive's own name.
        split, cache_dir: As in `load_collection`.
        streaming (`bool`, *optional*, defaults to `False`): Read as a stream, whose shards are the archives.

    Raises:
        ValueError: no such split, no images, or archives that can't be read.
    """
    folder = source if source.is_dir() else source.parent
    kind = extension(names[0])
    members = None  # of each archive that is read; `None` for all of them
    if kind == ".zip":
        members = {name: _zip_members(folder / name) for name in names}
        has_metadata = any(os.path.basename(member) in METADATA_READERS for name in names for member in members[name])
        by_datasets = has_metadata and source.is_dir()
    elif kind == ".tar":
        if source.is_dir():  # by the tars' names: to look into all of them would take long
            names = choose_split(source, names, split)
        names, by_datasets = _check_tars(source, folder, names)
        if not by_datasets and not source.is_dir():
            members = {name: list(_until_damage(folder / name, lambda tar, member: member.name)) for name in names}
    else:
        by_datasets = True
    if by_datasets:
        names = choose_split(source, names, split)
        return load_files(folder, names, KINDS[kind], cache_dir, streaming)

    folders = {name: os.path.splitext(name)[0] + "/" if source.is_dir() else "" for name in names}
    if members is not None:
        places = {folders[name] + member: (name, member) for name in names for member in members[name]}
        members = {}
        for path in choose_split(source, only_images(source, list(places)), split):
            name, member = places[path]
            members.setdefault(name, []).append(member)
    # The stamps enter the fingerprint of the cached copy, so that a changed archive is read again.
    archives = [
        (str((folder / name).resolve()), folders[name], members and members[name], _stamp(folder / name))
        for name in members or names
    ]
    arguments = {"features": FEATURES, "gen_kwargs": {"archives": archives}}
    if streaming:
        return datasets.IterableDataset.from_generator(_rows, **arguments)
    return datasets.Dataset.from_generator(_rows, cache_dir=cache_dir and str(cache_dir), **arguments)


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_mtime_ns, status.st_size


def _rows(archives: list[tuple[str, str, list[str] | None, tuple[int, int]]]) -> Iterator[dict]:
    for archive, folder, members, _ in archives:
        read = _read_zip if extension(archive) == ".zip" else _read_tar
        for member, data in read(archive, members):
            path = os.fsencode(folder + os.path.normpath(member)).decode(errors="replace")  # Arrow has UTF-8 only
            yield {"image": {"bytes": data, "path": path}}


def _is_data(member: str) -> bool:
    return not any(is_hidden(part) for part in os.path.normpath(member).split("/"))


def _zip_members(archive: Path) -> list[str]:
    try:
        with zipfile.ZipFile(archive) as file:
            names = [info.filename for info in file.infolist() if not info.is_dir()]
    except zipfile.BadZipFile as error:
        raise ValueError(f"'{archive}' is not a valid zip file ({error}); create it again.") from error
    return sorted(filter(_is_data, names))


def _read_zip(archive: str, members: list[str]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(archive) as file:
        for member in members:
            try:
                data = file.read(member)
            except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError):
                data = b""  # a damaged or encrypted member is one unreadable image, not the end of the archive
            yield member, data


def _tar_members(archive: str | Path, read: Callable) -> Iterator:
    """What `read` makes of each file of a tar; a `tarfile.ReadError` or another of `DAMAGED` at damage."""
    with tarfile.open(archive) as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # which would grow with each
            if member.isfile() and _is_data(member.name):
                yield read(tar, member)
        if not _is_compressed(tar):
            tar.fileobj.seek(tar.offset)
            if any(tar.fileobj.read(TAR_BLOCK)):
                raise tarfile.ReadError(f"no header at byte {tar.offset}")


def _until_damage(archive: str | Path, read: Callable) -> Iterator:
    try:
        yield from _tar_members(archive, read)
    except DAMAGED as error:
        logger.warning("'%s' is damaged (%s): what follows is left out, copy it again.", archive, error)


def _is_compressed(tar: tarfile.TarFile) -> bool:
    return not isinstance(tar.fileobj, io.BufferedReader)


def _read_tar(archive: str, members: list[str] | None) -> Iterator[tuple[str, bytes]]:
    wanted = None if members is None else set(members)

    def read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> tuple[str, bytes] | None:
        if extension(member.name) not in IMAGE_EXTENSIONS or wanted is not None and member.name not in wanted:
            return None
        try:
            return member.name, tar.extractfile(member).read()
        except DAMAGED:  # one unreadable image
            return member.name, b""

    return filter(None, _until_damage(archive, read))


def _check_tars(source: Path, folder: Path, names: list[str]) -> tuple[list[str], bool]:
    """
    The tars that have files in them, and whether these are samples of several files, as webdataset's are. Tars without
    files or without an end are logged.
    """
    kept, cut, first = [], [], []
    for name in names:
        found, count = [], 1 if first else FIRST_MEMBERS
        with contextlib.suppress(*DAMAGED):
            found.extend(islice(filter(None, _tar_members(folder / name, _whole_name)), count))
        if found:
            kept.append(name)
            first = first or found
            if not _has_end(folder / name):
                cut.append(name)
    if not kept:
        raise ValueError(f"no tar of '{source}' has a whole file in it ({shorten(names)}); create them again.")
    if len(kept) < len(names):
        empty = sorted(set(names) - set(kept))
        text = "%d tar(s) of '%s' have no whole file in them and are left out, create them again: %s."
        logger.warning(text, len(empty), source, shorten(empty))
    are_samples = _are_samples(source, first)
    broken = [name for name in cut if are_samples and not _ends_with_a_whole_file(folder / name)]
    if not are_samples and source.is_dir():
        only_images(source, first)  # warns of formats that can't be read
    if broken:  # `datasets` would end a run there
        raise ValueError(f"tars of '{source}' break off within a file ({shorten(broken)}); copy or remove them.")
    if cut:
        text = "%d tar(s) of '%s' break off before their end, only what precedes is read, copy them again: %s."
        logger.warning(text, len(cut), source, shorten(cut))
    return kept, are_samples


def _whole_name(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str | None:
    is_whole = _is_compressed(tar) or member.offset_data + member.size <= os.stat(tar.name).st_size
    return member.name if is_whole else None


def _ends_with_a_whole_file(tar: Path) -> bool:
    with contextlib.suppress(*DAMAGED):
        return all(_tar_members(tar, _whole_name))
    return True  # ends within a header


def _has_end(archive: Path) -> bool:
    """Whether a tar ends in a block of zeros. Of a compressed one only reading it would tell."""
    with tarfile.open(archive) as tar:
        if _is_compressed(tar):
            return True
        tar.fileobj.seek(-TAR_BLOCK, os.SEEK_END)
        return not any(tar.fileobj.read())


def _are_samples(source: Path, members: list[str]) -> bool:
    """Whether files belong together, which have the same name up to the first dot: an image and its class or text."""
    samples: dict[str, list[str]] = {}
    for member in members:
        place, name = os.path.split(member)
        name, _, field = name.partition(".")
        samples.setdefault(os.path.join(place, name), []).append(field)
    images = {key: [f for f in fields if extension(f"x.{f}") in IMAGE_EXTENSIONS] for key, fields in samples.items()}
    if not any(images.values()):
        return True
    with_others = [key for key in samples if 0 < len(images[key]) < len(samples[key])]
    alike = Counter(tuple(sorted(fields)) for fields in images.values() if len(fields) > 1)
    if not with_others and max(alike.values(), default=0) < 2:
        return False
    kinds = [set(fields) for fields in images.values() if fields]
    if not set.intersection(*kinds):
        found = ", ".join(sorted(set.union(*kinds)))
        raise ValueError(
            f"images of samples in the tars of '{source}' have no extension in common ({found}), so that some would "
            "be lost; pack them anew, all images with the same one."
        )
    return True

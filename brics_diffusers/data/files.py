"""The image files of a folder or archive: what is read, and what is left out and named."""

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from .decoding import pillow_heif


logger = logging.getLogger(__name__)

HEIF_EXTENSIONS = {".heic", ".heif", ".hif"}
# Formats Pillow opens without outside programs; .eps and .pdf, which would start Ghostscript, stay out.
IMAGE_EXTENSIONS = frozenset(
    ".apng .avif .bmp .dib .gif .j2c .j2k .jfif .jp2 .jpe .jpeg .jpf .jpg .jpx .pbm .pgm .png .pnm .ppm .qoi .tga "
    ".tif .tiff .webp".split()
) | (HEIF_EXTENSIONS if pillow_heif else set())
OTHER_IMAGES = HEIF_EXTENSIONS.union(ImageFolder.EXTENSIONS, ".arw .cr2 .cr3 .dng .jxl .nef .svg".split())
OTHER_IMAGES -= IMAGE_EXTENSIONS
ARCHIVES = {".arrow", ".tar", ".zip"} | {".7z", ".rar", ".tbz", ".tgz", ".txz"}  # the latter aren't read
# Folders in which network drives and systems keep thumbnails and what was deleted.
JUNK = {"@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "recycler", "lost+found"}
JUNK |= {"system volume information"}


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is no data."""
    return name.startswith((".", "__")) or name.lower() in JUNK  # "__MACOSX", "__pycache__"


def list_files(folder: Path) -> list[str]:
    r"""
    Relative paths of the files in a folder and its subfolders, sorted. Links are followed, which `datasets` does not
    do; hidden files are passed over, those that are not [`printable`] are left out.

    Args:
        folder (`Path`): The folder.

    Returns:
        `list[str]`: paths.

    Raises:
        ValueError: the path of the folder is not UTF-8.
    """
    if not _is_utf8(str(folder.absolute())):
        raise ValueError(f"the path {os.fsencode(folder)} is not UTF-8, which Arrow can't hold; rename the folder.")
    return printable(folder, sorted(_walk(folder)))


def printable(folder: Path, names: list[str]) -> list[str]:
    """The names that are UTF-8, as Arrow can't hold others, which are logged."""
    odd = [name for name in names if not _is_utf8(name)]
    if odd:
        found = shorten([str(os.fsencode(name)) for name in odd])
        text = "%d file(s) of '%s' have names that are not UTF-8 and are left out, rename them: %s."
        logger.warning(text, len(odd), folder, found)
        odd = set(odd)
    return [name for name in names if name not in odd]


def _is_utf8(name: str) -> bool:
    return name.encode("utf-8", "ignore").decode() == name


def _walk(folder: Path) -> Iterator[str]:
    seen = set()
    for root, directories, files in os.walk(folder, followlinks=True):
        if os.path.realpath(root) in seen:  # a link that leads back up
            directories.clear()
            continue
        seen.add(os.path.realpath(root))
        directories[:] = sorted(name for name in directories if not is_hidden(name))
        yield from (os.path.relpath(os.path.join(root, name), folder) for name in files if not is_hidden(name))


def only_images(source: Path, names: list[str]) -> list[str]:
    r"""
    The files whose names say that they are images; those of formats that can't be read are counted and logged.

    Args:
        source (`Path`): The folder or archive, for messages.
        names (`list[str]`): Its files.

    Returns:
        `list[str]`: some of `names`, at least one.

    Raises:
        ValueError: there are none.
    """
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(extension(name) or "no extension", []).append(name)
    others = sorted(name for kind in OTHER_IMAGES & set(kinds) for name in kinds[kind])
    remedy = "install pillow-heif to read HEIC" if HEIF_EXTENSIONS & OTHER_IMAGES & set(kinds) else "convert them"
    if IMAGE_EXTENSIONS & set(kinds):
        if others:
            text = "%d image(s) of '%s' are of formats that can't be read and are left out, %s: %s."
            logger.warning(text, len(others), source, remedy, shorten(others))
        return [name for name in names if extension(name) in IMAGE_EXTENSIONS]
    place = "folder" if source.is_dir() else source.suffix[1:]
    if not names:
        raise ValueError(f"{place} '{source}' is empty; expected images such as .png or .jpg in it.")
    found, remedy = ", ".join(sorted(kinds)[:8]), f", or {remedy}" if others else ""
    raise ValueError(
        f"{place} '{source}' has no images (found: {found}); expected files such as .png or .jpg in it{remedy}."
    )


def warn_of_others(folder: Path, taken: list[str], names: list[str]) -> None:
    """Logs which images and archives of a folder, that has several kinds of these, are not `taken`."""
    kinds = IMAGE_EXTENSIONS if extension(taken[0]) in IMAGE_EXTENSIONS else {extension(taken[0])}
    others = (IMAGE_EXTENSIONS | ARCHIVES) - kinds
    left = [name for name in names if extension(name) in others or re.search(r"\.tar\.\w+$", name)]
    if left:
        text = (
            "Of '%s' only the %d file(s) like %s are read; %d other(s) are left out, put them into a folder of their "
            "own: %s."
        )
        logger.warning(text, folder, len(taken), taken[0], len(left), shorten(left))


def extension(name: str) -> str:
    """The extension in small letters, with its dot."""
    return os.path.splitext(name)[1].lower()


def shorten(names: list[str], limit: int = 10) -> str:
    """The first names."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")

"""Image collections from the Hub, folders, parquet files or zip archives, loaded without decoding."""

import glob
import hashlib
import itertools
import logging
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets


logger = logging.getLogger(__name__)

# Formats Pillow opens without outside programs; .eps and .pdf, which would start Ghostscript, stay out.
IMAGE_EXTENSIONS = frozenset(
    ".avif .bmp .dib .gif .j2k .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp".split()
)
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
SHARD_NAME = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")  # "train-00000-of-00001", what `push_to_hub` writes
FINGERPRINT_THREADS = 8  # enough for drives on a network, which answer late
EXPECTED = "a folder of images, a folder of parquet files, a zip of images or the name of a dataset on the Hub"


def load_collection(
    source: str | os.PathLike,
    split: str = "train",
    image_column: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    max_images: int | None = None,
) -> datasets.Dataset:
    r"""
    Load one split of an image collection, without decoding any image.

    Local sources need no network and follow every change of their files. Folders are searched to any depth, hidden
    files and files of other types are passed over. Subfolders named after splits ("train", "val", "test", ...) become
    splits when there are at least two of them or when they hold every image; all other folders have one split,
    "train". Parquet files are told apart by the same words in their names, or as `<split>-00000-of-00001.parquet`.
    A folder that has both parquet files and images is read as parquet.

    Args:
        source (`str` or `os.PathLike`):
            A folder of images, a folder of parquet files, a `.parquet` file, a `.zip` of images, or a dataset name on
            the Hub. What exists locally comes first.
        split (`str`, *optional*, defaults to `"train"`):
            The split to load.
        image_column (`str`, *optional*):
            The column that holds the images. By default the first `datasets.Image` column, or else the first with
            image bytes, as a struct or as plain binary.
        cache_dir (`str` or `os.PathLike`, *optional*):
            Where `datasets` keeps what it prepares; its own default when `None`. Image folders are read in place.
        max_images (`int`, *optional*):
            Keep only this many images, the first ones.

    Returns:
        `datasets.Dataset`: one column, `"image"`, of `{"bytes", "path"}` dictionaries.

    Raises:
        FileNotFoundError: the source does not exist, or the Hub could not provide it.
        ValueError: no images, no such split or column, an unreadable archive, or `max_images` below 1.
    """
    if max_images is not None and max_images < 1:
        raise ValueError(f"max_images is {max_images}; give at least 1, or None for all images.")
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        dataset = _load_folder(path, split, cache_dir)
    elif path.suffix.lower() == ".zip" and path.is_file():
        dataset = _load_zip(path, split, cache_dir)
    elif path.suffix.lower() == ".parquet" and path.is_file():
        dataset = _load_parquet(path.parent, [path.name], split, cache_dir)
    elif path.is_file():
        raise ValueError(f"'{source}' is a single '{path.suffix}' file; give {EXPECTED}.")
    elif _looks_like_path(str(source)):
        raise FileNotFoundError(f"'{source}' does not exist; give {EXPECTED}.")
    else:
        dataset = _load_hub(str(source), split, cache_dir)

    column = _find_image_column(dataset.features, image_column, source)
    dataset = dataset.select_columns(column)
    if column != "image":
        dataset = dataset.rename_column(column, "image")
    dataset = dataset.cast_column("image", datasets.Image(decode=False))
    if len(dataset) == 0:
        raise ValueError(f"split '{split}' of '{source}' has no rows; give a split with at least one image.")
    return dataset if max_images is None else dataset.select(range(min(max_images, len(dataset))))


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


def _looks_like_path(source: str) -> bool:
    # A Hub name is "name" or "user/name"; anything of another form can only be a path.
    is_hub_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", source)
    return not is_hub_name or source.lower().endswith((".zip", ".parquet"))


def _load_folder(folder: Path, split: str, cache_dir) -> datasets.Dataset:
    names = sorted(_walk(folder))
    parquet = [name for name in names if name.lower().endswith(".parquet") and Path(name).name != "metadata.parquet"]
    if parquet:
        return _load_parquet(folder, parquet, split, cache_dir)
    names = _choose_split(folder, _only_images(folder, names), split, _split_of_image)
    paths = [str((folder / name).absolute()) for name in names]
    return datasets.Dataset.from_dict({"image": paths}, features=datasets.Features({"image": datasets.Image()}))


def _load_zip(archive: Path, split: str, cache_dir) -> datasets.Dataset:
    try:
        with zipfile.ZipFile(archive) as file:
            names = [info.filename for info in file.infolist() if not info.is_dir()]
    except zipfile.BadZipFile as error:
        raise ValueError(f"'{archive}' is not a valid zip file ({error}); create it again.") from error
    names = sorted(name for name in names if not any(_is_hidden(part) for part in name.split("/")))
    names = _choose_split(archive, _only_images(archive, names), split, _split_of_image)
    status = archive.stat()
    # The stamp enters the fingerprint of the cached copy, so that a changed archive is read again.
    arguments = {"archive": str(archive.resolve()), "names": names, "stamp": (status.st_mtime_ns, status.st_size)}
    # Plain binary and string: encoding as `datasets.Image` would prefer a local file that bears a member's name.
    features = datasets.Features({"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})
    cache_dir = None if cache_dir is None else str(cache_dir)
    return datasets.Dataset.from_generator(_zip_rows, features=features, cache_dir=cache_dir, gen_kwargs=arguments)


def _zip_rows(archive: str, names: list[str], stamp: tuple[int, int]) -> Iterator[dict]:
    with zipfile.ZipFile(archive) as file:
        for name in names:
            try:
                data = file.read(name)
            except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError):
                data = b""  # a damaged or encrypted member is one unreadable image, not the end of the archive
            yield {"image": {"bytes": data, "path": name}}


def _load_parquet(folder: Path, names: list[str], split: str, cache_dir) -> datasets.Dataset:
    names = _choose_split(folder, names, split, _split_of_parquet)
    files = [glob.escape(str((folder / name).resolve())) for name in names]  # `datasets` takes each for a pattern
    try:
        return datasets.load_dataset("parquet", data_files={split: files}, split=split, cache_dir=cache_dir)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:  # ArrowInvalid is a ValueError
        if "corresponds to no data" in str(error):
            raise ValueError(f"split '{split}' of '{folder}' has no rows; give one with images.") from error
        reason = error.__cause__ or error
        raise ValueError(f"parquet files in '{folder}' cannot be read ({reason}); repair them.") from error


def _load_hub(name: str, split: str, cache_dir) -> datasets.Dataset:
    try:
        return datasets.load_dataset(name, split=split, cache_dir=cache_dir)
    except ValueError as error:  # an unknown split or a missing configuration: the message lists the choices
        raise ValueError(f"dataset '{name}' with split '{split}' cannot be loaded: {error}") from error
    except Exception as error:  # whatever the network, the Hub or a proxy may raise
        raise FileNotFoundError(
            f"'{name}' is neither a local folder nor a dataset that the Hub could provide "
            f"({type(error).__name__}: {error}); check the path, or the name and the network."
        ) from error


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))  # "__MACOSX", "__pycache__"


def _walk(folder: Path) -> Iterator[str]:
    seen = set()
    for root, directories, files in os.walk(folder, followlinks=True):
        if os.path.realpath(root) in seen:  # a link that leads back up
            directories.clear()
            continue
        seen.add(os.path.realpath(root))
        directories[:] = sorted(name for name in directories if not _is_hidden(name))
        yield from (os.path.relpath(os.path.join(root, name), folder) for name in files if not _is_hidden(name))


def _only_images(source: Path, names: list[str]) -> list[str]:
    images = [name for name in names if os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS]
    if images:
        return images
    kind = "folder" if source.is_dir() else "zip"
    if not names:
        raise ValueError(f"{kind} '{source}' is empty; expected images such as .png or .jpg in it.")
    found = ", ".join(sorted({os.path.splitext(name)[1].lower() or "no extension" for name in names})[:8])
    raise ValueError(f"{kind} '{source}' has no images (found: {found}); expected files such as .png or .jpg in it.")


def _split_of_image(name: str) -> str | None:
    words = [part.lower() for part in Path(name).parts[:-1]]
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)


def _split_of_parquet(name: str) -> str | None:
    shard = SHARD_NAME.match(Path(name).name)
    if shard:
        return shard[1]
    words = re.split(r"[-._ /\\0-9]+", name.lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)


def _choose_split(source: Path, names: list[str], split: str, split_of: Callable[[str], str | None]) -> list[str]:
    groups: dict[str | None, list[str]] = {}
    for name in names:
        groups.setdefault(split_of(name), []).append(name)
    outside = groups.pop(None, [])
    if outside and len(groups) < 2:  # one folder called "test" among others is a class, not a split
        groups, outside = {"train": names}, []
    if outside:
        logger.warning("%d file(s) of '%s' lie outside its split folders and are left out.", len(outside), source)
    if split not in groups:
        raise ValueError(f"'{source}' has no split '{split}'; available splits: {', '.join(sorted(groups))}.")
    return groups[split]


def _find_image_column(features: datasets.Features, wanted: str | None, source) -> str:
    listing = ", ".join(features) or "none"
    if wanted is not None:
        if wanted not in features:
            raise ValueError(f"'{source}' has no column '{wanted}'; available columns: {listing}.")
        if _image_rank(features[wanted]) is None and getattr(features[wanted], "dtype", None) != "string":
            raise ValueError(f"column '{wanted}' of '{source}' holds no images; available columns: {listing}.")
        return wanted
    ranks = {name: _image_rank(feature) for name, feature in features.items()}
    columns = [name for name in features if ranks[name] is not None]
    if not columns:
        raise ValueError(f"'{source}' has no image column; choose one with image_column from: {listing}.")
    return min(columns, key=ranks.get)  # the first of those with the best rank


def _image_rank(feature) -> int | None:
    if isinstance(feature, datasets.Image):
        return 0
    if isinstance(feature, dict) and "bytes" in feature:
        return 1
    return 2 if getattr(feature, "dtype", None) in ("binary", "large_binary") else None

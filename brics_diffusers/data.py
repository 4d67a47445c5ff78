"""Image collections from the Hub, folders, parquet or zip archives, read as square RGB images in [-1, 1]."""

import glob
import io
import logging
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import datasets
import fsspec
import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader


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
EXPECTED = "a folder of images, a folder of parquet files, a zip of images or the name of a dataset on the Hub"


class UnreadableImageError(ValueError):
    """An image that cannot be turned into 8-bit RGB: truncated, not an image, too large or of no known range."""


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
    path = Path(source).expanduser()
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
    return datasets.Dataset.from_dict({"image": [str(folder / name) for name in names]})


def _load_zip(archive: Path, split: str, cache_dir) -> datasets.Dataset:
    try:
        with zipfile.ZipFile(archive) as file:
            names = [info.filename for info in file.infolist() if not info.is_dir()]
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"'{archive}' is not a valid zip file ({error}); create it again or give a folder."
        ) from error
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
    except datasets.exceptions.DatasetGenerationError as error:
        reason = error.__cause__ or error
        raise ValueError(
            f"the parquet files in '{folder}' cannot be read ({reason}); repair or remove them."
        ) from error


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
    for root, directories, files in os.walk(folder, followlinks=True):
        directories[:] = [name for name in directories if not _is_hidden(name)]
        for name in files:
            if not _is_hidden(name):
                yield os.path.relpath(os.path.join(root, name), folder)


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
        logger.warning("%d files of '%s' lie outside its split folders and are left out.", len(outside), source)
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


def read_image(data: dict | str | os.PathLike) -> Image.Image:
    r"""
    Read an image as 8-bit RGB, upright by its EXIF orientation.

    Transparency is composited on white, 16-bit values are divided by 257, floats in [0, 1] are multiplied by 255, of
    an animation the first frame is taken. Colour profiles are not applied.

    Args:
        data (`dict`, `str` or `os.PathLike`):
            A `{"bytes", "path"}` dictionary, where `bytes` comes first if present, or a path.

    Returns:
        `PIL.Image.Image`: mode "RGB".

    Raises:
        UnreadableImageError: missing, truncated, not an image, a decompression bomb or of no known range.
    """
    try:
        with Image.open(_image_file(data)) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, struct.error and more on bad files
        raise UnreadableImageError(f"not readable as an image: {error}") from error


def _image_file(data: dict | str | os.PathLike) -> str | os.PathLike | io.BytesIO:
    if not isinstance(data, dict):
        data = {"path": data}
    if data.get("bytes") is not None:
        return io.BytesIO(data["bytes"])
    path = data.get("path")
    if path is None:
        raise ValueError("neither bytes nor a path")
    if "://" not in str(path):
        return path
    with fsspec.open(str(path), "rb") as file:  # "zip://a.png::archive.zip", as some Hub datasets have it
        return io.BytesIO(file.read())


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_to_uint8(np.asarray(image))).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _to_uint8(values: np.ndarray) -> np.ndarray:
    # values (H, W): 16-bit gray, in modes "I;16" and "I", or float
    top = 1.0 if values.dtype.kind == "f" else 65535
    if not (values.min() >= 0 and values.max() <= top):  # also false for NaN
        raise ValueError(f"values in [{values.min()}, {values.max()}], expected [0, {top}]")
    return np.rint(values * (255 / top)).astype(np.uint8)


def center_crop_resize(image: Image.Image, resolution: int) -> Image.Image:
    r"""
    Cut the largest centered square and resize it with Pillow's Lanczos filter, antialiased when it shrinks.

    Args:
        image (`PIL.Image.Image`): the image, of any size.
        resolution (`int`): the side R of the result in pixels.

    Returns:
        `PIL.Image.Image`: R x R pixels; the very pixels of `image` where it already has this size.
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return image if side == resolution else image.resize((resolution, resolution), Image.Resampling.LANCZOS)


class ImageCollection(torch.utils.data.Dataset):
    r"""
    The rows of [`load_collection`] as square tensors.

    An item is a dictionary of `pixel_values`, float32 `(3, R, R)` in [-1, 1], or `None` for an unreadable image;
    `index` (`int`), the row that was read; and `unreadable` (`list[str]`), the unreadable images met on the way, each
    by its path or as "row 17"; and `resolution` (`int`), R.

    Args:
        dataset (`datasets.Dataset`):
            The result of [`load_collection`].
        resolution (`int`):
            The side R in pixels.
        random_flip (`bool`, *optional*, defaults to `False`):
            Mirror half of the images, drawn from torch's default generator, which `DataLoader` seeds in its workers.
        replace_unreadable (`bool`, *optional*, defaults to `False`):
            Let the next readable row take the place of an unreadable one, so that batches keep their size.

    Raises:
        ValueError: on reading, if images are to be replaced and none of the collection is readable.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        resolution: int,
        random_flip: bool = False,
        replace_unreadable: bool = False,
    ):
        if resolution < 1:
            raise ValueError(f"resolution is {resolution}; give a positive number of pixels.")
        self.dataset = dataset
        self.resolution = resolution
        self.random_flip = random_flip
        self.replace_unreadable = replace_unreadable

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a collection of {len(self)} images")
        unreadable = []
        for row in range(index, index + (len(self) if self.replace_unreadable else 1)):
            row %= len(self)
            data = self.dataset[row]["image"]
            try:
                image = read_image(data)
            except UnreadableImageError:
                unreadable.append(_image_name(data, row))
                continue
            return self._item(self._to_tensor(image), row, unreadable)
        if self.replace_unreadable:
            raise _none_readable(unreadable)
        return self._item(None, index, unreadable)

    def _item(self, pixel_values: torch.Tensor | None, row: int, unreadable: list[str]) -> dict:
        # The resolution lets `collate_images` shape a batch without images.
        return {
            "pixel_values": pixel_values,
            "index": row,
            "unreadable": unreadable,
            "resolution": self.resolution,
        }

    def _to_tensor(self, image: Image.Image) -> torch.Tensor:
        image = center_crop_resize(image, self.resolution)
        if self.random_flip and torch.rand(()) < 0.5:
            image = ImageOps.mirror(image)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (R, R, 3) -> (3, R, R)
        return pixels.contiguous().float() / 127.5 - 1.0


def _image_name(data: dict | None, row: int) -> str:
    path = (data or {}).get("path")
    if path is None:
        return f"row {row}"
    # Files within an archive may share their names, so these carry their row too.
    return path if data.get("bytes") is None else f"{path} (row {row})"


def _none_readable(names: list[str]) -> ValueError:
    return ValueError(f"none of the {len(names)} images is readable ({_shorten(names)}); give a collection of images.")


def _shorten(names: Iterable[str], limit: int = 10) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def collate_images(items: list[dict]) -> dict:
    r"""
    Stack the readable items of an [`ImageCollection`].

    Args:
        items (`list[dict]`): at least one item; those whose `pixel_values` are `None` are dropped.

    Returns:
        `dict`: `pixel_values` `(B, 3, R, R)`, `index` int64 `(B,)` and `unreadable` (`list[str]`). B is the number of
        readable items and may be 0.
    """
    readable = [item for item in items if item["pixel_values"] is not None]
    size = items[0]["resolution"]
    images = [item["pixel_values"] for item in readable]
    return {
        "pixel_values": torch.stack(images) if images else torch.empty(0, 3, size, size),
        "index": torch.tensor([item["index"] for item in readable], dtype=torch.int64),
        "unreadable": [name for item in items for name in item["unreadable"]],
    }


class UnreadableLog:
    r"""Warns of each unreadable image once, however many epochs meet it, and counts them (`count`)."""

    def __init__(self):
        self._names: dict[str, None] = {}  # in the order met

    @property
    def count(self) -> int:
        return len(self._names)

    def add(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._names:
                self._names[name] = None
                logger.warning("%s is not readable as an image and is skipped.", name)

    def summary(self) -> str:
        r"""One phrase such as "skipped 2 unreadable files: a.jpg, b.png"; at most ten names are spelled out."""
        files = "file" if self.count == 1 else "files"
        return f"skipped {self.count} unreadable {files}" + (f": {_shorten(self._names)}" if self._names else "")


class _ImageLoader(DataLoader):
    def __iter__(self) -> Iterator[dict]:
        read, unreadable = 0, []
        for batch in super().__iter__():
            read += len(batch["index"])
            if read == 0:
                unreadable += batch["unreadable"]
            yield batch
        if read == 0 and unreadable:
            raise _none_readable(unreadable)


def image_loader(
    dataset: datasets.Dataset,
    resolution: int,
    batch_size: int,
    *,
    shuffle: bool = False,
    random_flip: bool = False,
    replace_unreadable: bool = False,
    num_workers: int = 0,
    drop_last: bool = False,
    generator: torch.Generator | None = None,
) -> DataLoader:
    r"""
    Batches of [`collate_images`] from the rows of [`load_collection`], for training, encoding and evaluation.

    Args:
        dataset (`datasets.Dataset`):
            The result of [`load_collection`].
        resolution (`int`):
            The side R of the images in pixels.
        batch_size (`int`):
            Rows in a batch. Without `replace_unreadable` a batch is smaller by its unreadable images.
        shuffle, num_workers, drop_last, generator:
            As in [`torch.utils.data.DataLoader`]. `generator` orders the rows and seeds the workers; without workers,
            flips are drawn from torch's default generator.
        random_flip, replace_unreadable:
            As in [`ImageCollection`].

    Returns:
        `torch.utils.data.DataLoader`: at the end of a pass that met no readable image it raises a `ValueError`.

    Raises:
        ValueError: `drop_last` would leave no batch at all.
    """
    if drop_last and len(dataset) < batch_size:
        raise ValueError(
            f"{len(dataset)} images do not fill one batch of {batch_size}; lower batch_size or set drop_last=False."
        )
    return _ImageLoader(
        ImageCollection(dataset, resolution, random_flip, replace_unreadable),
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=num_workers,
        drop_last=drop_last,
        generator=generator,
        collate_fn=collate_images,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
    )

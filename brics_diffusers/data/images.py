"""Images of a collection as square tensors in [-1, 1], and the loaders that serve training and evaluation."""

import io
import logging
import os
import signal
import threading
from collections.abc import Iterable, Iterator

import datasets
import fsspec
import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from .image_modes import to_rgb


logger = logging.getLogger(__name__)


class UnreadableImageError(ValueError):
    """An image that cannot be turned into 8-bit RGB: truncated, not an image, too large or of no known range."""


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
            return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, struct.error and more on bad files
        raise UnreadableImageError(f"not readable as an image: {error}") from error


def image_size(data: dict | str | os.PathLike) -> tuple[int, int]:
    r"""
    Width and height as the file's header has them, without decoding the image.

    Args:
        data (`dict`, `str` or `os.PathLike`): As in [`read_image`].

    Returns:
        `tuple[int, int]`: pixels.

    Raises:
        UnreadableImageError: missing, or not an image. A truncated image shows only when it is read.
    """
    try:
        with Image.open(_image_file(data)) as image:
            return image.size
    except Exception as error:
        raise UnreadableImageError(f"not readable as an image: {error}") from error


def image_name(data: dict | None, row: int) -> str:
    r"""
    What to call an image: its path, or `"row 17"`; with the row too for files within an archive, which may share
    names.

    Args:
        data (`dict`): A `{"bytes", "path"}` dictionary.
        row (`int`): Its row in the collection.
    """
    path = (data or {}).get("path")
    if path is None:
        return f"row {row}"
    return path if data.get("bytes") is None else f"{path} (row {row})"


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
    `index` (`int`), the row that was read; `unreadable` (`list[str]`), the unreadable images met on the way, each
    by its path or as "row 17"; and `resolution` (`int`), R.

    Args:
        dataset (`datasets.Dataset`):
            The result of [`load_collection`].
        resolution (`int`):
            The side R in pixels.
        random_flip (`bool`, *optional*, defaults to `False`):
            Append the mirror image of every row: items `n` to `2n - 1`. Which images are mirrored then depends on the
            order of the items alone, whatever the workers' random states.
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
        return len(self.dataset) * (2 if self.random_flip else 1)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of a collection of {len(self)} images")
        num_rows = len(self.dataset)
        mirror, index = divmod(index, num_rows)
        unreadable = []
        for row in range(index, index + (num_rows if self.replace_unreadable else 1)):
            row %= num_rows
            data = self.dataset[row]["image"]
            try:
                image = read_image(data)
            except UnreadableImageError:
                unreadable.append(image_name(data, row))
                continue
            return self._item(self._to_tensor(image, bool(mirror)), row, unreadable)
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

    def _to_tensor(self, image: Image.Image, mirror: bool) -> torch.Tensor:
        image = center_crop_resize(image, self.resolution)
        if mirror:
            image = ImageOps.mirror(image)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (R, R, 3) -> (3, R, R)
        return pixels.contiguous().float() / 127.5 - 1.0


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
    def names(self) -> list[str]:
        """The unreadable images in the order met."""
        return list(self._names)

    @property
    def count(self) -> int:
        """Number of different unreadable images."""
        return len(self._names)

    def add(self, names: Iterable[str]) -> None:
        """Notes names, and warns of those that are new."""
        for name in names:
            if name not in self._names:
                self._names[name] = None
                logger.warning("%s is not readable as an image and is skipped.", name)

    def summary(self) -> str:
        r"""One phrase such as "skipped 2 unreadable files: a.jpg, b.png"; at most ten names are spelled out."""
        files = "file" if self.count == 1 else "files"
        return f"skipped {self.count} unreadable {files}" + (f": {_shorten(self._names)}" if self._names else "")


class InfiniteBatchSampler(torch.utils.data.Sampler):
    r"""
    Batches of indices without end: one shuffled pass over the collection after the other.

    Everything follows from the seed and the number of the batch. A run resumes at `start` without reading what lies
    before, and `num_processes` processes with batches of B see together what one process with batches of
    `num_processes * B` sees.

    Args:
        num_items (`int`): Size of the collection.
        batch_size (`int`): Items in a batch of one process.
        seed (`int`, *optional*, defaults to 0): Seed of the order.
        start (`int`, *optional*, defaults to 0): Batches of each process to pass over.
        process_index (`int`, *optional*, defaults to 0): Rank of this process.
        num_processes (`int`, *optional*, defaults to 1): Number of processes.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        seed: int = 0,
        start: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        self.num_items = num_items
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.process_index = process_index
        self.num_processes = num_processes

    def __iter__(self) -> Iterator[list[int]]:
        position = (self.start * self.num_processes + self.process_index) * self.batch_size
        epoch, order = None, None
        while True:
            batch = []
            for offset in range(position, position + self.batch_size):
                if offset // self.num_items != epoch:
                    epoch = offset // self.num_items
                    order = np.random.default_rng((self.seed, epoch)).permutation(self.num_items)
                batch.append(int(order[offset % self.num_items]))
            yield batch
            position += self.num_processes * self.batch_size


def _only_the_parent_terminates(_):
    # Clusters send SIGTERM to every process of a job, and workers have to live until the loop has saved.
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def watch():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def training_loader(
    dataset: torch.utils.data.Dataset,
    batch_size: int,
    seed: int = 0,
    start: int = 0,
    process_index: int = 0,
    num_processes: int = 1,
    num_workers: int = 0,
    collate_fn=None,
) -> DataLoader:
    r"""
    An endless loader of shuffled training batches of constant size, for one process of several.

    Args:
        dataset (`torch.utils.data.Dataset`): An [`ImageCollection`] or another map-style data set.
        batch_size, seed, start, process_index, num_processes: As in [`InfiniteBatchSampler`].
        num_workers, collate_fn: As in [`torch.utils.data.DataLoader`].

    Returns:
        `torch.utils.data.DataLoader`: batches on the CPU.
    """
    return DataLoader(
        dataset,
        batch_sampler=InfiniteBatchSampler(len(dataset), batch_size, seed, start, process_index, num_processes),
        num_workers=num_workers,
        collate_fn=collate_fn,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_only_the_parent_terminates,
        # A generator of its own: starting the loader must not draw from the one that training noise comes from.
        generator=torch.Generator().manual_seed(seed),
    )


def evaluation_loader(
    dataset: datasets.Dataset,
    resolution: int,
    batch_size: int,
    num_workers: int = 0,
    random_flip: bool = False,
    rows: range | None = None,
) -> DataLoader:
    r"""
    Every readable image once, in order, for evaluation and encoding.

    Args:
        dataset (`datasets.Dataset`): The result of [`load_collection`].
        resolution (`int`): The side R of the images in pixels.
        batch_size (`int`): Images in a batch; smaller by the unreadable ones, which are dropped.
        num_workers (`int`, *optional*, defaults to 0): As in [`torch.utils.data.DataLoader`].
        random_flip (`bool`, *optional*, defaults to `False`): Append the mirror images, as in [`ImageCollection`].
        rows (`range`, *optional*): The items to read; all by default.

    Returns:
        `torch.utils.data.DataLoader`: batches of [`collate_images`].
    """
    collection = ImageCollection(dataset, resolution, random_flip)
    if rows is not None:
        collection = torch.utils.data.Subset(collection, rows)
    return DataLoader(
        collection,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate_images,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_only_the_parent_terminates,
        generator=torch.Generator().manual_seed(0),
    )

"""Images of a collection as tensors of one size in [-1, 1], and the loaders that serve training and evaluation."""

import logging
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ..utils.sizes import height_and_width
from .decoding import UnreadableImageError, image_name, read_image
from .image_modes import check_channels, white_where_transparent
from .resized import ResizedImages


logger = logging.getLogger(__name__)


def center_crop_resize(image: Image.Image, resolution: int | Sequence[int]) -> Image.Image:
    r"""
    Cut the largest centered square, or rectangle of the result's proportions, and resize it with Pillow's Lanczos
    filter, antialiased when it shrinks. Colours of an RGBA image weigh as much as they are opaque.

    Args:
        image (`PIL.Image.Image`): the image, of any size.
        resolution (`int` or a pair): the side of the result, or its height and width, in pixels.

    Returns:
        `PIL.Image.Image`: the very pixels of `image` where it already has this size.
    """
    height, width = height_and_width(resolution)
    if image.width * height >= image.height * width:
        size = max(round(image.height * width / height), 1), image.height
    else:
        size = image.width, max(round(image.width * height / width), 1)
    left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
    image = image.crop((left, top, left + size[0], top + size[1]))
    if size == (width, height):
        return image
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    return white_where_transparent(image) if image.mode == "RGBA" else image


class ImageCollection(torch.utils.data.Dataset):
    r"""
    The rows of [`load_collection`] as tensors of one size.

    An item is a dictionary of `pixel_values`, float32 `(C, H, W)` in [-1, 1], or `None` for an unreadable image;
    `index` (`int`), the row that was read; `unreadable` (`list[str]`), the unreadable images met on the way, each
    by its path or as "row 17"; `reasons` (`dict[str, str]`), why, by these names; and `shape`, (C, H, W).

    Args:
        dataset (`datasets.Dataset`):
            The result of [`load_collection`].
        resolution (`int` or a pair):
            The side of squares, or height and width, in pixels.
        random_flip (`bool`, *optional*, defaults to `False`):
            Append the mirror image of every row: items `n` to `2n - 1`. Which images are mirrored then depends on the
            order of the items alone, whatever the workers' random states.
        replace_unreadable (`bool`, *optional*, defaults to `False`):
            Let the next readable row take the place of an unreadable one, so that batches keep their size.
        resized ([`ResizedImages`], *optional*):
            Where images are kept once they are cut and resized, and looked for before they are read.
        channels (`int`, *optional*, defaults to 3):
            1 for gray, 3 for RGB, 4 for RGB and transparency, as in [`read_image`].

    Raises:
        ValueError: for sizes and channels that no image has; on reading, if images are to be replaced and none of the
            collection is readable.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        resolution: int | Sequence[int],
        random_flip: bool = False,
        replace_unreadable: bool = False,
        resized: ResizedImages | None = None,
        channels: int = 3,
    ):
        check_channels(channels)
        self.dataset = dataset
        self.shape = channels, *height_and_width(resolution, "resolution")
        self.random_flip = random_flip
        self.replace_unreadable = replace_unreadable
        self.resized = resized

    def __len__(self) -> int:
        return len(self.dataset) * (2 if self.random_flip else 1)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of a collection of {len(self)} images")
        num_rows = len(self.dataset)
        mirror, index = divmod(index, num_rows)
        unreadable, reasons = [], {}
        for row in range(index, index + (num_rows if self.replace_unreadable else 1)):
            row %= num_rows
            try:
                pixel_values = to_tensor(self._pixels(row), bool(mirror))
                break
            except UnreadableImageError as error:
                unreadable.append(image_name(self.dataset[row]["image"], row))
                reasons[unreadable[-1]] = error.reason
        else:
            if self.replace_unreadable:
                raise none_readable(reasons)
            pixel_values, row = None, index
        item = {"pixel_values": pixel_values, "index": row, "unreadable": unreadable, "reasons": reasons}
        return item | {"shape": self.shape}  # lets `collate_images` shape a batch without images

    def _pixels(self, row: int) -> np.ndarray:
        pixels = None if self.resized is None else self.resized.get(row)
        if pixels is None:
            pixels = to_pixels(self.dataset[row]["image"], self.shape)
            if self.resized is not None:
                self.resized.put(row, pixels)
        return pixels


def to_pixels(data: dict, shape: tuple[int, int, int]) -> np.ndarray:
    """An image as of [`read_image`], cut and resized to a shape (C, H, W): uint8 (H, W, C)."""
    channels, *size = shape
    return np.array(center_crop_resize(read_image(data, channels), size)).reshape(*size, channels)


def to_tensor(pixels: np.ndarray, mirror: bool) -> torch.Tensor:
    """Pixels (H, W, C), uint8, to float32 (C, H, W) in [-1, 1], mirrored or not."""
    pixels = torch.from_numpy(pixels).permute(2, 0, 1)
    pixels = pixels.flip(-1) if mirror else pixels
    return pixels.contiguous().float() / 127.5 - 1.0


def none_readable(reasons: dict[str, str]) -> ValueError:
    name, reason = next(iter(reasons.items()))
    return ValueError(
        f"none of the {len(reasons)} images is readable ({_shorten(reasons)}; {name}: {reason}); give a collection of "
        "images."
    )


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
        `dict`: `pixel_values` `(B, C, H, W)`, `index` int64 `(B,)`, `unreadable` (`list[str]`) and `reasons`
        (`dict[str, str]`). B is the number of readable items and may be 0.
    """
    readable = [item for item in items if item["pixel_values"] is not None]
    images = [item["pixel_values"] for item in readable]
    return {
        "pixel_values": torch.stack(images) if images else torch.empty(0, *items[0]["shape"]),
        "index": torch.tensor([item["index"] for item in readable], dtype=torch.int64),
        "unreadable": [name for item in items for name in item["unreadable"]],
        "reasons": {name: reason for item in items for name, reason in item["reasons"].items()},
    }


class UnreadableLog:
    r"""Warns of each unreadable image once, however many epochs meet it, and counts them (`count`)."""

    def __init__(self):
        self.reasons: dict[str, str] = {}  # by name, in the order met

    @property
    def names(self) -> list[str]:
        """The unreadable images in the order met."""
        return list(self.reasons)

    @property
    def count(self) -> int:
        """Number of different unreadable images."""
        return len(self.reasons)

    def add(self, names: Iterable[str], reasons: Mapping[str, str] | None = None) -> None:
        """Notes names, and warns of those that are new with their reasons, where those are known."""
        for name in names:
            if name not in self.reasons:
                self.reasons[name] = (reasons or {}).get(name, "")
                why = f" ({self.reasons[name]})" if self.reasons[name] else ""
                logger.warning("%s is not readable as an image%s and is skipped.", name, why)

    def summary(self) -> str:
        r"""One phrase such as "skipped 2 unreadable files: a.jpg, b.png"; at most ten names are spelled out."""
        files = "file" if self.count == 1 else "files"
        return f"skipped {self.count} unreadable {files}" + (f": {_shorten(self.reasons)}" if self.reasons else "")


def balanced_order(labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    r"""
    Items of a pass in which all classes are equally frequent, and of a class all items nearly so.

    Args:
        labels (`np.ndarray` of shape (N,)): The class of each item.
        random (`np.random.Generator`): Source of the order.

    Returns:
        `np.ndarray` of shape (N,): indices; some occur several times, others not at all.
    """
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    share = -(-len(labels) // len(classes))
    drawn = []
    for members in classes:
        passes = [random.permutation(members) for _ in range(-(-share // len(members)))]
        drawn.append(np.concatenate(passes)[:share])
    return random.permutation(np.concatenate(drawn))[: len(labels)]


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
        balance (`np.ndarray` of shape (N,), *optional*): Labels of the items, to draw all classes equally often.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        seed: int = 0,
        start: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
        balance: np.ndarray | None = None,
    ):
        self.num_items = num_items
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.process_index = process_index
        self.num_processes = num_processes
        self.balance = balance

    def __iter__(self) -> Iterator[list[int]]:
        position = (self.start * self.num_processes + self.process_index) * self.batch_size
        epoch, order = None, None
        while True:
            batch = []
            for offset in range(position, position + self.batch_size):
                if offset // self.num_items != epoch:
                    epoch = offset // self.num_items
                    order = self._order(np.random.default_rng((self.seed, epoch)))
                batch.append(int(order[offset % self.num_items]))
            yield batch
            position += self.num_processes * self.batch_size

    def _order(self, random: np.random.Generator) -> np.ndarray:
        return random.permutation(self.num_items) if self.balance is None else balanced_order(self.balance, random)


def only_the_parent_terminates(_):
    """For a worker: of SIGTERM, only that of the process that it works for ends it."""
    if not hasattr(signal, "sigwaitinfo"):  # on Windows and macOS
        return
    # Clusters send SIGTERM to every process of a job, and workers have to live until the loop has saved.
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def watch():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


class Loader(DataLoader):
    """
    A [`torch.utils.data.DataLoader`] whose workers keep to [`only_the_parent_terminates`] from their first moment:
    torch starts threads in them before that is called, and one thread that lets SIGTERM in ends its process.
    """

    def __init__(self, dataset, **options):
        pin_memory = torch.cuda.is_available()
        super().__init__(dataset, pin_memory=pin_memory, worker_init_fn=only_the_parent_terminates, **options)

    def __iter__(self):
        if not self.num_workers or not hasattr(signal, "sigwaitinfo"):
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # which workers inherit
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def training_loader(
    dataset: torch.utils.data.Dataset,
    batch_size: int,
    seed: int = 0,
    start: int = 0,
    process_index: int = 0,
    num_processes: int = 1,
    num_workers: int = 0,
    collate_fn=None,
    balance: np.ndarray | None = None,
) -> DataLoader:
    r"""
    An endless loader of shuffled training batches of constant size, for one process of several.

    Args:
        dataset (`torch.utils.data.Dataset`): An [`ImageCollection`] or another map-style data set.
        batch_size, seed, start, process_index, num_processes, balance: As in [`InfiniteBatchSampler`].
        num_workers, collate_fn: As in [`torch.utils.data.DataLoader`].

    Returns:
        `torch.utils.data.DataLoader`: batches on the CPU.
    """
    return Loader(
        dataset,
        batch_sampler=InfiniteBatchSampler(
            len(dataset), batch_size, seed, start, process_index, num_processes, balance
        ),
        num_workers=num_workers,
        collate_fn=collate_fn,
        # A generator of its own: starting the loader must not draw from the one that training noise comes from.
        generator=torch.Generator().manual_seed(seed),
    )


def evaluation_loader(
    dataset: datasets.Dataset,
    resolution: int | Sequence[int],
    batch_size: int,
    num_workers: int = 0,
    random_flip: bool = False,
    rows: range | None = None,
    channels: int = 3,
) -> DataLoader:
    r"""
    Every readable image once, in order, for evaluation and encoding.

    Args:
        dataset (`datasets.Dataset`): The result of [`load_collection`].
        resolution (`int` or a pair): The side of the images, or height and width, in pixels.
        batch_size (`int`): Images in a batch; smaller by the unreadable ones, which are dropped.
        num_workers (`int`, *optional*, defaults to 0): As in [`torch.utils.data.DataLoader`].
        random_flip (`bool`, *optional*, defaults to `False`): Append the mirror images, as in [`ImageCollection`].
        rows (`range`, *optional*): The items to read; all by default.
        channels (`int`, *optional*, defaults to 3): As in [`ImageCollection`].

    Returns:
        `torch.utils.data.DataLoader`: batches of [`collate_images`].
    """
    collection = ImageCollection(dataset, resolution, random_flip, channels=channels)
    if rows is not None:
        collection = torch.utils.data.Subset(collection, rows)
    return Loader(
        collection,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate_images,
        generator=torch.Generator().manual_seed(0),
    )

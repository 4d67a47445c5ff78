"""Collections that are read as a stream of shards, from the Hub or from this machine, without being kept on disk.

The order follows from the seed, the epoch and the lane: processes and their workers are lanes, which share the shards
of each epoch anew. A lane permutes its examples block by block, and no block reaches into the next epoch. So where a
lane stands is an epoch, a place among its shards where a block begins, and how much of that block was used: a resumed
run reads that block again and goes on with the rest of it.
"""

import collections
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, get_worker_info

from ..utils.sizes import height_and_width
from .collection import find_image_column, load_collection, load_folder, looks_like_path
from .decoding import UnreadableImageError
from .files import IMAGE_EXTENSIONS, extension, list_files
from .images import Loader, UnreadableLog, collate_images, none_readable, to_pixels, to_tensor
from .repositories import is_saved, load_hub


logger = logging.getLogger(__name__)

SHARDED = {".tar", ".parquet", ".arrow"}
LOCAL_SHARDS = 64  # of a folder of images, which has random access: so many lanes read none twice
TENTH = 10  # of a stream's images one may be held out
BLOCK = 1000  # examples that are permuted together, datasets' own default; files of these many images are in memory
# Where a lane begins: epoch, shard's place among the lane's, example of that shard, examples of the block used.
START = (0, 0, 0, 0)


def load_stream(
    source: str | os.PathLike,
    split: str = "train",
    image_column: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    config_name: str | None = None,
) -> datasets.IterableDataset:
    r"""
    One split of a collection that is read as a stream.

    Args:
        source (`str` or `os.PathLike`):
            A dataset's name on the Hub, or a folder of tars or of parquet or Arrow files, each a shard; or any other
            that [`load_collection`] reads.
        split, image_column, cache_dir, config_name: As in [`load_collection`].

    Returns:
        `datasets.IterableDataset`: one column, `"image"`, of `{"bytes", "path"}` dictionaries.

    Raises:
        FileNotFoundError: As [`load_collection`].
        ValueError: As [`load_collection`].
    """
    path = Path(os.path.expanduser(source))
    if path.is_dir() and not is_saved(path) and _is_sharded({extension(name) for name in list_files(path)}):
        stream = load_folder(path, split, config_name, cache_dir, streaming=True)
    elif path.exists() or looks_like_path(str(source)):
        dataset = load_collection(source, split, image_column, cache_dir, config_name=config_name)
        return dataset.to_iterable_dataset(min(LOCAL_SHARDS, len(dataset)))
    else:
        stream = load_hub(str(source), split, config_name, cache_dir, streaming=True)
    column = find_image_column(stream.features, image_column, source)
    stream = stream.cast_column(column, datasets.Image(decode=False))  # before it is renamed, which would decode it
    stream = stream.select_columns(column)
    return stream if column == "image" else stream.rename_column(column, "image")


def _is_sharded(extensions: set[str]) -> bool:
    """Whether a folder's files are shards; those beside images are their metadata."""
    return bool(SHARDED & extensions) and not IMAGE_EXTENSIONS & extensions


def read_shard(stream: datasets.IterableDataset, shard: int, part: int = 0, parts: int = 1) -> Iterator[dict]:
    """The images of every `parts`-th example of a shard, from the `part`-th on."""
    rows = stream.shard(num_shards=stream.num_shards, index=shard).iter(1)  # `iter` knows nothing of workers
    return (row["image"][0] for row in itertools.islice(rows, part, None, parts))


def first_images(stream: datasets.IterableDataset, count: int) -> datasets.Dataset:
    """The first images of a stream, in memory, as [`load_collection`] gives them."""
    return _in_memory((read_shard(stream, shard) for shard in range(stream.num_shards)), count)


def split_stream(
    stream: datasets.IterableDataset, count: int
) -> tuple[datasets.IterableDataset, datasets.Dataset | None]:
    r"""
    Holds images out of a stream whose length nobody knows: each shard gives up every tenth of its images until it has
    given its share.

    Args:
        stream (`datasets.IterableDataset`): The result of [`load_stream`].
        count (`int`): Images to hold out at most.

    Returns:
        `tuple`: the stream without the shares, and what was held out, in memory as [`load_collection`] gives it, or
        `None` if no shard has ten images. The same ones in each call; with more shards than `count`, one of each
        shard is left out of the stream.
    """
    stop = TENTH * -(-count // stream.num_shards)  # example of a shard before which its share lies
    shares = (
        itertools.islice(read_shard(stream, shard), TENTH - 1, stop, TENTH) for shard in range(stream.num_shards)
    )
    held_out = _in_memory(shares, count)
    if len(held_out) == 0:
        return stream, None
    return stream.filter(partial(_is_kept, stop=stop), with_indices=True), held_out


def _is_kept(example: dict, index: int, stop: int) -> bool:
    """Of the `index`-th example of a shard."""
    return index >= stop or index % TENTH != TENTH - 1


def _in_memory(shards: Iterator[Iterator[dict]], count: int) -> datasets.Dataset:
    images = list(itertools.islice(itertools.chain.from_iterable(shards), count))
    features = datasets.Features({"image": datasets.Image(decode=False)})
    return datasets.Dataset.from_dict({"image": images}, features)


class StreamPosition:
    r"""
    Where the lanes of a run stand in a stream; register it for checkpointing.

    Args:
        process_index (`int`): Rank of this process.
        num_processes (`int`): Number of processes.
        num_workers (`int`): Workers of each process's loader.
    """

    def __init__(self, process_index: int, num_processes: int, num_workers: int):
        self.process_index, self.num_processes = process_index, num_processes
        self.workers = max(num_workers, 1)
        self.batches = 0  # of each process
        own = range(process_index * self.workers, (process_index + 1) * self.workers)
        self.lanes = dict.fromkeys(own, START)

    @property
    def num_lanes(self) -> int:
        """Of all processes."""
        return self.workers * self.num_processes

    def lane(self, worker: int) -> int:
        """The lane of a worker of a new loader, whose first worker gives the first batch."""
        return self.process_index * self.workers + (self.batches + worker) % self.workers

    def add(self, batch: dict) -> None:
        """Notes a batch of the loader as used."""
        lane, position = batch["position"]
        self.lanes[lane] = position
        self.batches += 1

    def state_dict(self) -> dict:
        """Of all lanes; call on every process."""
        lanes = {lane: position for share in gather_object([self.lanes]) for lane, position in share.items()}
        return {"lanes": lanes, "num_processes": self.num_processes, "batches": self.batches}

    def load_state_dict(self, state: dict) -> None:
        """Goes on where the lanes stood; other lanes, of other processes or workers, begin with the next epoch."""
        before = state["lanes"]
        if (len(before), state["num_processes"]) == (self.num_lanes, self.num_processes):
            self.batches = state["batches"]
            self.lanes = {lane: tuple(before[lane]) for lane in self.lanes}
            return
        epoch = max(position[0] for position in before.values()) + 1
        self.lanes = dict.fromkeys(self.lanes, (epoch, 0, 0, 0))
        text = "The stream was read by %d processes, %d workers in all, and now by %d, %d: it goes on with epoch %d."
        logger.warning(text, state["num_processes"], len(before), self.num_processes, self.num_lanes, epoch)


class StreamedImages(torch.utils.data.IterableDataset):
    r"""
    Endless batches of a stream's images, for one process.

    Images that can't be read have their places taken by the next of the lane that can. A batch is what
    `collate_images` makes, and `"position"`, which [`StreamPosition.add`] takes.

    Args:
        stream (`datasets.IterableDataset`): The result of [`load_stream`].
        resolution (`int` or a pair): The side of squares, or height and width, in pixels.
        batch_size (`int`): Images in a batch.
        position ([`StreamPosition`]): Where to begin.
        seed (`int`, *optional*, defaults to 0): Seed of the order.
        random_flip (`bool`, *optional*, defaults to `False`): Mirror each image with a probability of a half.
        channels (`int`, *optional*, defaults to 3): As in [`ImageCollection`].
        block (`int`, *optional*, defaults to 1000): Examples that are permuted together.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        resolution: int | Sequence[int],
        batch_size: int,
        position: StreamPosition,
        seed: int = 0,
        random_flip: bool = False,
        channels: int = 3,
        block: int = BLOCK,
    ):
        self.stream, self.batch_size, self.position = stream, batch_size, position
        self.shape = channels, *height_and_width(resolution, "resolution")
        self.seed, self.random_flip, self.block = seed, random_flip, block
        # With more lanes than shards, several read a shard and take every so-many-th example of it.
        self.parts = -(-position.num_lanes // stream.num_shards)
        if self.parts > 1 and position.process_index == 0:
            text = (
                "%d shards have %d readers, so each is read %d times; fewer --dataloader_num_workers would save that."
            )
            logger.warning(text, stream.num_shards, position.num_lanes, self.parts)

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        lane = self.position.lane(0 if info is None else info.id)
        examples, ahead = self._examples(lane, self.position.lanes[lane]), collections.deque()
        while True:
            items = []
            for _ in range(self.batch_size):
                if not ahead:
                    ahead.append(self._item(*next(examples)))
                item = ahead.popleft()
                position = item.pop("position")
                reasons = item["reasons"]
                while item["pixel_values"] is None and all(other["pixel_values"] is None for other in ahead):
                    ahead.append(self._item(*next(examples)))
                    if len(ahead) > self.block and ahead[-1]["pixel_values"] is None:
                        raise none_readable(reasons | {k: v for other in ahead for k, v in other["reasons"].items()})
                if item["pixel_values"] is None:
                    item["pixel_values"] = next(x["pixel_values"] for x in ahead if x["pixel_values"] is not None)
                items.append(item)
            yield collate_images(items) | {"position": (lane, position)}

    def _item(self, image: dict, name: str, mirror: bool, position: tuple) -> dict:
        item = {"index": -1, "unreadable": [], "reasons": {}, "shape": self.shape, "position": position}
        try:
            pixels = to_pixels(image, self.shape)
        except UnreadableImageError as error:
            return item | {"pixel_values": None, "unreadable": [name], "reasons": {name: error.reason}}
        return item | {"pixel_values": to_tensor(pixels, mirror)}

    def _examples(self, lane: int, position: tuple) -> Iterator[tuple[dict, str, bool, tuple]]:
        """Images of a lane in the order of training, their names, whether to mirror them, and the position after."""
        epoch, place, offset, used = position
        while True:
            empty = True
            for block, start in self._blocks(epoch, lane, place, offset):
                empty = False
                random = np.random.default_rng((self.seed, epoch, lane, *start))
                order, mirror = random.permutation(len(block)), random.integers(0, 2, len(block)) * self.random_flip
                for number in range(used, len(block)):
                    image, name = block[order[number]]
                    yield image, name, bool(mirror[number]), (epoch, *start, number + 1)
                used = 0
            if empty and place == offset == 0:
                raise ValueError(f"a share of the {self.stream.num_shards} shards has no images; use fewer processes.")
            epoch, place, offset, used = epoch + 1, 0, 0, 0

    def _blocks(self, epoch: int, lane: int, place: int, offset: int) -> Iterator[tuple[list, tuple[int, int]]]:
        """Blocks of a lane's epoch in the order of its shards, from an example on, each with where it begins."""
        units = list(itertools.product(range(self.stream.num_shards), range(self.parts)))
        order = np.random.default_rng((self.seed, epoch)).permutation(len(units))[lane :: self.position.num_lanes]
        block, start = [], None
        for number in range(place, len(order)):
            shard, part = units[order[number]]
            begin = offset if number == place else 0
            rows = itertools.islice(read_shard(self.stream, shard, part, self.parts), begin, None)
            for index, image in enumerate(rows, start=begin):
                start = start if block else (number, index)
                name = (image or {}).get("path") or f"image {index * self.parts + part}"
                block.append((image, f"{name} (shard {shard})"))
                if len(block) == self.block:
                    yield block, start
                    block = []
        if block:
            yield block, start


def stream_loader(images: StreamedImages, num_workers: int = 0) -> DataLoader:
    """The endless loader of a process's batches; `num_workers` as in the images' [`StreamPosition`]."""
    return Loader(
        images,
        batch_size=None,
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(images.seed),
    )


def shard_batches(
    stream: datasets.IterableDataset,
    shard: int,
    resolution: int | Sequence[int],
    batch_size: int,
    channels: int = 3,
    unreadable: UnreadableLog | None = None,
) -> Iterator[torch.Tensor]:
    r"""
    The readable images of one shard, in order.

    Args:
        stream (`datasets.IterableDataset`): The result of [`load_stream`].
        shard (`int`): Its number.
        resolution, batch_size, channels: As in [`StreamedImages`].
        unreadable (`UnreadableLog`, *optional*): Notes the images that could not be read.

    Yields:
        `torch.Tensor` of shape (B, C, H, W): Images in [-1, 1].
    """
    shape, images = (channels, *height_and_width(resolution, "resolution")), []
    for index, image in enumerate(read_shard(stream, shard)):
        try:
            images.append(to_tensor(to_pixels(image, shape), False))
        except UnreadableImageError as error:
            name = f"{(image or {}).get('path') or f'image {index}'} (shard {shard})"
            if unreadable is not None:
                unreadable.add([name], {name: error.reason})
        if len(images) == batch_size:
            yield torch.stack(images)
            images = []
    if images:
        yield torch.stack(images)

"""Key codes of a whole collection on disk, in memory-mapped shards."""

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from tqdm.auto import tqdm

from ..utils.files import atomic_write
from . import UnreadableLog, evaluation_loader
from .streaming import shard_batches


MANIFEST = "manifest.json"


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"codes-{shard:05d}.npy"


def _labels_path(shard: Path) -> Path:
    return shard.with_name(shard.name.replace("codes-", "labels-"))


def count_shards(dataset, shard_size: int = 1024, random_flip: bool = False) -> int:
    """Shards that [`write_key_codes`] makes of a collection; of a stream, one for each of its own."""
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.num_shards
    return -(-len(dataset) * (2 if random_flip else 1) // shard_size)


@torch.no_grad()
def write_key_codes(
    autoencoder,
    dataset,
    folder: str | os.PathLike,
    batch_size: int = 16,
    shard_size: int = 1024,
    random_flip: bool = False,
    num_workers: int = 0,
    process_index: int = 0,
    num_processes: int = 1,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    r"""
    Encodes a process's share of a collection and writes the clean key codes as float16 shards.

    Where the collection has a column `"label"`, each shard has the labels of its codes beside it.

    Shard `i` holds the codes of rows `i * shard_size` and following, or of shard `i` of a stream, less the unreadable
    ones. Shards appear by a
    rename when they are complete and those that exist are kept, so that an interrupted encoding goes on where it
    stopped. Call [`open_key_codes`] before, and [`finish_key_codes`] when every process is done.

    Args:
        autoencoder ([`BricsAutoencoder`]): The model; used in eval mode, so that codes are exact.
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): Result of `load_collection` or `load_stream`.
        folder (`str`): Folder for the shards.
        batch_size (`int`, defaults to 16): Images encoded at once.
        shard_size (`int`, defaults to 1024): Images of one shard; without influence on a stream.
        random_flip (`bool`, defaults to `False`): Encode the mirror images too.
        num_workers (`int`, defaults to 0): Processes that read images; a stream is read without any.
        process_index (`int`, defaults to 0): Rank of this process; ranks take shards in turn.
        num_processes (`int`, defaults to 1): Number of processes.
        stopped (`Callable`, *optional*): Asked before each shard; what is left is not made once it returns `True`.
    """
    folder = Path(folder)
    autoencoder.eval()
    device, dtype = next(autoencoder.parameters()).device, next(autoencoder.parameters()).dtype
    channels, *size = autoencoder.sample_shape
    stream = isinstance(dataset, datasets.IterableDataset)
    labels = None if stream or "label" not in dataset.features else np.array(dataset["label"], np.int64)

    def batches(shard: int, unreadable: UnreadableLog) -> Iterator[tuple[torch.Tensor, np.ndarray | None]]:
        if stream:
            for images in shard_batches(dataset, shard, size, batch_size, channels, unreadable):
                yield from ((images, None), (images.flip(-1), None)) if random_flip else ((images, None),)
            return
        num_items = len(dataset) * (2 if random_flip else 1)
        rows = range(shard * shard_size, min((shard + 1) * shard_size, num_items))
        options = {"random_flip": random_flip, "rows": rows, "channels": channels}
        for batch in evaluation_loader(dataset, size, batch_size, num_workers, **options):
            unreadable.add(batch["unreadable"], batch["reasons"])
            if batch["index"].numel():
                yield batch["pixel_values"], batch["index"].numpy()

    for shard in range(process_index, count_shards(dataset, shard_size, random_flip), num_processes):
        path = _shard_path(folder, shard)
        if stopped():
            return
        if path.exists():
            continue
        unreadable = UnreadableLog()
        codes = [np.empty((0, *autoencoder.key_code_shape), np.float16)]
        rows_read = [np.empty(0, np.int64)]
        progress = {"desc": f"Encoding shard {shard}", "disable": process_index > 0, "leave": False}
        for images, rows in tqdm(batches(shard, unreadable), **progress):
            key_codes = autoencoder.encode(images.to(device, dtype)).key_codes
            codes.append(key_codes.to("cpu", torch.float16).numpy())
            rows_read += [] if rows is None else [rows]
        if labels is not None:
            with atomic_write(_labels_path(path)) as file:
                np.save(file, labels[np.concatenate(rows_read)])
        _write_json(path.with_suffix(".unreadable.json"), unreadable.reasons)
        with atomic_write(path) as file:
            np.save(file, np.concatenate(codes))


def open_key_codes(folder: str | os.PathLike, fingerprint: str) -> bool:
    r"""
    Claims a folder for the key codes of one autoencoder and collection.

    Args:
        folder (`str`): The folder; made if it does not exist.
        fingerprint (`str`): What the codes are made from.

    Returns:
        `bool`: Whether the folder already holds them all.

    Raises:
        `ValueError`: If the folder holds codes of something else.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_json(path, {"fingerprint": fingerprint, "counts": None})
    manifest = json.loads(path.read_text())
    if manifest["fingerprint"] != fingerprint:
        raise ValueError(
            f"{folder} holds key codes of another autoencoder, collection, resolution, --random_flip, --shard_size or "
            "classes; delete it or name another folder with --key_codes_dir."
        )
    return manifest["counts"] is not None


def finish_key_codes(folder: str | os.PathLike, num_shards: int) -> UnreadableLog:
    r"""
    Marks a folder of key codes as complete.

    Args:
        folder (`str`): Folder with all shards.
        num_shards (`int`): Their number, from [`count_shards`].

    Returns:
        `UnreadableLog`: The files that were left out, by whichever process and run.

    Raises:
        `FileNotFoundError`: If a shard is missing.
        `ValueError`: If no image could be encoded.
    """
    folder = Path(folder)
    shards = [_shard_path(folder, shard) for shard in range(num_shards)]
    counts = [len(np.load(path, mmap_mode="r")) for path in shards]
    if sum(counts) == 0:
        raise ValueError(f"{folder} holds no key codes; give a collection with at least one readable image.")
    unreadable = UnreadableLog()
    for path in shards:
        reasons = json.loads(path.with_suffix(".unreadable.json").read_text())
        unreadable.add(reasons, reasons)
    manifest = json.loads((folder / MANIFEST).read_text())
    _write_json(folder / MANIFEST, manifest | {"counts": counts, "unreadable": unreadable.names})
    return unreadable


def _write_json(path: Path, content) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=2).encode())


class KeyCodeDataset(torch.utils.data.Dataset):
    r"""
    Key codes from disk, read through memory maps.

    Args:
        folder (`str`): Folder that [`finish_key_codes`] has marked as complete.
        with_labels (`bool`, defaults to `False`): Whether the collection's labels are read too, as `labels` (N,).

    An item is the key code, a float32 `torch.Tensor` of shape (C_z, H_z, W_z) in [0, 1]; with labels, a tuple of it
    and the label (`int`).

    Raises:
        `FileNotFoundError`: If the folder is not complete, or has no labels.
    """

    def __init__(self, folder: str | os.PathLike, with_labels: bool = False):
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        counts = json.loads(path.read_text())["counts"] if path.exists() else None
        if counts is None:
            raise FileNotFoundError(
                f"{folder} has no complete {MANIFEST}; encode the collection with write_key_codes."
            )
        self.ends = np.cumsum(counts)
        self._maps: dict[int, np.ndarray] = {}
        self.labels = self._read_labels() if with_labels else None

    def _read_labels(self) -> np.ndarray:
        paths = [_labels_path(_shard_path(self.folder, shard)) for shard in range(len(self.ends))]
        if not all(path.is_file() for path in paths):
            raise FileNotFoundError(
                f"{self.folder} has key codes without labels; encode the collection with classes in another folder."
            )
        return np.concatenate([np.load(path) for path in paths])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def standard_deviation(self, max_key_codes: int = 2000) -> float:
        """Standard deviation of all numbers in the key codes, from so many of them at most, spread evenly."""
        step = -(-len(self) // max_key_codes)
        count, total, squares = 0, 0.0, 0.0
        for shard in range(len(self.ends)):
            values = np.load(_shard_path(self.folder, shard), mmap_mode="r")[::step].astype(np.float64)
            count, total, squares = count + values.size, total + values.sum(), squares + np.square(values).sum()
        return math.sqrt(max(squares / count - (total / count) ** 2, 0.0))

    def __getitem__(self, index: int) -> torch.Tensor | tuple[torch.Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"key code {index} of {len(self)}")
        shard = int(np.searchsorted(self.ends, index, side="right"))
        if shard not in self._maps:
            self._maps[shard] = np.load(_shard_path(self.folder, shard), mmap_mode="r")
        codes = self._maps[shard]
        key_code = torch.from_numpy(codes[index - int(self.ends[shard])].astype(np.float32))
        return key_code if self.labels is None else (key_code, int(self.labels[index]))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_maps": {}}  # workers open the maps themselves

"""Images of a collection as they are after cropping and resizing, kept on disk between epochs and runs."""

import logging
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..utils.sizes import height_and_width
from .image_modes import MODES


logger = logging.getLogger(__name__)

CHECKSUM = np.dtype("<u8")


class ResizedImages:
    r"""
    A file of images of one size, filled as they are first read, by any number of processes.

    It takes a byte for every channel of every pixel and 8 more of the disk for every image that was read. What a
    killed process or a failing disk left incomplete has not its checksum and counts as missing; once the disk is full,
    nothing more is kept.

    Args:
        folder (`str`): Folder of the file; made if it does not exist.
        key (`str`): What the images are of; a digest of the collection.
        resolution (`int` or a pair): The side of squares, or height and width, in pixels.
        channels (`int`, defaults to 3): Channels of the images, as in [`ImageCollection`].
    """

    def __init__(self, folder: str | os.PathLike, key: str, resolution: int | Sequence[int], channels: int = 3):
        height, width = height_and_width(resolution)
        size = height if height == width else f"{height}x{width}"
        self.path = Path(folder) / f"{key[:32]}-{size}.{MODES[channels].lower()}"
        self.shape = height, width, channels
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        self._file, self._process, self._full = None, None, False

    def get(self, row: int) -> np.ndarray | None:
        """The pixels (H, W, C) of a row, uint8, or `None` if they are missing."""
        data = self._at(row).read(self._record)
        if len(data) < self._record:  # beyond the end so far
            return None
        checksum, pixels = data[: CHECKSUM.itemsize], bytearray(data[CHECKSUM.itemsize :])
        return np.frombuffer(pixels, np.uint8).reshape(self.shape) if checksum == _checksum(pixels) else None

    def put(self, row: int, pixels: np.ndarray) -> None:
        """Keeps the pixels (H, W, C) of a row."""
        if self._full:
            return
        pixels = pixels.tobytes()
        try:
            self._at(row).write(_checksum(pixels) + pixels)
        except OSError as error:
            self._full = True
            logger.warning("Resized images are no longer kept in %s: %s.", self.path, error)

    @property
    def _record(self) -> int:
        return CHECKSUM.itemsize + int(np.prod(self.shape))

    def _at(self, row: int):
        if self._process != os.getpid():  # forked workers would share the place in the file
            self._file, self._process = open(self.path, "r+b", buffering=0), os.getpid()
        self._file.seek(row * self._record)
        return self._file

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_file": None, "_process": None}


def _checksum(pixels: bytes | bytearray) -> bytes:
    return np.array(zlib.crc32(pixels) + 1, CHECKSUM).tobytes()  # 0 is what a hole in a file holds

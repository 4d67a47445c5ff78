"""Decodes single image files (JPEG, PNG, ...) to 8-bit pixels; damaged metadata is ignored."""

import contextlib
import io
import os
import zlib
from collections.abc import Callable

import fsspec
from PIL import Image, UnidentifiedImageError

from .image_modes import ORIENTATION, to_channels


try:
    import pillow_heif
except ImportError:
    pillow_heif = None
else:
    pillow_heif.register_heif_opener()

PNG, JPEG, EXIF = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"Exif\0\0"
# Comments and applications' segments but APP0 (JFIF) and APP14 (Adobe), which say what colours the channels are.
JPEG_METADATA = {0xFE, *range(0xE1, 0xF0)} - {0xEE}
# Texts, resolutions, dates, XMP, IPTC, Photoshop's, EXIF, ICC, GPS; in the place of their numbers one without meaning.
TIFF_METADATA = {*range(269, 273), 282, 283, 296, 305, 306, 315, 316, 700, 33723, 34377, 34665, 34675, 34853, 37724}
UNKNOWN_TAG = 65000
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}  # ISO/IEC 23008-12


class UnreadableImageError(ValueError):
    r"""
    An image that cannot be turned into one of 8 bits: truncated, not an image, too large or of no known range.

    Args:
        reason (`str`): Why; kept as an attribute.
    """

    def __init__(self, reason: str):
        super().__init__(f"not readable as an image: {reason}")
        self.reason = reason

    def __reduce__(self):
        return type(self), (self.reason,)


def read_image(data: dict | str | os.PathLike, channels: int = 3) -> Image.Image:
    r"""
    Read an image with 8 bits a channel, upright by its EXIF orientation.

    Transparency is composited on white unless it is one of the channels, 16-bit values are divided by 257, floats in
    [0, 1] are multiplied by 255, of an animation the first frame is taken. Colour profiles are not applied, and faults
    in them, in EXIF data or in texts are passed over.

    Args:
        data (`dict`, `str` or `os.PathLike`):
            A `{"bytes", "path"}` dictionary, where `bytes` comes first if present, or a path.
        channels (`int`, *optional*, defaults to 3): 1 for gray, 3 for RGB, 4 for RGB and transparency.

    Returns:
        `PIL.Image.Image`: mode "L", "RGB" or "RGBA".

    Raises:
        UnreadableImageError: missing, truncated, not an image, a decompression bomb or of no known range.
    """

    def read(image: Image.Image) -> Image.Image:
        image.load()
        return to_channels(image, channels)

    return _with_image(data, read)


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
    return _with_image(data, lambda image: image.size)


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


def _with_image(data: dict | str | os.PathLike, read: Callable):
    # Pillow's readers raise OSError, SyntaxError, struct.error and more on bad files.
    try:
        with Image.open(_image_file(data)) as image:
            return read(image)
    except Exception as error:
        with contextlib.suppress(Exception):
            with Image.open(io.BytesIO(_without_metadata(_contents(data)))) as image:
                return read(image)
        raise UnreadableImageError(_reason(error, data)) from error


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


def _contents(data: dict | str | os.PathLike) -> bytes:
    file = _image_file(data)
    if isinstance(file, io.BytesIO):
        return file.getvalue()
    with open(file, "rb") as opened:
        return opened.read()


def _reason(error: Exception, data: dict | str | os.PathLike) -> str:
    if not isinstance(error, UnidentifiedImageError):
        return str(error) or type(error).__name__
    start = _contents(data)[:12]
    if pillow_heif is None and start[4:8] == b"ftyp" and start[8:] in HEIF_BRANDS:
        return "HEIC needs pillow-heif, install it"
    return "its bytes are of no format that Pillow reads" if start else "the file is empty"


def _without_metadata(data: bytes) -> bytes:
    r"""
    A PNG, JPEG or TIFF less everything that has no influence on its pixels but the EXIF orientation.

    Args:
        data (`bytes`): A file, perhaps with faults.

    Returns:
        `bytes`: a file of the same format.

    Raises:
        `ValueError`: For another format.
    """
    if data.startswith(PNG):
        chunks = _png_chunks(data)
        # Chunks with a small first letter are ancillary (PNG, 5.4); of these transparency belongs to the pixels.
        kept = [chunk for kind, chunk in chunks if kind[:1].isupper() or kind == b"tRNS"]
        exif = next((chunk[8:-4] for kind, chunk in chunks if kind == b"eXIf"), b"")
        exif = b"eXIf" + _orientation_only(exif)[len(EXIF) :]  # not in a PNG, where the chunk's name says it
        exif = b"".join([(len(exif) - 4).to_bytes(4), exif, zlib.crc32(exif).to_bytes(4)])
        return b"".join([PNG, kept[0], exif, *kept[1:]])
    if data.startswith(JPEG):
        segments, image = _jpeg_segments(data)
        kept = [segment for kind, segment in segments if kind not in JPEG_METADATA]
        exif = next((segment[4:] for kind, segment in segments if kind == 0xE1 and segment[4:].startswith(EXIF)), b"")
        exif = _orientation_only(exif)
        return b"".join([JPEG[:2], b"\xff\xe1", (len(exif) + 2).to_bytes(2), exif, *kept, image])
    if data[:4] in (b"II*\0", b"MM\0*"):
        return _without_tiff_metadata(bytearray(data), "little" if data[:2] == b"II" else "big")
    raise ValueError("not a PNG, JPEG or TIFF")


def _without_tiff_metadata(data: bytearray, order: str) -> bytes:
    start = int.from_bytes(data[4:8], order)
    for entry in range(start + 2, start + 2 + 12 * int.from_bytes(data[start : start + 2], order), 12):
        if int.from_bytes(data[entry : entry + 2], order) in TIFF_METADATA:
            data[entry : entry + 2] = UNKNOWN_TAG.to_bytes(2, order)
    return bytes(data)


def _orientation_only(exif: bytes) -> bytes:
    faulty, clean = Image.Exif(), Image.Exif()
    with contextlib.suppress(Exception):
        faulty.load(exif)
        clean[ORIENTATION] = faulty[ORIENTATION]
    return clean.tobytes()


def _png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, position = [], len(PNG)
    while position < len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4])
        chunks.append((data[position + 4 : position + 8], data[position:end]))
        position = end
    return chunks


def _jpeg_segments(data: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    segments, position = [], 2
    while data[position] == 0xFF and data[position + 1] != 0xDA:  # the scan follows, to the end
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4])
        segments.append((data[position + 1], data[position:end]))
        position = end
    return segments, data[position:]

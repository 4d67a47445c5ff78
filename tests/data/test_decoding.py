"""Reading of single images: modes, depths, orientation, first frames, and files that are broken."""

import io
import pickle
import struct
import zipfile
import zlib

import numpy as np
import pytest
from image_files import COLORS, encoded, save
from PIL import Image

from brics_diffusers.data import UnreadableImageError, image_name, image_size, read_image


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(color_type, bit_depth, size, rows):
    """A PNG in a form that Pillow does not write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bit_depth, color_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def pixels(data):
    image = read_image({"bytes": data, "path": None})
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def test_gray_and_one_bit():
    assert pixels(encoded(Image.new("L", (3, 2), 77))).tolist() == [[[77] * 3] * 3] * 2
    one_bit = Image.new("1", (2, 1))
    one_bit.putpixel((1, 0), 1)
    assert pixels(encoded(one_bit)).tolist() == [[[0] * 3, [255] * 3]]


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled(format):
    values = np.array([[0, 257, 128 * 257, 65535, 1000]], np.uint16)
    expected = [0, 1, 128, 255, 4]  # 1000 / 257 = 3.89
    assert pixels(encoded(Image.fromarray(values), format))[0, :, 0].tolist() == expected


def test_big_endian_and_32_bit_gray():
    big = Image.frombytes("I;16B", (2, 1), struct.pack(">2H", 0, 200 * 257))
    assert pixels(encoded(big, "TIFF"))[0, :, 1].tolist() == [0, 200]
    wide = Image.fromarray(np.array([[0, 65535, 514]], np.int32))
    assert pixels(encoded(wide, "TIFF"))[0, :, 2].tolist() == [0, 255, 2]
    with pytest.raises(UnreadableImageError, match=r"values in \[0, 70000\], expected \[0, 65535\]"):
        pixels(encoded(Image.fromarray(np.array([[0, 70000]], np.int32)), "TIFF"))


def test_16_bit_rgb_png():
    row = b"\0" + struct.pack(">6H", 0, 128 * 257, 65535, 64 * 257, 257, 0)
    result = pixels(png(2, 16, (2, 1), row))
    assert result.tolist() == [[[0, 128, 255], [64, 1, 0]]]


def test_transparent_value_of_16_bit_gray():
    image = Image.fromarray(np.array([[1000, 1001, 40 * 257]], np.uint16))
    data = {"bytes": encoded(image, transparency=1000), "path": None}
    assert np.asarray(read_image(data, 4))[0].tolist() == [[255] * 3 + [0], [4] * 3 + [255], [40] * 3 + [255]]
    assert np.asarray(read_image(data))[0, :, 0].tolist() == [255, 4, 40]


def test_float_tiff():
    values = np.array([[0.0, 0.2, 1.0]], np.float32)
    assert pixels(encoded(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 51, 255]
    for bad in (2.0, -0.5, np.nan):
        with pytest.raises(UnreadableImageError, match=r"expected \[0, 1.0\]"):
            pixels(encoded(Image.fromarray(np.array([[0.5, bad]], np.float32)), "TIFF"))


def test_palette():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert pixels(encoded(image)).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert pixels(encoded(image, transparency=1)).tolist() == [[[10, 20, 30], [255] * 3]]
    assert pixels(encoded(image, transparency=bytes([0, 255]))).tolist() == [[[255] * 3, [200, 100, 50]]]
    assert pixels(encoded(image, "GIF", transparency=0)).tolist() == [[[255] * 3, [200, 100, 50]]]


def test_alpha_is_composited_on_white():
    half = [round((100 * 128 + 255 * 127) / 255)] * 3
    gray = Image.new("LA", (1, 1), (100, 128))
    assert np.abs(pixels(encoded(gray)) - half).max() <= 1
    color = Image.new("RGBA", (2, 1), (200, 0, 50, 0))
    color.putpixel((1, 0), (200, 0, 50, 255))
    assert pixels(encoded(color)).tolist() == [[[255] * 3, [200, 0, 50]]]
    keyed = Image.new("RGB", (2, 1), (1, 2, 3))
    keyed.putpixel((1, 0), (9, 9, 9))
    assert pixels(encoded(keyed, transparency=(1, 2, 3))).tolist() == [[[255] * 3, [9, 9, 9]]]


def test_palette_with_alpha_and_premultiplied_modes(monkeypatch):
    palette = Image.new("RGBA", (1, 1), (255, 0, 0, 0)).convert("PA")
    premultiplied = Image.new("LA", (1, 1), (0, 0)).convert("La")
    for image in (palette, premultiplied):  # no file format holds these, so they are handed over opened
        monkeypatch.setattr(Image, "open", lambda file, image=image: image.copy())
        assert pixels(b"").tolist() == [[[255] * 3]]


def test_cmyk_jpeg():
    for color in [(220, 30, 40), (20, 200, 60), (10, 20, 30), (240, 240, 240)]:
        data = encoded(Image.new("RGB", (16, 16), color).convert("CMYK"), "JPEG", quality=95)
        assert Image.open(io.BytesIO(data)).mode == "CMYK"
        assert np.abs(pixels(data) - color).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    # What the camera stores, so that the operation of each EXIF orientation gives the upright image.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    assert np.array_equal(pixels(data)[:, :, 0], upright)


def test_exif_orientation_of_jpeg_and_16_bit():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored a quarter turn counterclockwise
    image = Image.new("RGB", (32, 16), (255, 0, 0))
    image.paste((0, 0, 255), (16, 0, 32, 16))
    result = pixels(encoded(image, "JPEG", quality=95, exif=exif))
    assert result.shape == (32, 16, 3)
    assert np.abs(result[4, 8] - [255, 0, 0]).max() < 8 and np.abs(result[28, 8] - [0, 0, 255]).max() < 8
    deep = Image.fromarray(np.array([[10 * 257, 20 * 257]], np.uint16))
    assert pixels(encoded(deep, exif=exif))[:, :, 0].tolist() == [[10], [20]]


def test_first_frame():
    frames = [Image.new("RGB", (4, 4), color) for color in COLORS[:3]]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(data)[0, 0].tolist() == list(COLORS[0])


def test_size_and_name_without_decoding(tmp_path):
    save(tmp_path / "a.png", size=(9, 7))
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[:50])  # its header is whole
    assert image_size(tmp_path / "a.png") == image_size(tmp_path / "cut.png") == image_size({"bytes": data}) == (9, 7)
    (tmp_path / "text.png").write_text("no image")
    for wrong in (tmp_path / "text.png", tmp_path / "missing.png", {"bytes": b""}, {"path": None}):
        with pytest.raises(UnreadableImageError, match="not readable as an image"):
            image_size(wrong)
    assert image_name({"bytes": None, "path": "a.png"}, 3) == "a.png"
    assert image_name({"bytes": data, "path": "a.png"}, 3) == "a.png (row 3)"
    assert image_name({"bytes": data, "path": None}, 3) == image_name(None, 3) == "row 3"


def test_read_image_from_paths(tmp_path):
    save(tmp_path / "a.png", (1, 2, 3))
    for data in (tmp_path / "a.png", str(tmp_path / "a.png"), {"bytes": None, "path": str(tmp_path / "a.png")}):
        assert read_image(data).getpixel((0, 0)) == (1, 2, 3)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as file:
        file.write(tmp_path / "a.png", "inner/a.png")
    assert read_image({"path": f"zip://inner/a.png::{tmp_path}/b.zip"}).getpixel((0, 0)) == (1, 2, 3)


def test_unreadable_images(tmp_path, monkeypatch):
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), "JPEG")
    for data in (whole[: len(whole) // 2], b"hello", b""):
        with pytest.raises(UnreadableImageError, match="not readable as an image"):
            read_image({"bytes": data, "path": "x.jpg"})
    for data in (tmp_path / "missing.png", {"bytes": None, "path": None}):
        with pytest.raises(UnreadableImageError, match="not readable as an image"):
            read_image(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImageError, match="decompression bomb"):
        read_image({"bytes": encoded(Image.new("L", (64, 64))), "path": None})


# Faults beside the pixels


def exif_data(orientation, *entries):
    """EXIF data with entries as bytes, in a form that Pillow does not write."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0), *entries
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4)


NOISE = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
RESOLUTIONS = {  # `XResolution` as text, as a fraction with a denominator of 0 beyond the end, of an unknown type
    "text": struct.pack("<HHI4s", 0x011A, 2, 3, b"72"),
    "word": struct.pack("<HHI4s", 0x011A, 2, 4, b"abc"),
    "beyond": struct.pack("<HHII", 0x011A, 5, 1, 9999),
    "type": struct.pack("<HHII", 0x011A, 77, 1, 0),
}


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("fault", RESOLUTIONS)
def test_faults_in_exif_data(format, fault):
    image = Image.new("RGB", (32, 16), (255, 0, 0))
    image.paste((0, 0, 255), (16, 0, 32, 16))
    options = {"tiffinfo": {0x0112: 6}} if format == "TIFF" else {"exif": exif_data(6, RESOLUTIONS[fault])}
    data = encoded(image, format, **options)
    result = pixels(data)
    assert result.shape == (32, 16, 3) and image_size({"bytes": data})[0] in (16, 32)
    assert np.abs(result[4, 8] - [255, 0, 0]).max() < 8 and np.abs(result[28, 8] - [0, 0, 255]).max() < 8


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff", exif_data(99), b"noise"])
def test_data_that_is_no_exif_data(exif):
    whole = encoded(Image.fromarray(NOISE), exif=exif_data(1))
    start, end = whole.index(b"eXIf") - 4, whole.index(b"IDAT") - 4
    data = whole[:start] + chunk(b"eXIf", exif.removeprefix(b"Exif\0\0")) + whole[end:]
    assert np.array_equal(pixels(data), NOISE)


def test_faults_in_chunks_of_a_png():
    large = np.random.default_rng(0).integers(0, 2, 2**21, np.uint8).tobytes()  # 2 MB, Pillow unpacks 1 MB
    profile = encoded(Image.fromarray(NOISE), icc_profile=large, exif=exif_data(6))
    assert np.array_equal(pixels(profile), np.rot90(NOISE, -1)) and image_size({"bytes": profile}) == (6, 4)
    plain = encoded(Image.fromarray(NOISE))
    after_header, before_end = plain.index(b"IDAT") - 4, plain.index(b"IEND") - 4
    text = chunk(b"zTXt", b"key\0\0" + zlib.compress(large))
    broken = chunk(b"tEXt", b"key\0text")[:-1] + b"?"  # its checksum does not hold
    for fault in (text, broken):
        for place in (after_header, before_end):
            assert np.array_equal(pixels(plain[:place] + fault + plain[place:]), NOISE)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    keyed = encoded(palette, transparency=0)
    place = keyed.index(b"IDAT") - 4
    assert pixels(keyed[:place] + broken + keyed[place:]).tolist() == [[[255] * 3] * 2]  # transparency is kept


def test_faults_in_segments_of_a_jpeg():
    plain = encoded(Image.fromarray(NOISE), "JPEG")
    data = encoded(Image.fromarray(NOISE), "JPEG", exif=exif_data(6))
    profile = b"\xff\xe2" + struct.pack(">H", 2 + 12) + b"ICC_PROFILE\0"  # ends before its number
    assert np.array_equal(pixels(data[:2] + profile + data[2:]), np.rot90(pixels(plain), -1))
    cmyk = encoded(Image.new("RGB", (16, 16), (220, 30, 40)).convert("CMYK"), "JPEG", quality=95)
    assert np.array_equal(pixels(cmyk[:2] + profile + cmyk[2:]), pixels(cmyk))  # the Adobe segment is kept


def test_faults_in_tags_of_a_tiff():
    data = bytearray(encoded(Image.fromarray(NOISE), "TIFF", tiffinfo={0x0112: 6, 0x011A: 72.0, 0x0128: 3}))
    place = data.index(struct.pack("<HHI", 0x011A, 5, 1))
    data[place : place + 12] = struct.pack("<HHI4s", 0x011A, 2, 3, b"72")  # a resolution as text
    assert np.array_equal(pixels(bytes(data)), np.rot90(NOISE, -1)) and image_size({"bytes": bytes(data)}) == (4, 6)


def test_an_image_is_turned_once():
    data = encoded(Image.fromarray(NOISE), exif=exif_data(6))
    image = read_image({"bytes": data})
    assert np.array_equal(pixels(encoded(image)), np.asarray(image).astype(int))
    assert image.getexif().get(0x0112) is None


def test_reasons():
    reasons = {
        b"": "the file is empty",
        b"hello": "its bytes are of no format that Pillow reads",
        encoded(Image.fromarray(NOISE), "JPEG")[:-50]: "truncated",
        struct.pack(">I", 24) + b"ftypheic" + bytes(12): "HEIC needs pillow-heif|of no format",
    }
    for data, reason in reasons.items():
        with pytest.raises(UnreadableImageError, match=f"^not readable as an image: .*({reason})") as error:
            read_image({"bytes": data})
        assert pickle.loads(pickle.dumps(error.value)).reason == error.value.reason
        assert "0x" not in error.value.reason


def test_heic():
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), (200, 30, 40))).save(buffer)
    assert np.abs(pixels(buffer.getvalue()) - (200, 30, 40)).max() < 8

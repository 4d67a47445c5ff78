"""PIL images of any mode as 8-bit ones, the same for training and for pipelines."""

import numpy as np
from PIL import ExifTags, Image


MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # of images, by their channels
ORIENTATION = ExifTags.Base.Orientation
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright(image: Image.Image) -> Image.Image:
    r"""
    Turns an image as its EXIF orientation says. Unlike `PIL.ImageOps.exif_transpose`, no other entry of the EXIF data
    is read or written, so that none can fail.

    Args:
        image (`PIL.Image.Image`): An image of any mode.

    Returns:
        `PIL.Image.Image`: the image itself if it is upright, else a new one that no longer has an orientation.
    """
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # whatever Pillow's reader of EXIF data and XMP may raise
        turn = None
    if turn is None:
        return image
    image = image.transpose(turn)
    image.info = {key: value for key, value in image.info.items() if key == "transparency"}
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    r"""
    An image as 8-bit RGB, [`upright`]: transparency is composited on white, values of more than 8 bits are scaled as
    in [`to_eight_bits`].

    Args:
        image (`PIL.Image.Image`): An image of any mode.

    Returns:
        `PIL.Image.Image`: mode "RGB".

    Raises:
        `ValueError`: For values out of range.
    """
    image = to_eight_bits(upright(image))
    if image.has_transparency_data or image.mode == "La":
        image = to_rgba(image)
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def to_rgba(image: Image.Image) -> Image.Image:
    r"""
    An image as 8-bit RGBA, [`upright`], with its transparency, or none. What is wholly transparent becomes white: its
    colours are what a program happened to leave there.

    Args:
        image (`PIL.Image.Image`): An image of any mode.

    Returns:
        `PIL.Image.Image`: mode "RGBA".

    Raises:
        `ValueError`: For values out of range.
    """
    image = to_eight_bits(upright(image))
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA") if image.has_transparency_data else image.convert("RGB").convert("RGBA")
    return white_where_transparent(image)


def white_where_transparent(image: Image.Image) -> Image.Image:
    """An RGBA image with white in place of the colours of wholly transparent pixels."""
    hidden = image.getchannel("A").point([255] + [0] * 255)
    return Image.composite(Image.new("RGBA", image.size, (255, 255, 255, 0)), image, hidden)


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    r"""
    An image of so many channels of 8 bits, [`upright`]: 1 for gray, 3 for RGB, both with transparency composited on
    white, and 4 for RGBA as in [`to_rgba`].

    Args:
        image (`PIL.Image.Image`): An image of any mode.
        channels (`int`): 1, 3 or 4.

    Returns:
        `PIL.Image.Image`: mode "L", "RGB" or "RGBA".

    Raises:
        `ValueError`: For values out of range, or another number of channels.
    """
    check_channels(channels)
    return to_rgba(image) if channels == 4 else to_rgb(image).convert(MODES[channels])


def check_channels(channels: int) -> None:
    """Refuses numbers of channels that no images are read with, with a `ValueError`."""
    if channels not in MODES:
        raise ValueError(
            f"images have {channels} channels; they are read with 1 (gray), 3 (RGB) or 4 (RGB and transparency)."
        )


def to_eight_bits(image: Image.Image) -> Image.Image:
    r"""
    Scales the values of gray images of 16 bits (modes "I;16" and "I") or floats ("F"), which Pillow's own conversions
    would clip.

    Args:
        image (`PIL.Image.Image`): An image of any mode.

    Returns:
        `PIL.Image.Image`: mode "L", or "LA" with a transparent value; images of other modes as they are.

    Raises:
        `ValueError`: For values out of [0, 65535], floats out of [0, 1].
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)  # (H, W)
    top = 1.0 if values.dtype.kind == "f" else 65535
    if not (values.min() >= 0 and values.max() <= top):  # also false for NaN
        raise ValueError(
            f"an image of mode {image.mode} has values in [{values.min()}, {values.max()}], expected [0, {top}]; "
            "scale them."
        )
    scaled = np.rint(values * (255 / top)).astype(np.uint8)
    transparent = image.info.get("transparency")  # a PNG's one value that is
    if not isinstance(transparent, int):
        return Image.fromarray(scaled)
    alpha = np.where(values == transparent, 0, 255).astype(np.uint8)
    return Image.merge("LA", [Image.fromarray(scaled), Image.fromarray(alpha)])

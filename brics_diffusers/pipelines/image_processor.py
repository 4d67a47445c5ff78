"""Images given to a pipeline, read as in training."""

from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from ..data.image_modes import to_eight_bits, to_rgb, upright


class BricsImageProcessor(VaeImageProcessor):
    r"""
    [`VaeImageProcessor`] that composites transparent images on white, where Pillow shows the colours that were hidden,
    scales gray images of 16 bits, which Pillow clips, and turns images as their EXIF orientation says. In masks,
    transparency has no influence.
    """

    @staticmethod
    def convert_to_rgb(image: Image.Image) -> Image.Image:
        """Any image to mode "RGB"."""
        return to_rgb(image)

    @staticmethod
    def convert_to_grayscale(image: Image.Image) -> Image.Image:
        """Any image to mode "L"."""
        return to_eight_bits(upright(image)).convert("L")

"""Images given to a pipeline, read as in training."""

from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from ..data.image_modes import to_channels, to_eight_bits, upright


class BricsImageProcessor(VaeImageProcessor):
    """
    [`VaeImageProcessor`] for images of 1 (gray), 3 (RGB) or 4 channels (RGB and transparency) that composites
    transparent images on white, where Pillow shows the colours that were hidden, scales gray images of 16 bits, which
    Pillow clips, and turns images as their EXIF orientation says. In masks, transparency has no influence.
    """

    def __init__(self, channels: int = 3, **kwargs):
        # No image is taken for latents, which four channels would be by default.
        super().__init__(vae_latent_channels=0, **kwargs)
        self.channels = channels

    def convert_to_rgb(self, image: Image.Image) -> Image.Image:
        """Any image to the mode of so many channels."""
        return to_channels(image, self.channels)

    @staticmethod
    def convert_to_grayscale(image: Image.Image) -> Image.Image:
        """Any image to mode "L"."""
        return to_eight_bits(upright(image)).convert("L")

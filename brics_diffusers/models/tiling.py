"""Decoding of large images tile by tile."""

import torch
from diffusers.models.autoencoders.vae import AutoencoderMixin


TILE = 64  # side of a tile of the feature block
# Pixels of the feature block around a tile on which the tile's image can depend: two by the first block's two
# convolutions; by the second less than two (up-convolution and filter) and one (its convolutions at half the spacing),
# by each further block half as many: less than 2 + 3 * 2, however many there are.
MARGIN = 8


class TilingMixin(AutoencoderMixin):
    """`enable_tiling` of an autoencoder with a `decoder` and its config's `decoder_type`."""

    use_tiling = False

    def enable_tiling(self):
        r"""
        Lets the style decoder work on tiles, in eval mode: images of 1024 pixels and more take a fraction of the
        memory and are the same but for rounding. Style, coordinates and feature block still come from the whole key
        code, and encoding stays as it is.

        Raises:
            `NotImplementedError`: For the decoders `"vqgan"` and `"movq"`, whose normalisation and attention see the
                whole image.
        """
        if self.config.decoder_type != "style":
            raise NotImplementedError(
                f"decoder_type is {self.config.decoder_type!r}, whose normalisation and attention see the whole "
                "image, so tiles would show; use enable_slicing, or an autoencoder with decoder_type='style'."
            )
        super().enable_tiling()

    def decode_in_tiles(self, feature_block: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        r"""
        What `self.decoder` gives, tile by tile.

        Args:
            feature_block (`torch.Tensor` of shape (B, C_d, H_d, W_d)): Features of every pixel.
            style (`torch.Tensor` of shape (B, style_dim)): Style code of the whole images.

        Returns:
            `torch.Tensor` of shape (B, out_channels, H, W).
        """
        height, width = feature_block.shape[2:]
        factor = self.decoder_factor
        rows = []
        for top in range(0, height, TILE):
            row = []
            for left in range(0, width, TILE):
                y, x = max(top - MARGIN, 0), max(left - MARGIN, 0)
                part = feature_block[:, :, y : top + TILE + MARGIN, x : left + TILE + MARGIN]
                image = self.decoder(part, style)[:, :, (top - y) * factor :, (left - x) * factor :]
                row.append(image[:, :, : TILE * factor, : TILE * factor].clone())  # frees the margins
            rows.append(torch.cat(row, dim=3))
        return torch.cat(rows, dim=2)

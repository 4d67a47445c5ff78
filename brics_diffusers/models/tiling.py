"""Encoding and decoding of large images tile by tile."""

import itertools

import torch
from diffusers.models.autoencoders.vae import AutoencoderMixin

from .configuration import decoder_layers


TILE = 64  # side of a tile of the feature block


def tile_margin(layers_per_block: tuple[int, ...]) -> int:
    """
    Pixels of the feature block around a tile on which the tile's image can depend. With n pairs of convolutions in a
    block at most: 2 n by the first block's; by the second less than two (up-convolution and filter) and n (its
    convolutions at half the spacing), by each further block half as many: less than 2 n + 2 (2 + n), however many
    there are.
    """
    return 4 * max(layers_per_block) + 4


def tile_starts(size: int, tile: int, factor: int) -> list[int]:
    """Where tiles of an axis begin, in pixels, on multiples of a factor; the last one ends with the image."""
    step = max(tile * 3 // 4 // factor * factor, factor)
    return [*range(0, size - tile, step), size - tile]


def tent(side: int, like: torch.Tensor) -> torch.Tensor:
    """Weights that rise from the ends of an axis to its middle."""
    place = torch.arange(1, side + 1, device=like.device, dtype=like.dtype)
    return torch.minimum(place, side + 1 - place)


class TilingMixin(AutoencoderMixin):
    """`enable_tiling` of an autoencoder with a `decoder` and its config's `decoder_type`."""

    use_tiling = False

    def enable_tiling(self):
        r"""
        Lets encoder and style decoder work on tiles, in eval mode: images of 1024 pixels and more take a fraction of
        the memory. Decoded images are the same but for rounding: style, coordinates and feature block still come from
        the whole key code. Key codes are others: normalisation and attention of the encoder see a tile of the size of
        the training images, and where tiles overlap their logits are averaged.

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

    def encode_in_tiles(self, image: torch.Tensor) -> torch.Tensor:
        """
        What `self.encoder` gives, tile by tile. Tiles are as large as training images and overlap by a quarter or
        more; a tile counts less towards its border.
        """
        sizes, factor = image.shape[2:], self.encoder_factor
        tiles = [min(pair) for pair in zip(self.sample_shape[1:], sizes, strict=True)]
        if all(tile == size for tile, size in zip(tiles, sizes, strict=True)):
            return self.encoder(image)
        total = weights = None
        for top, left in itertools.product(*map(tile_starts, sizes, tiles, (factor, factor))):
            part = self.encoder(image[:, :, top : top + tiles[0], left : left + tiles[1]])
            weight = torch.outer(*(tent(side, part) for side in part.shape[2:]))
            if total is None:
                total = part.new_zeros(*part.shape[:2], *(size // factor for size in sizes))
                weights = total.new_zeros(total.shape[2:])
            y, x = top // factor, left // factor
            total[:, :, y : y + weight.shape[0], x : x + weight.shape[1]] += weight * part
            weights[y : y + weight.shape[0], x : x + weight.shape[1]] += weight
        return total / weights

    def decode_in_tiles(self, feature_block: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        """What `self.decoder` gives, tile by tile; the style code is that of the whole images."""
        height, width = feature_block.shape[2:]
        factor = self.decoder_factor
        margin = tile_margin(decoder_layers(self.config))
        rows = []
        for top in range(0, height, TILE):
            row = []
            for left in range(0, width, TILE):
                y, x = max(top - margin, 0), max(left - margin, 0)
                part = feature_block[:, :, y : top + TILE + margin, x : left + TILE + margin]
                image = self.decoder(part, style)[:, :, (top - y) * factor :, (left - x) * factor :]
                row.append(image[:, :, : TILE * factor, : TILE * factor].clone())  # frees the margins
            rows.append(torch.cat(row, dim=3))
        return torch.cat(rows, dim=2)

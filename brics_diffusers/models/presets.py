"""The paper's five autoencoders, as keyword arguments of `BricsAutoencoder` (256 x 256 images)."""


def _preset(key_size: int, key_channels: int, min_resolution: int) -> dict:
    # From 256 pixels to key_size, width doubling from 64 at every level, attention at the lowest (Sec. 3.1).
    num_blocks = (256 // key_size).bit_length()
    return {
        "down_block_types": ("DownEncoderBlock2D",) * (num_blocks - 1) + ("AttnDownEncoderBlock2D",),
        "encoder_block_out_channels": tuple(64 * 2**level for level in range(num_blocks)),
        "key_channels": key_channels,
        "min_resolution": min_resolution,
        "encoder_shortcut": False,
    }


PRESETS = {
    "church-64x64x4": _preset(64, 4, 16),
    "church-32x32x4": _preset(32, 4, 4),
    "church-32x32x8": _preset(32, 8, 4),
    "ffhq-16x16x8": _preset(16, 8, 4),
    "ffhq-16x16x16": _preset(16, 16, 4),
}

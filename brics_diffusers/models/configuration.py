"""Whether the arguments of an autoencoder fit together."""

from diffusers.configuration_utils import FrozenDict

from ..utils.sizes import height_and_width, size_text
from .regularization import REGULARIZATIONS


DECODER_TYPES = ("style", "vqgan", "movq")


def encoder_factor(config: FrozenDict) -> int:
    """Pixels of the image per element of the key code, along one axis."""
    return 2 ** (len(config.encoder_block_out_channels) - 1)


def decoder_factor(config: FrozenDict) -> int:
    """Pixels of the image per element of the feature block, along one axis."""
    return 2 ** (len(config.decoder_block_out_channels) - 1)


def decoder_layers(config: FrozenDict) -> tuple[int, ...]:
    """Pairs of convolutions in each block of the style decoder."""
    layers = config.decoder_layers_per_block
    return tuple(layers) if isinstance(layers, (list, tuple)) else (layers,) * len(config.decoder_block_out_channels)


def check_config(config: FrozenDict) -> None:
    """Refuses arguments of [`BricsAutoencoder`] that contradict each other, with a `ValueError`."""
    divided, multiplied = encoder_factor(config), decoder_factor(config)
    for name, allowed in (("decoder_type", DECODER_TYPES), ("regularization", REGULARIZATIONS)):
        if config[name] not in allowed:
            raise ValueError(f"{name} is {config[name]!r}; it must be one of {', '.join(map(repr, allowed))}.")
    if not config.interpolation_gamma > 0:
        raise ValueError(f"interpolation_gamma is {config.interpolation_gamma}; it must be above 0.")
    if config.scaling_factor is not None and not config.scaling_factor > 0:
        raise ValueError(f"scaling_factor is {config.scaling_factor}; it must be above 0.")
    if config.key_length < 1 or config.key_channels < 1 or config.key_channels % config.key_length:
        raise ValueError(
            f"key_channels is {config.key_channels} and key_length {config.key_length}; "
            "key_channels must be a positive multiple of key_length."
        )
    if config.decoder_type == "movq" and any(width % 32 for width in config.decoder_block_out_channels):
        raise ValueError(
            f"decoder_block_out_channels is {tuple(config.decoder_block_out_channels)}; the spatial norms of the "
            "'movq' decoder have 32 groups, so use widths that divide by 32."
        )
    layers = decoder_layers(config)
    valid = all(type(number) is int and number > 0 for number in layers)
    if len(layers) != len(config.decoder_block_out_channels) or not valid:
        raise ValueError(
            f"decoder_layers_per_block is {config.decoder_layers_per_block!r}; give one positive number, or one for "
            f"each of the {len(config.decoder_block_out_channels)} widths of decoder_block_out_channels."
        )
    if len(config.down_block_types) != len(config.encoder_block_out_channels):
        raise ValueError(
            f"down_block_types names {len(config.down_block_types)} blocks and encoder_block_out_channels "
            f"{len(config.encoder_block_out_channels)}; give one width a block."
        )
    size = height_and_width(config.sample_size, "sample_size")
    made = [side * multiplied for side in height_and_width(config.feature_size, "feature_size")]
    if size != tuple(made):
        raise ValueError(
            f"sample_size is {config.sample_size}; feature_size={config.feature_size} and "
            f"{len(config.decoder_block_out_channels)} decoder blocks make images of {size_text(made)}, so change "
            "one of the three."
        )
    if any(side % divided for side in size) or divided % multiplied:
        raise ValueError(
            f"the encoder divides by {divided} and the decoder multiplies by {multiplied}; "
            f"the first must be a multiple of the second and divide sample_size={config.sample_size}."
        )

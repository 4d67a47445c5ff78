"""Configurations of models that take milliseconds."""

from pathlib import Path


ROOT = Path(__file__).parents[1]
AUTOENCODER = {
    "sample_size": 32,
    "encoder_block_out_channels": (8, 16, 16),
    "encoder_layers_per_block": 1,
    "norm_num_groups": 4,
    "feature_size": 16,
    "feature_channels": 16,
    "num_levels": 4,
    "min_resolution": 4,
    "max_resolution": 16,
    "style_dim": 16,
    "decoder_block_out_channels": (16, 8),
}
UNET = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 16,
}

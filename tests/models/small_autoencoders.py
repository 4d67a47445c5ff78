"""Small autoencoders of every kind, for the tests of the autoencoder."""

import torch
from torch import nn

from brics_diffusers import BricsAutoencoder


SMALL = {
    "sample_size": 16,
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "encoder_block_out_channels": (8, 8, 16),
    "encoder_layers_per_block": 1,
    "norm_num_groups": 4,
    "key_channels": 4,
    "feature_size": 8,
    "feature_channels": 16,
    "num_levels": 3,
    "min_resolution": 4,
    "max_resolution": 16,
    "level_channels": 2,
    "max_entries": 1000,
    "style_dim": 16,
    "decoder_block_out_channels": (16, 8),
}


VARIANTS = {
    "style-noise": {},
    "style-kl": {"regularization": "kl"},
    "style-none": {"regularization": "none"},
    "style-interpolate": {"regularization": "interpolate"},
    "4d-keys": {"key_length": 2},
    "hash": {"grid_type": "hash"},
    "no-coordinates": {"use_coordinates": False},
    "no-shortcut": {"encoder_shortcut": False},
    "vqgan": {"decoder_type": "vqgan"},
    # diffusers' spatial normalisation has 32 groups, whatever norm_num_groups says.
    "movq": {"decoder_type": "movq", "decoder_block_out_channels": (32, 32)},
}


# Another batch size or memory plan changes the order of float32 sums; outputs are of order 1.
SAME = {"rtol": 1e-4, "atol": 1e-5}


def make_model(seed=0, **config) -> BricsAutoencoder:
    """A small model with grid entries and modulation of order 1, so that codes and styles matter as after training."""
    torch.manual_seed(seed)
    model = BricsAutoencoder(**{**SMALL, **config})
    nn.init.uniform_(model.grids.entries, -1, 1)
    for name, parameter in model.named_parameters():
        if name.endswith("affine.weight"):
            nn.init.normal_(parameter)
    return model


def fix_logits(model, monkeypatch, *logits):
    """Lets the encoder give logits that a test chooses, the same for every image."""
    logits = torch.cat(logits, dim=1)
    monkeypatch.setattr(model.encoder, "forward", lambda sample: logits.expand(len(sample), -1, -1, -1))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def relative_error(actual, expected):
    return ((actual.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


def public(config):
    return {name: value for name, value in config.items() if not name.startswith("_")}

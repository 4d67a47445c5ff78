"""The models that compare_autoencoders.py trains, and how each is trained."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import yaml
from comparison import config_path
from diffusers import AutoencoderKL, VQModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder

from brics_diffusers import BricsAutoencoder
from brics_diffusers.metrics.reconstruction import image_metrics, row_generator
from brics_diffusers.models.encoder import ShortcutEncoder
from brics_diffusers.training_utils.optimization import build_optimizer


# LDM's weight of the KL divergence; a few percent of the loss here.
KL_WEIGHT = 1e-6
# The paper's, of the KL divergence of key codes (App. A.4).
KEY_CODE_KL_WEIGHT = 1e-4

SMALL_BRICS = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "encoder_block_out_channels": (16, 32, 64),
    "encoder_layers_per_block": 1,
    "norm_num_groups": 16,
    "key_channels": 4,
    "feature_channels": 64,
    "num_levels": 8,
    "min_resolution": 1,
    "style_dim": 64,
    "decoder_block_out_channels": (64, 32),
}
# The same encoder but for the groups of its normalisation; a decoder that costs half as much again as BRICS'.
SMALL_PEER = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (16, 32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
}
CODEBOOK = {"num_vq_embeddings": 1024, "vq_embed_dim": 4}


def small_models(size: int, train_batch_size: int, max_train_steps: int) -> dict:
    """How models for images of a size are made and trained."""
    half, sample_size = size // 2, {"sample_size": size}
    return {
        "train_batch_size": train_batch_size,
        "max_train_steps": max_train_steps,
        "BricsAutoencoder": SMALL_BRICS | sample_size | {"feature_size": half, "max_resolution": half},
        "AutoencoderKL": SMALL_PEER | sample_size,
        "VQModel": SMALL_PEER | CODEBOOK | sample_size,
    }


# An image costs the peers 4.2 G multiply-adds, BRICS 4.0 G.
FLUENT_PEER = {
    "sample_size": 128,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (24, 48, 96, 192),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
}
# Photographs are shrunk to 128 x 128: at 256 x 256 two CPU cores would not get through some hundred steps. Emoji at
# half their size are what two cores can train several diffusion models of. The 3-D emoji are for a GPU.
PRESETS = {
    "fluent-emoji-128": {
        "train_batch_size": 16,
        "max_train_steps": 2000,
        "BricsAutoencoder": yaml.safe_load(Path(config_path("fluent-emoji-128")).read_text())["autoencoder"],
        "AutoencoderKL": FLUENT_PEER,
        "VQModel": FLUENT_PEER | CODEBOOK,
    },
    "noto-emoji-64": small_models(64, 8, 3000),
    "noto-emoji-32": small_models(32, 8, 3000),
    "photos-256": small_models(128, 4, 1250),
}


class BoundedEncoder(ShortcutEncoder):
    """`ShortcutEncoder` with `double_z`, whose means lie in [-2, 2] and whose variances are as good as none."""

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, H, W) -> (B, 2 * out_channels, H / f, W / f): means and log-variances."""
        means, log_variances = super().forward(sample).chunk(2, dim=1)
        return torch.cat([4 * torch.sigmoid(means) - 2, torch.full_like(log_variances, -30)], dim=1)


class NoisyAutoencoderKL(AutoencoderKL):
    """
    `AutoencoderKL` with BRICS' shortcut in the encoder, and with noise on the latents in training. Arguments as of
    `AutoencoderKL`; `relative_noise`, the standard deviation of that noise in units of the latents' own in the batch;
    `bounded`, for latents like BRICS' codes, which a sigmoid keeps in [-2, 2] (near 0 they stay as they are) and that
    are not drawn from a posterior; and `decoder_block_out_channels`, for a decoder of other widths than the encoder's.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int,
        down_block_types: tuple[str, ...],
        up_block_types: tuple[str, ...],
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        norm_num_groups: int,
        latent_channels: int,
        relative_noise: float = 0.0,
        bounded: bool = False,
        decoder_block_out_channels: tuple[int, ...] | None = None,
    ):
        encoder = {
            "down_block_types": down_block_types,
            "block_out_channels": block_out_channels,
            "layers_per_block": layers_per_block,
            "norm_num_groups": norm_num_groups,
        }
        sizes = {"sample_size": sample_size, "up_block_types": up_block_types, "latent_channels": latent_channels}
        super().__init__(**encoder, **sizes, use_quant_conv=False)
        encoder_class = BoundedEncoder if bounded else ShortcutEncoder
        self.encoder = encoder_class(in_channels=3, out_channels=latent_channels, double_z=True, **encoder)
        if decoder_block_out_channels is not None:
            widths = {"block_out_channels": decoder_block_out_channels, "up_block_types": up_block_types}
            depths = {"layers_per_block": layers_per_block, "norm_num_groups": norm_num_groups}
            self.decoder = Decoder(in_channels=latent_channels, out_channels=3, **widths, **depths)


CLASSES = {
    "BricsAutoencoder": BricsAutoencoder,
    "AutoencoderKL": AutoencoderKL,
    "NoisyAutoencoderKL": NoisyAutoencoderKL,
    "VQModel": VQModel,
}
# Classes that extend the arguments of another.
PRESET_OF = {"NoisyAutoencoderKL": "AutoencoderKL"}


@dataclass(frozen=True)
class Variant:
    """A model of the comparison: its class, what of the preset's arguments is changed, and how it is trained."""

    class_name: str
    changes: dict = field(default_factory=dict)
    learning_rate: float = 2e-3
    part_learning_rates: dict = field(default_factory=dict)
    adam_beta2: float = 0.99
    warmup: float = 0.02  # share of the steps
    steps: float = 1.0  # share of --max_train_steps
    optimizer: str = "Adam"  # or "Muon"

    def build_optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a model; Adam's epsilon is the paper's for BRICS and the usual one for the others."""
        epsilon = 1e-15 if isinstance(model, BricsAutoencoder) else 1e-8
        adam = 0.9, self.adam_beta2, epsilon
        rates = self.learning_rate, *adam, self.part_learning_rates
        return build_optimizer(model, *rates, optimizer=self.optimizer.lower())

    def arguments(self, preset: dict) -> dict:
        """Keyword arguments of the class."""
        return preset[PRESET_OF.get(self.class_name, self.class_name)] | self.changes

    def build(self, preset: dict) -> torch.nn.Module:
        """The model, with new weights from torch's random state."""
        return CLASSES[self.class_name](**self.arguments(preset))


# BRICS' noise over the standard deviation of its codes, at 64 x 64 after 3,000 steps; at 32 x 32 it is 0.07.
RELATIVE_NOISE = 0.04
BRICS = Variant("BricsAutoencoder", {}, 12e-3, {"encoder": 2e-3})
KL = Variant("AutoencoderKL", {}, 1e-3)
SHORTCUT_KL = Variant("NoisyAutoencoderKL", {}, 2e-3, warmup=0.1)
# What search_variants found best at 32 x 32.
SEARCHED = replace(BRICS, learning_rate=24e-3, part_learning_rates={"encoder": 4e-3}, warmup=0.1)
MUON = replace(SEARCHED, warmup=0.02, optimizer="Muon")
NOISY_KL = replace(SHORTCUT_KL, changes={"relative_noise": RELATIVE_NOISE})
BOUNDED_KL = replace(NOISY_KL, changes=NOISY_KL.changes | {"bounded": True})
MUON_KL = replace(NOISY_KL, learning_rate=4e-3, optimizer="Muon")
BOUNDED_MUON_KL = replace(MUON_KL, changes=BOUNDED_KL.changes)
COARSE = {"num_levels": 4, "max_resolution": 8}  # 1, 2, 4 and 8 cells an axis
NARROW = {"key_channels": 3, "feature_channels": 63, "style_dim": 63}  # widths must be divisible by the three groups
# More and narrower convolutions for nearly the same multiply-adds.
RESIDUAL = {"feature_channels": 40, "decoder_block_out_channels": (40, 24), "decoder_layers_per_block": (3, 2)}
# The first five are trained unless --models says otherwise.
VARIANTS = {
    "AutoencoderKL": KL,
    "BRICS": BRICS,
    "AutoencoderKL, shortcut": SHORTCUT_KL,
    "AutoencoderKL, shortcut, noise": NOISY_KL,
    "VQModel": replace(KL, class_name="VQModel"),
    "BRICS, two thirds of the steps": replace(BRICS, steps=2 / 3),
    "BRICS without noise": replace(BRICS, changes={"key_noise_scale": 0.0}),
    "BRICS, noise 0.03125": replace(BRICS, changes={"key_noise_scale": 0.03125}),
    "BRICS, noise 0.0625": replace(BRICS, changes={"key_noise_scale": 0.0625}),
    "BRICS, noise 0.125": replace(BRICS, changes={"key_noise_scale": 0.125}),
    "BRICS, interpolated noise": replace(BRICS, changes={"regularization": "interpolate"}),
    "BRICS, interpolated noise 0.3": replace(
        BRICS, changes={"regularization": "interpolate", "interpolation_gamma": 0.3}
    ),
    "BRICS, interpolated noise 0.1": replace(
        BRICS, changes={"regularization": "interpolate", "interpolation_gamma": 0.1}
    ),
    "BRICS, KL regularization": replace(BRICS, changes={"regularization": "kl"}),
    "BRICS without shortcut": replace(BRICS, changes={"encoder_shortcut": False}),
    "BRICS, grids from 4 cells": replace(BRICS, changes={"min_resolution": 4}),
    # With the noise that goes with them by default, a quarter of the finest cell.
    "BRICS, grids to 8 cells": replace(BRICS, changes=COARSE),
    "BRICS, 3 channels": replace(BRICS, changes=NARROW),
    "BRICS, decoder as costly as the others'": replace(BRICS, changes={"decoder_block_out_channels": (80, 40)}),
    "BRICS, decoder's learning rate 24e-3": replace(BRICS, part_learning_rates={"encoder": 2e-3, "decoder": 24e-3}),
    "BRICS, learning rate 24e-3, warm-up 0.1": SEARCHED,
    "BRICS, grids to 8 cells, learning rate 24e-3, warm-up 0.1": replace(SEARCHED, changes=COARSE),
    "BRICS, 3 channels, learning rate 24e-3, warm-up 0.1": replace(SEARCHED, changes=NARROW),
    "BRICS, residual decoder, learning rate 24e-3, warm-up 0.1": replace(SEARCHED, changes=RESIDUAL),
    "BRICS, Muon": MUON,
    "BRICS, Muon, warm-up 0.1": replace(SEARCHED, optimizer="Muon"),
    "BRICS, residual decoder, Muon": replace(MUON, changes=RESIDUAL),
    "BRICS, residual decoder as costly as the others', Muon": replace(
        MUON, changes=RESIDUAL | {"decoder_layers_per_block": (4, 3)}
    ),
    "AutoencoderKL, learning rate 2e-3, warm-up 0.1": replace(KL, learning_rate=2e-3, warmup=0.1),
    "AutoencoderKL, Muon": replace(KL, learning_rate=2e-3, optimizer="Muon"),
    "AutoencoderKL, shortcut, noise, bounded": BOUNDED_KL,
    "AutoencoderKL, shortcut, noise, Muon": MUON_KL,
    "AutoencoderKL, shortcut, noise, bounded, Muon": BOUNDED_MUON_KL,
    "AutoencoderKL, shortcut, noise, bounded, decoder as costly as BRICS', Muon": replace(
        BOUNDED_MUON_KL, changes=BOUNDED_MUON_KL.changes | {"decoder_block_out_channels": (16, 24, 56)}
    ),
    "BRICS, Muon, grids at 12e-3": replace(MUON, part_learning_rates=MUON.part_learning_rates | {"grids": 12e-3}),
    "BRICS, one learning rate 4e-3": replace(BRICS, learning_rate=4e-3, part_learning_rates={}),
    "BRICS, the paper's learning rate 2e-3": replace(BRICS, learning_rate=2e-3, part_learning_rates={}),
}
# How Muon's learning rates were chosen: halves and doubles, in proportion.
for name in ("BRICS, Muon", "AutoencoderKL, Muon", "AutoencoderKL, shortcut, noise, Muon"):
    chosen = VARIANTS[name]
    for share in (0.25, 0.5, 2):
        parts = {part: share * rate for part, rate in chosen.part_learning_rates.items()}
        rate = share * chosen.learning_rate
        VARIANTS[f"{name}, learning rate {rate:g}"] = replace(chosen, learning_rate=rate, part_learning_rates=parts)
DEFAULT_MODELS = list(VARIANTS)[:5]


def search_variants(names: list[str]) -> dict[str, Variant]:
    """As many trials of the learning rate, Adam's second beta and the warm-up for each of some `VARIANTS`."""
    trials = {}
    for name in names:
        variant = VARIANTS[name]
        rates = (1e-3, 2e-3, 4e-3, 8e-3)
        options = [{"learning_rate": rate, "adam_beta2": beta} for rate in rates for beta in (0.99, 0.999)]
        options += [{"learning_rate": rate, "warmup": 0.1} for rate in rates[1:3]]
        if "encoder" in variant.part_learning_rates:  # the options are the encoder's rates, all others in proportion
            for option in options:
                share = option["learning_rate"] / variant.part_learning_rates["encoder"]
                option["learning_rate"] = share * variant.learning_rate
                option["part_learning_rates"] = {
                    part: share * rate for part, rate in variant.part_learning_rates.items()
                }
        for option in options:
            text = ", ".join(f"{key} {value:g}" for key, value in option.items() if key != "part_learning_rates")
            trials[f"{name}: {text}"] = replace(variant, **{"adam_beta2": 0.99, "warmup": 0.02} | option)
    return trials


def folder_name(name: str, seed: int) -> str:
    """The folder of a model of one seed, among runs and among saved models."""
    return f"{name.replace(' ', '-').replace(',', '')}-{seed}"


def reconstruct(model, images: torch.Tensor):
    """Reconstructions as in training, and the model's own regularizer, weighted."""
    if isinstance(model, AutoencoderKL):
        posterior = model.encode(images).latent_dist
        latents = posterior.sample()
        noise = model.config.get("relative_noise", 0.0)
        if noise > 0:
            latents = latents + noise * latent_deviation(posterior.mean.detach()) * torch.randn_like(latents)
        return model.decode(latents).sample, KL_WEIGHT * posterior.kl().mean()
    output = model(images)
    if isinstance(model, VQModel):
        # As diffusers weighs them by default: the encoder's loss, and a quarter of the codebook's. VQGAN's paper
        # weighs them the other way round.
        return output.sample, output.commit_loss
    # BRICS' regularizer is the noise on its codes, unless they are drawn from a posterior.
    return output.sample, 0.0 if output.kl_loss is None else KEY_CODE_KL_WEIGHT * output.kl_loss.mean()


def latent_deviation(latents: torch.Tensor) -> torch.Tensor:
    """Standard deviation of latents (B, C, H, W): the root mean square over the channels of each one's own."""
    return latents.var(dim=(0, 2, 3)).mean().sqrt()


def encode(model, images: torch.Tensor) -> torch.Tensor:
    """The latents without any noise."""
    encoded = model.encode(images)
    if isinstance(model, AutoencoderKL):
        return encoded.latent_dist.mode()
    return encoded.latents if isinstance(model, VQModel) else encoded.key_codes


def decode(model, latents: torch.Tensor) -> torch.Tensor:
    """Images of latents that may be noisy: key codes stay in [0, 1], and `VQModel` takes the nearest codes."""
    return model.decode(latents.clamp(0, 1) if isinstance(model, BricsAutoencoder) else latents).sample


@torch.no_grad()
def psnr_with_noise(model, batches: list, noise: float) -> float:
    """Mean PSNR of images from latents with noise of a standard deviation, each image's noise by its row alone;
    `batches` are latents, the images that they are of, and their rows."""
    values = []
    for latents, images, rows in batches:
        draws = [torch.randn(latents.shape[1:], generator=row_generator(0, row)) for row in rows.tolist()]
        values.append(image_metrics(decode(model, latents + noise * torch.stack(draws).to(latents)), images)["psnr"])
    return torch.cat(values).mean().item()

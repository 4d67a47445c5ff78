"""Models that a run begins with: of the size that `--resolution` asks for, or published."""

import argparse
import inspect
import math
from collections.abc import Mapping

from diffusers import DDPMScheduler

from ..data.image_modes import check_channels
from ..models import BricsAutoencoder
from ..models.loading import load_autoencoder
from ..pipelines import BricsKeyCodePipeline
from ..pipelines.sampling import load_pipeline


# Arguments of an autoencoder that only training heeds, so that a trained one may have them otherwise.
NOISE_ARGUMENTS = ("regularization", "key_noise_scale", "interpolation_gamma")


def resized(config: Mapping, resolution: int, feature_size: int | None = None) -> dict:
    """
    What makes an autoencoder's config, or some of it, one for images of another size, `"sample_size"` and
    `"feature_size"`: the feature block grows with them, unless its size is given. A `ValueError` if it would have no
    whole size.
    """
    defaults = inspect.signature(BricsAutoencoder.__init__).parameters
    size, feature = (config.get(name, defaults[name].default) for name in ("sample_size", "feature_size"))
    if not isinstance(size, int) or not isinstance(feature, int):
        raise ValueError(
            f"--resolution is for squares, but the autoencoder's sample_size is {size} and feature_size {feature}; "
            "change these with --set."
        )
    if feature_size is None:
        feature_size, rest = divmod(feature * resolution, size)
        if rest or resolution < 1:
            unit = size // math.gcd(size, feature)
            raise ValueError(
                f"--resolution is {resolution}; an autoencoder with sample_size {size} and feature_size {feature} can "
                f"be made for multiples of {unit}, so give one."
            )
    return {"sample_size": resolution, "feature_size": feature_size}


def check_image_channels(in_channels: int, out_channels: int) -> None:
    """Refuses, with a `ValueError`, images that are not read, and an autoencoder of other images than its own."""
    check_channels(in_channels)
    if out_channels != in_channels:
        raise ValueError(
            f"in_channels is {in_channels} and out_channels {out_channels}; an autoencoder is trained to give back "
            "what it takes, so set both alike: --set autoencoder.in_channels=1 autoencoder.out_channels=1."
        )


def load_resized_autoencoder(name_or_path: str, resolution: int | None, **changes) -> BricsAutoencoder:
    """A saved autoencoder as of [`load_autoencoder`], for images of another size if `resolution` gives one."""
    autoencoder = load_autoencoder(name_or_path, **changes)
    if resolution is None or resolution == autoencoder.config.sample_size:
        return autoencoder
    return load_autoencoder(name_or_path, **changes, **resized(autoencoder.config, resolution))


def build_autoencoder(args: argparse.Namespace) -> BricsAutoencoder:
    """A new autoencoder of stage one, or a pretrained one, with the flags that concern it."""
    path = args.pretrained_autoencoder_name_or_path
    noise = {} if args.key_noise_scale is None else {"key_noise_scale": args.key_noise_scale}
    if path is None:
        if args.train_decoder_only:
            raise ValueError("--train_decoder_only keeps an encoder; name its --pretrained_autoencoder_name_or_path.")
        autoencoder = BricsAutoencoder(**args.autoencoder | noise)
    else:
        autoencoder = load_resized_autoencoder(path, args.resolution)
        noise = noise_changes(args) | noise
        if args.train_decoder_only:
            noise = decoder_noise(autoencoder, noise)
        kinds = {autoencoder.config.regularization, noise.get("regularization", autoencoder.config.regularization)}
        if "kl" in kinds and len(kinds) > 1:
            raise ValueError(
                f"the pretrained autoencoder has regularization {autoencoder.config.regularization!r}, and encoders "
                "with and without 'kl' differ; leave --set autoencoder.regularization out."
            )
        if noise:
            autoencoder = load_resized_autoencoder(path, args.resolution, **noise)
    check_image_channels(autoencoder.config.in_channels, autoencoder.config.out_channels)
    if args.train_decoder_only:
        autoencoder.encoder.requires_grad_(False)
    if args.gradient_checkpointing:
        autoencoder.enable_gradient_checkpointing()
    return autoencoder


def noise_changes(args: argparse.Namespace) -> dict:
    """What `--set` changes of a pretrained autoencoder; a `ValueError` if it is more than the noise in training."""
    changes = {name: value for section, name, value in args.changes if section == "autoencoder"}
    other = sorted(set(changes) - set(NOISE_ARGUMENTS))
    if other:
        raise ValueError(
            f"--set autoencoder.{other[0]} is for new models; of a pretrained one it can change "
            f"{', '.join(NOISE_ARGUMENTS)}, so leave it out."
        )
    return changes


def decoder_noise(autoencoder: BricsAutoencoder, noise: dict) -> dict:
    """The noise on key codes for `--train_decoder_only`: changes of config, with the regularisation that uses them."""
    if autoencoder.config.regularization == "kl":
        raise ValueError("--train_decoder_only adds noise to key codes; it can't with regularization 'kl'.")
    if not noise:
        raise ValueError(
            "--train_decoder_only is for noisier key codes than those before; give --key_noise_scale, above "
            f"{autoencoder.key_noise_scale:.4g}, or --set autoencoder.regularization=interpolate."
        )
    return {"regularization": "noise" if "key_noise_scale" in noise else "interpolate"} | noise


def load_key_code_pipeline(name_or_path: str) -> BricsKeyCodePipeline:
    """
    A pipeline whose diffusion model can be trained on, in float32, with a `DDPMScheduler` of the same noise levels in
    place of a solver that was made from the scheduler of a training. A `FileNotFoundError` if there is none, a
    `ValueError` if it is of another class, or its scheduler is for sampling only.
    """
    pipe = load_pipeline(name_or_path)
    if not isinstance(pipe, BricsKeyCodePipeline):
        raise ValueError(
            f"{name_or_path} is a {type(pipe).__name__}, but a BricsKeyCodePipeline is needed; name the output of "
            "stage two."
        )
    if not hasattr(pipe.scheduler, "get_velocity") and pipe.scheduler.config.get("trained_betas"):
        pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)  # of a solver: the same noise levels
    if not hasattr(pipe.scheduler, "get_velocity"):
        raise ValueError(
            f"{name_or_path} has a {type(pipe.scheduler).__name__}, which adds no noise in training; save the "
            "pipeline with a CosineVariantScheduler or another of diffusers' that has get_velocity."
        )
    pipe.autoencoder.float()
    pipe.unet.float()
    return pipe


def check_resolution(resolution: int | None, autoencoder: BricsAutoencoder) -> None:
    """Refuses a `--resolution` of stage two that is not the autoencoder's, with a `ValueError`."""
    height, width = autoencoder.sample_shape[1:]
    if resolution is not None and not resolution == height == width:
        remedy = f"give {height}" if height == width else "leave it out"
        raise ValueError(
            f"--resolution is {resolution}, but the autoencoder's images are of {height} x {width}; {remedy}, or name "
            f"an autoencoder that was trained with --resolution {resolution}."
        )


def check_key_codes(autoencoder: BricsAutoencoder, unet) -> None:
    """Refuses a UNet for key codes of another number of channels than the autoencoder's, with a `ValueError`."""
    channels = autoencoder.key_code_shape[0]
    if unet.config.in_channels != channels:
        raise ValueError(
            f"the pipeline's UNet is for key codes of {unet.config.in_channels} channels, the autoencoder's have "
            f"{channels}; name the autoencoder that the pipeline has, or leave --autoencoder_name_or_path out."
        )

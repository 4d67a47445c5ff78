"""What compare_generation.py trains on: latents of each autoencoder as a diffusion model takes them, and schedules."""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from autoencoder_models import CLASSES, decode, encode
from comparison import BATCH_SIZE, reconstructions, training_rows
from diffusers import DPMSolverMultistepScheduler, UNet2DModel

from brics_diffusers import BricsAutoencoder, CosineVariantScheduler
from brics_diffusers.data import collection_fingerprint, evaluation_loader
from brics_diffusers.metrics.feature_distances import collection_features
from brics_diffusers.metrics.feature_extractors import extractor_digest
from brics_diffusers.metrics.reconstruction import image_batches, row_generator
from brics_diffusers.utils.files import atomic_write, weights_digest
from brics_diffusers.utils.safe_loading import load_class_safely


# Table 4's, by its letters, and that of the configs for small collections: changes of the scheduler, and the limit of
# min-SNR weighting.
SCHEDULES = {
    "b": ({"gamma_schedule": "cosine_variant"}, None),
    "a": ({"gamma_schedule": "cosine"}, 5.0),
    "b-min-snr": ({"gamma_schedule": "cosine_variant"}, 5.0),
}


def load_saved_autoencoder(folder: Path) -> torch.nn.Module:
    """
    A model that compare_autoencoders.py has saved, in eval mode; a `FileNotFoundError` if there is none, and a
    `ValueError` if it is of a class that is not compared.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; train this autoencoder with compare_autoencoders.py, or leave it out of --models."
        )
    name = json.loads(path.read_text())["_class_name"]
    if name not in CLASSES:
        raise ValueError(f"{path} is of class {name}; give a model of {', '.join(CLASSES)}.")
    return load_class_safely(CLASSES[name], str(folder)).requires_grad_(False).eval()


@dataclass
class LatentSpace:
    """
    An autoencoder's latents as the diffusion model sees them: key codes less 0.5, others as they are, over
    `deviation`, their standard deviation over the training images, as LDM scales them, unless `--scaling_factor` says
    otherwise. `VQModel`'s are those before the quantisation, which is part of decoding.

    `name` is that of the autoencoder's folder. On the CPU: `latents` (N, C, H, W) of the training images, and of their
    mirror images after them if training has those; `held_out` (M, C, H, W); and features (R, D) of reconstructions, of
    training and of held-out images.
    """

    autoencoder: torch.nn.Module
    deviation: float
    latents: torch.Tensor
    held_out: torch.Tensor
    reconstruction_features: torch.Tensor
    held_out_reconstruction_features: torch.Tensor
    name: str

    @property
    def bound(self) -> float | None:
        """What latents stay below in size, if they have bounds."""
        return 0.5 / self.deviation if isinstance(self.autoencoder, BricsAutoencoder) else None

    @property
    def device(self) -> torch.device:
        """Where the autoencoder is."""
        return self.autoencoder.device

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """The diffusion model's latents of images in [-1, 1]."""
        return _scaled(self.autoencoder, encode(self.autoencoder, images), self.deviation)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images of the diffusion model's latents."""
        return decode(self.autoencoder, latents * self.deviation + _center(self.autoencoder))


@torch.no_grad()
def latent_space(args, folder: Path, train_set, validation_set, extractor) -> LatentSpace:
    """The latent space of a saved autoencoder; encoding is done once and kept in `args.output_dir`."""
    autoencoder = load_saved_autoencoder(folder).to(args.device)
    origin = weights_digest({"autoencoder": autoencoder}), extractor_digest(extractor)
    origin += tuple(collection_fingerprint(dataset) for dataset in (train_set, validation_set))
    origin += args.num_reference_images, args.flags.random_flip, args.flags.scaling_factor
    digest = hashlib.sha256(repr(origin).encode()).hexdigest()[:16]
    path = Path(args.output_dir) / "latents" / f"{folder.name}-{digest}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = _encode_all(args, autoencoder, train_set, validation_set, extractor)
        with atomic_write(path) as file:
            file.write(safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()}))
    tensors = safetensors.torch.load_file(path)
    return LatentSpace(autoencoder, tensors.pop("deviation").item(), **tensors, name=folder.name)


def _encode_all(args, autoencoder, train_set, validation_set, extractor) -> dict[str, torch.Tensor]:
    size = autoencoder.config.sample_size

    def latents(dataset, random_flip=False):
        loader = evaluation_loader(dataset, size, BATCH_SIZE, random_flip=random_flip)
        batches = image_batches(loader, args.device, progress=False)
        return torch.cat([encode(autoencoder, images).float().cpu() for images, _ in batches])

    def features(dataset, rows=None):
        loader = evaluation_loader(dataset, size, BATCH_SIZE, rows=rows)
        return collection_features(reconstructions(autoencoder, loader), extractor, args.device, progress=False)

    of_training, held_out = latents(train_set, args.flags.random_flip), latents(validation_set)
    deviation, factor = of_training.std(), args.flags.scaling_factor
    if factor is not None and isinstance(autoencoder, BricsAutoencoder):
        deviation = torch.tensor(1 / factor)
    return {
        "deviation": deviation,
        "latents": _scaled(autoencoder, of_training, deviation),
        "held_out": _scaled(autoencoder, held_out, deviation),
        "reconstruction_features": features(train_set, training_rows(len(train_set))[: args.num_reference_images]),
        "held_out_reconstruction_features": features(validation_set),
    }


def _scaled(autoencoder, latents: torch.Tensor, deviation) -> torch.Tensor:
    return (latents - _center(autoencoder)) / deviation


def _center(autoencoder) -> float:
    return 0.5 if isinstance(autoencoder, BricsAutoencoder) else 0.0


def build_unet(config: dict, latents: torch.Tensor) -> UNet2DModel:
    """A UNet for latents (N, C, H, W), with weights from torch's random state."""
    channels, height = latents.shape[1:3]
    return UNet2DModel(**{"sample_size": height, "in_channels": channels, "out_channels": channels} | config)


def build_scheduler(config: dict, schedule: str, bound: float | None) -> CosineVariantScheduler:
    """One of `SCHEDULES`. Nothing clamps latents without bounds, and DPM-Solver++ only those within [-1, 1]."""
    changes, _ = SCHEDULES[schedule]
    of_latents = {"clip_sample": bound is not None, "clip_sample_range": bound or 1.0}
    return CosineVariantScheduler(**{"prediction_type": "v_prediction"} | config | changes | of_latents)


def starting_noise(shape: torch.Size, count: int) -> torch.Tensor:
    """Noise (count, *shape) to sample from, each one's by its number alone, so that all models begin with the same."""
    return torch.stack([torch.randn(shape, generator=row_generator(0, number)) for number in range(count)])


@torch.no_grad()
def denoise(unet, scheduler, noise: torch.Tensor, num_inference_steps: int) -> torch.Tensor:
    """Latents of noise, both (B, C, H, W), by DPM-Solver++ (2M) on Karras' noise levels."""
    solver = DPMSolverMultistepScheduler.from_config(scheduler.config, use_karras_sigmas=True)
    solver.set_timesteps(num_inference_steps, device=noise.device)
    latents = noise * solver.init_noise_sigma
    for timestep in solver.timesteps:
        prediction = unet(solver.scale_model_input(latents, timestep), timestep, return_dict=False)[0]
        latents = solver.step(prediction, timestep, latents, return_dict=False)[0]
    return latents


def clock(device: torch.device) -> float:
    """Seconds. Other work on a CPU does not lengthen the time that a process has computed."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()

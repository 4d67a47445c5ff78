"""Training steps: images per second of stage one beside diffusers' VQModel, and of stage two; data; Adam on the grids.

Stage one and the VQModel have the same encoder (widths, layers, attention), batch, loss (mean squared error and each
one's own regularizer) and optimizer, and take turns step by step. The VQModel's decoder is VQGAN's with the encoder's
widths. R1, discriminator and LPIPS, which would be the same for both, are left out. The share of time for data is that
of a loader without processes of its own, which hides nothing.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from compare_autoencoders import reconstruct
from diffusers import UNet2DModel, VQModel
from diffusers.models.autoencoders.vae import Encoder
from PIL import Image
from sampling import SMALL_AUTOENCODER, SMALL_UNET
from timing import interleaved, medians

from brics_diffusers import BricsAutoencoder
from brics_diffusers.data import ImageCollection, collate_images, load_collection, training_loader
from brics_diffusers.models.presets import PRESETS
from brics_diffusers.training_utils.losses import denoising_loss, reconstruction_loss
from brics_diffusers.training_utils.optimization import build_optimizer
from brics_diffusers.utils.reports import markdown_table


# The preset with images of half the side: two cores get through some steps.
AUTOENCODER = PRESETS["church-64x64x4"] | {"sample_size": 128, "feature_size": 32}
# Shape of the key codes that the UNet of the emoji model is made for.
EMOJI_CODES = (SMALL_AUTOENCODER["key_channels"], *[SMALL_AUTOENCODER["sample_size"] // 4] * 2)
NUM_CODES = 8192  # LDM's VQ models
# Their squares are denormal numbers, as they become in Adam's second moments of entries that are rarely hit.
FAINT_GRADIENT = 1e-21


def vq_model(ours: BricsAutoencoder) -> VQModel:
    """VQGAN with our encoder."""
    config = ours.config
    widths = tuple(config.encoder_block_out_channels)
    model = VQModel(
        block_out_channels=widths,
        down_block_types=tuple(config.down_block_types),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=2,
        latent_channels=config.key_channels,
        norm_num_groups=config.norm_num_groups,
        num_vq_embeddings=NUM_CODES,
    )
    model.encoder = Encoder(
        out_channels=config.key_channels,
        down_block_types=tuple(config.down_block_types),
        block_out_channels=widths,
        layers_per_block=config.encoder_layers_per_block,
        norm_num_groups=config.norm_num_groups,
        double_z=False,
    )
    return model


def write_images(folder: Path, count: int, size: int) -> None:
    """Smooth random images as PNG files of twice the training size, as a photograph's reader would meet them."""
    random = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        coarse.resize((2 * size, 2 * size), Image.Resampling.BICUBIC).save(folder / f"{index:03d}.png")


class Reader:
    """A training step's part before the model: the next batch of the loader over a folder of PNG files."""

    def __init__(self, folder: str, size: int, batch_size: int, device: torch.device):
        write_images(Path(folder), 8 * batch_size, size)
        images = ImageCollection(load_collection(folder), size, random_flip=True)
        self.batches = iter(training_loader(images, batch_size, collate_fn=collate_images))
        self.device = device
        self.read()

    def read(self) -> None:
        self.batch = next(self.batches)["pixel_values"].to(self.device)


class StageOne:
    """A model in training, in two parts: gradients and the optimizer's step."""

    def __init__(self, model: torch.nn.Module, reader: Reader):
        self.model, self.reader = model.train(), reader
        self.optimizer = build_optimizer(model, 2e-3, 0.9, 0.99, 1e-15)

    def gradients(self) -> None:
        self.optimizer.zero_grad()
        sample, regularizer = reconstruct(self.model, self.reader.batch)
        (reconstruction_loss(sample, self.reader.batch, perceptual_weight=0.0)[0] + regularizer).backward()


class StageTwo:
    """The diffusion model in training on random key codes."""

    def __init__(self, unet: dict, latent_shape: tuple, batch_size: int, device: torch.device):
        channels, size, _ = latent_shape
        self.model = UNet2DModel(sample_size=size, in_channels=channels, out_channels=channels, **unet).to(device)
        self.optimizer = build_optimizer(self.model, 1e-4, 0.9, 0.999, 1e-8)
        self.latents = torch.randn(batch_size, *latent_shape, device=device)
        self.timesteps = torch.randint(1000, (batch_size,), device=device)

    def step(self) -> None:
        self.optimizer.zero_grad()
        denoising_loss(self.model(self.latents, self.timesteps).sample, self.latents).backward()
        self.optimizer.step()


def time_stages(device, rounds, batch_size, autoencoder, unet, unet_batch_size) -> dict:
    """Medians in seconds of all parts of the steps, which take turns."""
    ours = BricsAutoencoder(**autoencoder).to(device)
    with tempfile.TemporaryDirectory() as folder:
        reader = Reader(folder, ours.config.sample_size, batch_size, device)
        runs = {"BRICS": StageOne(ours, reader), "VQModel": StageOne(vq_model(ours).to(device), reader)}
        steps = {"data": reader.read}
        for name, run in runs.items():
            steps |= {f"{name} gradients": run.gradients, f"{name} optimizer": run.optimizer.step}
        steps["stage two"] = StageTwo(unet, EMOJI_CODES, unet_batch_size, device).step
        interleaved(steps, device, rounds=1)  # warms up, and makes Adam's moments
        return medians(interleaved(steps, device, rounds))


def time_adam(entries: torch.Tensor, rounds: int) -> list[dict]:
    """Adam's step on grids alone, fused and foreach, with ordinary and with faint gradients, flushed or not."""
    rows, device = [], entries.device
    for name, gradient in (("ordinary", 1e-3), ("faint", FAINT_GRADIENT)):
        for flush in (True, False) if device.type == "cpu" else (False,):
            torch.set_flush_denormal(flush)
            steps = {}
            for kind in ("fused", "foreach"):
                grids = entries.clone().requires_grad_()
                grids.grad = torch.full_like(grids, gradient)
                steps[kind] = torch.optim.Adam([grids], 2e-3, (0.9, 0.99), 1e-15, **{kind: True}).step
            interleaved(steps, device, rounds=1)
            times = medians(interleaved(steps, device, rounds))
            rows.append({"gradients": name, "denormals": "flushed" if flush else "kept", **times})
    torch.set_flush_denormal(False)
    return rows


def measure(
    device: str = "cpu",
    rounds: int = 3,
    batch_size: int = 2,
    autoencoder: dict | None = None,
    unet: dict | None = None,
    unet_batch_size: int = 32,
) -> dict:
    """
    Runs everything and returns the numbers: `"images_per_second"` by model, `"VQModel / BRICS"` (time of a step),
    `"data_share"`, `"optimizer_share"` (of our step), `"adam"` (rows, in seconds) and the sizes. One more step of
    everything warms up; the models' arguments are `AUTOENCODER` and `SMALL_UNET` by default.
    """
    device, autoencoder = torch.device(device), autoencoder or AUTOENCODER
    torch.manual_seed(0)
    torch.set_flush_denormal(True)  # as the training scripts do
    times = time_stages(device, rounds, batch_size, autoencoder, unet or SMALL_UNET, unet_batch_size)
    steps = {name: times[f"{name} gradients"] + times[f"{name} optimizer"] for name in ("BRICS", "VQModel")}
    per_second = {name: batch_size / value for name, value in steps.items()}
    entries = BricsAutoencoder(**autoencoder).grids.entries.detach().to(device)
    return {
        "images_per_second": per_second | {"stage two": unet_batch_size / times["stage two"]},
        "VQModel / BRICS": steps["VQModel"] / steps["BRICS"],
        "data_share": times["data"] / (times["data"] + steps["BRICS"]),
        "optimizer_share": times["BRICS optimizer"] / steps["BRICS"],
        "adam": time_adam(entries, rounds),
        "size": autoencoder["sample_size"],
        "batch": batch_size,
        "unet_batch": unet_batch_size,
    }


def describe(result: dict) -> str:
    """The part of the report."""
    rows = [{"model": name, "images/s": value} for name, value in result["images_per_second"].items()]
    adam = [
        {name: f"{1e3 * value:.1f} ms" if isinstance(value, float) else value for name, value in row.items()}
        for row in result["adam"]
    ]
    size, batch = result["size"], result["batch"]
    return f"""Stage one on images of {size} x {size}, batch {batch}; stage two with the UNet of `noto-emoji-64`
and its key codes, batch {result["unet_batch"]}.

{markdown_table(rows)}
A step of the VQModel takes {result["VQModel / BRICS"]:.2f} of the time of one of BRICS. Of a step with its data,
{result["data_share"]:.1%} is reading and resizing images; of a step, {result["optimizer_share"]:.1%} is the optimizer.

Adam's step on the grids alone; faint gradients leave denormal second moments:

{markdown_table(adam)}"""

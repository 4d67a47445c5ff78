"""Loss of a diffusion model on key codes that it is not trained on, by noise level."""

from collections.abc import Callable

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..data import evaluation_loader
from ..metrics.reconstruction import row_generator
from ..models import BricsAutoencoder
from ..pipelines.pipeline_brics_key_code import key_codes_to_latents


QUARTERS = 4


class HeldOutLoss:
    """
    Denoising loss of held-out images, which the autoencoder encodes once and the processes share. Each is noised once
    in every quarter of the time t in [0, 1]; its noise and times follow from its row, so that they are the same at all
    validations and on any number of processes.
    """

    @torch.no_grad()
    def __init__(
        self,
        accelerator: Accelerator,
        autoencoder: BricsAutoencoder,
        dataset: datasets.Dataset,
        batch_size: int,
        num_workers: int = 0,
    ):
        self.accelerator = accelerator
        rows = range(accelerator.process_index, len(dataset), accelerator.num_processes)
        channels, *size = autoencoder.sample_shape
        loader = evaluation_loader(dataset, size, batch_size, num_workers, rows=rows, channels=channels)
        self.batches = []
        for batch in loader:
            if batch["index"].numel():
                key_codes = autoencoder.encode(batch["pixel_values"].to(accelerator.device)).key_codes
                self.batches.append((batch["index"].tolist(), key_codes))

    @torch.no_grad()
    def __call__(
        self, loss: Callable[..., torch.Tensor], num_train_timesteps: int, scaling_factor: float
    ) -> dict[str, float]:
        """
        `"loss"`, and for each quarter one such as `"loss_t_0.25_0.50"`, the same on every process; empty if no image
        is readable. `loss` makes of latents and noise (B, C, H, W) and timesteps (B,) a scalar, their mean.
        """
        sums, count = torch.zeros(QUARTERS, dtype=torch.float64), 0
        for rows, key_codes in self.batches:
            latents = key_codes_to_latents(key_codes, scaling_factor)
            draws = [_draw(row, latents.shape[1:], num_train_timesteps) for row in rows]
            noise, timesteps = (torch.stack(parts, dim=1).to(latents.device) for parts in zip(*draws, strict=True))
            values = [loss(latents, *pair) for pair in zip(noise, timesteps, strict=True)]
            sums += len(rows) * torch.stack(values).double().cpu()
            count += len(rows)
        shares = gather_object([(sums, count)])
        count = sum(count for _, count in shares)
        if count == 0:
            return {}
        means = (sum(sums for sums, _ in shares) / count).tolist()
        names = [f"loss_t_{quarter / QUARTERS:.2f}_{(quarter + 1) / QUARTERS:.2f}" for quarter in range(QUARTERS)]
        return {"loss": sum(means) / QUARTERS} | dict(zip(names, means, strict=True))


def _draw(row: int, shape: torch.Size, num_train_timesteps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise (4, C, H, W) and timesteps (4,) of one image, one of each quarter."""
    generator = row_generator(0, row)
    noise = torch.randn(QUARTERS, *shape, generator=generator)
    times = (torch.arange(QUARTERS) + torch.rand(QUARTERS, generator=generator)) / QUARTERS
    return noise, (times * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)  # rounding may reach 1

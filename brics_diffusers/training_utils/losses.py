"""Losses of both training stages, as functions of tensors (App. A.3 and A.5)."""

import torch
import torch.nn.functional as F
from torch import nn

from ..utils.compositing import as_rgb
from .augmentation import augment


def reconstruction_loss(
    sample: torch.Tensor,
    target: torch.Tensor,
    mse_weight: float = 20.0,
    perceptual_weight: float = 5.0,
    perceptual_metric: nn.Module | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    Weighted sum of squared error and a perceptual distance, LPIPS in the paper (App. A.3), of reconstructions and
    images (B, C, H, W); and its unweighted parts by name, detached: `"mse"`, and the distance as its network calls it,
    `"lpips"` for LPIPS. The network, of [`load_perceptual_network`], sees RGBA on white; it is needed unless its
    weight is 0.
    """
    mse = F.mse_loss(sample, target)
    loss, parts = mse_weight * mse, {"mse": mse.detach()}
    if perceptual_weight > 0:
        distance = perceptual_metric(as_rgb(sample), as_rgb(target)).mean()
        loss = loss + perceptual_weight * distance
        parts[getattr(perceptual_metric, "metric_name", "lpips")] = distance.detach()
    return loss, parts


def adversarial_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """Non-saturating logistic loss of the generating side: mean softplus(-logits) of its images."""
    return F.softplus(-fake_logits).mean()


def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """Logistic loss of the discriminator: mean softplus(-real) + mean softplus(fake)."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def gradient_penalty(images: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """
    R1 of Mescheder et al. 2018: half the squared norm of the discriminator's gradient at real images (B, C, H, W) that
    require a gradient, batch mean; to be multiplied by gamma and by the interval between penalties. Logits (B, ...) of
    patches are averaged.
    """
    logits = logits.reshape(len(images), -1).mean(dim=1)
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return 0.5 * gradient.square().sum(dim=(1, 2, 3)).mean()


def denoising_loss(
    prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Squared error of the diffusion model's prediction (B, C, H, W), with one weight a sample (B,), for instance from
    `min_snr_weights` (App. A.5).
    """
    error = (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))
    return (error if weights is None else weights * error).mean()


def adversarial_ramp(step: int, start_step: int, warmup_steps: int) -> float:
    """Share of the adversarial weight at an optimizer step: 0 before `start_step`, then linear to 1."""
    if step < start_step:
        return 0.0
    return min(1.0, (step - start_step + 1) / max(warmup_steps, 1))


class DiscriminatorLoss(nn.Module):
    """
    A discriminator together with its loss, so that one forward pass of a distributed wrapper covers all of it: with R1
    of the paper's gamma and interval (App. A.3), which scales its weight, on plain real images; all images are judged
    after [`~augmentation.augment`].
    """

    def __init__(
        self,
        discriminator: nn.Module,
        gradient_penalty_weight: float = 4.0,
        gradient_penalty_interval: int = 16,
        augmentation: str = "",
    ):
        super().__init__()
        self.discriminator = discriminator
        self.gradient_penalty_weight = gradient_penalty_weight
        self.gradient_penalty_interval = gradient_penalty_interval
        self.augmentation = augmentation

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B,), or (B, h, w) of patches, of images (B, C, H, W), augmented."""
        return self.discriminator(augment(images, self.augmentation))

    @torch.compiler.disable  # its gradient is differentiated again, and compiled code can't be: a step in 16 is eager
    def penalty(self, real: torch.Tensor) -> torch.Tensor:
        """R1 at images (B, C, H, W), in float32."""
        with torch.autocast(real.device.type, enabled=False):
            images = real.detach().float().requires_grad_(True)
            return gradient_penalty(images, self.discriminator(images))

    def forward(self, real: torch.Tensor, fake: torch.Tensor, penalize: bool):
        """
        The loss to minimise for images and detached reconstructions (B, C, H, W), and its parts by name, detached;
        with R1, in float32, if the step is to be penalised.
        """
        real_logits, fake_logits = self.logits(real), self.logits(fake)
        loss = discriminator_loss(real_logits.float(), fake_logits.float())
        parts = {"discriminator": loss.detach()}
        if penalize and self.gradient_penalty_weight > 0:
            penalty = self.penalty(real)
            loss = loss + self.gradient_penalty_weight * self.gradient_penalty_interval * penalty
            parts["r1"] = penalty.detach()
        return loss, parts

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
    r"""
    Weighted sum of squared error and a perceptual distance, LPIPS in the paper (App. A.3).

    Args:
        sample (`torch.Tensor` of shape (B, C, H, W)): Reconstructions.
        target (`torch.Tensor` of shape (B, C, H, W)): Images in [-1, 1].
        mse_weight (`float`, defaults to 20.0): Weight of the mean squared error.
        perceptual_weight (`float`, defaults to 5.0): Weight of the perceptual distance.
        perceptual_metric (`nn.Module`, *optional*):
            Result of [`load_perceptual_network`], which sees RGBA on white; needed unless `perceptual_weight` is 0.

    Returns:
        `tuple`: the loss, and its unweighted parts by name, detached: `"mse"`, and the distance as its network calls
        it, `"lpips"` for LPIPS.
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
    r"""
    R1 of Mescheder et al. 2018: half the squared norm of the discriminator's gradient at real images, batch mean.

    Args:
        images (`torch.Tensor` of shape (B, C, H, W)): Real images that require a gradient.
        logits (`torch.Tensor` of shape (B, ...)): The discriminator's logits for them; those of patches are averaged.

    Returns:
        `torch.Tensor`: scalar, to be multiplied by gamma and by the interval between penalties.
    """
    logits = logits.reshape(len(images), -1).mean(dim=1)
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return 0.5 * gradient.square().sum(dim=(1, 2, 3)).mean()


def denoising_loss(
    prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    r"""
    Squared error of the diffusion model, with one weight a sample (App. A.5).

    Args:
        prediction (`torch.Tensor` of shape (B, C, H, W)): Output of the model.
        target (`torch.Tensor` of shape (B, C, H, W)): Noise, velocity or clean latents.
        weights (`torch.Tensor` of shape (B,), *optional*): For instance from `min_snr_weights`.

    Returns:
        `torch.Tensor`: scalar.
    """
    error = (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))
    return (error if weights is None else weights * error).mean()


def adversarial_ramp(step: int, start_step: int, warmup_steps: int) -> float:
    """Share of the adversarial weight at an optimizer step: 0 before `start_step`, then linear to 1."""
    if step < start_step:
        return 0.0
    return min(1.0, (step - start_step + 1) / max(warmup_steps, 1))


class DiscriminatorLoss(nn.Module):
    r"""
    A discriminator together with its loss, so that one forward pass of a distributed wrapper covers all of it.

    Args:
        discriminator (`nn.Module`): Images to logits.
        gradient_penalty_weight (`float`, defaults to 4.0): Gamma of R1 (App. A.3).
        gradient_penalty_interval (`int`, defaults to 16): Steps from one penalty to the next; scales its weight.
        augmentation (`str`, defaults to `""`):
            What [`~augmentation.augment`] does to all images before they are judged. R1 is that of plain real images.
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
        r"""
        Args:
            real (`torch.Tensor` of shape (B, C, H, W)): Images of the collection.
            fake (`torch.Tensor` of shape (B, C, H, W)): Reconstructions, detached.
            penalize (`bool`): Whether this is a step with R1, which is computed in float32.

        Returns:
            `tuple`: the loss to minimise, and its parts by name, detached.
        """
        real_logits, fake_logits = self.logits(real), self.logits(fake)
        loss = discriminator_loss(real_logits.float(), fake_logits.float())
        parts = {"discriminator": loss.detach()}
        if penalize and self.gradient_penalty_weight > 0:
            penalty = self.penalty(real)
            loss = loss + self.gradient_penalty_weight * self.gradient_penalty_interval * penalty
            parts["r1"] = penalty.detach()
        return loss, parts

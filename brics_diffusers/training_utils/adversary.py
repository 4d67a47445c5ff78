"""The discriminator beside an autoencoder in training: when it learns, when it counts, and how much (App. A.3)."""

import argparse

import torch
from accelerate import Accelerator

from ..models import BricsAutoencoder, BricsDiscriminator, PatchDiscriminator
from .losses import DiscriminatorLoss, adversarial_loss, adversarial_ramp
from .optimization import build_optimizer, schedule_factor, set_adam


DISCRIMINATOR_TYPES = ("stylegan2", "patch")


def build_discriminator(
    discriminator_type: str, autoencoder: BricsAutoencoder, arguments: dict
) -> BricsDiscriminator | PatchDiscriminator:
    """A new discriminator, one of `DISCRIMINATOR_TYPES`, of the images of an autoencoder."""
    arguments = {"in_channels": autoencoder.config.out_channels} | arguments
    if discriminator_type == "patch":
        return PatchDiscriminator(**arguments)
    return BricsDiscriminator(**{"sample_size": autoencoder.config.sample_size} | arguments)


def last_layer_weight(autoencoder: BricsAutoencoder) -> torch.nn.Parameter:
    """The weight that makes pixels: of the style decoder's last RGB output, or another decoder's last convolution."""
    decoder = autoencoder.decoder
    return decoder.conv_out.weight if hasattr(decoder, "conv_out") else decoder.blocks[-1].to_rgb.weight


def adaptive_weight(
    accelerator: Accelerator, reconstruction: torch.Tensor, adversarial: torch.Tensor, weight: torch.nn.Parameter
) -> torch.Tensor:
    """
    VQGAN's weight of the adversarial loss (arXiv 2012.09841, Eq. 7), in [0, 10000], detached: the norm of the
    reconstruction loss' gradient to [`last_layer_weight`] over that of the adversarial loss'. Gradients are means over
    the processes, so all of them have the same weight; the accelerator's loss scale keeps those in float16 from
    vanishing. It is not a number unless all gradients are finite, so that the step is skipped and a loss scale that is
    too large becomes smaller.
    """
    scale = torch.ones((), device=weight.device)
    scale = scale if accelerator.scaler is None else accelerator.scaler.scale(scale)
    gradients = [
        torch.autograd.grad(scale * loss, weight, retain_graph=True)[0].float()
        for loss in (reconstruction, adversarial)
    ]
    gradients = accelerator.reduce(torch.stack(gradients) / scale, reduction="mean")
    norms = gradients.flatten(1).norm(dim=1)
    weight = (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4)
    return weight.where(norms.isfinite().all(), torch.nan).detach()


def lazy_correction(interval: int, penalty_weight: float) -> float:
    r"""
    StyleGAN2's correction of Adam where a penalty comes every `interval` steps (arXiv 1912.04958, App. B): the factor
    of the learning rate and the power of the betas, interval / (interval + 1); 1 for a penalty at every step, or none.
    """
    return interval / (interval + 1) if interval > 1 and penalty_weight > 0 else 1.0


class Adversary:
    """
    The discriminator with its loss and its optimizer, and its part in the loss of the generating side, whose schedule
    scales the discriminator's learning rate too. A `ValueError` if the adversarial loss is to count before the
    discriminator learns.
    """

    def __init__(
        self, args: argparse.Namespace, accelerator: Accelerator, autoencoder: BricsAutoencoder, lr_scheduler
    ):
        self.args, self.accelerator, self.lr_scheduler = args, accelerator, lr_scheduler
        start = args.discriminator_start_step
        self.start_step = args.gan_start_step if start is None else start
        if self.start_step > args.gan_start_step:
            raise ValueError(
                f"--discriminator_start_step is {start}, after --gan_start_step {args.gan_start_step}; a "
                "discriminator must learn before it counts, so lower the one or raise the other."
            )
        self.last_weight = last_layer_weight(autoencoder)
        discriminator = build_discriminator(args.discriminator_type, autoencoder, args.discriminator)
        interval, gamma = args.gradient_penalty_interval, args.gradient_penalty_weight
        loss = DiscriminatorLoss(discriminator, gamma, interval, args.augmentation)
        power = lazy_correction(interval, gamma) if args.lazy_r1_correction else 1.0
        rate = args.learning_rate if args.discriminator_learning_rate is None else args.discriminator_learning_rate
        self.learning_rate = power * rate
        betas = args.discriminator_adam_beta1**power, args.adam_beta2**power
        optimizer = build_optimizer(loss, self.learning_rate, *betas, args.discriminator_adam_epsilon)
        self.network, self.optimizer = accelerator.prepare(loss, optimizer)

    def learns(self, step: int) -> bool:
        """Whether the discriminator is trained at an optimizer step."""
        return step >= self.start_step

    def counts(self, step: int) -> bool:
        """Whether the generating side has the adversarial loss at an optimizer step."""
        return step >= self.args.gan_start_step

    def generator_loss(self, sample: torch.Tensor, reconstruction: torch.Tensor, step: int):
        """
        The weighted adversarial loss of reconstructions (B, C, H, W), float32, with their graph, and its parts by
        name, detached. An adaptive weight heeds `reconstruction`, the weighted reconstruction loss.
        """
        args = self.args
        # Unwrapped: its parameters take no gradient here, so there is nothing to synchronise.
        self.network.requires_grad_(False)
        with self.accelerator.autocast():
            logits = self.accelerator.unwrap_model(self.network).logits(sample)
        adversarial = adversarial_loss(logits.float())
        parts = {"adversarial": adversarial.detach()}
        weight = adversarial_ramp(step, args.gan_start_step, args.gan_warmup_steps) * args.adversarial_weight
        if args.adaptive_gan_weight:
            ratio = adaptive_weight(self.accelerator, reconstruction, adversarial, self.last_weight)
            parts["adaptive_gan_weight"], weight = ratio, weight * ratio
        return weight * adversarial, parts

    def discriminator_loss(self, images: torch.Tensor, sample: torch.Tensor, step: int):
        """
        The loss of the discriminator for images and their reconstructions, and its parts by name, detached. Its
        optimizer gets the learning rate of the step.
        """
        set_adam(self.optimizer, learning_rate=self.learning_rate * schedule_factor(self.lr_scheduler))
        self.network.requires_grad_(True)
        return self.network(images, sample.detach(), step % self.args.gradient_penalty_interval == 0)

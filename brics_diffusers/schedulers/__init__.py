"""Noise schedules of the diffusion model, without anything of pipelines and training loops."""

from .scheduling_cosine_variant import CosineVariantScheduler

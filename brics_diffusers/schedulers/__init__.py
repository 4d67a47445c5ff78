"""Noise schedules of the diffusion model."""

from .scheduling_cosine_variant import CosineVariantScheduler

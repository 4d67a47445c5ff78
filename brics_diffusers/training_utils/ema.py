"""Averages of weights over training steps."""

import contextlib

import torch
from diffusers.training_utils import EMAModel


def ema_half_life_decay(batch_size: int, half_life_images: float) -> float:
    """Decay of averaged weights that forgets half in `half_life_images` images at `batch_size` images a step."""
    return 0.5 ** (batch_size / half_life_images)


@contextlib.contextmanager
def averaged_weights(model: torch.nn.Module, ema: EMAModel):
    """Within the context, `model` has the averaged weights and is in eval mode."""
    was_training = model.training
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    model.eval()
    try:
        yield model
    finally:
        ema.restore(model.parameters())
        model.train(was_training)

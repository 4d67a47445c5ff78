"""Gray images and images with transparency as the RGB that people, and networks trained on photographs, see."""

import torch


def as_rgb(images: torch.Tensor) -> torch.Tensor:
    """
    Images (B, C, H, W) in [-1, 1] of 1, 3 or 4 channels to (B, 3, H, W): gray three times, RGBA composited on white,
    RGB as it is. Gradients flow.
    """
    channels = images.shape[1]
    if channels == 3:
        return images
    if channels == 1:
        return images.expand(-1, 3, -1, -1)
    if channels == 4:
        opacity = (images[:, 3:] / 2 + 0.5).clamp(0, 1)
        return opacity * images[:, :3] + (1 - opacity)
    raise ValueError(f"images have {channels} channels; they are shown with 1, 3 or 4, so give as many.")

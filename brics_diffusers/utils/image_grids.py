"""Pictures of batches of images."""

import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from .compositing import as_rgb


def image_grid(images: torch.Tensor, columns: int = 8) -> Image.Image:
    """Puts images (N, C, H, W) in [-1, 1], clipped, into one picture, `columns` in a row; RGBA is shown on white."""
    images = as_rgb(images.detach().float().cpu().clamp(-1, 1)) / 2 + 0.5
    return to_pil_image(make_grid(images, nrow=columns, padding=2, pad_value=1.0))


def side_by_side(targets: torch.Tensor, samples: torch.Tensor, columns: int = 8) -> Image.Image:
    """Rows of `columns` images, each followed by the row of their reconstructions, as one picture."""
    rows = [part for pair in zip(targets.split(columns), samples.split(columns), strict=True) for part in pair]
    return image_grid(torch.cat([row.cpu().float() for row in rows]), min(columns, len(targets)))

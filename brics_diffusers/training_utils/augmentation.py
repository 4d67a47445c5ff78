"""Differentiable augmentation of what a discriminator sees, for small collections (Zhao et al., arXiv 2006.10738).

Each function takes images (B, C, H, W) in [-1, 1], changes each at random by itself, and lets gradients through.
Random numbers come from the default generator of the images' device. What is moved or cut out is 0, a mid grey.
"""

import torch
import torch.nn.functional as F


def color(images: torch.Tensor) -> torch.Tensor:
    """Brightness (+- 0.5), saturation (times 0 to 2) and contrast (times 0.5 to 1.5); transparency stays."""
    if images.shape[1] == 4:
        return torch.cat([color(images[:, :3]), images[:, 3:]], dim=1)
    random = torch.rand(3, len(images), 1, 1, 1, device=images.device, dtype=images.dtype)
    images = images + (random[0] - 0.5)
    grey = images.mean(dim=1, keepdim=True)
    images = grey + 2 * random[1] * (images - grey)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (random[2] + 0.5) * (images - mean)


def translation(images: torch.Tensor, ratio: float = 1 / 8) -> torch.Tensor:
    """Moves by up to `ratio` of height and width, whole pixels."""
    images = F.pad(images, (1, 1, 1, 1))
    for dim in (2, 3):
        size = images.shape[dim] - 2
        largest = round(size * ratio)
        shift = torch.randint(-largest, largest + 1, (len(images), 1), device=images.device)
        index = (torch.arange(size, device=images.device) + shift + 1).clamp(0, size + 1)  # (B, size)
        index = index.view(len(images), 1, *((size, 1) if dim == 2 else (1, size)))
        shape = list(images.shape)
        shape[dim] = size
        images = images.gather(dim, index.expand(shape))
    return images


def cutout(images: torch.Tensor, ratio: float = 1 / 2) -> torch.Tensor:
    """Cuts out a rectangle of `ratio` of height and width, with its centre anywhere in the image."""
    inside = []
    for size in images.shape[2:]:
        side = round(size * ratio)
        start = torch.randint(0, size + 1, (len(images), 1), device=images.device) - side // 2
        place = torch.arange(size, device=images.device) - start  # (B, size)
        inside.append((place >= 0) & (place < side))
    rows, columns = inside
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


POLICIES = {"color": color, "translation": translation, "cutout": cutout}


def augment(images: torch.Tensor, names: str) -> torch.Tensor:
    """
    Changes each of the images (B, C, H, W) in [-1, 1] at random, in the order of `names`, some of `POLICIES` with
    commas between, or none. Brightness and contrast may leave [-1, 1].
    """
    for name in filter(None, names.split(",")):
        images = POLICIES[name](images)
    return images

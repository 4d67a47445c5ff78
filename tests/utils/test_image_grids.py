"""Many images in one picture."""

import torch

from brics_diffusers.utils.image_grids import image_grid, side_by_side


def test_pictures():
    targets, samples = torch.full((3, 3, 4, 4), -1.0), torch.full((3, 3, 4, 4), 2.0)
    picture = side_by_side(targets, samples)
    assert picture.size == (3 * 6 + 2, 2 * 6 + 2)
    assert picture.getpixel((3, 3)) == (0, 0, 0) and picture.getpixel((3, 9)) == (255, 255, 255)
    assert image_grid(targets, columns=2).size == (2 * 6 + 2, 2 * 6 + 2)

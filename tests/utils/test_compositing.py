"""Transparent images on white, and sizes in pixels."""

import pytest
import torch

from brics_diffusers.utils.compositing import as_rgb
from brics_diffusers.utils.sizes import height_and_width, size_text


def test_what_people_see():
    color = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    assert as_rgb(color) is color
    assert torch.equal(as_rgb(color[:, :1]), torch.full((2, 3, 4, 5), -1.0))
    for opacity, expected in ((1.0, [-1, 0, 1]), (-1.0, [1, 1, 1]), (0.0, [0, 0.5, 1]), (-3.0, [1, 1, 1])):
        images = torch.cat([color, torch.full((2, 1, 4, 5), opacity)], dim=1).requires_grad_()
        seen = as_rgb(images)
        torch.testing.assert_close(seen[0, :, 0, 0], torch.tensor(expected, dtype=torch.float32))
    with pytest.raises(ValueError, match="images have 2 channels; they are shown with 1, 3 or 4"):
        as_rgb(color[:, :2])


def test_sizes():
    assert height_and_width(8) == (8, 8) and height_and_width([8, 12]) == (8, 12) and size_text((8, 12)) == "8 x 12"
    for size in (0, "8", [8], [8, 0], [8, 8, 3], 8.0, None):
        with pytest.raises(
            ValueError, match="resolution is .*; give a positive number of pixels, or height and width"
        ):
            height_and_width(size, "resolution")

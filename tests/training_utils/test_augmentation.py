"""What augmentation does to images: values, shifts, cut-outs, gradients, random numbers."""

import argparse

import pytest
import torch

from brics_diffusers.training_utils.arguments import policy
from brics_diffusers.training_utils.augmentation import augment, color, cutout, translation


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.rand(6, 3, 16, 24) * 2 - 1


def test_color_is_affine_in_each_image_and_its_greys(images):
    torch.manual_seed(1)
    changed = color(images)
    brightness, saturation, contrast = torch.manual_seed(1) and torch.rand(3, 6, 1, 1, 1)
    grey = images.mean(dim=1, keepdim=True)
    expected = (images - grey) * (2 * saturation) + grey + brightness - 0.5
    expected = (expected - expected.mean(dim=(1, 2, 3), keepdim=True)) * (contrast + 0.5)
    torch.testing.assert_close(changed - changed.mean(dim=(1, 2, 3), keepdim=True), expected)


def test_translation_moves_whole_pixels_and_fills_with_grey(images):
    moved, shifts = translation(images), set()
    for image, other in zip(images, moved, strict=True):
        padded = torch.nn.functional.pad(image, (3, 3, 2, 2))  # an eighth of 24 and of 16
        found = [(y, x) for y in range(5) for x in range(7) if torch.equal(padded[:, y : y + 16, x : x + 24], other)]
        assert len(found) == 1
        shifts |= set(found)
    assert len(shifts) > 1  # each image by itself


def test_cutout_clears_one_rectangle(images):
    images = images + 2  # no zeros before
    cut = cutout(images)
    gone = (cut == 0).all(dim=1)
    assert torch.equal(cut, images * ~gone[:, None])
    for mask in gone:
        rows, columns = mask.any(dim=1), mask.any(dim=0)
        assert torch.equal(mask, rows[:, None] & columns[None]) and 4 <= rows.sum() <= 8 and 6 <= columns.sum() <= 12
    assert len({tuple(mask.nonzero()[0].tolist()) for mask in gone}) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_flow_and_the_dtype_stays(images, dtype):
    images = images.to(dtype).requires_grad_()
    changed = augment(images, "color,translation,cutout")
    assert changed.dtype == dtype and changed.shape == images.shape
    changed.square().sum().backward()
    assert images.grad.isfinite().all() and (images.grad.flatten(1).norm(dim=1) > 0).all()


def test_draws_repeat_with_the_random_state_and_none_are_made_without_augmentation(images):
    state = torch.get_rng_state()
    assert augment(images, "") is images and torch.equal(torch.get_rng_state(), state)
    first = augment(images, "cutout,color")
    assert not torch.equal(augment(images, "cutout,color"), first)
    torch.set_rng_state(state)
    assert torch.equal(augment(images, "cutout,color"), first)


def test_policy():
    assert policy("color,cutout") == "color,cutout" and policy("") == ""
    with pytest.raises(argparse.ArgumentTypeError, match="some of color, translation, cutout with commas .* not flip"):
        policy("color,flip")

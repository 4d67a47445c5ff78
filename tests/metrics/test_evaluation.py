"""Metrics of reconstructions against scikit-image, and their summary over the images."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from small_models import AUTOENCODER

from brics_diffusers import BricsAutoencoder
from brics_diffusers.metrics.reconstruction import (
    gather_by_index,
    image_batches,
    image_metrics,
    reconstruct,
    reconstruction_metrics,
    row_generator,
    summarize_metrics,
)


def as_standard(image):
    return image.clamp(-1, 1) / 2 + 0.5


@pytest.mark.parametrize("protocol", ["standard", "paper"])
def test_metrics_equal_those_of_scikit_image(protocol):
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(3, 3, 24, 32, generator=generator) * 2 - 1
    target[1] /= 2  # each image has a range of its own
    sample = (target + 0.3 * torch.randn(target.shape, generator=generator)) * 1.1  # leaves [-1, 1] in places
    metrics = image_metrics(sample, target, protocol)
    for index in range(3):
        a, b = (
            (as_standard(image[index]) if protocol == "standard" else image[index]).permute(1, 2, 0).double().numpy()
            for image in (sample, target)
        )
        psnr_range, ssim_range = (1, 1) if protocol == "standard" else (np.ptp(b), max(np.ptp(a), np.ptp(b)))
        expected = peak_signal_noise_ratio(b, a, data_range=psnr_range)
        assert metrics["psnr"][index].item() == pytest.approx(expected, abs=1e-3)
        # scikit-image leaves out a border of 5 pixels, so 5 reflected ones are added first.
        padded = [np.pad(image, ((5, 5), (5, 5), (0, 0)), mode="reflect") for image in (a, b)]
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": ssim_range}
        expected = structural_similarity(*padded, channel_axis=2, **options)
        assert metrics["ssim"][index].item() == pytest.approx(expected, abs=1e-4)  # float32 variances


def test_unknown_protocol():
    with pytest.raises(ValueError, match="protocol is 'papper'; it must be one of 'standard', 'paper'"):
        image_metrics(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16), "papper")


def batches(images, sizes):
    start = 0
    for size in sizes:
        index = torch.arange(start, start + size)
        yield {"pixel_values": images[index], "index": index, "unreadable": []}
        start += size


@pytest.mark.parametrize("regularization", ["noise", "kl"])
@pytest.mark.parametrize("protocol", ["standard", "paper"])
def test_batch_size_does_not_matter(protocol, regularization):
    torch.manual_seed(0)
    autoencoder = BricsAutoencoder(**AUTOENCODER, regularization=regularization).eval()
    torch.nn.init.normal_(autoencoder.grids.entries)
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole, parts = (
        reconstruction_metrics(autoencoder, batches(images, sizes), progress=False, protocol=protocol)
        for sizes in ([6], [1, 0, 3, 2])
    )
    assert whole["index"].tolist() == parts["index"].tolist() == list(range(6))
    for name in ("psnr", "ssim"):
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_perturbation_follows_seed_and_row(autoencoder):
    images, rows = torch.rand(2, 3, 32, 32) * 2 - 1, torch.tensor([5, 9])
    clean = reconstruct(autoencoder, images, rows)
    first, again, other = (reconstruct(autoencoder, images, rows, True, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not autoencoder.training
    for different in (clean, other, reconstruct(autoencoder, images, rows + 1, True)):
        assert (first - different).flatten(1).abs().amax(dim=1).min() > 1e-4
    # The noise is what training adds: the same drawn by hand.
    torch.testing.assert_close(first, reconstruct_by_hand(autoencoder, images, rows))


def reconstruct_by_hand(autoencoder, images, rows):
    key_codes = autoencoder.encode(images).key_codes
    noise = torch.stack([torch.randn(4, 8, 8, generator=row_generator(0, row)) for row in rows.tolist()])
    return autoencoder.decode((key_codes + autoencoder.key_noise_scale * noise).clamp(0, 1)).sample


@pytest.mark.parametrize("model_class", [AutoencoderKL, VQModel])
def test_other_autoencoders(model_class):
    model = model_class(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1).eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    metrics = reconstruction_metrics(model, batches(images, [2]), progress=False, protocol="paper")
    with torch.no_grad():
        torch.testing.assert_close(metrics["psnr"], image_metrics(model(images).sample, images, "paper")["psnr"])


def test_lpips_is_added_and_nothing_is_empty(autoencoder):
    images = torch.rand(2, 3, 32, 32) * 2 - 1

    def distance(a, b):
        return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)

    metrics = reconstruction_metrics(autoencoder, batches(images, [2]), distance, progress=False)
    assert metrics["lpips"].shape == (2,) and (metrics["lpips"] > 0).all()
    assert reconstruction_metrics(autoencoder, [], progress=False)["index"].shape == (0,)


class TestSummary:
    def test_mean_and_two_sample_deviations(self):
        values = torch.tensor([20.0, 22.0, 27.0, torch.inf])
        summary = summarize_metrics({"index": torch.arange(4), "psnr": values})["psnr"]
        assert summary["mean"] == pytest.approx(23) and summary["two_std"] == pytest.approx(2 * 13**0.5)
        assert (summary["images"], summary["left_out"]) == (3, 1)

    def test_one_colour_has_no_inferred_range(self):
        images = torch.zeros(2, 3, 16, 16)
        metrics = image_metrics(torch.rand(2, 3, 16, 16), images, "paper")
        summary = summarize_metrics({"index": torch.arange(2), **metrics})
        assert summary["psnr"] == {"mean": None, "two_std": None, "images": 0, "left_out": 2}
        assert summary["ssim"]["images"] == 2  # whose range comes from the reconstruction

    def test_too_few(self):
        with pytest.raises(ValueError, match="1 readable images; a standard deviation needs at least 2"):
            summarize_metrics({"index": torch.arange(1), "psnr": torch.ones(1)})

    def test_broken_weights(self):
        metrics = image_metrics(torch.full((2, 3, 16, 16), torch.nan), torch.rand(2, 3, 16, 16))
        with pytest.raises(ValueError, match="reconstructions of 2 images hold NaN, the first in row 0"):
            summarize_metrics({"index": torch.arange(2), **metrics})


def test_gathered_in_the_order_of_the_collection():
    metrics = gather_by_index({"index": torch.tensor([4, 0, 2]), "psnr": torch.tensor([4.0, 0.0, 2.0])})
    assert metrics["index"].tolist() == metrics["psnr"].tolist() == [0, 2, 4]


def test_too_few_images():
    with pytest.raises(ValueError, match="0 readable images; at least 1 are needed"):
        list(image_batches(batches(torch.empty(0, 3, 8, 8), [0]), progress=False))

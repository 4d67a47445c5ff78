import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from brics_diffusers.evaluation import image_metrics, reconstruction_metrics


def test_metrics_equal_those_of_scikit_image():
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(3, 3, 24, 32, generator=generator) * 2 - 1
    sample = (target + 0.3 * torch.randn(target.shape, generator=generator)) * 1.1  # leaves [-1, 1] in places
    metrics = image_metrics(sample, target)
    for index in range(3):
        a, b = ((image[index].clamp(-1, 1) / 2 + 0.5).permute(1, 2, 0).double().numpy() for image in (sample, target))
        assert metrics["psnr"][index].item() == pytest.approx(peak_signal_noise_ratio(b, a, data_range=1), abs=1e-3)
        # scikit-image leaves out a border of 5 pixels, so 5 reflected ones are added first.
        padded = [np.pad(image, ((5, 5), (5, 5), (0, 0)), mode="reflect") for image in (a, b)]
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}
        expected = structural_similarity(*padded, channel_axis=2, **options)
        assert metrics["ssim"][index].item() == pytest.approx(expected, abs=1e-4)  # float32 variances


def batches(images, sizes):
    start = 0
    for size in sizes:
        index = torch.arange(start, start + size)
        yield {"pixel_values": images[index], "index": index, "unreadable": []}
        start += size


def test_batch_size_does_not_matter(autoencoder):
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole, parts = (
        reconstruction_metrics(autoencoder, batches(images, sizes), progress=False) for sizes in ([6], [1, 0, 3, 2])
    )
    assert whole["index"].tolist() == parts["index"].tolist() == list(range(6))
    for name in ("psnr", "ssim"):
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-4)


def test_lpips_is_added_and_nothing_is_empty(autoencoder):
    images = torch.rand(2, 3, 32, 32) * 2 - 1

    def distance(a, b):
        return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)

    metrics = reconstruction_metrics(autoencoder, batches(images, [2]), distance, progress=False)
    assert metrics["lpips"].shape == (2,) and (metrics["lpips"] > 0).all()
    assert reconstruction_metrics(autoencoder, [], progress=False)["index"].shape == (0,)

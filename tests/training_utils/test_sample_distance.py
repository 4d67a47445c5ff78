"""The distance of samples from training images at validations."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from brics_diffusers.data import load_collection
from brics_diffusers.metrics.feature_distances import frechet_distance
from brics_diffusers.metrics.feature_extractors import load_feature_extractor
from brics_diffusers.metrics.image_features import extract_features, to_uint8
from brics_diffusers.training_utils import sample_distance
from brics_diffusers.training_utils.sample_distance import SampleDistance


@pytest.fixture
def make(image_folder, tmp_path, monkeypatch):
    """A distance as of the only process."""
    accelerator = SimpleNamespace(
        device="cpu",
        is_main_process=True,
        main_process_first=contextlib.nullcontext,
        wait_for_everyone=lambda: None,
    )
    monkeypatch.setattr(sample_distance, "gather_features", lambda *features: features)
    monkeypatch.setattr(sample_distance, "broadcast_object_list", lambda objects: objects)

    def make(metric="kid", extractor="random-conv", num_samples=8):
        dataset = load_collection(image_folder)
        return SampleDistance(metric, extractor, accelerator, dataset, 32, num_samples, tmp_path / "cache")

    return make


@pytest.fixture
def samples():
    return torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def real(image_folder):
    extractor = load_feature_extractor("random-conv")
    return extract_features(load_collection(image_folder), 32, extractor, progress=False).features


def test_kid_equals_the_double_sum(make, samples, real):
    distance = make()
    assert distance.name == "kid_random_conv"
    features = distance.features(samples)
    assert torch.equal(features, load_feature_extractor("random-conv")(to_uint8(samples)))

    def kernel(a, b):
        return (np.dot(a, b) / len(a) + 1) ** 3

    x, y = features.double().numpy(), real.double().numpy()
    within = [
        sum(kernel(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j) / (len(s) * (len(s) - 1))
        for s in (x, y)
    ]
    between = sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))
    assert distance(features) == pytest.approx(1000 * (sum(within) - 2 * between), rel=1e-5)


def test_frechet(make, samples, real):
    distance = make("frechet")
    assert distance.name == "fid_random_conv"
    features = distance.features(samples)
    assert distance(features) == pytest.approx(frechet_distance(features, real), rel=1e-3)


def test_training_images_are_read_once(make, samples, monkeypatch):
    first = make()
    monkeypatch.setattr("brics_diffusers.metrics.image_features.extract_features", None)
    again = make()
    assert torch.equal(first.real, again.real) and len(again.real) == 24


def test_large_collections_are_represented_by_a_part(make, real, monkeypatch):
    monkeypatch.setattr(sample_distance, "REFERENCE_IMAGES", 5)
    assert torch.allclose(make().real, real[[0, 5, 10, 15, 20]], atol=1e-5)


def test_errors(make):
    with pytest.raises(ValueError, match="kid needs at least 2 images of each kind, got 1 samples and 24 training"):
        make(num_samples=1)
    with pytest.raises(ValueError, match="random-con"):
        make(extractor="random-con")

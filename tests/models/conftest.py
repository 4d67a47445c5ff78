"""Fixtures of the tests of the autoencoder."""

import pytest
import torch
from small_autoencoders import VARIANTS, make_model


@pytest.fixture(scope="module")
def models():
    return {name: make_model(**config) for name, config in VARIANTS.items()}


@pytest.fixture(params=VARIANTS)
def any_model(request, models):
    return models[request.param].eval()


@pytest.fixture
def model(models):
    return models["style-noise"].eval()


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.fixture
def codes():
    return torch.rand(3, 4, 4, 4, generator=torch.Generator().manual_seed(4))

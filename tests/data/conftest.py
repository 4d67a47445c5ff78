"""Collections in a temporary folder, with the Hub out of reach."""

import datasets
import pytest

from brics_diffusers.data import load_collection


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def load(tmp_path):
    def load(source, *args, **kwargs):
        return load_collection(source, *args, cache_dir=tmp_path / "cache", **kwargs)

    return load


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "images"
    path.mkdir()
    return path

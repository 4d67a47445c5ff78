"""Fixtures that many tests share."""

import os
import subprocess
import sys


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may ask a network

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from hub_server import running_hub
from launching import THREADS, environment
from PIL import Image
from small_models import AUTOENCODER, ROOT, UNET

from brics_diffusers import BricsAutoencoder, BricsKeyCodePipeline, CosineVariantScheduler


torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def same_number_of_threads():
    """For whatever comes after a test that changes it: sums depend on it in their last bits."""
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture
def autoencoder():
    torch.manual_seed(0)
    model = BricsAutoencoder(**AUTOENCODER).eval()
    torch.nn.init.normal_(model.grids.entries)  # as large as after training, so that codes matter
    return model


@pytest.fixture
def unet():
    torch.manual_seed(1)
    return UNet2DModel(sample_size=8, in_channels=4, out_channels=4, **UNET).eval()


@pytest.fixture
def pipe(autoencoder, unet):
    pipeline = BricsKeyCodePipeline(autoencoder, unet, CosineVariantScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """24 smooth random images of 40 x 32 pixels, and a text file with an image's name."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for index in range(24):
        coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        coarse.resize((40, 32), Image.Resampling.BICUBIC).save(folder / f"{index:02d}.png")
    (folder / "broken.png").write_text("not an image")
    return folder


@pytest.fixture(scope="session")
def run_python():
    """Runs Python code in a fresh process and returns what it prints."""

    def run(code: str, *arguments: str) -> str:
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment())
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module")
def hub():
    """A Hub on this machine, for the tests of one module."""
    with running_hub() as server:
        yield server

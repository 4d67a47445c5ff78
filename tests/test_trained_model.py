"""The model that ships with the repository: what its card promises."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from diffusers import DPMSolverMultistepScheduler
from huggingface_hub import ModelCard
from PIL import Image

from brics_diffusers import BricsKeyCodePipeline
from brics_diffusers.data import evaluation_loader, load_collection
from brics_diffusers.metrics.reconstruction import reconstruction_metrics
from demo import show_trained_model


ROOT = Path(__file__).parents[1]
MODEL = ROOT / "model_cards/brics-noto-emoji-64"
IMAGES = ROOT.parent / "shared/data/noto-emoji-64"


@pytest.fixture(scope="module")
def trained():
    pipe = BricsKeyCodePipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def report():
    return json.loads((MODEL / "reports/reconstruct-metrics-standard.json").read_text())


def test_size():
    sizes = {path.name: path.stat().st_size for path in MODEL.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 30e6 and max(sizes.values()) <= 15e6
    assert not [name for name in sizes if Path(name).suffix in (".bin", ".pt", ".ckpt", ".pkl", ".npy")]


def test_samples(trained):
    trained.scheduler = DPMSolverMultistepScheduler.from_config(trained.scheduler.config, use_karras_sigmas=True)
    draw = {"num_inference_steps": 10, "output_type": "pt"}
    images, again = (trained(4, generator=torch.Generator().manual_seed(0), **draw).images for _ in range(2))
    assert images.shape == (4, 3, 64, 64) and torch.equal(images, again)
    # Emoji stand on white: the corners of most, and not their middle.
    corners = images[:, :, :4, :4].mean(dim=(1, 2, 3))
    assert corners.median() > 0.9 and images[:, :, 24:40, 24:40].mean() < 0.85


def test_the_demo_begins_with_it(tmp_path):
    show_trained_model(tmp_path, seed=0)
    samples, photographs = (Image.open(tmp_path / f"emoji-{name}.png") for name in ("samples", "reconstructions"))
    assert samples.size == (8 * 66 + 2, 2 * 66 + 2) and photographs.size == (5 * 66 + 2, 2 * 66 + 2)
    corner = np.asarray(samples)[4:8, 4:8]  # of the first sample, which stands on white
    assert corner.mean() > 230


def test_card():
    card = ModelCard.load(MODEL / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert "arXiv preprint arXiv:2305.18601" in card.text and "| hours |" in card.text
    pictures = re.findall(r"\]\(([\w/-]+\.png)\)", card.text)
    assert len(pictures) >= 5
    for name in pictures:
        width, height = Image.open(MODEL / name).size
        assert width > 200 and height > 100


@pytest.mark.parametrize(("name", "size"), [("astronaut", (256, 256)), ("coffee", (320, 192))])
def test_tiled_encoding_loses_less_than_two_decibels(trained, name, size):
    image = Image.fromarray(getattr(skimage.data, name)()).resize(size)

    def psnr():
        found = np.asarray(trained.reconstruct(image).images[0], np.float64)
        return -10 * np.log10(((found - np.asarray(image)) ** 2).mean() / 255**2)

    whole = psnr()
    trained.vae.enable_tiling()
    tiled = psnr()
    trained.vae.disable_tiling()
    assert whole > 18 and tiled > whole - 2


@pytest.mark.skipif(not IMAGES.is_dir(), reason=f"{IMAGES.name} is not beside the repository")
def test_reported_metrics_are_the_models(trained, report):
    assert (report["split"], report["protocol"]) == ("validation", "standard")
    loader = evaluation_loader(load_collection(IMAGES, "validation"), 64, batch_size=16)
    metrics = reconstruction_metrics(trained.autoencoder.eval(), loader)
    for name in ("psnr", "ssim"):
        assert metrics[name].mean().item() == pytest.approx(report["metrics"][name]["mean"], abs=0.01)

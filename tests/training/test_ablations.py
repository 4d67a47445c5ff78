"""The ablations that docs/measuring.md lists: valid at full size, and trained for two steps in small."""

import re
import shlex

import pytest
import torch
import train_autoencoder
import train_key_codes
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from small_models import ROOT

from brics_diffusers import BricsAutoencoder, CosineVariantScheduler
from brics_diffusers.training_utils.optimization import build_optimizer


# In the order of the tables, each once.
ROWS = list(dict.fromkeys(re.findall(r"`(--set [a-z][^`]+)`", (ROOT / "docs/measuring.md").read_text())))
STAGE_ONE = [row for row in ROWS if "autoencoder." in row]
STAGE_TWO = [row for row in ROWS if "scheduler." in row]
# Sizes that the small models need in place of the page's.
SMALL = {
    "autoencoder.feature_size": ["autoencoder.feature_size=8", "autoencoder.decoder_block_out_channels=[16,16,8]"],
    "layers_per_block": ["autoencoder.decoder_block_out_channels=[12,8]"],
    "movq": ["autoencoder.decoder_block_out_channels=[32,32]"],
}


def small_flags(row: str) -> list[str]:
    changes = [change for key, value in SMALL.items() if key in row for change in value]
    return shlex.split(row) + (["--set", *changes] if changes else [])


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield Accelerator()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def share_that_moves(model, take_steps) -> float:
    before = [parameter.detach().clone() for parameter in model.parameters()]
    take_steps()
    moved = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    return sum(moved) / len(moved)


@pytest.mark.parametrize("row", STAGE_ONE)
def test_autoencoder_at_full_size(row):
    config = str(ROOT / "training/configs/church-32x32x4.yaml")
    args = train_autoencoder.parse_args(["--config", config, "--dataset_name", "x", *shlex.split(row)])
    with torch.device("meta"):
        autoencoder = BricsAutoencoder(**args.autoencoder)
        shape = autoencoder.decode(torch.empty(1, *autoencoder.key_code_shape)).sample.shape
    assert shape == (1, 3, 256, 256)


@pytest.fixture
def train_small(write_config, accelerator):
    """Trains a small autoencoder for two steps with a row's flags, and returns it."""

    def train(row: str) -> BricsAutoencoder:
        flags = ["--config", str(write_config()), "--dataset_name", "x", "--adversarial_weight", "0"]
        torch.manual_seed(0)
        trainer = train_autoencoder.Trainer(train_autoencoder.parse_args([*flags, *small_flags(row)]), accelerator)
        images = torch.rand(4, 3, 32, 32) * 2 - 1

        def take_steps():
            for step in range(2):
                parts, finite = trainer.step(images, step)
                assert finite and parts["mse"].isfinite()
                assert ("kl" in parts) == ("kl" in row)

        assert share_that_moves(trainer.unwrapped, take_steps) >= 0.9
        return trainer.unwrapped

    return train


@pytest.mark.parametrize("row", STAGE_ONE)
def test_autoencoder_trains(row, train_small):
    train_small(row)


@pytest.mark.parametrize("power", (12, 14, 16, 18))
def test_table_sizes_train(power, train_small):
    """Fig. 14. The paper's finest grid has 65**3 nodes, more than 2**18, so every size binds."""
    flags = f"--set autoencoder.max_entries={2**power} autoencoder.max_resolution=64"
    grids = train_small(flags).grids
    entries = [min((resolution + 1) ** 3, 2**power) for resolution in grids.resolutions]
    assert grids.entries.shape[1] == sum(entries) and entries[-1] == 2**power


@pytest.mark.parametrize("row", STAGE_TWO)
def test_key_codes_train(row, write_config, autoencoder):
    flags = ["--config", str(write_config()), "--dataset_name", "x", "--autoencoder_name_or_path", "y"]
    args = train_key_codes.parse_args([*flags, *shlex.split(row)])
    torch.manual_seed(0)
    unet, scheduler = train_key_codes.build_unet(args, autoencoder), CosineVariantScheduler(**args.scheduler)
    optimizer = build_optimizer(unet, args.learning_rate, args.adam_beta1, args.adam_beta2, args.adam_epsilon)
    latents, noise = torch.rand(2, 4, 4, 8, 8) * 2 - 1
    timesteps = torch.tensor([10, 300, 600, 990])

    def take_steps():
        for _ in range(2):
            loss = train_key_codes.training_loss(unet, scheduler, latents, noise, timesteps, args.snr_gamma)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    assert share_that_moves(unet, take_steps) >= 0.9

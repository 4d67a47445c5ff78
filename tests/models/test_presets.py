"""The presets of the autoencoder against the configs of training."""

import json

import pytest
import torch
import yaml
from small_models import ROOT

from brics_diffusers import BricsAutoencoder
from brics_diffusers.models.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_what_its_training_config_says(name):
    config = yaml.safe_load((ROOT / "training" / "configs" / f"{name}.yaml").read_text())["autoencoder"]
    with torch.device("meta"):
        written, preset = (json.loads(BricsAutoencoder(**c).to_json_string()) for c in (config, PRESETS[name]))
    assert written == preset


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_named_after_its_key_codes(name):
    with torch.device("meta"):
        channels, height, width = BricsAutoencoder(**PRESETS[name]).key_code_shape
    assert name.endswith(f"-{height}x{width}x{channels}")

"""BRICS (arXiv 2305.18601) in the style of Hugging Face diffusers; without the training loops and the benchmarks."""

import diffusers
from diffusers.pipelines import pipeline_loading_utils

from .models import (
    BricsAutoencoder,
    BricsAutoencoderOutput,
    BricsDecoderOutput,
    BricsDiscriminator,
    BricsEncoderOutput,
    PatchDiscriminator,
)
from .pipelines import BricsKeyCodePipeline
from .schedulers import CosineVariantScheduler


__version__ = "0.1.0"

__all__ = [
    "BricsAutoencoder",
    "BricsAutoencoderOutput",
    "BricsDecoderOutput",
    "BricsDiscriminator",
    "BricsEncoderOutput",
    "BricsKeyCodePipeline",
    "CosineVariantScheduler",
    "PatchDiscriminator",
]


def _register_with_diffusers():
    """Makes `DiffusionPipeline` save and load this package's classes by their short names."""
    methods = ["save_pretrained", "from_pretrained"]
    classes = dict.fromkeys(("BricsAutoencoder", "CosineVariantScheduler", "BricsKeyCodePipeline"), methods)
    pipeline_loading_utils.LOADABLE_CLASSES["brics_diffusers"] = classes
    pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(classes)
    diffusers.BricsKeyCodePipeline = BricsKeyCodePipeline  # found by `DiffusionPipeline.from_pretrained`
    diffusers.CosineVariantScheduler = CosineVariantScheduler  # found by the `from_config` of other schedulers


_register_with_diffusers()

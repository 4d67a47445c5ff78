"""How far samples are from training images, at each validation of a diffusion model."""

import os
from collections.abc import Sequence

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..metrics.feature_distances import (
    KID_SCALE,
    check_count,
    frechet_distance,
    gather_features,
    kernel_distance,
    name_with_features,
)
from ..metrics.feature_extractors import apply_extractor, load_feature_extractor
from ..metrics.image_features import cached_features, to_uint8
from ..utils.compositing import as_rgb


DISTANCES = {"kid": "kid", "frechet": "fid"}  # what reports call them
REFERENCE_IMAGES = 10_000  # far more than there are samples; the kernel's sums grow with their square


class SampleDistance:
    """
    Distance of samples from training images by learned features, `"kid"` (unbiased, times 1,000) or `"frechet"`
    (compares at equal numbers of samples only). Those of at most `REFERENCE_IMAGES` training images, evenly spread
    over the collection, are computed once and kept on disk.

    Errors are those of `load_feature_extractor`, and a `ValueError` if there are fewer than 2 samples, or than 2
    training images.
    """

    def __init__(
        self,
        metric: str,
        feature_extractor: str,
        accelerator: Accelerator,
        dataset: datasets.Dataset,
        resolution: int | Sequence[int],
        num_samples: int,
        cache_dir: str | os.PathLike,
        num_workers: int = 0,
    ):
        self.metric, self.accelerator = metric, accelerator
        device = accelerator.device
        with accelerator.main_process_first():  # which may have to download it
            self.extractor = load_feature_extractor(feature_extractor, device)
        self.name = name_with_features(DISTANCES[metric], self.extractor)
        if len(dataset) > REFERENCE_IMAGES:
            dataset = dataset.select([row * len(dataset) // REFERENCE_IMAGES for row in range(REFERENCE_IMAGES)])
        self.real = None  # the main process alone needs them
        if accelerator.is_main_process:
            options = {"device": device, "num_workers": num_workers, "desc": "Features of training images"}
            self.real = cached_features(dataset, resolution, self.extractor, cache_dir, **options)[0].features
            check_count(metric, 2, samples=num_samples, training=len(self.real))
        accelerator.wait_for_everyone()

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, D), on the CPU, of samples (B, C, H, W) in [-1, 1], which are seen on white."""
        return apply_extractor(self.extractor, to_uint8(as_rgb(images)).to(self.accelerator.device))[0].cpu()

    def __call__(self, features: torch.Tensor) -> float:
        """
        The distance, the same on every process, from the features (N, D) of this process's samples; some may have
        none, (0, 0). Call on every process.
        """
        (generated,) = gather_features(features)
        distance = None
        if self.accelerator.is_main_process:
            if self.metric == "kid":
                device = self.accelerator.device
                distance = KID_SCALE * kernel_distance(generated.to(device), self.real.to(device))
            else:
                distance = frechet_distance(generated, self.real)
        return broadcast_object_list([distance])[0]

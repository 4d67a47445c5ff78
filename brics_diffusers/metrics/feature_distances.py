"""Fréchet and kernel distances, which make FID and KID, between features of images, or of reconstructions."""

import itertools
import re
from collections.abc import Iterable

import torch
from accelerate.utils import gather_object
from torch import nn

from ..data import UnreadableLog
from ..utils.compositing import as_rgb
from .feature_extractors import apply_extractor, extractor_description
from .image_features import to_uint8
from .reconstruction import image_batches, reconstruct


KID_SCALE = 1_000  # kernel distances are reported times this
FEW_IMAGES = 3_000  # with fewer, a Fréchet distance is mostly bias


def check_count(metric: str, least: int, **counts: int) -> None:
    """A `ValueError` if there are fewer images of a kind than a metric is defined for."""
    if min(counts.values()) < least:
        numbers = " and ".join(f"{count} {name}" for name, count in counts.items())
        raise ValueError(
            f"{metric} needs at least {least} images of each kind, got {numbers}; add images or leave {metric} out."
        )


def frechet_distance(generated: torch.Tensor, real: torch.Tensor) -> float:
    """
    Squared Fréchet distance of two Gaussians with the means and (unbiased) covariances of features (N, D) and (M, D),
    on the CPU, by torch-fidelity: the trace of the matrix square root is the sum of the square roots of the product's
    eigenvalues. It stays defined for fewer images than features, where covariances are singular. Needs 2 of each.
    """
    from torch_fidelity import KEY_METRIC_FID
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    check_count("fid", 2, generated=len(generated), real=len(real))
    statistics = (fid_features_to_statistics(features) for features in (generated, real))
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def kernel_distance(
    generated: torch.Tensor, real: torch.Tensor, rows_at_once: int = 2_048, paired: bool = False
) -> float:
    """
    Squared maximum mean discrepancy of features (N, D) and (M, D) with the kernel `(x . y / D + 1)^3`: KID (Bińkowski
    et al. 2018), which is reported times `KID_SCALE`, by the caller. Unbiased: its expectation does not depend on the
    number of images, so few of them do, at least 2 of each, and it may be slightly negative. Of all images at once,
    where others average over subsets; the kernel of `rows_at_once` images with as many others is in memory. `paired`:
    row i of both is of the same image (reconstructions and their originals), which is left out, as an image with
    itself is.
    """
    check_count("kid", 2, generated=len(generated), real=len(real))
    if paired and len(generated) != len(real):
        raise ValueError(f"paired needs as many images of each kind, got {len(generated)} and {len(real)}; drop it.")

    def total(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        pairs = itertools.product(a.split(rows_at_once), b.split(rows_at_once))
        return sum((x.double() @ y.double().T / x.shape[1] + 1).pow(3).sum() for x, y in pairs)

    def mean(a: torch.Tensor, b: torch.Tensor, paired: bool) -> torch.Tensor:
        if not paired:
            return total(a, b) / (len(a) * len(b))
        rows = zip(a.split(rows_at_once), b.split(rows_at_once), strict=True)
        own = sum(((x.double() * y.double()).mean(dim=1) + 1).pow(3).sum() for x, y in rows)
        return (total(a, b) - own) / (len(a) * (len(a) - 1))

    within = mean(generated, generated, True) + mean(real, real, True)
    return (within - 2 * mean(generated, real, paired)).item()


def name_with_features(metric: str, extractor: str | nn.Module) -> str:
    """The name under which to report a metric of an extractor's features, for instance `kid_efficientnet_lite2`."""
    name = extractor if isinstance(extractor, str) else extractor_description(extractor)["name"]
    return f"{metric}_{re.sub(r'[^0-9a-z]+', '_', name.split(': ')[-1].lower())}"


@torch.no_grad()
def collection_features(
    loader: Iterable[dict],
    extractor: nn.Module,
    device: torch.device | str = "cpu",
    unreadable: UnreadableLog | None = None,
    progress: bool = True,
) -> torch.Tensor:
    """
    Features (N, D) of a loader's images, on the CPU; (0, 0) without any. `unreadable` notes files that it could not
    read.
    """
    batches = image_batches(loader, device, unreadable, "Extracting features", progress, least=0)
    return _concatenate([_features(extractor, images) for images, _ in batches])


@torch.no_grad()
def reconstruction_features(
    autoencoder,
    loader: Iterable[dict],
    extractor: nn.Module,
    unreadable: UnreadableLog | None = None,
    progress: bool = True,
    protocol: str = "standard",
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Features (N, D) of a loader's images and of their reconstructions, clipped to [-1, 1] and rounded to 8 bits, both
    on the CPU and in the same order; (0, 0) without any image. For the autoencoder, protocol and seed see
    [`~reconstruction.reconstruction_metrics`].
    """
    device = next(autoencoder.parameters()).device
    originals, reconstructions = [], []
    for images, rows in image_batches(loader, device, unreadable, "Extracting features", progress, least=0):
        sample = reconstruct(autoencoder, images, rows, protocol == "paper", seed)
        originals.append(_features(extractor, images))
        reconstructions.append(_features(extractor, sample.float()))
    return _concatenate(originals), _concatenate(reconstructions)


def _features(extractor: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return apply_extractor(extractor, to_uint8(as_rgb(images)))[0].cpu()


def _concatenate(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    parts = [part for part in parts if len(part)]
    return torch.cat(parts) if parts else torch.empty(0, 0)


def gather_features(*features: torch.Tensor) -> list[torch.Tensor]:
    """
    The features (N, D) of all processes, those of the first process first, one tensor for each argument. They are on
    the CPU; some processes may have none.
    """
    return [_concatenate(parts) for parts in zip(*gather_object([features]), strict=True)]


def reconstruction_distances(
    originals: torch.Tensor, reconstructions: torch.Tensor, references: torch.Tensor, extractor: str | nn.Module
) -> dict[str, float]:
    """
    How far reconstructions are from the images they are of, and from others of the same kind, by features as of
    [`reconstruction_features`] and of `references`, which are not among the originals: `"rfid_<features>"`, the
    Fréchet distance between originals and reconstructions; `"kid_<features>"`, the kernel distance of reconstructions
    from references times 1,000; `"kid_<features>_originals"`, that of the originals, which a perfect autoencoder would
    have too.
    """
    kid = name_with_features("kid", extractor)
    return {
        name_with_features("rfid", extractor): frechet_distance(reconstructions, originals),
        kid: KID_SCALE * kernel_distance(reconstructions, references),
        f"{kid}_originals": KID_SCALE * kernel_distance(originals, references),
    }

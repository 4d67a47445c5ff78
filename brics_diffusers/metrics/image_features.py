"""Computes features of whole collections, and caches them on disk by images and extractor."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm.auto import tqdm

from ..data import (
    UnreadableImageError,
    UnreadableLog,
    collection_fingerprint,
    evaluation_loader,
    image_name,
    image_size,
)
from ..utils.files import atomic_write
from .feature_extractors import apply_extractor, extractor_description, extractor_digest


logger = logging.getLogger(__name__)

FORMAT = 1  # of cached features; raise it when reading, cutting or resizing of images changes


@dataclass
class ImageFeatures:
    """
    Features of a collection, on the CPU: float32 `features` (N, D), one row a readable image, in the collection's
    order; `logits` (N, C) of classes, if any; and the names of files that could not be read.
    """

    features: torch.Tensor
    logits: torch.Tensor | None
    unreadable: list[str]


def common_image_size(dataset: datasets.Dataset) -> int | tuple[int, int]:
    """
    The size in pixels of images that all have the same, from their headers: the side of squares, or height and width.
    Unreadable files have none and are passed over. A `ValueError` if sizes differ, or none is readable.
    """
    first = None
    for row in range(len(dataset)):
        data = dataset[row]["image"]
        try:
            size = image_size(data)
        except UnreadableImageError:
            continue
        name = image_name(data, row)
        if first is not None and size != first[0]:
            raise ValueError(
                f"{name} is {size[0]}x{size[1]}, but {first[1]} is {first[0][0]}x{first[0][1]}; generated images must "
                "have one size, resize them first."
            )
        first = first or (size, name)
    if first is None:
        raise ValueError(f"none of the {len(dataset)} images is readable; give a collection of images.")
    width, height = first[0]
    return height if height == width else (height, width)


def to_uint8(pixel_values: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] to uint8; gives back the very pixels that `ImageCollection` has read."""
    return (pixel_values * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def extract_features(
    dataset: datasets.Dataset,
    resolution: int | Sequence[int],
    extractor: nn.Module,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str | torch.device = "cpu",
    desc: str = "Extracting features",
    progress: bool = True,
) -> ImageFeatures:
    """
    Features of every readable image, in order; a `ValueError` if there is none. Images are cut and resized to
    `resolution` pixels, a side or height and width (`center_crop_resize`), before the extractor sees them.
    """
    loader = evaluation_loader(dataset, resolution, batch_size, num_workers)
    unreadable, features, logits = UnreadableLog(), [], []
    for batch in tqdm(loader, desc=desc, disable=not progress):
        unreadable.add(batch["unreadable"], batch["reasons"])
        if batch["index"].numel():
            some_features, some_logits = apply_extractor(extractor, to_uint8(batch["pixel_values"]).to(device))
            features.append(some_features.cpu())
            logits += [] if some_logits is None else [some_logits.cpu()]
    if not features:
        raise ValueError(f"none of the {len(dataset)} images is readable; give a collection of images.")
    return ImageFeatures(torch.cat(features), torch.cat(logits) if logits else None, unreadable.names)


def cached_features(
    dataset: datasets.Dataset,
    resolution: int | Sequence[int],
    extractor: nn.Module,
    cache_dir: str | os.PathLike,
    **options,
) -> tuple[ImageFeatures, bool]:
    """
    As [`extract_features`], with its options, but kept in `cache_dir` under a digest of the images' bytes, the
    extractor's weights and the resolution: what changes is extracted anew. Logits are not kept. Also returns whether
    they were there.
    """
    size = resolution if isinstance(resolution, int) else tuple(resolution)
    origin = f"{FORMAT} {collection_fingerprint(dataset)} {size} {extractor_digest(extractor)}"
    path = Path(cache_dir) / f"features-{hashlib.sha256(origin.encode()).hexdigest()[:32]}.safetensors"
    found = _read_features(path)
    if found is not None:
        return found, True
    found = extract_features(dataset, resolution, extractor, **options)
    found.logits = None
    facts = {"unreadable": found.unreadable, "extractor": extractor_description(extractor), "resolution": resolution}
    content = safetensors.torch.save({"features": found.features}, {"facts": json.dumps(facts)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(content)
    return found, False


def _read_features(path: Path) -> ImageFeatures | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
            return ImageFeatures(file.get_tensor("features"), None, facts["unreadable"])
    except (SafetensorError, OSError) as error:
        logger.warning("%s is damaged (%s); its features are extracted again.", path, error)
        return None

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
    r"""
    Features of a collection, on the CPU.

    Args:
        features (`torch.Tensor` of shape (N, D)): float32, one row a readable image, in the collection's order.
        logits (`torch.Tensor` of shape (N, C) or `None`): float32 class logits.
        unreadable (`list[str]`): Files that could not be read.
    """

    features: torch.Tensor
    logits: torch.Tensor | None
    unreadable: list[str]


def common_image_size(dataset: datasets.Dataset) -> int | tuple[int, int]:
    r"""
    The size of images that all have the same, from their headers. Unreadable files have none and are passed over.

    Args:
        dataset (`datasets.Dataset`): Result of `load_collection`.

    Returns:
        `int`: the side of squares in pixels, or `tuple[int, int]`: height and width.

    Raises:
        `ValueError`: If sizes differ, or none is readable.
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
    r"""
    Features of every readable image, in order.

    Args:
        dataset (`datasets.Dataset`): Result of `load_collection`.
        resolution (`int` or a pair):
            Side, or height and width, in pixels to which images are cut and resized (`center_crop_resize`) before the
            extractor sees them.
        extractor (`nn.Module`): Result of `load_feature_extractor`.
        batch_size (`int`, defaults to 64): Images in a batch.
        num_workers (`int`, defaults to 0): Processes that read images.
        device (`str` or `torch.device`, defaults to `"cpu"`): Where the extractor works.
        desc (`str`, defaults to `"Extracting features"`): Text of the progress bar.
        progress (`bool`, defaults to `True`): Whether to show a progress bar.

    Returns:
        `ImageFeatures`.

    Raises:
        `ValueError`: If no image is readable, or the extractor gives what are no features.
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
    r"""
    As [`extract_features`], but kept on disk under a digest of the images' bytes, the extractor's weights and the
    resolution: what changes is extracted anew. Logits are not kept.

    Args:
        dataset, resolution, extractor: As in [`extract_features`].
        cache_dir (`str`): Folder for the files; made if it does not exist.
        options: Further arguments of [`extract_features`].

    Returns:
        `tuple`: `ImageFeatures` without logits, and whether they were on disk.
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

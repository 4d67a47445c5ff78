"""The training images nearest to given images, in memory that does not grow with the training set."""

from collections.abc import Iterable

import datasets
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torchvision.transforms.functional import to_pil_image
from tqdm.auto import tqdm

from ..data import UnreadableLog, evaluation_loader
from .feature_extractors import apply_extractor, extractor_description, extractor_names, load_feature_extractor
from .image_features import to_uint8
from .perceptual import LPIPS_WEIGHTS, load_lpips


COLUMNS_AT_ONCE = 2**16  # of embeddings: sums of so many squares in float32 stay exact to five digits


class PixelEmbedding(nn.Module):
    """Pixels, scaled so that squared distances are mean squared errors of images in [0, 1]."""

    description = {"name": "pixels", "definition": "mean squared difference of pixels, images in [0, 1]"}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images (B, 3, H, W) to vectors (B, 3 * H * W)."""
        pixels = images.float().flatten(1) / 255
        return pixels / pixels.shape[1] ** 0.5


class LpipsEmbedding(nn.Module):
    """
    Vectors whose squared distance is LPIPS, as `load_lpips` loads it. LPIPS averages, over the pixels of each layer,
    weighted squared differences of features of unit length; so features times the square root of weight / pixels do
    it. A negative weight, with which LPIPS is no squared distance, is a `ValueError`.
    """

    def __init__(self, metric: nn.Module):
        super().__init__()
        self.metric = metric
        if any((linear.model[-1].weight < 0).any() for linear in metric.lins):
            raise ValueError("LPIPS has negative weights, so it is no squared distance; use its published weights.")
        backbone = "random" if metric.pnet_rand else "ImageNet"
        definition = f"LPIPS {metric.version}, {metric.pnet_type}, backbone weights: {backbone}"
        self.description = {"name": f"lpips-{metric.pnet_type}", "definition": definition}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images (B, 3, H, W) to vectors (B, F): half a million numbers for VGG at 64 x 64 pixels."""
        layers = self.metric.net(self.metric.scaling_layer(images.float() / 127.5 - 1))
        parts = []
        for features, linear in zip(layers, self.metric.lins, strict=True):  # (B, C, H', W')
            # The same tiny number as in lpips keeps pixels without any activation finite.
            unit = features / (features.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
            pixels = features.shape[2] * features.shape[3]
            parts.append((unit * (linear.model[-1].weight / pixels).sqrt()).flatten(1))
        return torch.cat(parts, dim=1)


class FeatureEmbedding(nn.Module):
    """Features of an extractor (result of `load_feature_extractor`), unscaled."""

    def __init__(self, extractor: nn.Module):
        super().__init__()
        self.extractor = extractor
        description = extractor_description(extractor)
        self.description = description | {"definition": f"squared distance between features of {description['name']}"}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images (B, 3, H, W) to vectors (B, D)."""
        return apply_extractor(self.extractor, images)[0]


def distance_names() -> list[str]:
    """What [`load_embedding`] takes."""
    return [*(f"lpips-{network}" for network in LPIPS_WEIGHTS), "pixels", *extractor_names()]


def load_embedding(distance: str, device: str | torch.device = "cpu") -> nn.Module:
    """
    The module, frozen, in eval mode, that maps images to vectors whose squared distance is `distance`, one of
    [`distance_names`]. A `FileNotFoundError` if weights are neither in torch's cache nor to be downloaded.
    """
    if distance not in distance_names():
        raise ValueError(f"{distance!r} is no distance; give one of {', '.join(distance_names())}.")
    if distance == "pixels":
        return PixelEmbedding()
    if not distance.startswith("lpips-"):
        return FeatureEmbedding(load_feature_extractor(distance, device))
    metric = load_lpips(distance.removeprefix("lpips-"), remedy="choose another distance")
    return LpipsEmbedding(metric).eval().to(device)


def squared_distances(queries: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """
    Squared Euclidean distances, float64 (Q, B), of vectors (Q, F) and (B, F), from differences, so that near
    duplicates keep their digits.
    """
    total = torch.zeros(len(queries), len(others), dtype=torch.float64, device=queries.device)
    parts = zip(queries.split(COLUMNS_AT_ONCE, dim=1), others.split(COLUMNS_AT_ONCE, dim=1), strict=True)
    for a, b in parts:
        total += torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").double().square()
    return total


@torch.no_grad()
def embed_images(images: torch.Tensor, embedding: nn.Module, batch_size: int = 16) -> torch.Tensor:
    """Vectors (N, F) of uint8 images (N, 3, H, W), `batch_size` at once."""
    return torch.cat([embedding(part) for part in images.split(batch_size)])


@torch.no_grad()
def nearest_neighbours(
    queries: torch.Tensor, batches: Iterable[dict], embedding: nn.Module, num_neighbours: int = 5
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The training images nearest to each query, vectors (Q, F) from `embedding`. Training images, batches with
    `pixel_values` in [-1, 1] and `index`, pass by, and only the nearest so far are remembered: memory holds the
    vectors of the queries and of one batch.

    Returns distances, float64 (Q, `num_neighbours`), the smallest first, and the training images' indices, int64; of
    equals the earlier comes first. A `ValueError` if there are fewer training images than neighbours.
    """
    if num_neighbours < 1:
        raise ValueError(f"num_neighbours is {num_neighbours}; give at least 1.")
    distances = torch.empty(len(queries), 0, dtype=torch.float64)
    indices = torch.empty(len(queries), 0, dtype=torch.int64)
    for batch in batches:
        if batch["index"].numel() == 0:
            continue
        vectors = embedding(to_uint8(batch["pixel_values"]).to(queries.device))
        distances = torch.cat([distances, squared_distances(queries, vectors).cpu()], dim=1)
        indices = torch.cat([indices, batch["index"].expand(len(queries), -1)], dim=1)
        distances, order = distances.sort(dim=1, stable=True)
        distances = distances[:, :num_neighbours]
        indices = indices.gather(1, order[:, :num_neighbours])
    if indices.shape[1] < num_neighbours:
        raise ValueError(
            f"{num_neighbours} neighbours are wanted of {indices.shape[1]} training images; lower num_neighbours."
        )
    return distances, indices


def nearest_in_collection(
    queries: torch.Tensor,
    dataset: datasets.Dataset,
    embedding: nn.Module,
    num_neighbours: int = 5,
    batch_size: int = 16,
    num_workers: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, UnreadableLog]:
    """
    [`nearest_neighbours`] of uint8 images (Q, 3, R, R) in a collection, whose images are cut and resized to that size;
    also returns the files that could not be read.
    """
    unreadable = UnreadableLog()
    loader = evaluation_loader(dataset, queries.shape[-2:], batch_size, num_workers)

    def read():
        for batch in tqdm(loader, desc="Comparing", unit="batch", disable=not progress):
            unreadable.add(batch["unreadable"], batch["reasons"])
            yield batch

    vectors = embed_images(queries.to(device), embedding, batch_size)
    return *nearest_neighbours(vectors, read(), embedding, num_neighbours), unreadable


def near_copies(distances: torch.Tensor, indices: torch.Tensor, of_neighbours: tuple, rows: list[int]) -> list[bool]:
    """
    Which generated images are nearer to a training image than that one is to any other of the training images; equal
    distances are no near copy. `distances` and `indices` (Q, K) are the generated images' own, as of
    [`nearest_neighbours`]; `of_neighbours` are those, (M, 2), of the M training images in `rows`, which are nearest to
    generated ones: themselves, if no other is equal, and another.
    """
    to_others, found = of_neighbours
    is_itself = found[:, 0] == torch.tensor(rows)
    to_nearest_other = dict(zip(rows, torch.where(is_itself, to_others[:, 1], to_others[:, 0]).tolist(), strict=True))
    nearest = zip(distances[:, 0].tolist(), indices[:, 0].tolist(), strict=True)
    return [distance < to_nearest_other[index] for distance, index in nearest]


def neighbour_grid(
    queries: torch.Tensor, neighbours: torch.Tensor, distances: torch.Tensor, smallest: int = 96
) -> Image.Image:
    """
    A picture with one row a query: the query, a gap, and its neighbours with their distances (Q, K) below. Queries (Q,
    3, H, W) and neighbours (Q, K, 3, H, W) are uint8; narrower than `smallest` pixels, they are enlarged by a whole
    factor.
    """
    *_, height, width = queries.shape
    factor = max(1, -(-smallest // width))
    size = width, height = width * factor, height * factor
    text, margin, gap = 16, 4, 16  # pixels
    columns, rows = 1 + neighbours.shape[1], len(queries)
    whole = margin + (width + margin) * columns + gap, margin + text + (height + text + margin) * rows
    picture = Image.new("RGB", whole, "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)

    def place(image: torch.Tensor, left: int, top: int) -> None:
        picture.paste(to_pil_image(image).resize(size, Image.Resampling.NEAREST), (left, top))

    draw.text((margin, 2), "generated", "black", font)
    draw.text((2 * margin + width + gap, 2), "nearest training images", "black", font)
    for row, (query, others) in enumerate(zip(queries, neighbours, strict=True)):
        top = margin + text + row * (height + text + margin)
        place(query, margin, top)
        for column, other in enumerate(others):
            left = 2 * margin + width + gap + column * (width + margin)
            place(other, left, top)
            draw.text((left, top + height), f"{distances[row, column].item():.4g}", "black", font)
    return picture

"""How much of the feature grids is in use: in training by gradients, afterwards by counting lookups."""

import itertools
from collections.abc import Iterable

import torch
from diffusers import VQModel

from ..models import BricsAutoencoder
from ..models.grids.feature_grids import FeatureGrids
from ..models.grids.lookup_reference import pixel_centers


# Of log10(hits / mean hits), in quarters of a decade.
HISTOGRAM_EDGES = [quarter / 4 for quarter in range(-16, 13)]


class GridUsage:
    """Remembers which entries of the grids ever received a gradient."""

    def __init__(self, grids: FeatureGrids):
        self.entries = grids.entries
        self.hit = torch.zeros(grids.entries.shape[:2], dtype=torch.bool, device=grids.entries.device)

    @torch.no_grad()
    def update(self, optimizer: torch.optim.Optimizer) -> float:
        """
        Reads Adam's second moments after a step, which are above zero for a long while after a gradient: every ten
        steps are enough. Returns the share of the entries that ever received a gradient.
        """
        moments = optimizer.state.get(self.entries, {}).get("exp_avg_sq")
        if moments is not None:
            self.hit |= (moments > 0).any(dim=-1)
        return self.hit.float().mean().item()

    def state_dict(self) -> dict:
        """Which entries were reached."""
        return {"hit": self.hit}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from a `state_dict`."""
        self.hit.copy_(state["hit"])


@torch.no_grad()
def count_entry_hits(grids: FeatureGrids, keys: torch.Tensor) -> torch.Tensor:
    """
    How often a lookup of tiled key codes (B, g * C_key, H_d, W_d) reads each entry, int64 (g, entries of all levels):
    once a pixel for every corner of its cell that has a weight above zero. Where a level shares entries, an entry has
    the hits of all its nodes.
    """
    batch_size, _, height, width = keys.shape
    keys = keys.float().clamp(0, 1).unflatten(1, (grids.num_groups, -1)).movedim(2, -1)  # (B, g, H_d, W_d, C_key)
    if grids.use_coordinates:
        centers = pixel_centers(height, width, keys.device, keys.dtype)
        keys = torch.cat([centers.expand(batch_size, grids.num_groups, -1, -1, -1), keys], dim=-1)
    points = keys.transpose(0, 1).flatten(1, 3)  # (g, B * H_d * W_d, d)
    return torch.cat([_level_hits(grids, points, level) for level in range(len(grids.resolutions))], dim=1)


def _level_hits(grids: FeatureGrids, points: torch.Tensor, level: int) -> torch.Tensor:
    resolution, entries = grids.resolutions[level], grids.level_entries[level]
    position = points * resolution
    cell = position.floor().clamp(max=resolution - 1)
    fraction = position - cell  # in [0, 1]; both ends mean that half of the corners have no weight
    group_start = torch.arange(grids.num_groups, device=points.device)[:, None] * entries
    hits = torch.zeros(grids.num_groups * entries, dtype=torch.int64, device=points.device)
    for corner in itertools.product((0, 1), repeat=grids.num_dims):
        corner = torch.tensor(corner, device=points.device)
        read = torch.where(corner.bool(), fraction > 0, fraction < 1).all(dim=-1)  # (g, points)
        index = group_start + grids.entry_index(cell.long() + corner, level)
        hits += torch.bincount(index[read], minlength=hits.numel())
    return hits.view(grids.num_groups, entries)


@torch.no_grad()
def collection_entry_hits(autoencoder: BricsAutoencoder, batches: Iterable[tuple]) -> torch.Tensor:
    """
    Hits of every entry when a collection, batches of `image_batches`, is decoded from its own key codes; as
    [`count_entry_hits`], on the CPU.
    """
    repeat = autoencoder.encoder_factor // autoencoder.decoder_factor
    hits = torch.zeros(autoencoder.grids.entries.shape[:2], dtype=torch.int64)
    for images, _ in batches:
        key_codes = autoencoder.encode(images).key_codes
        tiled = key_codes.repeat_interleave(repeat, dim=2).repeat_interleave(repeat, dim=3)  # (B, C_z, H_d, W_d)
        hits += count_entry_hits(autoencoder.grids, tiled).cpu()
    return hits


@torch.no_grad()
def collection_codebook_hits(vq_model: VQModel, batches: Iterable[tuple]) -> torch.Tensor:
    """
    How often a collection, batches of `image_batches`, is encoded as each entry of a VQ codebook; int64 (entries,), on
    the CPU.
    """
    hits = torch.zeros(vq_model.config.num_vq_embeddings, dtype=torch.int64)
    for images, _ in batches:
        index = vq_model.quantize(vq_model.encode(images).latents)[2][2]
        hits += torch.bincount(index.flatten().cpu(), minlength=hits.numel())
    return hits


def hit_statistics(hits: torch.Tensor) -> dict:
    """
    Hits of some entries, not all zero, in figures: `"entries"`; `"used"`, the share of them that were hit at all;
    `"mean_hits"`; `"variance"`, that of hits divided by their mean, so that grids and codebooks of any size compare: 0
    if all are hit alike; and `"histogram"`, counts of the used entries by log10(hits / mean hits) between
    `HISTOGRAM_EDGES`, in whose outer bins is all that lies beyond.
    """
    hits = hits.double()
    mean = hits.mean()
    edges = torch.tensor(HISTOGRAM_EDGES, dtype=torch.float64)
    decades = (hits[hits > 0] / mean).log10().clamp(edges[0], edges[-1])
    return {
        "entries": hits.numel(),
        "used": (hits > 0).double().mean().item(),
        "mean_hits": mean.item(),
        "variance": (hits / mean).var(correction=0).item(),
        "histogram": torch.histogram(decades, edges).hist.long().tolist(),
    }


def usage_by_group_and_level(grids: FeatureGrids, hits: torch.Tensor) -> dict:
    """
    Statistics of hits (g, entries of all levels) of every level of every group, and summed up: `"histogram_edges"`,
    `"total"`, and lists `"groups"`, `"levels"` and `"groups_and_levels"` of [`hit_statistics`] with the keys
    `"group"`, and `"level"`, `"resolution"`, `"nodes"` (of one group), `"shared"` (whether nodes share entries).
    Levels differ in their mean hits; `"total"` and `"groups"` count that as variance, too.
    """
    parts = hits.split(grids.level_entries, dim=1)
    facts = [
        {"level": level, "resolution": resolution, "nodes": nodes, "shared": nodes > entries}
        for level, (resolution, nodes, entries) in enumerate(
            zip(grids.resolutions, grids.level_nodes, grids.level_entries, strict=True)
        )
    ]
    groups = range(grids.num_groups)
    return {
        "histogram_edges": HISTOGRAM_EDGES,
        "total": hit_statistics(hits),
        "groups": [{"group": group} | hit_statistics(hits[group]) for group in groups],
        "levels": [fact | hit_statistics(part) for fact, part in zip(facts, parts, strict=True)],
        "groups_and_levels": [
            {"group": group} | fact | hit_statistics(part[group])
            for group in groups
            for fact, part in zip(facts, parts, strict=True)
        ],
    }

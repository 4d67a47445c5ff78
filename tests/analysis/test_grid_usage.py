"""Which entries of the grids and of codebooks are used, against brute force."""

import itertools
import math

import pytest
import torch
from diffusers import VQModel

from brics_diffusers.analysis.grid_usage import (
    HISTOGRAM_EDGES,
    GridUsage,
    collection_codebook_hits,
    collection_entry_hits,
    count_entry_hits,
    hit_statistics,
    usage_by_group_and_level,
)
from brics_diffusers.models.grids.feature_grids import FeatureGrids


def test_counts_entries_that_ever_had_a_gradient():
    grids = FeatureGrids(2, num_levels=2, min_resolution=2, max_resolution=4)
    usage = GridUsage(grids)
    optimizer = torch.optim.Adam(grids.parameters(), betas=(0.9, 0.99))
    assert usage.update(optimizer) == 0
    reached = torch.zeros(grids.entries.shape[:2], dtype=torch.bool)
    for key in (0.1, 0.9):
        grids(torch.full((1, 2, 3, 3), key)).sum().backward()
        reached |= (grids.entries.grad != 0).any(dim=-1)
        optimizer.step()
        optimizer.zero_grad()
        share = usage.update(optimizer)
    assert share == pytest.approx(reached.float().mean().item()) and 0 < share < 1
    # What was reached once stays counted when its moment is forgotten, and through a checkpoint.
    optimizer.state.clear()
    restored = GridUsage(grids)
    restored.load_state_dict(usage.state_dict())
    assert restored.update(optimizer) == pytest.approx(share)


def brute_force_hits(grids, keys):
    """One pixel, one level, one node after the other; the weight of a node is a product of hat functions."""
    batch_size, channels, height, width = keys.shape
    key_length = channels // grids.num_groups
    hits = torch.zeros(grids.entries.shape[:2], dtype=torch.int64)
    for batch, group, row, column in itertools.product(
        range(batch_size), range(grids.num_groups), range(height), range(width)
    ):
        key = keys[batch, group * key_length : (group + 1) * key_length, row, column].tolist()
        point = [(column + 0.5) / width, (row + 0.5) / height, *key][-grids.num_dims :]
        start = 0
        for level, resolution in enumerate(grids.resolutions):
            for node in itertools.product(range(resolution + 1), repeat=grids.num_dims):
                weight = math.prod(max(0, 1 - abs(x * resolution - n)) for x, n in zip(point, node, strict=True))
                if weight > 0:
                    hits[group, start + grids.entry_index(torch.tensor(node), level)] += 1
            start += grids.level_entries[level]
    return hits


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_entries": 30},
        {"max_entries": 30, "grid_type": "hash"},
        {"key_length": 2, "max_entries": 50},
        {"use_coordinates": False},
    ],
    ids=["dense enough", "wrapped", "hashed", "4-D", "without coordinates"],
)
def test_hits_equal_brute_force(options):
    grids = FeatureGrids(2, num_levels=2, min_resolution=2, max_resolution=4, **options)
    channels = 2 * options.get("key_length", 1)
    keys = torch.randint(0, 9, (2, channels, 3, 4), generator=torch.Generator().manual_seed(0)) / 8
    keys[0, 0, 0, :2] = torch.tensor([0.3, 0.7])  # eighths lie on nodes, at the ends too; these do not
    assert torch.equal(count_entry_hits(grids, keys), brute_force_hits(grids, keys))


def test_entries_that_are_hit_are_those_that_a_decode_reads(autoencoder):
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    hits = collection_entry_hits(autoencoder, [(images[:2], None), (images[2:], None)])
    autoencoder.decode(autoencoder.encode(images).key_codes.detach()).sample.square().sum().backward()
    assert torch.equal(hits > 0, (autoencoder.grids.entries.grad != 0).any(dim=-1))


def test_codebook_hits():
    torch.manual_seed(0)
    vq_model = VQModel(block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=5).eval()
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    hits = collection_codebook_hits(vq_model, [(images[:1], None), (images[1:], None)])
    with torch.no_grad():
        latents = vq_model.encode(images).latents.movedim(1, -1)
    distances = (latents.unsqueeze(-2) - vq_model.quantize.embedding.weight).square().sum(dim=-1)
    assert torch.equal(hits, torch.bincount(distances.argmin(dim=-1).flatten(), minlength=5))
    assert hits.sum() == 3 * 64


def filled_bins(statistics):
    """Counts of the histogram's bins that are not empty, by their lower edge."""
    bins = zip(HISTOGRAM_EDGES[:-1], statistics["histogram"], strict=True)
    return {edge: count for edge, count in bins if count > 0}


def test_statistics():
    statistics = hit_statistics(torch.tensor([[0, 2], [2, 4]]))
    assert filled_bins(statistics) == {0: 2, 0.25: 1}  # once and, log10(2) = 0.30, twice the mean; no bin for 0 hits
    del statistics["histogram"]
    assert statistics == {"entries": 4, "used": 0.75, "mean_hits": 2.0, "variance": 0.5}


def test_outer_bins_hold_what_lies_beyond():
    hits = torch.zeros(100_000, dtype=torch.int64)
    hits[7] = 3
    assert filled_bins(hit_statistics(hits)) == {2.75: 1}
    assert filled_bins(hit_statistics(torch.tensor([1, 10**6]))) == {-4: 1, 0.25: 1}


def test_usage_by_group_and_level():
    grids = FeatureGrids(2, num_levels=2, min_resolution=1, max_resolution=2, max_entries=20)
    hits = torch.zeros(2, 28, dtype=torch.int64)
    hits[1, 8:13] = 4  # level 1 begins behind 8 entries
    hits[0, 0] = 1
    usage = usage_by_group_and_level(grids, hits)
    assert [(row["nodes"], row["entries"], row["shared"]) for row in usage["levels"]] == [
        (8, 16, False),
        (27, 40, True),
    ]
    assert [row["used"] for row in usage["groups_and_levels"]] == [1 / 8, 0, 0, 5 / 20]
    # Hits are 8 times the mean of their group and level (log10: 0.90), and 4 times (0.60).
    assert [filled_bins(row) for row in usage["groups_and_levels"]] == [{0.75: 1}, {}, {}, {0.5: 5}]
    assert len(usage["histogram_edges"]) == len(usage["total"]["histogram"]) + 1
    assert [row["used"] for row in usage["groups"]] == [1 / 28, 5 / 28]
    assert usage["total"]["entries"] == 56

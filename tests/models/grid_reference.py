"""The lookup as plain loops over groups, pixels, levels and corners, for the tests of the grids."""

import itertools
import math

import numpy as np
import torch

from brics_diffusers.models.grids.feature_grids import FeatureGrids


# Float64 on entries of order 1: a few hundred products and sums, each within 1.1e-16 of exact.
EXACT = {"rtol": 0, "atol": 1e-12}


DYADIC = {"num_levels": 3, "min_resolution": 2, "max_resolution": 8}  # resolutions 2, 4, 8: their nodes are floats


ODD = {"num_levels": 3, "min_resolution": 3, "max_resolution": 7}  # resolutions 3, 5, 7


# Nodes of the levels of DYADIC: 27, 125, 729 in 3-D and 81, 625, 6561 in 4-D. The limits leave the coarsest level
# unwrapped, wrap all levels (one cell then meets an entry more than once), or wrap none.
TABLES = {
    "tiled-unwrapped": {"grid_type": "tiled", "max_entries": 10**4},
    "tiled-wrapped": {"grid_type": "tiled", "max_entries": 100},
    "tiled-tiny": {"grid_type": "tiled", "max_entries": 7},
    "tiled-single": {"grid_type": "tiled", "max_entries": 1},
    "hash-unwrapped": {"grid_type": "hash", "max_entries": 10**4},
    "hash-wrapped": {"grid_type": "hash", "max_entries": 100},
    "hash-tiny": {"grid_type": "hash", "max_entries": 7},
    "dense": {"grid_type": "dense", "max_entries": 7},
}


def make_grids(dtype=torch.float64, seed=0, **config) -> FeatureGrids:
    """A module with entries of order 1 instead of 1e-4."""
    torch.manual_seed(seed)
    grids = FeatureGrids(**config).to(dtype)
    torch.nn.init.normal_(grids.entries)
    return grids


def exact_resolutions(num_levels, min_resolution, max_resolution):
    """Smallest n with n >= N_min (N_max / N_min)^(l / (N_r - 1)), in integers (Eq. 2)."""
    root = max(num_levels - 1, 1)
    return [
        next(n for n in itertools.count(1) if n**root >= min_resolution ** (root - level) * max_resolution**level)
        for level in range(num_levels)
    ]


def reference_entry(node, resolution, size, grid_type):
    """Entry of a node of a level that stores `size` entries (Eq. 4, App. K)."""
    if grid_type == "hash" and (resolution + 1) ** len(node) > size:
        index = 0
        for coordinate, prime in zip(node, (1, 2654435761, 805459861, 3674653429), strict=False):
            index ^= coordinate * prime
        return index % size
    return sum(coordinate * (resolution + 1) ** axis for axis, coordinate in enumerate(node)) % size


def reference_lookup(
    entries,
    keys,
    upstream,
    *,
    num_groups,
    level_channels,
    max_entries,
    grid_type,
    key_length=1,
    num_levels,
    min_resolution,
    max_resolution,
):
    """Features, gradient to keys and gradient to entries of `(features * upstream).sum()` (Eq. 1-4, 6).

    The derivative at a node is the one of the cell to its right, and the last cell's at 1.
    """
    resolutions = exact_resolutions(num_levels, min_resolution, max_resolution)
    entries, keys, upstream = (tensor.detach().double().numpy() for tensor in (entries, keys, upstream))
    features, grad_keys, grad_entries = np.zeros(upstream.shape), np.zeros(keys.shape), np.zeros(entries.shape)
    batch_size, _, height, width = keys.shape
    dims = 2 + key_length
    for group, image, row, column in itertools.product(*map(range, (num_groups, batch_size, height, width))):
        key_channels = range(group * key_length, (group + 1) * key_length)
        key = [keys[image, channel, row, column].item() for channel in key_channels]
        point = [(column + 0.5) / width, (row + 0.5) / height, *key]
        pixel = row * width + column
        start = 0
        for level, resolution in enumerate(resolutions):
            size = (resolution + 1) ** dims if grid_type == "dense" else min((resolution + 1) ** dims, max_entries)
            channels = slice(level * level_channels, (level + 1) * level_channels)
            grad = upstream[group, channels, image, pixel]
            cell = [min(math.floor(coordinate * resolution), resolution - 1) for coordinate in point]
            fraction = [coordinate * resolution - low for coordinate, low in zip(point, cell, strict=True)]
            for corner in itertools.product((0, 1), repeat=dims):
                node = [low + step for low, step in zip(cell, corner, strict=True)]
                entry = start + reference_entry(node, resolution, size, grid_type)
                weights = [part if step else 1 - part for part, step in zip(fraction, corner, strict=True)]
                features[group, channels, image, pixel] += math.prod(weights) * entries[group, entry]
                grad_entries[group, entry] += math.prod(weights) * grad
                for axis, channel in enumerate(key_channels, start=2):
                    slope = resolution * math.prod(weights[:axis] + weights[axis + 1 :])
                    sign = 1 if corner[axis] else -1
                    grad_keys[image, channel, row, column] += sign * slope * (entries[group, entry] @ grad)
            start += size
    return tuple(map(torch.from_numpy, (features, grad_keys, grad_entries)))


def make_keys(kind, shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    if (
        kind == "nodes"
    ):  # of the level of resolution 8: ends and interior, some of them nodes of the coarser levels too
        return torch.randint(0, 9, shape, generator=generator).to(dtype) / 8
    if kind == "between":
        return torch.rand(shape, generator=generator, dtype=dtype)
    return torch.full(shape, {"zero": 0.0, "one": 1.0}[kind], dtype=dtype)


def check_against_reference(config, keys):
    grids = make_grids(**config)
    keys = keys.requires_grad_()
    features = grids(keys)
    batch_size, _, height, width = keys.shape
    expected_shape = (config["num_groups"], grids.num_features, batch_size, height * width)
    assert features.shape == expected_shape and features.dtype == torch.float64
    upstream = torch.randn(features.shape, dtype=torch.float64)
    grad_keys, grad_entries = torch.autograd.grad((features * upstream).sum(), [keys, grids.entries])
    expected = reference_lookup(grids.entries, keys, upstream, **config)
    torch.testing.assert_close(features, expected[0], **EXACT)
    torch.testing.assert_close(grad_keys, expected[1], **EXACT)
    torch.testing.assert_close(grad_entries, expected[2], **EXACT)

"""The lookup as the paper defines it, a loop over groups, levels and corners (Sec. 3.2, Eq. 1-4 and 6).

Slow, short and differentiable by autograd: what the fast implementations are held against.
"""

import itertools
from collections.abc import Sequence

import torch


# One odd multiplier per axis spreads neighbouring nodes over the table; the first stays 1 so that rows remain cache
# lines (Instant-NGP, Sec. 3).
HASH_PRIMES = (1, 2654435761, 805459861, 3674653429)


def pixel_centers(height: int, width: int, device, dtype) -> torch.Tensor:
    """
    Pixel-centre coordinates (x, y) in (0, 1) of a lattice, (height, width, 2): `x = (column + 0.5) / width`, y alike
    (Eq. 1).
    """
    x = (torch.arange(width, device=device, dtype=dtype) + 0.5) / width
    y = (torch.arange(height, device=device, dtype=dtype) + 0.5) / height
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)


def is_hashed(resolution: int, num_dims: int, num_entries: int, grid_type: str) -> bool:
    """Whether a level hashes its nodes: levels that hold all of their nodes are row-major in every grid type."""
    return grid_type == "hash" and (resolution + 1) ** num_dims > num_entries


def entry_index(nodes: torch.Tensor, resolution: int, num_entries: int, grid_type: str) -> torch.Tensor:
    """
    Entry in [0, num_entries) of a level's table that holds each node (..., d), int64, x first, in [0, N_l] (Eq. 4;
    App. K for `"hash"`).
    """
    num_dims = nodes.shape[-1]
    if is_hashed(resolution, num_dims, num_entries, grid_type):
        index = nodes[..., 0] * HASH_PRIMES[0]
        for axis in range(1, num_dims):
            index = index ^ (nodes[..., axis] * HASH_PRIMES[axis])
    else:
        index = sum(nodes[..., axis] * (resolution + 1) ** axis for axis in range(num_dims))
    return index % num_entries


def lookup_reference(
    keys: torch.Tensor,
    entries: torch.Tensor,
    resolutions: Sequence[int],
    level_entries: Sequence[int],
    grid_type: str,
    use_coordinates: bool = True,
) -> torch.Tensor:
    """Arguments and result as in [`retrieve`]; without coordinates, the points are the keys alone."""
    num_groups, height, width = len(entries), *keys.shape[2:]
    keys = keys.flatten(2).unflatten(1, (num_groups, -1)).permute(1, 0, 3, 2)  # (g, B, P, C_key)
    centers = pixel_centers(height, width, keys.device, keys.dtype).flatten(0, 1)
    features = []
    for group_keys, group_entries in zip(keys, entries.to(keys.dtype), strict=True):
        points = group_keys  # (B, P, d)
        if use_coordinates:
            points = torch.cat([centers.expand(len(group_keys), -1, -1), group_keys], dim=-1)  # Eq. 1
        tables = group_entries.split(list(level_entries))
        levels = [
            interpolate_level(points, table, resolution, grid_type)
            for table, resolution in zip(tables, resolutions, strict=True)
        ]  # each (B, P, C_r)
        features.append(torch.cat(levels, dim=-1).permute(2, 0, 1))
    return torch.stack(features).to(entries.dtype)


def interpolate_level(points: torch.Tensor, table: torch.Tensor, resolution: int, grid_type: str) -> torch.Tensor:
    """
    d-linear interpolation of points (B, P, d) in [0, 1] in one level of one group, table (entries, C_r): (B, P, C_r)
    (Eq. 3 and 6).
    """
    position = points * resolution
    # A point on a node belongs to the cell on its right, the last node to the last cell. Points that are not finite
    # get a cell too, and features that are not finite.
    cell = position.detach().nan_to_num().floor().long().clamp(0, resolution - 1)
    fraction = position - cell
    features = 0
    for corner in itertools.product((0, 1), repeat=points.shape[-1]):
        corner = torch.tensor(corner, device=points.device)
        weight = torch.where(corner.bool(), fraction, 1 - fraction).prod(dim=-1, keepdim=True)
        features = features + weight * table[entry_index(cell + corner, resolution, len(table), grid_type)]
    return features

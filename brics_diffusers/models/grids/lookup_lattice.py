"""A faster lookup for batches on the CPU: levels are resampled to the pixels once, in vectorised torch (Eq. 3, 6).

A pixel's x and y are the same in every image. So a level can be resampled in x and y to the pixels once for the batch,
and what is left for an image is linear interpolation along the key: one read of two neighbours in place of 8 corners.
It is exact. Resampling costs as much as reading a number of images, which grows with the resolution, so it is faster
from some batch size on; for one image the corners themselves are read (lookup_torch.py).
`benchmarks/retrieval.py` times both ways.

Resampled levels are not kept between calls. At inference that would make the lookup 2 to 4 times faster, but it is
3% of a decode at the paper's 64x64x4 preset, and the levels would take 153 MB for one feature size.
"""

import torch
import torch.nn.functional as F

from .levels import Level, plane_corners


# Up to this many nodes along the key per image of the batch, resampling is cheaper than reading 8 corners a point.
# Measured with one thread, forward and backward: 17 to 65 nodes with 64 x 64 pixels, 5 to 33 with 32 x 32.
NODES_PER_IMAGE = 10


def is_cheaper(level: Level, keys: torch.Tensor) -> bool:
    """Whether a level is faster by way of the lattice, for keys (C_key, g, B, P)."""
    # Levels that share entries would have to be unrolled first. On other devices it could not be measured.
    possible = keys.device.type == "cpu" and level.num_dims == 3 and not level.shares_entries and keys.numel() > 0
    return possible and level.resolution + 1 <= NODES_PER_IMAGE * keys.shape[2]


def lookup_level(
    level: Level,
    keys: torch.Tensor,
    entries: torch.Tensor,
    size: tuple[int, int],
    features: torch.Tensor,
    slopes: torch.Tensor,
) -> None:
    """
    Reads one level that does not share entries, for keys (g, B, P) at the pixels of a lattice of `size`: `features`
    (g, C_r, B, P) and the `slopes` along the key (1 or 0, g, C_r, B, P) are overwritten.
    """
    side, channels = level.resolution + 1, entries.shape[2]
    nodes, weights = (corner.t().contiguous() for corner in plane_corners(level, *size, keys))  # (P, 4)
    for group, group_keys in enumerate(keys):
        columns = entries[group, level.start : level.start + level.num_entries].to(keys.dtype)
        columns = columns.view(side, side**2, channels).transpose(0, 1).reshape(side**2, side * channels)
        lattice = F.embedding_bag(nodes, columns, per_sample_weights=weights, mode="sum")  # (P, side * C_r)
        cell, place = level.cell(group_keys)
        index = (cell + column_starts(cell, side)).flatten()  # (B * P,)
        # A node and the next along the key lie behind one another: a window of 2 C_r numbers, one window a node.
        windows = lattice.view(-1).as_strided((lattice.numel() // channels - 1, 2 * channels), (channels, 1))
        pairs = windows.index_select(0, index).view(*cell.shape, 2, channels)  # (B, P, 2, C_r)
        below, above = pairs.permute(2, 3, 0, 1).contiguous()
        features[group] = torch.lerp(below, above, place)
        for slope in slopes:
            torch.sub(above, below, out=slope[group]).mul_(level.resolution)


def scatter_level(
    level: Level, keys: torch.Tensor, grad_features: torch.Tensor, size: tuple[int, int], grad_entries: torch.Tensor
) -> None:
    """
    The gradient of `lookup_level` to the entries, from that to its features: the level's part of `grad_entries` (g,
    entries of all levels, C_r) is overwritten.
    """
    side, channels = level.resolution + 1, grad_features.shape[1]
    pixels, weights, starts = bags_of_nodes(level, *size, keys)
    paired = channels % 2 == 0  # two channels as one complex number: half the additions to find a place for
    parts = channels // 2 if paired else channels
    steps = torch.arange(2 * parts).view(2, parts, 1, 1)
    for group, (group_keys, rows) in enumerate(zip(keys, grad_features.to(keys.dtype), strict=True)):
        cell, place = level.cell(group_keys)
        rows = torch.complex(rows[::2], rows[1::2]) if paired else rows  # (parts, B, P)
        rows = torch.stack([rows * (1 - place), rows * place])
        index = (cell + column_starts(cell, side)) * parts + steps  # (2, parts, B, P)
        lattice = keys.new_zeros(size[0] * size[1], side * channels)
        target = torch.view_as_complex(lattice.view(-1, 2)) if paired else lattice.view(-1)
        target.scatter_add_(0, index.flatten(), rows.flatten())
        columns = F.embedding_bag(pixels, lattice, starts, per_sample_weights=weights, mode="sum")
        columns = columns.view(side**2, side, channels).transpose(0, 1)
        of_level = grad_entries[group, level.start : level.start + level.num_entries]
        of_level.view(side, side**2, channels).copy_(columns)


def column_starts(cell: torch.Tensor, side: int) -> torch.Tensor:
    """First node of every pixel's column of the lattice, (P,)."""
    return torch.arange(cell.shape[-1]) * side


def bags_of_nodes(level: Level, height: int, width: int, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """For each node of a plane of the grid, the pixels whose cells have it as a corner, and its weight for them."""
    nodes, weights = (corner.flatten() for corner in plane_corners(level, height, width, like))
    order = nodes.argsort(stable=True)
    counts = torch.bincount(nodes, minlength=(level.resolution + 1) ** 2)
    return order % (height * width), weights[order], counts.cumsum(0) - counts

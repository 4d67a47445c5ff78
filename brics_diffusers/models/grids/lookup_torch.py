"""The lookup in vectorised torch, for the CPU and for any accelerator (Sec. 3.2, Eq. 2-4 and 6).

A pixel's x and y are the same in every group and image: the four corners around them and their weights are computed
once a level, and a group and image add the cell of their key. Each plane of corners, below and above the key, is read
as one bag; from the bags come the features and their slope along the key, so that the gradient to the keys needs no
second read.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from . import lookup_lattice
from .levels import Level, iterate_levels, plane_corners


# On the CPU images are read in turns of about this many points of all groups: indices, weights and rows of a turn
# (256 bytes a point) stay in the second-level cache and cost no fresh pages. Turns of 8 images took twice as long.
CPU_POINTS = 2**14


def key_planes(level: Level, keys: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Terms (planes, g, B, P) of the `2 ** C_key` planes around keys (C_key, g, B, P), and the places between them."""
    sides = [level.neighbours(key, axis) for axis, key in enumerate(keys, start=2)]
    terms = sides[0][0]
    for other, _ in sides[1:]:
        terms = level.join(terms.unsqueeze(1), other.unsqueeze(0)).flatten(0, 1)
    return terms, [place for _, place in sides]


def interpolate(planes: torch.Tensor, places: Sequence[torch.Tensor]) -> torch.Tensor:
    """Linear interpolation of values (2, ..., 2, *shape) along their first axes, one axis a place (*shape)."""
    for place in places:
        planes = torch.lerp(planes[0], planes[1], place)
    return planes


def image_blocks(keys: torch.Tensor) -> Iterator[slice]:
    """Slices of the batch of keys (C_key, g, B, P) that are worked on in turn."""
    _, num_groups, batch_size, num_points = keys.shape
    turn = max(1, CPU_POINTS // max(1, num_groups * num_points)) if keys.device.type == "cpu" else max(1, batch_size)
    return (slice(first, first + turn) for first in range(0, batch_size, turn))


def split_keys(keys: torch.Tensor, num_groups: int) -> torch.Tensor:
    """(B, g * C_key, H, W) -> (C_key, g, B, P)."""
    return keys.flatten(2).unflatten(1, (num_groups, -1)).permute(2, 1, 0, 3).contiguous()


def group_starts(level: Level, num_groups: int, total_entries: int, device: torch.device) -> torch.Tensor:
    """First entry of the level in each group, (g, 1, 1, 1), when all groups' entries lie behind one another."""
    return (torch.arange(num_groups, device=device) * total_entries + level.start).view(-1, 1, 1, 1)


def lookup(
    keys: torch.Tensor,
    entries: torch.Tensor,
    resolutions: Sequence[int],
    level_entries: Sequence[int],
    grid_type: str,
    with_slopes: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and result as of the operator `lookup` in lookup_operator.py."""
    (num_groups, total_entries, channels), (height, width) = entries.shape, keys.shape[2:]
    batch_size, num_features = len(keys), channels * len(resolutions)
    keys = split_keys(keys, num_groups)
    table = entries.to(keys.dtype).flatten(0, 1)
    features = entries.new_empty(num_groups, num_features, batch_size, height * width)
    slopes = keys.new_empty(len(keys) if with_slopes else 0, *features.shape)
    for level in iterate_levels(resolutions, level_entries, 2 + len(keys), grid_type):
        of_level = slice(level.number * channels, (level.number + 1) * channels)
        if lookup_lattice.is_cheaper(level, keys):
            lookup_lattice.lookup_level(
                level, keys[0], entries, (height, width), features[:, of_level], slopes[:, :, of_level]
            )
            continue
        terms, weights = (corner.t().contiguous() for corner in plane_corners(level, height, width, keys))  # (P, 4)
        starts = group_starts(level, num_groups, total_entries, keys.device)
        for images in image_blocks(keys):
            plane_terms, places = key_planes(level, keys[:, :, images])
            index = level.entry(level.join(plane_terms.unsqueeze(-1), terms)).add_(starts)  # (planes, g, b, P, 4)
            bag_weights = weights.expand(index.shape).reshape(-1, 4)
            bags = F.embedding_bag(index.view(-1, 4), table, per_sample_weights=bag_weights, mode="sum")
            planes = bags.view(*index.shape[:-1], channels).permute(0, 1, 4, 2, 3)  # (planes, g, C_r, b, P)
            planes = planes.contiguous().unflatten(0, (2,) * len(keys))
            places = [place.unsqueeze(1) for place in places]
            features[:, of_level, images] = interpolate(planes, places)
            for axis, slope in enumerate(slopes):
                rise = planes.select(axis, 1) - planes.select(axis, 0)
                others = places[:axis] + places[axis + 1 :]
                slope[:, of_level, images] = interpolate(rise, others).mul_(level.resolution)
    return features, slopes


def scatter(
    grad_features: torch.Tensor,
    keys: torch.Tensor,
    resolutions: Sequence[int],
    level_entries: Sequence[int],
    grid_type: str,
) -> torch.Tensor:
    """Arguments and result as of the operator `scatter` in lookup_operator.py. Deterministic if torch is set to be."""
    num_groups, total_entries = len(grad_features), sum(level_entries)
    channels, (height, width) = grad_features.shape[1] // len(resolutions), keys.shape[2:]
    keys = split_keys(keys, num_groups)
    grad_entries = keys.new_zeros(num_groups, total_entries, channels)
    # Two channels as one complex number: half the additions to find a place for. Only the CPU gains.
    paired = keys.device.type == "cpu" and channels % 2 == 0
    target = torch.view_as_complex(grad_entries.view(-1, 2)) if paired else grad_entries.view(-1)
    width_of_entry = channels // 2 if paired else channels
    parts = torch.arange(width_of_entry, device=keys.device).view(-1, 1, 1)
    for level in iterate_levels(resolutions, level_entries, 2 + len(keys), grid_type):
        of_level = grad_features[:, level.number * channels : (level.number + 1) * channels]
        if lookup_lattice.is_cheaper(level, keys):
            lookup_lattice.scatter_level(level, keys[0], of_level, (height, width), grad_entries)
            continue
        terms, weights = plane_corners(level, height, width, keys)  # (4, P)
        starts = group_starts(level, num_groups, total_entries, keys.device).squeeze(-1)
        for images in image_blocks(keys):
            plane_terms, places = key_planes(level, keys[:, :, images])
            index = level.join(plane_terms.unsqueeze(1), terms[:, None, None])
            index = level.entry(index).add_(starts).mul_(width_of_entry)  # (planes, 4, g, b, P)
            index = index.unsqueeze(3) + parts
            rows = of_level[:, :, images].to(keys.dtype)
            rows = torch.complex(rows[:, ::2], rows[:, 1::2]) if paired else rows  # (g, C, b, P)
            for place in reversed(places):
                place = place.unsqueeze(1)
                rows = torch.stack([rows * (1 - place), rows * place])
            rows = rows.view(len(plane_terms), 1, *rows.shape[len(places) :]) * weights[:, None, None, None]
            target.scatter_add_(0, index.flatten(), rows.flatten())
    return grad_entries

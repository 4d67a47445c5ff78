"""The levels of the grids for vectorised lookups: where pixels and keys lie in them (Sec. 3.2, Eq. 1-4)."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from .lookup_reference import HASH_PRIMES, is_hashed


class Level(NamedTuple):
    """
    A level of the grids: its place among them, cells per axis N_l, entries that it stores, the first of them among
    those of all levels, dimensions of the points d, and whether the terms of an index are combined by XOR instead of
    by addition.
    """

    number: int
    resolution: int
    num_entries: int
    start: int
    num_dims: int
    hashed: bool

    @property
    def shares_entries(self) -> bool:
        """Whether there are fewer entries than nodes."""
        return (self.resolution + 1) ** self.num_dims > self.num_entries

    def cell(self, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cell of positions in [0, 1], int64, and the place in it, in [0, 1]; a cell even for what is not finite."""
        position = position * self.resolution
        cell = position.nan_to_num().floor().clamp(0, self.resolution - 1)
        return cell.long(), position - cell

    def neighbours(self, position: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The nodes on both sides of coordinates (...) in [0, 1] along an axis (x is 0, y is 1, keys follow): what the
        two add to the index of an entry, (2, ...) int64, and the place between them in [0, 1], (...).
        """
        cell, place = self.cell(position)
        factor = HASH_PRIMES[axis] if self.hashed else (self.resolution + 1) ** axis
        return torch.stack([cell, cell + 1]) * factor, place

    def join(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Puts together what axes add to the index of an entry."""
        return first ^ second if self.hashed else first + second

    def entry(self, terms: torch.Tensor) -> torch.Tensor:
        """Index of the stored entry (Eq. 4), from the index terms of each axis (they are overwritten)."""
        return terms.remainder_(self.num_entries) if self.shares_entries else terms


def iterate_levels(
    resolutions: Sequence[int], level_entries: Sequence[int], num_dims: int, grid_type: str
) -> Iterator[Level]:
    """The levels, coarse to fine."""
    start = 0
    for number, (resolution, num_entries) in enumerate(zip(resolutions, level_entries, strict=True)):
        hashed = is_hashed(resolution, num_dims, num_entries, grid_type)
        yield Level(number, resolution, num_entries, start, num_dims, hashed)
        start += num_entries


def plane_corners(level: Level, height: int, width: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Terms (4, P) and bilinear weights (4, P) of the corners around the pixel centres, in a plane of x and y."""
    sides = []
    for axis, length in enumerate((width, height)):
        centers = (torch.arange(length, device=like.device, dtype=like.dtype) + 0.5) / length
        terms, place = level.neighbours(centers, axis)
        sides.append((terms, torch.stack([1 - place, place])))
    (x_terms, x_weights), (y_terms, y_weights) = sides
    terms = level.join(y_terms[:, None, :, None], x_terms[None, :, None, :])  # (2, 2, H, W)
    weights = y_weights[:, None, :, None] * x_weights[None, :, None, :]
    return terms.reshape(4, height * width), weights.reshape(4, height * width)

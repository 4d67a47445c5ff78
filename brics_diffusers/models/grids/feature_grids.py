"""Groups of multi-resolution feature grids, looked up with key codes and pixel coordinates (Sec. 3.2, Eq. 1-6)."""

import math

import torch
from torch import nn

from .lookup_operator import retrieve
from .lookup_reference import entry_index, lookup_reference


GRID_TYPES = ("tiled", "dense", "hash")


def grid_resolutions(num_levels: int, min_resolution: int, max_resolution: int) -> list[int]:
    """
    Cells per axis of every level, coarsest first, `N_l = ceil(N_min * b**l)` with `b = (N_max / N_min) ** (1 / (N_r -
    1))` (Eq. 2). One level alone has resolution `min_resolution`.
    """
    growth = (max_resolution / min_resolution) ** (1 / max(num_levels - 1, 1))
    # The small offset keeps rounding in the power from lifting an integer result by one.
    return [math.ceil(min_resolution * growth**level - 1e-9) for level in range(num_levels)]


class FeatureGrids(nn.Module):
    r"""
    One set of multi-resolution grids per group; d-linear interpolation at (x, y, key) (Sec. 3.2, Eq. 2-4 and 6).

    Group `i` reads its own grids at `(x, y, key_i)`: the centre of a pixel of the feature block and slice `i` of the
    key code there. The levels' features are concatenated. A level with more than `max_entries` nodes shares entries
    among nodes, unless `grid_type` is `"dense"`. Without coordinates, the point is `key_i` alone.

    Args:
        num_groups (`int`): Number of groups g.
        key_length (`int`, defaults to 1):
            Channels of a group's key C_key; points have `2 + key_length` dimensions, `key_length` without coordinates.
        num_levels (`int`, defaults to 16): Levels of each group N_r.
        min_resolution (`int`, defaults to 1): Cells per axis of the coarsest level.
        max_resolution (`int`, defaults to 64): Cells per axis of the finest level.
        level_channels (`int`, defaults to 4): Features stored at a node C_r.
        max_entries (`int`, defaults to 2**18): Entries stored for a level at most, T.
        grid_type (`str`, defaults to `"tiled"`):
            How a node finds its entry: `"tiled"`: row-major index modulo T; `"hash"`: Instant-NGP's XOR of primes
            modulo T (App. K); `"dense"`: no limit T. Levels of at most T nodes are row-major in every type.
        use_coordinates (`bool`, defaults to `True`): Whether x and y are part of a point.

    Raises:
        `ValueError`: If `grid_type` is unknown or a size is out of range.
    """

    def __init__(
        self,
        num_groups: int,
        key_length: int = 1,
        num_levels: int = 16,
        min_resolution: int = 1,
        max_resolution: int = 64,
        level_channels: int = 4,
        max_entries: int = 2**18,
        grid_type: str = "tiled",
        use_coordinates: bool = True,
    ):
        super().__init__()
        if grid_type not in GRID_TYPES:
            raise ValueError(f"grid_type is {grid_type!r}; it must be one of {', '.join(map(repr, GRID_TYPES))}.")
        if not 1 <= key_length <= 2:
            raise ValueError(f"key_length is {key_length}; set it to 1 or 2.")
        if num_levels < 1 or not 1 <= min_resolution <= max_resolution:
            raise ValueError(
                f"num_levels={num_levels}, min_resolution={min_resolution}, max_resolution={max_resolution}; "
                "give at least one level and 1 <= min_resolution <= max_resolution."
            )
        if max_entries < 1 or level_channels < 1:
            raise ValueError(f"max_entries={max_entries}, level_channels={level_channels}; both must be at least 1.")
        self.num_groups = num_groups
        self.use_coordinates = use_coordinates
        self.num_dims = key_length + (2 if use_coordinates else 0)
        self.level_channels = level_channels
        self.grid_type = grid_type
        self.resolutions = grid_resolutions(num_levels, min_resolution, max_resolution)
        limit = math.inf if grid_type == "dense" else max_entries
        self.level_nodes = [(n + 1) ** self.num_dims for n in self.resolutions]
        self.level_entries = [min(nodes, limit) for nodes in self.level_nodes]
        # All levels lie behind one another in one tensor: one optimizer entry, one all-reduce. Channels are last, so
        # that a node is one 16-byte read.
        self.entries = nn.Parameter(torch.empty(num_groups, sum(self.level_entries), level_channels))
        self.reset_parameters()

    def reset_parameters(self):
        """Draws the entries from U(-1e-4, 1e-4), as Instant-NGP does."""
        nn.init.uniform_(self.entries, -1e-4, 1e-4)

    @property
    def num_features(self) -> int:
        """Features of a point: levels times channels of a level."""
        return len(self.resolutions) * self.level_channels

    def entry_index(self, nodes: torch.Tensor, level: int) -> torch.Tensor:
        """Entry of a level's table that holds each node, see [`~lookup_reference.entry_index`]."""
        return entry_index(nodes, self.resolutions[level], self.level_entries[level], self.grid_type)

    def forward(self, keys: torch.Tensor) -> torch.Tensor:
        """
        Features (g, N_r * C_r, B, H_d * W_d) of every pixel from the tiled key codes (B, g * C_key, H_d, W_d) there,
        in the dtype of the entries, levels coarse to fine along the second axis. Positions are computed in float32, or
        in float64 when `keys` are: half precision cannot tell 1/256 apart near 1.
        """
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
        codes = keys.detach()
        keys = keys + (codes.clamp(0, 1) - codes)  # stays in the grids, with a gradient at 0 and 1
        grids = (keys, self.entries, self.resolutions, self.level_entries, self.grid_type)
        # Without coordinates, in ablations, there are two or four corners to read: the definition will do.
        return retrieve(*grids) if self.use_coordinates else lookup_reference(*grids, use_coordinates=False)

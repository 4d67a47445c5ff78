"""Groups of multi-resolution feature grids, looked up with key codes and pixel coordinates (Sec. 3.2, Eq. 1-6)."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn


GRID_TYPES = ("tiled", "dense", "hash")

# One odd multiplier per axis spreads neighbouring nodes over the table; the first stays 1 so that rows remain cache
# lines (Instant-NGP, Sec. 3).
HASH_PRIMES = (1, 2654435761, 805459861, 3674653429)

# A 3-D level that shares entries is unrolled to a volume for the lookup as long as it has no more nodes than this
# (a 100-cell cube: 16 MB a group with 4 float32 channels); above, eight gathers a point move less than the volume.
MAX_UNROLLED_NODES = 101**3


def grid_resolutions(num_levels: int, min_resolution: int, max_resolution: int) -> list[int]:
    r"""
    Cells per axis of every level, `N_l = ceil(N_min * b**l)` with `b = (N_max / N_min) ** (1 / (N_r - 1))` (Eq. 2).

    Args:
        num_levels (`int`): Number of levels N_r.
        min_resolution (`int`): Cells per axis of the coarsest level, N_min.
        max_resolution (`int`): Cells per axis of the finest level, N_max.

    Returns:
        `list[int]`: The resolutions, coarsest first. One level alone has resolution `min_resolution`.
    """
    growth = (max_resolution / min_resolution) ** (1 / max(num_levels - 1, 1))
    # The small offset keeps rounding in the power from lifting an integer result by one.
    return [math.ceil(min_resolution * growth**level - 1e-9) for level in range(num_levels)]


def pixel_centers(height: int, width: int, device, dtype) -> torch.Tensor:
    r"""
    Pixel-centre coordinates (x, y) in (0, 1) of a lattice (Eq. 1).

    Returns:
        `torch.Tensor`: shape (height, width, 2), `x = (column + 0.5) / width`, `y = (row + 0.5) / height`.
    """
    x = (torch.arange(width, device=device, dtype=dtype) + 0.5) / width
    y = (torch.arange(height, device=device, dtype=dtype) + 0.5) / height
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)


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
        min_resolution (`int`, defaults to 16): Cells per axis of the coarsest level.
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
        min_resolution: int = 16,
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
            raise ValueError(f"key_length is {key_length}; grids are 3-D or 4-D, so set key_length to 1 or 2.")
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

    @property
    def unrolls(self) -> bool:
        """Whether the lookup reads 3-D volumes (`sample_volumes`) instead of gathering corners."""
        return self.num_dims == 3 and max(self.level_nodes) <= MAX_UNROLLED_NODES

    def entry_index(self, nodes: torch.Tensor, level: int) -> torch.Tensor:
        r"""
        Entry of a level's table that holds each node (Eq. 4; App. K for `"hash"`).

        Args:
            nodes (`torch.Tensor` of shape (..., d), int64): Node coordinates, x first, in [0, N_l].
            level (`int`): The level.

        Returns:
            `torch.Tensor` of shape (...), int64, in [0, entries of the level).
        """
        entries = self.level_entries[level]
        if self.grid_type == "hash" and self.level_nodes[level] > entries:
            index = nodes[..., 0] * HASH_PRIMES[0]
            for axis in range(1, self.num_dims):
                index = index ^ (nodes[..., axis] * HASH_PRIMES[axis])
        else:
            strides = [(self.resolutions[level] + 1) ** axis for axis in range(self.num_dims)]
            index = sum(nodes[..., axis] * stride for axis, stride in enumerate(strides))
        return index % entries

    def volume(self, level_table: torch.Tensor, level: int) -> torch.Tensor:
        r"""
        A level as 3-D volumes: every node with the entry it holds.

        Args:
            level_table (`torch.Tensor` of shape (g, entries of the level, C_r)): The level's part of `entries`.
            level (`int`): The level.

        Returns:
            `torch.Tensor` of shape (g, C_r, N_l + 1, N_l + 1, N_l + 1), axes key, y, x.
        """
        side = self.resolutions[level] + 1
        if self.level_nodes[level] > self.level_entries[level]:
            axis = torch.arange(side, device=level_table.device)
            key, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
            index = self.entry_index(torch.stack([x, y, key], dim=-1).flatten(0, 2), level)
            level_table = level_table.index_select(1, index)
        return level_table.view(self.num_groups, side, side, side, self.level_channels).permute(0, 4, 1, 2, 3)

    def sample_volumes(self, points: torch.Tensor) -> torch.Tensor:
        """Trilinear lookup through one `grid_sample` a level, all groups and the whole batch at once."""
        # At 1 exactly the last cell's slope must reach the key (one-sided derivative): a value half an ulp below 1
        # stays inside that cell, while its gradient is passed on as if nothing had moved.
        below_one = 1 - torch.finfo(points.dtype).eps / 2
        points = points - (points - below_one).clamp(min=0).detach()
        grid = points.unflatten(2, (1, -1)) * 2 - 1  # (g, B, 1, P, 3)
        tables = self.entries.to(points.dtype).split(self.level_entries, dim=1)
        levels = [
            F.grid_sample(self.volume(table, level), grid, padding_mode="zeros", align_corners=True)
            for level, table in enumerate(tables)
        ]  # each (g, C_r, B, 1, P)
        return torch.cat(levels, dim=1).squeeze(3)

    def gather_corners(self, points: torch.Tensor) -> torch.Tensor:
        """d-linear lookup as one weighted `embedding_bag` of 2**d corners a point and level."""
        num_groups, batch_size, num_points, num_dims = points.shape
        corners = torch.tensor(list(itertools.product((0, 1), repeat=num_dims)), device=points.device)  # (2**d, d)
        total_entries = self.entries.shape[1]
        group_start = torch.arange(num_groups, device=points.device).view(-1, 1, 1, 1) * total_entries
        indices, weights = [], []
        for level, resolution in enumerate(self.resolutions):
            position = points * resolution
            cell = position.detach().floor().clamp(max=resolution - 1)
            fraction = (position - cell).unsqueeze(-2)  # (g, B, P, 1, d), in [0, 1]
            weights.append(torch.where(corners.bool(), fraction, 1 - fraction).prod(dim=-1))
            level_start = group_start + sum(self.level_entries[:level])
            indices.append(level_start + self.entry_index(cell.long().unsqueeze(-2) + corners, level))
        features = F.embedding_bag(
            torch.stack(indices).flatten(0, 3),  # (L * g * B * P, 2**d)
            self.entries.to(points.dtype).flatten(0, 1),
            per_sample_weights=torch.stack(weights).flatten(0, 3),
            mode="sum",
        )
        features = features.unflatten(0, (len(self.resolutions), num_groups, batch_size, num_points))
        return features.permute(1, 0, 4, 2, 3).flatten(1, 2)  # (g, L * C_r, B, P)

    def forward(self, keys: torch.Tensor) -> torch.Tensor:
        r"""
        Features of every pixel from the keys there.

        Args:
            keys (`torch.Tensor` of shape (B, g * C_key, H_d, W_d)):
                Tiled key codes in [0, 1]. Positions are computed in float32, or in float64 when `keys` are: half
                precision cannot tell 1/256 apart near 1.

        Returns:
            `torch.Tensor` of shape (g, N_r * C_r, B, H_d * W_d) in the dtype of the entries, levels coarse to fine
            along the second axis.
        """
        height, width = keys.shape[2:]
        dtype = torch.promote_types(keys.dtype, torch.float32)
        keys = keys.to(dtype).unflatten(1, (self.num_groups, -1)).flatten(3).permute(1, 0, 3, 2)
        keys = keys + (keys.clamp(0, 1) - keys).detach()  # stays in the grids, with a gradient at 0 and 1
        points = keys  # (g, B, H_d * W_d, d)
        if self.use_coordinates:
            centers = pixel_centers(height, width, keys.device, dtype).view(-1, 2)
            points = torch.cat([centers.expand(*keys.shape[:2], -1, -1), keys], dim=-1)  # Eq. 1
        features = self.sample_volumes(points) if self.unrolls else self.gather_corners(points)
        return features.to(self.entries.dtype)

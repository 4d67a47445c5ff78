"""Triton kernels of the lookup for CUDA: all levels, groups and images in one launch each way (Sec. 3.2, Eq. 2-4, 6).

A program works on a block of points in one level of one group. Programs of a level follow one another, so that its
table stays in the second-level cache. Corners are read straight from the grids: a node is one 16-byte read, and no
table of all pixels (153 MB for the paper's 64x64x4 preset) has to be written first. Gradients are added up in float32
whatever the type of the entries: every CUDA device adds float32 atomically, 16 bits only later ones.

Bytes that must move, for n points, g groups, L levels and C_r channels of s bytes: forward `g * n * (4 * C_key + L *
C_r * s)`, with slopes `g * n * L * C_r * C_key * 4` more, and each entry that is touched once; backward `g * n * (4 *
C_key * 2 + L * C_r * (s + C_key * 4))`, 4 for every channel of every entry (zeros) and 8 for those touched (read and
written).
"""

import functools
import logging
from collections.abc import Sequence

import torch

from .lookup_reference import HASH_PRIMES, is_hashed


try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform
    triton = None

logger = logging.getLogger(__name__)

ENTRY_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# One point a thread: it reads whole nodes, and its sums (features and slopes of a level) fit in registers many times
# over. The work waits for memory, so small programs, many to a multiprocessor, hide it best.
NUM_WARPS = 4
BLOCK = 32 * NUM_WARPS

# How nodes of a level find their entries.
ROW_MAJOR, ROW_MAJOR_SHARED, HASHED = range(3)


def supports(keys: torch.Tensor, entries: torch.Tensor) -> bool:
    """Whether kernels can read these tensors; Triton's interpreter (`TRITON_INTERPRET=1`) does so on the CPU."""
    if triton is None or keys.device != entries.device:
        return False
    on_device = keys.is_cuda or (keys.device.type == "cpu" and triton.knobs.runtime.interpret)
    return on_device and keys.dtype == torch.float32 and entries.dtype in ENTRY_DTYPES


# Kinds of lookups that have failed in this process: device, key length, type of the entries.
_failed: set[tuple[torch.device, int, torch.dtype]] = set()


def runs_on(device: torch.device, key_length: int = 1, dtype: torch.dtype = torch.float32) -> bool:
    """
    Whether kernels compile and run on a CUDA device: found out once, by a lookup of one point each way. Also `False`
    once [`give_up`] was called for this kind of lookup. If there is no memory for a few numbers, which says nothing
    about the kernels, a `torch.OutOfMemoryError`.
    """
    if device.type != "cuda" or (device, key_length, dtype) in _failed:
        return False
    try:
        _probe(device, key_length, dtype)
    except Exception as error:  # an old device, no C compiler for the launcher: torch reads the grids as well
        if is_out_of_memory(error):
            raise
        give_up(device, key_length, dtype, error)
        return False
    return True


@functools.cache
def _probe(device: torch.device, key_length: int, dtype: torch.dtype) -> None:
    num_entries = 2 ** (2 + key_length)
    grids = ([1], [num_entries], "tiled")
    keys = torch.zeros(1, key_length, 1, 1, device=device)
    lookup(keys, torch.zeros(1, num_entries, 4, device=device, dtype=dtype), *grids, with_slopes=True)
    scatter(torch.zeros(1, 4, 1, 1, device=device, dtype=dtype), keys, *grids)
    torch.cuda.synchronize(device)


def give_up(device: torch.device, key_length: int, dtype: torch.dtype, error: Exception) -> None:
    """Leaves a kind of lookup to torch from now on, with a warning."""
    _failed.add((device, key_length, dtype))
    text = "Triton does not work on %s with keys of length %d and %s, so grids are read by torch: %s"
    logger.warning(text, device, key_length, dtype, error)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device had no memory left, by torch's allocator or by the driver under a kernel."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


@functools.cache
def level_table(resolutions: tuple, level_entries: tuple, num_dims: int, grid_type: str, device) -> torch.Tensor:
    """Rows (resolution, first entry, entries, how nodes find them) of all levels, (L, 4) int64."""
    rows, start = [], 0
    for resolution, num_entries in zip(resolutions, level_entries, strict=True):
        shared = ROW_MAJOR_SHARED if (resolution + 1) ** num_dims > num_entries else ROW_MAJOR
        mode = HASHED if is_hashed(resolution, num_dims, num_entries, grid_type) else shared
        rows.append((resolution, start, num_entries, mode))
        start += num_entries
    return torch.tensor(rows, dtype=torch.int64, device=device)


def launch(kernel, keys: torch.Tensor, num_groups: int, channels: int, grids: tuple, *tensors, **constants) -> None:
    """Runs a kernel on all points, levels and groups."""
    resolutions, level_entries, grid_type = grids
    batch_size, key_channels, height, width = keys.shape
    num_points = batch_size * height * width
    if num_points == 0:
        return
    key_length = key_channels // num_groups
    levels = level_table(tuple(resolutions), tuple(level_entries), 2 + key_length, grid_type, keys.device)
    with torch.cuda.device_of(keys):
        kernel[triton.cdiv(num_points, BLOCK), len(levels), num_groups](
            keys,
            levels,
            *tensors,
            num_points,
            height,
            width,
            sum(level_entries),
            key_length=key_length,
            channels=channels,
            padded_channels=triton.next_power_of_2(channels),
            block=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,  # positions are rounded before their cell is taken off, as torch does
            **constants,
        )


def lookup(
    keys: torch.Tensor,
    entries: torch.Tensor,
    resolutions: Sequence[int],
    level_entries: Sequence[int],
    grid_type: str,
    with_slopes: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and result as of the operator `lookup` in lookup_operator.py."""
    (num_groups, _, channels), (batch_size, key_channels, height, width) = entries.shape, keys.shape
    features = entries.new_empty(num_groups, channels * len(resolutions), batch_size, height * width)
    slopes = keys.new_empty(key_channels // num_groups if with_slopes else 0, *features.shape)
    grids = (resolutions, level_entries, grid_type)
    launch(_lookup_kernel, keys, num_groups, channels, grids, entries, features, slopes, with_slopes=with_slopes)
    return features, slopes


def scatter(
    grad_features: torch.Tensor,
    keys: torch.Tensor,
    resolutions: Sequence[int],
    level_entries: Sequence[int],
    grid_type: str,
) -> torch.Tensor:
    """Arguments and result as of the operator `scatter` in lookup_operator.py. Additions come in any order."""
    num_groups, channels = len(grad_features), grad_features.shape[1] // len(resolutions)
    grad_entries = keys.new_zeros(num_groups, sum(level_entries), channels)
    grids = (resolutions, level_entries, grid_type)
    launch(_scatter_kernel, keys, num_groups, channels, grids, grad_features, grad_entries)
    return grad_entries


if triton is not None:
    _PRIME_Y, _PRIME_KEY, _PRIME_SECOND_KEY = (tl.constexpr(prime) for prime in HASH_PRIMES[1:])
    _SHARED, _HASHED = tl.constexpr(ROW_MAJOR_SHARED), tl.constexpr(HASHED)

    @triton.jit
    def _cell(position, resolution):
        """Cell of positions in [0, 1], int64, and the place in it; one of the cells whatever a position is."""
        position = position * resolution.to(tl.float32)
        cell = tl.floor(position).to(tl.int32)
        cell = tl.minimum(tl.maximum(cell, 0), resolution.to(tl.int32) - 1)
        return cell.to(tl.int64), position - cell.to(tl.float32)

    @triton.jit
    def _locate(keys, offsets, mask, group, resolution, height, width, key_length: tl.constexpr):
        """Cells and places of points on the axes x, y, key and second key (with one key: the key's again, unused)."""
        num_pixels = height * width
        pixel = (offsets % num_pixels).to(tl.int32)
        x_cell, x = _cell(((pixel % width).to(tl.float32) + 0.5) / width, resolution)
        y_cell, y = _cell(((pixel // width).to(tl.float32) + 0.5) / height, resolution)
        channel = (offsets // num_pixels * tl.num_programs(2) + group) * key_length
        key_cell, key = _cell(tl.load(keys + channel * num_pixels + pixel, mask, 0.0), resolution)
        second = channel + key_length - 1
        second_cell, second_key = _cell(tl.load(keys + second * num_pixels + pixel, mask, 0.0), resolution)
        return x_cell, y_cell, key_cell, second_cell, x, y, key, second_key

    @triton.jit
    def _entry(x, y, key, second_key, resolution, num_entries, mode, key_length: tl.constexpr):
        """Entry of a level that holds a node: `entry_index` of lookup_reference.py."""
        side = resolution + 1
        if mode == _HASHED:
            index = x ^ (y * _PRIME_Y) ^ (key * _PRIME_KEY)
            if key_length == 2:
                index = index ^ (second_key * _PRIME_SECOND_KEY)
        else:
            index = x + side * (y + side * key)
            if key_length == 2:
                index += side * side * side * second_key
        if mode >= _SHARED:  # a division of 64 bits is slow, and most levels need none
            index = index % num_entries
        return index

    @triton.jit
    def _weight(place, side: tl.constexpr):
        """Share of the node on a side (0 or 1) of places in [0, 1]."""
        if side == 1:
            weight = place
        else:
            weight = 1.0 - place
        return weight

    @triton.jit
    def _lookup_kernel(
        keys,
        levels,
        entries,
        features,
        slopes,
        num_points,
        height,
        width,
        total_entries,
        key_length: tl.constexpr,
        channels: tl.constexpr,
        padded_channels: tl.constexpr,
        block: tl.constexpr,
        with_slopes: tl.constexpr,
    ):
        # Offsets have 64 bits: entries of all groups can be more than 2 ** 31.
        level, group = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        offsets = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        mask = offsets < num_points
        resolution, start = tl.load(levels + 4 * level), tl.load(levels + 4 * level + 1)
        num_entries, mode = tl.load(levels + 4 * level + 2), tl.load(levels + 4 * level + 3)
        cell_x, cell_y, cell_key, cell_second, x, y, key, second_key = _locate(
            keys, offsets, mask, group, resolution, height, width, key_length
        )
        channel = tl.arange(0, padded_channels)
        inside = mask[:, None] & (channel < channels)[None, :]
        table = entries + (group * total_entries + start) * channels
        total = tl.zeros((block, padded_channels), tl.float32)
        slope = tl.zeros((block, padded_channels), tl.float32)
        second_slope = tl.zeros((block, padded_channels), tl.float32)
        for plane in tl.static_range(2**key_length):
            values = tl.zeros((block, padded_channels), tl.float32)
            for corner in tl.static_range(4):
                index = _entry(
                    cell_x + corner % 2,
                    cell_y + corner // 2,
                    cell_key + plane % 2,
                    cell_second + plane // 2,
                    resolution,
                    num_entries,
                    mode,
                    key_length,
                )
                node = tl.load(table + index[:, None] * channels + channel[None, :], inside, 0.0)
                weight = _weight(x, corner % 2) * _weight(y, corner // 2)
                values += weight[:, None] * node.to(tl.float32)
            weight, second_weight = _weight(key, plane % 2), tl.full((block,), 1.0, tl.float32)
            if key_length == 2:
                second_weight = _weight(second_key, plane // 2)
                second_slope += (weight * (2 * (plane // 2) - 1))[:, None] * values
            total += (weight * second_weight)[:, None] * values
            slope += (second_weight * (2 * (plane % 2) - 1))[:, None] * values
        row = (group * tl.num_programs(1) + level) * channels + channel[None, :]
        target = row * num_points + offsets[:, None]
        tl.store(features + target, total.to(features.dtype.element_ty), inside)
        if with_slopes:
            tl.store(slopes + target, slope * resolution.to(tl.float32), inside)
            if key_length == 2:
                target += tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * channels * num_points
                tl.store(slopes + target, second_slope * resolution.to(tl.float32), inside)

    @triton.jit
    def _scatter_kernel(
        keys,
        levels,
        grad_features,
        grad_entries,
        num_points,
        height,
        width,
        total_entries,
        key_length: tl.constexpr,
        channels: tl.constexpr,
        padded_channels: tl.constexpr,
        block: tl.constexpr,
    ):
        level, group = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        offsets = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        mask = offsets < num_points
        resolution, start = tl.load(levels + 4 * level), tl.load(levels + 4 * level + 1)
        num_entries, mode = tl.load(levels + 4 * level + 2), tl.load(levels + 4 * level + 3)
        cell_x, cell_y, cell_key, cell_second, x, y, key, second_key = _locate(
            keys, offsets, mask, group, resolution, height, width, key_length
        )
        channel = tl.arange(0, padded_channels)
        inside = mask[:, None] & (channel < channels)[None, :]
        row = (group * tl.num_programs(1) + level) * channels + channel[None, :]
        grad = tl.load(grad_features + row * num_points + offsets[:, None], inside, 0.0).to(tl.float32)
        table = grad_entries + (group * total_entries + start) * channels
        for plane in tl.static_range(2**key_length):
            plane_weight = _weight(key, plane % 2)
            if key_length == 2:
                plane_weight *= _weight(second_key, plane // 2)
            for corner in tl.static_range(4):
                index = _entry(
                    cell_x + corner % 2,
                    cell_y + corner // 2,
                    cell_key + plane % 2,
                    cell_second + plane // 2,
                    resolution,
                    num_entries,
                    mode,
                    key_length,
                )
                weight = plane_weight * _weight(x, corner % 2) * _weight(y, corner // 2)
                pointers = table + index[:, None] * channels + channel[None, :]
                tl.atomic_add(pointers, weight[:, None] * grad, inside, sem="relaxed")

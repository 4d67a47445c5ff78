"""Time and memory of the lookup in the feature grids, forward and backward, at the paper's 64x64x4 preset.

Times (on a CPU: processor time) are medians of rounds in which all candidates take turns, and are to be compared
within one run only: the lookup against torch's own `F.grid_sample` on every level. The grids' gradient is part of
every backward pass. On a CPU, levels are read at 8 corners or by way of the pixels' lattice, by batch and resolution;
both are also tried for all.

Bytes are those that must move once: keys, features, slopes, their gradients, all entries' gradient, and the entries
that are touched. What that takes is measured: a copy that reads and writes as many.

Memory is counted in torch's allocator during one forward and backward pass: the largest sum of bytes alive that were
not there before (features, what is kept for the backward pass, gradients to keys and entries, temporaries). The grids
themselves (74.5 MB) and the gradient that comes in are not part of it.
"""

import argparse
import functools
import json
import math
from unittest import mock

import torch
import torch.nn.functional as F
from timing import interleaved, medians, peak_bytes

from brics_diffusers.models.grids import lookup_lattice
from brics_diffusers.models.grids.feature_grids import FeatureGrids
from brics_diffusers.models.grids.lookup_operator import retrieval_implementation, retrieve
from brics_diffusers.models.grids.lookup_reference import entry_index, pixel_centers
from brics_diffusers.models.presets import PRESETS
from brics_diffusers.utils.reports import markdown_table


FEATURE_SIZE = 64
KEY_CHANNELS = 4


def grid_sample_lookup(keys, entries, resolutions, level_entries, grid_type):
    """The lookup by `F.grid_sample` on the levels as volumes, copied where nodes share entries."""
    num_groups, (batch_size, _, height, width) = len(entries), keys.shape
    centers = pixel_centers(height, width, keys.device, keys.dtype).expand(num_groups, batch_size, -1, -1, -1)
    points = 2 * torch.cat([centers, keys.transpose(0, 1).unsqueeze(-1)], dim=-1) - 1  # (g, B, H, W, 3)
    levels = []
    for table, resolution in zip(entries.split(level_entries, dim=1), resolutions, strict=True):
        axis = torch.arange(resolution + 1, device=keys.device)
        nodes = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")[::-1], dim=-1)  # x last, as it is read
        if nodes[..., 0].numel() > table.shape[1]:
            table = table[:, entry_index(nodes, resolution, table.shape[1], grid_type).flatten()]
        volume = table.transpose(1, 2).unflatten(2, nodes.shape[:3])  # (g, C_r, key, y, x)
        levels.append(F.grid_sample(volume, points, align_corners=True, padding_mode="border"))
    return torch.cat(levels, dim=1).flatten(3)  # (g, N_r * C_r, B, P)


def make_step(grids: FeatureGrids, batch_size: int, lookup):
    """A forward and backward pass through one of the lookups."""
    device = grids.entries.device
    keys = torch.rand(batch_size, KEY_CHANNELS, FEATURE_SIZE, FEATURE_SIZE, device=device, requires_grad=True)
    upstream = torch.randn(KEY_CHANNELS, grids.num_features, batch_size, FEATURE_SIZE**2, device=device)

    def step():
        keys.grad = grids.entries.grad = None
        features = lookup(keys, grids.entries, grids.resolutions, grids.level_entries, grids.grid_type)
        features.backward(upstream)

    return step


def with_lattice_up_to(nodes_per_image: float, step) -> None:
    """A step in which levels up to a number of nodes along the key are read by way of the lattice."""
    with mock.patch.object(lookup_lattice, "NODES_PER_IMAGE", nodes_per_image):
        step()


def time_lookups(grids: FeatureGrids, batch_size: int, rounds: int) -> dict[str, float]:
    """Medians in seconds of all lookups and of moving the bytes, and these by the fast one's time."""
    device = grids.entries.device
    fast = make_step(grids, batch_size, retrieve)
    half = torch.empty(bytes_moved(grids, batch_size, fast) // 8, device=device)  # read and written, 4 bytes each
    steps = {
        "retrieve": fast,
        "grid_sample": make_step(grids, batch_size, grid_sample_lookup),
        "copy of its bytes": functools.partial(torch.empty_like(half).copy_, half),
    }
    if device.type == "cpu":
        steps["corners only"] = functools.partial(with_lattice_up_to, 0, fast)
        steps["lattice only"] = functools.partial(with_lattice_up_to, math.inf, fast)
    interleaved(steps, device, rounds=1)  # warms up
    seconds = medians(interleaved(steps, device, rounds))
    ratios = {f"{name} / retrieve": seconds[name] / seconds["retrieve"] for name in list(seconds)[1:]}
    return {**seconds, **ratios, "MB that must move": 8 * half.numel() / 1e6}


def bytes_moved(grids: FeatureGrids, batch_size: int, step) -> int:
    """What a forward and backward pass must read and write at least once."""
    step()
    entries = grids.entries
    touched = int((entries.grad != 0).sum())  # a gradient of exactly 0 comes of random numbers hardly ever
    keys = batch_size * KEY_CHANNELS * FEATURE_SIZE**2
    features = keys * grids.num_features  # of a group at a pixel
    forward = 4 * keys + entries.element_size() * (features + touched) + 4 * features  # the last are slopes
    backward = 2 * 4 * keys + entries.element_size() * features + 4 * features + 4 * (entries.numel() + 2 * touched)
    return forward + backward


def peak_of_step(grids: FeatureGrids, batch_size: int) -> int:
    """Largest number of bytes alive during a forward and backward pass, less those alive before."""
    step = make_step(grids, batch_size, retrieve)
    step()  # what is made once, and the gradients that the second step frees first
    grids.entries.grad = None
    return peak_bytes(step, grids.entries.device)


def measure(device: str = "cpu", batch_sizes: tuple[int, ...] = (1, 8), rounds: int = 9) -> dict:
    """Runs everything and returns the numbers."""
    torch.manual_seed(0)
    # The other defaults are the preset's.
    grids = FeatureGrids(KEY_CHANNELS, min_resolution=PRESETS["church-64x64x4"]["min_resolution"]).to(device)
    keys = torch.empty(0, KEY_CHANNELS, 1, 1, device=device)
    results = {"implementation": retrieval_implementation(keys, grids.entries), "threads": torch.get_num_threads()}
    for batch_size in batch_sizes:
        results[f"batch {batch_size}"] = time_lookups(grids, batch_size, rounds)
    one, two = (peak_of_step(grids, batch_size) / 1e6 for batch_size in (1, 2))
    results["memory"] = {"MB at batch 1": one, "MB for each further image": two - one}
    return results


def describe(result: dict) -> str:
    """The part of the report."""
    rows, batches = [], {name: times for name, times in result.items() if name.startswith("batch")}
    for name, times in batches.items():
        figures = {key: value for key, value in times.items() if "/" in key or "MB" in key}
        rows.append({"lookup, forward and backward": name, "retrieve, ms": 1e3 * times["retrieve"], **figures})
    one, more = result["memory"].values()
    return f"""Implementation: {result["implementation"]}. `grid_sample` is torch's, on the levels as volumes, the
copies of those whose nodes share entries included; the copy reads and writes as many bytes as the lookup must.

{markdown_table(rows)}
Memory of a forward and backward pass: {one:.1f} MB at batch 1, {more:.1f} MB for each further image.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch_sizes", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    print(json.dumps(measure(args.device, args.batch_sizes, args.rounds), indent=2))


if __name__ == "__main__":
    main()

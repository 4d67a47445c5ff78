"""Time and memory of the lookup in the feature grids, forward and backward, at the paper's 64x64x4 preset.

Times (on a CPU: processor time) are medians of rounds in which all candidates take turns, and are to be compared
within one run only: the fast lookup against the reference, a loop over groups, levels and corners with index gathers,
and against the same loop with all corners in one gather. The grids' gradient is part of every backward pass. On a CPU,
levels are read at 8 corners or by way of the pixels' lattice, by batch and resolution; both are also tried for all.

Bytes are those that must move once: keys, features, slopes, their gradients, all entries' gradient, and the entries
that are touched. What that takes is measured: a copy that reads and writes as many.

Memory is counted in torch's allocator during one forward and backward pass: the largest sum of bytes alive that were
not there before (features, what is kept for the backward pass, gradients to keys and entries, temporaries). The grids
themselves (74.5 MB) and the gradient that comes in are not part of it.
"""

import argparse
import functools
import itertools
import json
import math
from unittest import mock

import torch
from timing import interleaved, medians, peak_bytes

from brics_diffusers.models.grids import lookup_lattice, lookup_torch
from brics_diffusers.models.grids.feature_grids import FeatureGrids
from brics_diffusers.models.grids.lookup import retrieval_implementation, retrieve
from brics_diffusers.models.grids.lookup_reference import entry_index, pixel_centers
from brics_diffusers.utils.reports import markdown_table


FEATURE_SIZE = 64
KEY_CHANNELS = 4
BAR = 5  # times the speed of a loop


def gather_loop(keys, entries, resolutions, level_entries, grid_type):
    """The reference with the corners of a point in one gather instead of a loop: a harder loop to beat."""
    height, width = keys.shape[2:]
    centers = pixel_centers(height, width, keys.device, keys.dtype).flatten(0, 1)
    corners = torch.tensor(list(itertools.product((0, 1), repeat=3)), device=keys.device)  # (8, 3)
    features = []
    for key, group_entries in zip(keys.flatten(2).unbind(1), entries, strict=True):
        points = torch.cat([centers.expand(len(key), -1, -1), key.unsqueeze(-1)], dim=-1)  # (B, P, 3)
        levels = []
        for table, resolution in zip(group_entries.split(level_entries), resolutions, strict=True):
            position = points * resolution
            cell = position.detach().floor().clamp(max=resolution - 1)
            fraction = (position - cell).unsqueeze(-2)
            weights = torch.where(corners.bool(), fraction, 1 - fraction).prod(dim=-1, keepdim=True)
            index = entry_index(cell.long().unsqueeze(-2) + corners, resolution, len(table), grid_type)
            levels.append((weights * table[index]).sum(dim=-2))
        features.append(torch.cat(levels, dim=-1).permute(2, 0, 1))
    return torch.stack(features)


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


def with_zeros_of_torch(step) -> None:
    """A step in which torch itself makes the memory of the entries' gradient."""
    with mock.patch.object(lookup_torch, "fresh_zeros", lambda shape, like: like.new_zeros(shape)):
        step()


def time_lookups(grids: FeatureGrids, batch_size: int, rounds: int) -> dict[str, float]:
    """Medians in seconds of all lookups and of moving the bytes, and these by the fast one's time."""
    device = grids.entries.device
    fast = make_step(grids, batch_size, retrieve)
    half = torch.empty(bytes_moved(grids, batch_size, fast) // 8, device=device)  # read and written, 4 bytes each
    steps = {
        "retrieve": fast,
        "loop over corners": make_step(grids, batch_size, functools.partial(retrieve, implementation="reference")),
        "loop with one gather": make_step(grids, batch_size, gather_loop),
        "copy of its bytes": functools.partial(torch.empty_like(half).copy_, half),
    }
    if device.type == "cpu":
        steps["corners only"] = functools.partial(with_lattice_up_to, 0, fast)
        steps["lattice only"] = functools.partial(with_lattice_up_to, math.inf, fast)
        steps["zeros of torch"] = functools.partial(with_zeros_of_torch, fast)
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
    return peak_bytes(functools.partial(with_zeros_of_torch, step), grids.entries.device)  # numpy's are not counted


def measure(device: str = "cpu", batch_sizes: tuple[int, ...] = (1, 8), rounds: int = 9) -> dict:
    """Runs everything and returns the numbers."""
    torch.manual_seed(0)
    grids = FeatureGrids(KEY_CHANNELS).to(device)  # the defaults are the preset's
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
    verdicts = [
        f"{name.removeprefix('loop ')} {', '.join(bar_met(times[f'{name} / retrieve']) for times in batches.values())}"
        for name in ("loop over corners", "loop with one gather")
    ]
    return f"""Implementation: {result["implementation"]}. The loops are what a user would write first; the copy reads
and writes as many bytes as the lookup must.

{markdown_table(rows)}
At least {BAR} times the speed of a loop is wanted: {"; ".join(verdicts)}. Memory of a forward and backward pass:
{one:.1f} MB at batch 1 (at most 91 is wanted), {more:.1f} MB for each further image (35).
"""


def bar_met(ratio: float) -> str:
    """Whether a loop takes so many times as long."""
    return f"{ratio:.1f} ({'met' if ratio >= BAR else 'missed'})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch_sizes", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    print(json.dumps(measure(args.device, args.batch_sizes, args.rounds), indent=2))


if __name__ == "__main__":
    main()

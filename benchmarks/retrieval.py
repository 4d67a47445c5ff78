"""Time and memory of the lookup in the feature grids, forward and backward, at the paper's 64x64x4 preset.

Times (on a CPU: processor time) are medians of rounds in which all candidates take turns, and are to be compared
within one run only: the fast lookup against the reference, a loop over groups, levels and corners with index gathers,
and against the same loop with all corners in one gather. The grids' gradient is part of every backward pass.

Memory is counted in torch's allocator during one forward and backward pass: the largest sum of bytes alive that were
not there before (features, what is kept for the backward pass, gradients to keys and entries, temporaries). The grids
themselves (74.5 MB) and the gradient that comes in are not part of it.
"""

import argparse
import functools
import itertools
import json

import torch
from timing import interleaved, medians, peak_bytes

from brics_diffusers.models.feature_grids import FeatureGrids
from brics_diffusers.models.reference_retrieval import entry_index, pixel_centers
from brics_diffusers.models.retrieval import retrieval_implementation, retrieve
from brics_diffusers.reports import markdown_table


FEATURE_SIZE = 64
KEY_CHANNELS = 4


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


def time_lookups(grids: FeatureGrids, batch_size: int, rounds: int) -> dict[str, float]:
    """Medians in seconds of all lookups, and of the loops' times by the fast one's."""
    lookups = {
        "retrieve": retrieve,
        "loop over corners": functools.partial(retrieve, implementation="reference"),
        "loop with one gather": gather_loop,
    }
    steps = {name: make_step(grids, batch_size, lookup) for name, lookup in lookups.items()}
    device = grids.entries.device
    interleaved(steps, device, rounds=1)  # warms up
    seconds = medians(interleaved(steps, device, rounds))
    ratios = {f"{name} / retrieve": seconds[name] / seconds["retrieve"] for name in list(seconds)[1:]}
    return {**seconds, **ratios}


def peak_of_step(grids: FeatureGrids, batch_size: int) -> int:
    """Largest number of bytes alive during a forward and backward pass, less those alive before."""
    step = make_step(grids, batch_size, retrieve)
    step()  # what is made once, and the gradients that the second step frees first
    grids.entries.grad = None
    return peak_bytes(step, grids.entries.device)


def measure(device: str = "cpu", batch_sizes: tuple[int, ...] = (1, 8), rounds: int = 3) -> dict:
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
    rows = []
    for name, times in result.items():
        if name.startswith("batch"):
            ratios = {key: value for key, value in times.items() if "/" in key}
            rows.append({"lookup, forward and backward": name, "retrieve, ms": 1e3 * times["retrieve"], **ratios})
    one, more = result["memory"].values()
    return f"""Implementation: {result["implementation"]}. The loops are what a user would write first.

{markdown_table(rows)}
At least 5 is wanted of `loop over corners / retrieve`. Memory of a forward and backward pass: {one:.1f} MB at batch 1
(at most 91 is wanted), {more:.1f} MB for each further image (35).
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch_sizes", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(json.dumps(measure(args.device, args.batch_sizes, args.rounds), indent=2))


if __name__ == "__main__":
    main()

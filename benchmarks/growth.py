"""How time and memory of the lookup and of a whole decode grow with batch, resolution, levels, groups and T.

One thing of the paper's 64x64x4 preset is changed at a time. The slope is that of a line through log(time) over
log(value): 0 for what does not grow, 1 for what grows in proportion. Resolution counts pixels. Weights are float32 on
a CPU and bfloat16 on a GPU; what is looked up with stays in float32.
"""

import functools

import torch
from timing import log_slope, time_and_memory

from brics_diffusers import BricsAutoencoder
from brics_diffusers.models.presets import PRESETS
from brics_diffusers.utils.plots import COLORS, new_figure
from brics_diffusers.utils.reports import markdown_table


AXES = {
    "batch": (1, 2, 4),
    "resolution": (128, 256, 512),
    "levels": (4, 8, 16, 32),
    "groups": (1, 2, 4, 8, 16),
    "T": (2**12, 2**14, 2**16, 2**18, 2**20),
}
LOOKUP_REPEATS = 5  # a lookup takes a twentieth of a decode


def changed(config: dict, axis: str, value: int) -> tuple[dict, int]:
    """The configuration with one thing changed, and the batch size."""
    if axis == "batch":
        return config, value
    if axis == "resolution":
        factor = config["sample_size"] // config["feature_size"]
        return config | {"sample_size": value, "feature_size": value // factor}, 1
    name = {"levels": "num_levels", "groups": "key_channels", "T": "max_entries"}[axis]
    return config | {name: value}, 1


def make_steps(config: dict, batch_size: int, device: torch.device) -> tuple:
    """A lookup, repeated, and a decode."""
    model = BricsAutoencoder(**config).eval().to(device)
    if device.type == "cuda":  # diffusers warns of any conversion
        model.to(torch.bfloat16)
    codes = torch.rand(batch_size, *model.key_code_shape, device=device, dtype=model.dtype)
    keys = torch.rand(batch_size, model.key_code_shape[0], *[model.config.feature_size] * 2, device=device)

    def lookups():
        for _ in range(LOOKUP_REPEATS):
            model.grids(keys)

    return lookups, functools.partial(model.decode, codes)


@torch.no_grad()
def measure_axis(config: dict, axis: str, values: tuple[int, ...], device: torch.device, rounds: int) -> dict:
    """Times, peaks and slopes along one axis; all values take turns."""
    steps = {}
    for value in values:
        lookups, decode = make_steps(*changed(config, axis, value), device)
        steps |= {("lookup", value): lookups, ("decode", value): decode}
    found = time_and_memory(steps, device, rounds)
    rows = [{"value": value, "lookup": found["lookup", value], "decode": found["decode", value]} for value in values]
    for row in rows:
        row["lookup"]["seconds"] /= LOOKUP_REPEATS
    # The slope is that of work over pixels, not over the side of the image.
    sizes = [value**2 if axis == "resolution" else value for value in values]
    slopes = {
        f"{part} {name}": log_slope(sizes, [max(row[part][key], 1e-9) for row in rows])
        for part in ("lookup", "decode")
        for name, key in (("time", "seconds"), ("memory", "peak_mb"))
    }
    return {"rows": rows, "slopes": slopes}


def measure(device: str = "cpu", rounds: int = 1, config: dict | None = None, axes: dict | None = None) -> dict:
    """Runs everything and returns the numbers: rows and slopes by axis."""
    torch.manual_seed(0)
    with torch.device("meta"):
        full = dict(BricsAutoencoder(**(config or PRESETS["church-64x64x4"])).config)
    settings = {key: value for key, value in full.items() if not key.startswith("_")}
    axes = axes or AXES
    return {axis: measure_axis(settings, axis, axes[axis], torch.device(device), rounds) for axis in axes}


def describe(result: dict) -> str:
    """The part of the report."""
    rows = [
        {
            "changed": f"{axis} {row['value']}",
            "lookup ms": 1e3 * row["lookup"]["seconds"],
            "lookup MB": row["lookup"]["peak_mb"],
            "decode ms": 1e3 * row["decode"]["seconds"],
            "decode MB": row["decode"]["peak_mb"],
        }
        for axis, found in result.items()
        for row in found["rows"]
    ]
    slopes = [{"slope over": axis, **found["slopes"]} for axis, found in result.items()]
    first = result["batch"]["rows"][0]
    share = first["lookup"]["seconds"] / first["decode"]["seconds"]
    return f"""Forward passes; memory is without the weights. Slopes: 0 does not grow, 1 is in proportion. At batch
{first["value"]} the lookup takes {share:.1%} of a decode.

{markdown_table(rows)}
{markdown_table(slopes)}
The paper claims that the lookup's time has slope 0 over T, and at most 1 over points: batch, pixels (the slope over
resolution) and groups. What a level shares among images makes slopes smaller than 1. T changes how many entries are
stored, and so how many are in a processor's cache. In training the entries' gradient and Adam's step do grow with it.
"""


def figures(result: dict) -> dict:
    """Plots of time and memory over value, in units of the first value's."""
    figure, rows = new_figure(len(result), rows=2, width=3.0, height=2.7)
    for column, (axis, found) in zip(rows.T, result.items(), strict=True):
        values = [row["value"] for row in found["rows"]]
        for axes, key, title in zip(column, ("seconds", "peak_mb"), ("time", "memory"), strict=True):
            for color, part in zip(COLORS, ("lookup", "decode"), strict=False):
                amounts = [row[part][key] for row in found["rows"]]
                axes.plot(values, [amount / amounts[0] for amount in amounts], marker=".", color=color, label=part)
            axes.set(xlabel=axis, xscale="log", yscale="log", title=f"{title} / {title} at {axis} {values[0]}")
            axes.title.set_fontsize(8)
            axes.set_xticks(values, [str(value) for value in values], fontsize=7)
            axes.minorticks_off()
    rows[0, 0].legend(fontsize=8)
    return {"growth": figure}

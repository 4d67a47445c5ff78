"""Plots of the analyses, each a matplotlib figure."""

import math

import torch

from ..utils.image_grids import image_grid
from ..utils.plots import COLORS, new_figure
from .code_statistics import PRECISION_DECADES


def usage_plot(usage: dict, codebook: dict | None = None):
    """
    Share of used entries and variance of hits by group and level (`usage_by_group_and_level`), and histograms of hits,
    those of a VQ codebook (`hit_statistics`) too.
    """
    figure, ((left, middle, right),) = new_figure(3)
    resolutions, num_groups = [level["resolution"] for level in usage["levels"]], len(usage["groups"])
    for axes, name, title in (
        (left, "used", "share of entries used"),
        (middle, "variance", "variance of hits / mean"),
    ):
        values = torch.tensor([row[name] for row in usage["groups_and_levels"]]).view(num_groups, -1)
        top = 1 if name == "used" else None
        image = axes.imshow(values, vmin=0, vmax=top, cmap="viridis", aspect="auto", interpolation="nearest")
        axes.set(title=title, xlabel="cells per axis of the level", ylabel="group")
        axes.set_xticks(range(len(resolutions)), resolutions, fontsize=7)
        axes.set_yticks(range(num_groups))
        figure.colorbar(image, ax=axes)

    kinds = {"all levels": usage["total"], "finest level": usage["levels"][-1], "VQ codebook": codebook}
    for color, (name, statistics) in zip(COLORS, kinds.items(), strict=False):
        if statistics is not None:
            shares = torch.tensor(statistics["histogram"]) / statistics["entries"]
            label = f"{name}: {statistics['used']:.0%} used"
            right.stairs(shares, usage["histogram_edges"], color=color, label=label)
    right.set(title="histogram of hits", xlabel="log10(hits / mean hits) of used entries", ylabel="share of entries")
    right.legend(fontsize=8)
    return figure


def code_plot(statistics: dict):
    """Histograms of key codes, and of the precision of KL-regularised ones, from `key_code_statistics`."""
    precision = statistics.get("precision")
    figure, axes = new_figure(1 if precision is None else 2)
    _channel_histograms(axes[0, 0], statistics["histogram"], 0, 1)
    axes[0, 0].set(title="key codes", xlabel="value", ylabel="density")
    if precision is not None:
        _channel_histograms(axes[0, 1], precision["histogram"], *PRECISION_DECADES)
        relaxed = statistics["relaxed_precision"]
        axes[0, 1].axvline(math.log10(relaxed), color="black", linestyle="--", label=f"relaxed: {relaxed:.4g}")
        axes[0, 1].set(title="precision of the codes", xlabel="log10(sigma)", ylabel="density")
        axes[0, 1].legend(fontsize=8)
    return figure


def _channel_histograms(axes, counts: list[list[int]], low: float, high: float) -> None:
    density = torch.tensor(counts, dtype=torch.float64)
    num_bins = density.shape[1]
    density *= num_bins / (high - low) / density.sum(dim=1, keepdim=True)
    edges = torch.linspace(low, high, num_bins + 1)
    for channel, values in enumerate(density):
        label = f"channel {channel}" if len(counts) <= len(COLORS) else None  # more would hide the plot
        color = COLORS[channel % len(COLORS)]
        axes.stairs(values, edges, color=color, alpha=0.8, label=label)
    if len(counts) <= len(COLORS):
        axes.legend(fontsize=8)


def schedule_plot(curves: dict, prediction_type: str, snr_gamma: float):
    """logSNR and loss weights over time (Fig. 13), from `schedule_curves`; dashed with min-SNR."""
    figure, ((left, right),) = new_figure(2)
    for color, (name, curve) in zip(COLORS, curves.items(), strict=False):
        left.plot(curve["t"], curve["log_snr"], color=color, label=name)
        left.plot(curve["t"], curve["log_snr_capped"], color=color, linestyle="--")
        right.plot(curve["t"], curve["min_snr_weight"], color=color, linestyle="--", label=f"{name}, min-SNR")
    right.axhline(1, color="black", linewidth=1, label="without min-SNR")
    left.set(title=f"logSNR; dashed: capped at log {snr_gamma:g}", xlabel="t", ylabel="log(SNR)")
    right.set(title=f"weight of the loss ({prediction_type})", xlabel="t", ylabel="weight")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    return figure


def noised_plot(decoded: dict[str, torch.Tensor], times: list[float]):
    """What noised codes decode to (Fig. 12): images (B, times, 3, H, W) by schedule, times from left to right."""
    num_images = next(iter(decoded.values())).shape[0]
    rows = torch.stack(list(decoded.values()), dim=1).flatten(0, 1)  # (B * schedules, times, 3, H, W)
    picture = image_grid(rows.flatten(0, 1), columns=len(times))
    step_x, step_y = picture.width / len(times), picture.height / len(rows)
    figure, ((axes,),) = new_figure(width=0.9 * len(times) + 1, height=0.9 * len(rows) + 0.5)
    axes.imshow(picture)
    axes.set_xticks([(index + 0.5) * step_x for index in range(len(times))], [f"t = {time:g}" for time in times])
    axes.set_yticks([(index + 0.5) * step_y for index in range(len(rows))], list(decoded) * num_images)
    axes.tick_params(length=0, labelsize=8, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    return figure


def cost_plot(parameters: dict[str, float], multiply_adds: dict[str, float], image: str):
    """
    Bars of decoders' parameters in millions and multiply-adds in 10**9, by name, for images such as `"256 x 256"`.
    """
    figure, ((left, right),) = new_figure(2, height=0.3 * len(parameters) + 0.9)
    for axes, values, title in (
        (left, multiply_adds, f"multiply-adds of one {image} decode (G)"),
        (right, parameters, "parameters (M)"),
    ):
        bars = axes.barh(list(values), list(values.values()), color=COLORS[0])
        axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
        axes.set_title(title, fontsize=10)
        axes.margins(x=0.12)
        axes.tick_params(labelsize=8)
        axes.invert_yaxis()
    right.set_yticks([])
    return figure

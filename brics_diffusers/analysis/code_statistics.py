"""Where key codes lie, and how exact they are (App. D)."""

from collections.abc import Iterable

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from ..models import BricsAutoencoder


EDGE = 1 / 256  # the relaxed precision of the paper's presets: closer to 0 or 1, a code hardly moves any more
NUM_BINS = 256
PRECISION_DECADES = (-6.0, 0.0)  # log10 of sigma; it can't exceed 1/2, and below 1e-6 float32 sees nothing

# Trapezoidal rule for expectations over N(0, 1): exact to rounding for smooth functions, to 2% for a step.
NORMAL_NODES = torch.linspace(-8, 8, 257, dtype=torch.float64)


def sigmoid_precision(mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """
    Standard deviation of sigmoid(mean + std * n), n ~ N(0, 1): the precision of a KL-regularised code (App. D.1).
    `mean` and `std` are those of the logits, of any one shape; the result has it too, float64, in [0, 1/2].
    """
    mean, std = mean.double(), std.double()
    center = torch.sigmoid(mean)  # squares of differences from here on: no cancellation when std is tiny
    weights = torch.exp(-NORMAL_NODES.square() / 2)
    first, second = torch.zeros_like(mean), torch.zeros_like(mean)
    for node, weight in zip(NORMAL_NODES.tolist(), (weights / weights.sum()).tolist(), strict=True):
        difference = torch.sigmoid(mean + std * node) - center
        first += weight * difference
        second += weight * difference.square()
    return (second - first.square()).clamp(min=0).sqrt()


class RunningHistogram:
    """
    Histogram, mean and standard deviation of each channel, batch by batch; values outside [low, high] count in the
    outer bins.
    """

    def __init__(self, num_channels: int, low: float, high: float):
        self.low, self.high = low, high
        self.counts = torch.zeros(num_channels, NUM_BINS, dtype=torch.int64)
        self.sums = torch.zeros(2, num_channels, dtype=torch.float64)

    def add(self, values: torch.Tensor) -> None:
        """Adds values (C, n)."""
        values = values.double().cpu()
        bins = ((values - self.low) / (self.high - self.low) * NUM_BINS).long().clamp(0, NUM_BINS - 1)
        self.counts.scatter_add_(1, bins, torch.ones_like(bins))
        self.sums += torch.stack([values.sum(dim=1), values.square().sum(dim=1)])

    def mean_and_std(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation (divided by N) of each channel (C,), float64."""
        mean, square = self.sums / self.counts.sum(dim=1)
        return mean, (square - mean.square()).clamp(min=0).sqrt()


@torch.no_grad()
def key_code_statistics(autoencoder: BricsAutoencoder, batches: Iterable[tuple]) -> dict:
    """
    Distribution of the key codes of a collection, without perturbation, from batches of `image_batches`.

    The result has `"channels"`, for each channel its `"mean"`, `"std"`, `"near_zero"` and `"near_one"` (shares of
    codes within 1/256), and with KL regularisation `"precision"` (mean sigma of the codes drawn in training);
    `"histogram"` (C, 256) counts of [0, 1]; `"relaxed_precision"`, 1 / (4 N_max) of Sec. 3.4; and with KL
    regularisation `"precision"`, of all codes: `"mean"`, `"min"`, `"max"`, `"above_relaxed"` (share of codes less
    exact than the relaxed ones) and `"histogram"` (C, 256) counts of log10(sigma) in [-6, 0].
    """
    num_channels = autoencoder.config.key_channels
    codes, edges = RunningHistogram(num_channels, 0, 1), torch.zeros(2, num_channels, dtype=torch.int64)
    relaxed = 1 / (4 * autoencoder.config.max_resolution)
    precision = PrecisionStatistics(num_channels, relaxed) if autoencoder.config.regularization == "kl" else None
    for images, _ in batches:
        logits = autoencoder.encoder(images)
        if precision is not None:
            posterior = DiagonalGaussianDistribution(logits.float())
            precision.add(posterior)
            logits = posterior.mean
        values = torch.sigmoid(logits.float()).transpose(0, 1).flatten(1).cpu()  # (C_z, B * H_z * W_z)
        codes.add(values)
        edges += torch.stack([(values <= EDGE).sum(dim=1), (values >= 1 - EDGE).sum(dim=1)])
    near_zero, near_one = edges / codes.counts.sum(dim=1)
    mean, std = codes.mean_and_std()
    columns = {"mean": mean, "std": std, "near_zero": near_zero, "near_one": near_one}
    result = {"histogram": codes.counts.tolist(), "relaxed_precision": relaxed}
    if precision is not None:
        columns["precision"] = precision.values.mean_and_std()[0]
        result["precision"] = precision.summary()
    names = columns.keys()
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return {"channels": [dict(zip(names, row, strict=True)) for row in rows]} | result


class PrecisionStatistics:
    """Empirical precision of KL-regularised codes, batch by batch, beside the `relaxed` precision."""

    def __init__(self, num_channels: int, relaxed: float):
        self.relaxed = relaxed
        self.values, self.logs = (
            RunningHistogram(num_channels, 0, 1),
            RunningHistogram(num_channels, *PRECISION_DECADES),
        )
        self.smallest, self.largest, self.above = float("inf"), 0.0, 0

    def add(self, posterior: DiagonalGaussianDistribution) -> None:
        """Adds the codes of a batch."""
        sigma = sigmoid_precision(posterior.mean.cpu(), posterior.std.cpu()).transpose(0, 1).flatten(1)  # (C_z, n)
        self.values.add(sigma)
        self.logs.add(sigma.clamp(min=1e-30).log10())
        self.smallest, self.largest = min(self.smallest, sigma.min().item()), max(self.largest, sigma.max().item())
        self.above += (sigma > self.relaxed).sum().item()

    def summary(self) -> dict:
        """Figures of all codes together."""
        return {
            "mean": self.values.mean_and_std()[0].mean().item(),
            "min": self.smallest,
            "max": self.largest,
            "above_relaxed": self.above / self.values.counts.sum().item(),
            "histogram": self.logs.counts.tolist(),
        }

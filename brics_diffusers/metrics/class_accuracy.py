"""A linear classifier on features of images, and how often it is right."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


WEIGHT_DECAY = 1e-3  # of the weights of standardized features over the square root of their number


@dataclass
class LinearClassifier:
    """
    Multinomial logistic regression on features (N, D), standardized: `mean` (D,) and `deviation` (D,), times the
    square root of D, are those of the features it was fitted to; `weight` is (D, C), `bias` (C,).
    """

    mean: torch.Tensor
    deviation: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Numbers of the likeliest classes (N,) of features (N, D)."""
        scaled = (features.double() - self.mean) / self.deviation
        return (scaled @ self.weight + self.bias).argmax(dim=1)


def fit_classifier(features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> LinearClassifier:
    """
    The classifier of features (N, D) and labels (N,) with the smallest cross-entropy, in which all classes count alike
    however many images they have, in float64; a `ValueError` if a class has no image.
    """
    counts = torch.bincount(labels, minlength=num_classes)
    if (counts == 0).any():
        raise ValueError(f"class {counts.argmin().item()} has no image to learn from; give images of every class.")
    features, shares = features.double(), 1 / (num_classes * counts.double())
    mean, deviation = features.mean(dim=0), features.std(dim=0).clamp_min(1e-12) * features.shape[1] ** 0.5
    scaled = (features - mean) / deviation
    weight = torch.zeros(features.shape[1], num_classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        entropy = F.cross_entropy(scaled @ weight + bias, labels, reduction="none")
        value = (entropy * shares[labels]).sum() + WEIGHT_DECAY / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return LinearClassifier(mean, deviation, weight.detach(), bias.detach())


def recall_by_class(predicted: torch.Tensor, labels: torch.Tensor, num_classes: int) -> list[float | None]:
    """The share of each class's images that are found, `None` without any; their mean is the balanced accuracy."""
    found = [predicted[labels == number] == number for number in range(num_classes)]
    return [right.double().mean().item() if len(right) else None for right in found]

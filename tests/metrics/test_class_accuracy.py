"""The linear classifier of features, and the share of each class that it finds."""

import pytest
import torch
import torch.nn.functional as F

from brics_diffusers.metrics.class_accuracy import WEIGHT_DECAY, fit_classifier, recall_by_class


@pytest.fixture
def classes():
    """Features of three classes of 300, 30 and 10 images, which overlap a little, and their numbers."""
    torch.manual_seed(0)
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([300, 30, 10]))
    means = torch.tensor([[0.0, 0, 0, 0], [3, 0, 0, 9], [0, 3, 0, 0]])
    return means[labels] + torch.randn(340, 4) * torch.tensor([1.0, 1, 1, 5]), labels


def test_the_loss_has_its_minimum_there(classes):
    features, labels = classes
    classifier = fit_classifier(features, labels, 3)
    parameters = classifier.weight.clone().requires_grad_(), classifier.bias.clone().requires_grad_()
    scaled = (features.double() - features.double().mean(0)) / features.double().std(0) / 2
    each = [
        F.cross_entropy(scaled[labels == n] @ parameters[0] + parameters[1], labels[labels == n]) for n in range(3)
    ]
    loss = sum(each) / 3 + WEIGHT_DECAY / 2 * parameters[0].square().sum()
    assert max(gradient.abs().max() for gradient in torch.autograd.grad(loss, parameters)) < 1e-4


def test_rare_classes_count_as_much_as_frequent_ones(classes):
    features, labels = classes
    recalls = recall_by_class(fit_classifier(features, labels, 3)(features), labels, 3)
    assert min(recalls) > 0.85


def test_recall():
    predicted, labels = torch.tensor([0, 1, 1, 1, 0]), torch.tensor([0, 0, 1, 1, 1])
    assert recall_by_class(predicted, labels, 3) == [0.5, pytest.approx(2 / 3), None]


def test_a_class_without_images(classes):
    with pytest.raises(ValueError, match="class 3 has no image to learn from"):
        fit_classifier(*classes, 4)

"""Class-conditional training of stage two: labels that are dropped, and the classes of validation images."""

import argparse
from collections import Counter

import datasets
import numpy as np
import torch

from ..pipelines import BricsKeyCodePipeline


def known_classes(args: argparse.Namespace, pipeline: BricsKeyCodePipeline | None) -> list[str] | None:
    """
    Names of the classes of a pipeline to go on from, in the order of their numbers; `None` without a pipeline or
    without classes. A `ValueError` if one of the two, pipeline and run, has classes and the other has none.
    """
    if pipeline is None:
        return None
    if (pipeline.num_classes is not None) != args.class_conditional:
        kind, remedy = ("unconditional", "leave --class_conditional out")
        if pipeline.num_classes is not None:
            kind, remedy = ("class-conditional", "add --class_conditional")
        raise ValueError(f"{args.pretrained_model_name_or_path} is {kind}; {remedy}, or train a new model.")
    if args.class_conditional and pipeline.class_names is None:
        raise ValueError(
            f"{args.pretrained_model_name_or_path} has no id2label, which names its classes; save it with one."
        )
    return pipeline.class_names


def drop_labels(
    labels: torch.Tensor,
    no_class: int,
    probability: float,
    seed: int,
    batch: int,
    process_index: int = 0,
    num_processes: int = 1,
) -> torch.Tensor:
    """
    Replaces a random share of a process's labels (B,) of a batch by `no_class` (Ho and Salimans, arXiv 2207.12598).

    What is replaced follows from the seed and the number of the batch, as noise does: several processes replace what
    one process with their batches together does.
    """
    # A third number: other draws than those of noise, which has two.
    random = np.random.default_rng((seed, batch, 1)).random(len(labels) * num_processes)
    share = torch.from_numpy(random[process_index * len(labels) : (process_index + 1) * len(labels)])
    return torch.where(share < probability, no_class, labels)


def count_classes(dataset: datasets.Dataset) -> dict[str, int]:
    """Images of each class of a collection with labels, by name."""
    names, counts = dataset.features["label"].names, Counter(dataset["label"])
    return {name: counts[label] for label, name in enumerate(names)}


def frequent_labels(num_images: int, class_images: dict[str, int]) -> list[int]:
    """Labels of images drawn with the classes' shares of the training images, the same at each call."""
    counts = np.array(list(class_images.values()))
    return np.random.default_rng(0).choice(len(counts), num_images, p=counts / counts.sum()).tolist()


def spread_labels(num_images: int, num_classes: int) -> list[int]:
    """Labels of images that show all classes in their order, each equally often as far as that can be."""
    return [index * num_classes // num_images for index in range(num_images)]

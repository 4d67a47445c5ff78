"""Class-conditional training of stage two: flags, labels that are dropped, and the classes of validation images."""

import argparse
import functools
from collections import Counter

import datasets
import numpy as np
import torch

from ..pipelines import BricsKeyCodePipeline
from .arguments import positive


def probability(text: str) -> float:
    """Type of a flag for a share: a `float` in [0, 1)."""
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to below 1, not {text}")
    return float(text)


def add_class_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of class-conditional training."""
    add = parser.add_argument
    flag = functools.partial(add, action=argparse.BooleanOptionalAction, default=False)
    flag(
        "--class_conditional",
        help="Train with the classes of the images: a column, a metadata file, or the folders that they lie in.",
    )
    add(
        "--class_column",
        help="Column that holds the classes; default: `label`, or the only one of ClassLabel, or of strings.",
    )
    add(
        "--class_dropout_prob",
        type=probability,
        default=0.1,
        help="Share of images that train without their class, which classifier-free guidance needs.",
    )
    flag("--balance_classes", help="Draw all classes equally often, the images of rare ones repeatedly.")
    add("--min_class_images", type=positive, default=1, help="Leave out the images of classes with fewer images.")


def check_class_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses flags of classes in a training without them, and a UNet's number of classes from elsewhere."""
    if not args.class_conditional:
        given = [
            f"--{name}"
            for name in ("class_column", "class_dropout_prob", "balance_classes", "min_class_images")
            if getattr(args, name) != parser.get_default(name)
        ]
        if given:
            parser.error(f"{', '.join(given)} need classes; add --class_conditional or leave them out")
    if args.class_conditional and args.streaming:
        parser.error(
            "--class_conditional counts the images of all classes first, and --streaming does not; leave one out"
        )
    for name in ("num_class_embeds", "class_embed_type"):
        if args.unet.get(name) is not None:
            parser.error(f"unet.{name} is {args.unet[name]}; leave it out, --class_conditional sets it")


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

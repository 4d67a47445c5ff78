"""How often a classifier finds the class that samples were asked for, beside images that nobody has generated.

A linear classifier is fitted to features of --dataset_split, all classes counting alike, and judged by its balanced
accuracy, the mean over the classes of the share of images that it finds: on --num_samples samples, all classes in
turn, and on the images of --test_split.
"""

import argparse
import statistics
from pathlib import Path

import torch
from accelerate import PartialState

from ..data import evaluation_loader, load_collection
from ..metrics.class_accuracy import fit_classifier, recall_by_class
from ..metrics.feature_distances import collection_features
from ..metrics.feature_extractors import load_feature_extractor
from ..metrics.generation import KID_FEATURES
from ..pipelines.sampling import load_pipeline, load_samples
from ..training_utils.arguments import positive
from ..utils.reports import make_output_folder, markdown_table
from .generated import add_sampling_arguments, sample_to_folder
from .shared import add_collection_arguments, add_run_arguments, choose_device, publish


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this subcommand."""
    add = parser.add_argument
    add("model", help="Pipeline with classes: its folder, or its name on the Hub.")
    add("--num_samples", type=positive, default=450, help="Samples of all classes together. Default: %(default)s.")
    add("--feature_extractor", default=KID_FEATURES, metavar="NAME", help="Features. Default: %(default)s.")
    add("--test_split", default="validation", help="Split of images to compare with. Default: %(default)s.")
    add("--class_column", help="Column that holds the classes, as in stage two.")
    add_sampling_arguments(parser)
    add_collection_arguments(parser, split="train")
    add_run_arguments(parser, seed="the samples", output_dir="runs/class-accuracy")


def run(args: argparse.Namespace) -> None:
    """Makes the samples on all processes, fits and judges on the first, and writes the report."""
    device, state = choose_device(args.device), PartialState()
    pipe = load_pipeline(args.model)
    names = getattr(pipe, "class_names", None)
    if not names:
        raise ValueError(f"{args.model} has no classes with names; give a pipeline that was trained with them.")
    if args.class_labels is not None:
        raise ValueError("--class_labels are all classes in turn here; leave them out.")
    args.class_labels = ["all"]
    if state.is_main_process:  # what can fail does so before the samples are made
        splits = {split: _labelled(args, split, names) for split in (args.dataset_split, args.test_split)}
        extractor = load_feature_extractor(args.feature_extractor, device)
    folder = make_output_folder(Path(args.output_dir) / "samples")
    sample_to_folder(args, args.model, folder, state, device)
    if not state.is_main_process:
        return
    size = pipe.autoencoder.config.sample_size

    def features_of(dataset, labels: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        rows, loader = [], evaluation_loader(dataset, size, args.batch_size, args.dataloader_num_workers)

        def noted():
            for batch in loader:
                rows.extend(batch["index"].tolist())
                yield batch

        features = collection_features(noted(), extractor, device)
        return features, torch.tensor([labels[row] for row in rows])

    classifier = fit_classifier(*features_of(*splits[args.dataset_split]), len(names))
    samples = load_samples(folder, args.num_samples)
    judged = {
        "samples": features_of(samples, [number % len(names) for number in range(len(samples))]),
        args.test_split: features_of(*splits[args.test_split]),
    }
    result = {"model": args.model, "dataset_name": args.dataset_name, "features": args.feature_extractor}
    result |= {"num_samples": args.num_samples, "seed": args.seed, "test_split": args.test_split, "classes": {}}
    for name, (features, labels) in judged.items():
        recalls = recall_by_class(classifier(features), labels, len(names))
        accuracy = statistics.mean(value for value in recalls if value is not None)
        result["classes"][name] = dict(zip(names, recalls, strict=True)) | {"balanced accuracy": accuracy}
    publish(args, "class-accuracy", result, _describe(result), dict, device)


def _labelled(args: argparse.Namespace, split: str, names: list[str]):
    """A split's images of the classes in `names`, and their numbers."""
    options = {"config_name": args.dataset_config_name, "with_labels": True, "class_column": args.class_column}
    dataset = load_collection(args.dataset_name, split, args.image_column, args.cache_dir, **options)
    of_collection = dataset.features["label"].names
    labels = [of_collection[label] for label in dataset["label"]]
    rows = [row for row, name in enumerate(labels) if name in names]
    if not rows:
        raise ValueError(f"{split} has no image of {', '.join(names)}; name another --class_column or split.")
    return dataset.select(rows).select_columns("image"), [names.index(labels[row]) for row in rows]


def _describe(result: dict) -> str:
    shares = result["classes"].items()
    rows = [
        {"class": name} | {which: f"{found[name]:.1%}" for which, found in shares if found[name] is not None}
        for name in next(iter(result["classes"].values()))
    ]
    samples, real = (found["balanced accuracy"] for found in result["classes"].values())
    return (
        f"# Classes of samples\n\n{markdown_table(rows)}\n"
        f"Share of the images whose class a linear classifier finds by features of {result['features']}: of "
        f"{result['num_samples']} samples of `{result['model']}`, all classes in turn, and of the images of "
        f"{result['test_split']}. Samples over images: {samples / real:.2f}.\n"
    )

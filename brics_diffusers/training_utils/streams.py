"""Training and held-out images of both stages, and their loaders: of a collection on this machine or of a stream."""

import argparse
import hashlib
import itertools
import logging

import datasets
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from ..data import ImageCollection, collate_images, load_collection, training_loader
from ..data.streaming import (
    TENTH,
    StreamedImages,
    StreamPosition,
    first_images,
    load_stream,
    read_shard,
    split_stream,
    stream_loader,
)
from ..models import BricsAutoencoder
from .checkpoints import RunState
from .run import hold_out, load_splits, resized_images


logger = logging.getLogger(__name__)

HELD_OUT_IMAGES = 256  # of a validation split, for stage two
SHARDS_TO_TELL = 8  # of a stream, by whose first images it is told from others


def open_stream(args: argparse.Namespace, split: str) -> datasets.IterableDataset:
    """A split of the run's collection as [`load_stream`] gives it."""
    return load_stream(args.dataset_name, split, args.image_column, args.cache_dir, args.dataset_config_name)


def load_training_images(args: argparse.Namespace):
    """
    What a run of stage one trains on, a collection or a stream, and validates with, a collection or `None`; of a
    stream, validation images are kept in memory.
    """
    if not args.streaming:
        return load_splits(args)
    return hold_out_of_stream(args, args.num_validation_images)


def hold_out_of_stream(args: argparse.Namespace, count: int, of_training: bool = True):
    r"""
    The training images of a streamed collection, and the first of its validation split or else some of its own.

    Args:
        args (`argparse.Namespace`): Flags of [`add_common_arguments`], and `validation_split`.
        count (`int`): Images to hold out at most, which are kept in memory; 0 for none.
        of_training (`bool`, defaults to `True`): Whether training images may be held out.

    Returns:
        `tuple`: a `datasets.IterableDataset`, and a `datasets.Dataset` or `None`.
    """
    stream = open_stream(args, args.dataset_split)
    if count == 0:
        return stream, None
    validation = None
    try:
        validation = open_stream(args, args.validation_split or "validation")
    except (ValueError, FileNotFoundError):
        if args.validation_split is not None:
            raise
    if validation is not None:
        return stream, first_images(validation, count)
    if not of_training:
        return stream, None
    stream, held_out = split_stream(stream, count)
    if held_out is None:
        logger.warning("No images are held out: there is no validation split, and no shard has ten images.")
    else:
        logger.info("No validation split: %d images of the stream are held out.", len(held_out))
    return stream, held_out


def image_loader(
    args: argparse.Namespace,
    accelerator: Accelerator,
    images: datasets.Dataset | datasets.IterableDataset,
    autoencoder: BricsAutoencoder,
    state: RunState,
    position: StreamPosition,
) -> DataLoader:
    """
    The endless loader of this process's training batches (`collate_images`), from where the run stands: the images
    seen, or the position in a stream. Call on every process.
    """
    channels, *size = autoencoder.sample_shape
    if args.streaming:
        options = {"seed": args.seed, "random_flip": args.random_flip, "channels": channels}
        stream = StreamedImages(images, size, args.train_batch_size, position, **options)
        return stream_loader(stream, args.dataloader_num_workers)
    return training_loader(
        ImageCollection(images, size, args.random_flip, True, resized_images(args, images, autoencoder), channels),
        args.train_batch_size,
        args.seed,
        start=state.images_seen // (args.train_batch_size * accelerator.num_processes),
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        num_workers=args.dataloader_num_workers,
        collate_fn=collate_images,
    )


def load_images_to_encode(args: argparse.Namespace, class_names: list[str] | None = None):
    """The collection or stream of stage two, and held-out images for its validation or `None`.

    With `--class_conditional` the collection has labels, of `class_names` if they are given.
    """
    count = HELD_OUT_IMAGES if args.num_held_out_images is None else args.num_held_out_images
    of_training = args.num_held_out_images is not None
    if args.streaming:
        return hold_out_of_stream(args, count, of_training)
    where = args.image_column, args.cache_dir, args.max_train_samples, args.dataset_config_name
    classes = args.class_conditional, args.class_column, args.min_class_images, class_names
    train = load_collection(args.dataset_name, args.dataset_split, *where, *classes)
    return hold_out(args, train, count, of_training)


def stream_fingerprint(args: argparse.Namespace, stream: datasets.IterableDataset) -> str:
    """A digest of a stream's name, its shards, how many of its images may be held out, and the first images of some
    shards, of which the last is missing where images are held out: reading all would take days."""
    facts = args.dataset_config_name, args.dataset_split, stream.num_shards, args.num_held_out_images
    digest = hashlib.sha256(repr(facts).encode())
    for shard in torch.linspace(0, stream.num_shards - 1, min(SHARDS_TO_TELL, stream.num_shards)).tolist():
        digest.update(repr(list(itertools.islice(read_shard(stream, round(shard)), TENTH))).encode())
    return digest.hexdigest()

"""Training and held-out images of both stages, and their loaders: of a collection on this machine or of a stream."""

import argparse
import hashlib
import logging

import datasets
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from ..data import ImageCollection, collate_images, load_collection, training_loader
from ..data.streaming import StreamedImages, StreamPosition, first_images, load_stream, read_shard, stream_loader
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
    What a run of stage one trains on, a collection or a stream, and validates with, a collection or `None`. Of a
    stream, the first `num_validation_images` of the validation split are kept in memory; without such a split nothing
    is held out.
    """
    if not args.streaming:
        return load_splits(args)
    return open_stream(args, args.dataset_split), hold_out_of_stream(args, args.num_validation_images)


def hold_out_of_stream(args: argparse.Namespace, count: int) -> datasets.Dataset | None:
    """The first images of the validation split, at most `count`, in memory; `None` if there is no such split."""
    if count == 0:
        return None
    try:
        held_out = open_stream(args, args.validation_split or "validation")
    except (ValueError, FileNotFoundError):
        if args.validation_split is not None:
            raise
        logger.warning("No validation split: of a stream no images are held out; --validation_split names some.")
        return None
    return first_images(held_out, count)


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
    if args.streaming:
        return open_stream(args, args.dataset_split), hold_out_of_stream(args, count)
    where = args.image_column, args.cache_dir, args.max_train_samples, args.dataset_config_name
    classes = args.class_conditional, args.class_column, args.min_class_images, class_names
    train = load_collection(args.dataset_name, args.dataset_split, *where, *classes)
    return hold_out(args, train, count, of_training=args.num_held_out_images is not None)


def stream_fingerprint(args: argparse.Namespace, stream: datasets.IterableDataset) -> str:
    """A digest of a stream's name, its shards, and the first images of some of them: reading all would take days."""
    digest = hashlib.sha256(repr((args.dataset_config_name, args.dataset_split, stream.num_shards)).encode())
    for shard in torch.linspace(0, stream.num_shards - 1, min(SHARDS_TO_TELL, stream.num_shards)).tolist():
        digest.update(repr(next(read_shard(stream, round(shard)), None)).encode())
    return digest.hexdigest()

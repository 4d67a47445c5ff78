"""Flags of class-conditional training, for stage two."""

import argparse
import functools

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

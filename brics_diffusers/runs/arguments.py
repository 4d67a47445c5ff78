"""Flags and config files of both training scripts."""

import argparse
import contextlib
import re
import sys
from pathlib import Path

import yaml
from accelerate import Accelerator


CONFIG_SECTIONS = ("autoencoder", "discriminator", "train_autoencoder", "unet", "scheduler", "train_key_codes")


# Flags that a resumed run may have otherwise without another result.
FREE_FLAGS = {
    *("config", "changes", "dataset_name", "cache_dir", "output_dir", "key_codes_dir", "resume_from_checkpoint"),
    *("mixed_precision", "gradient_checkpointing", "dataloader_num_workers", "encode_batch_size", "shard_size"),
    *("checkpointing_steps", "checkpoints_total_limit", "validation_steps", "logging_steps", "max_nonfinite_steps"),
    *("validation_split", "num_validation_images", "num_inference_steps", "pretrained_autoencoder_name_or_path"),
    *("best_metric", "save_validation_weights", "cache_resized"),
    *("autoencoder_name_or_path", "save_dtype", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_license"),
}


def positive(text: str) -> int:
    """Type of a flag that counts something: an `int` of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


def not_negative(text: str) -> int:
    """Type of a flag that may be 0: an `int` of at least 0."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {text}")
    return int(text)


def setting(text: str) -> tuple[str, str, object]:
    """Type of a flag that changes a config: `section.name=value`, the value as in YAML."""
    name, equals, value = text.partition("=")
    section, _, name = name.partition(".")
    if not (section and name and equals):
        raise argparse.ArgumentTypeError(f"must look like autoencoder.key_length=2, not {text}")
    try:
        value = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"must have a value that YAML can read, not {text}") from error
    with contextlib.suppress(ValueError):
        value = float(value) if isinstance(value, str) else value  # YAML takes 1e-3 for text
    return section, name, value


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that both training scripts have."""
    add = parser.add_argument
    add("--config", help="YAML file with models and flags; flags on the command line beat it.")
    add(
        "--set",
        dest="changes",
        type=setting,
        nargs="+",
        action="extend",
        default=[],
        metavar="SECTION.NAME=VALUE",
        help="Changes to the models of the config, for instance autoencoder.key_length=2.",
    )
    add(
        "--dataset_name",
        "--train_data_dir",
        dest="dataset_name",
        help="Folder of images, folder of parquet files, zip of images, or name of a data set on the Hub.",
    )
    add("--dataset_config_name", help="Configuration of a data set that has several.")
    add("--dataset_split", default="train", help="Split to train on.")
    add("--image_column", help="Column that holds the images; default: `image`, or the only one.")
    add("--cache_dir", help="Folder in which `datasets` keeps prepared data.")
    add("--max_train_samples", type=int, help="Use the first images only.")
    add("--random_flip", action=argparse.BooleanOptionalAction, default=False, help="Add mirror images.")
    add("--output_dir", help="Folder for checkpoints, logs and the result.")
    add("--seed", type=int, default=0, help="Seed of weights, data order and noise.")
    add("--train_batch_size", type=positive, default=16, help="Images of one process in one step.")
    add("--gradient_accumulation_steps", type=positive, default=1, help="Batches to sum gradients over before a step.")
    add("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=False, help="Less memory, slower.")
    add("--max_train_steps", type=positive, default=100_000, help="Optimizer steps.")
    add(
        "--lr_scheduler", default="constant", help="Schedule of the learning rate, a name of diffusers' get_scheduler."
    )
    add("--lr_warmup_steps", type=int, default=0, help="Steps in which the learning rate rises from 0.")
    add("--max_grad_norm", type=float, default=None, help="Clip gradients to this norm; not clipped by default.")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="Default: what `accelerate config` has chosen.")
    add("--dataloader_num_workers", type=int, default=0, help="Processes that read data, for each training process.")
    add("--checkpointing_steps", type=positive, default=5000, help="Steps between checkpoints.")
    add("--checkpoints_total_limit", type=positive, help="Checkpoints to keep; all by default.")
    add("--resume_from_checkpoint", help="Path of a checkpoint, or `latest`, which starts afresh if there is none.")
    add("--validation_steps", type=positive, default=2000, help="Steps between validations.")
    add("--logging_steps", type=positive, default=10, help="Steps between entries in the logs.")
    add("--max_nonfinite_steps", type=positive, default=25, help="Skipped steps in a row after which a run stops.")
    add_hub_arguments(parser)
    add_license_argument(parser)


def parse_arguments(parser: argparse.ArgumentParser, section: str, models: tuple[str, ...], argv=None):
    r"""
    Parses flags, with defaults from a config file.

    Args:
        parser (`argparse.ArgumentParser`): Parser with all flags of the script, `--config` among them.
        section (`str`): Section of the file that holds this script's flags.
        models (`tuple[str]`): Sections that hold keyword arguments of models; they become attributes of the result.
        argv (`list[str]`, *optional*): Command line.

    Returns:
        `argparse.Namespace`: flags, and one `dict` for each of `models`, empty where the file has no such section.

    Raises:
        `SystemExit`: If the file can't be read or names an unknown flag, or `--set` one of another section's models.
    """
    argv = sys.argv[1:] if argv is None else argv
    path = parser.parse_known_args(argv)[0].config
    config = {}
    if path is not None:
        try:
            config = yaml.safe_load(Path(path).read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            parser.error(f"--config {path} can't be read as YAML: {error}")
        if not isinstance(config, dict):
            parser.error(f"--config {path} must hold sections such as {section}:, not a {type(config).__name__}")
        unknown = sorted(set(config) - set(CONFIG_SECTIONS))
        if unknown:
            expected = ", ".join(CONFIG_SECTIONS)
            parser.error(f"--config {path} has unknown sections {', '.join(unknown)}; expected some of {expected}")
        flags = config.get(section) or {}
        unknown = sorted(name for name in flags if f"--{name}" not in parser._option_string_actions)
        if unknown:
            parser.error(f"--config {path} names unknown flags in {section}: {', '.join(unknown)}")
        # Before the command line's own flags, which so have the last word; both are checked alike.
        argv = [text for name, value in flags.items() for text in flag_words(name, value)] + list(argv)
    args = parser.parse_args(argv)
    for name in models:
        setattr(args, name, config.get(name) or {})
    for name, key, value in args.changes:
        if name not in models:
            parser.error(f"--set {name}.{key} is none of this script's models; expected {' or '.join(models)}")
        getattr(args, name)[key] = value
    check_images(parser, getattr(args, "autoencoder", {}))
    if args.dataset_name is None:
        parser.error("no collection: give --dataset_name (a folder, a zip, or a name on the Hub)")
    return args


def check_images(parser: argparse.ArgumentParser, autoencoder: dict) -> None:
    """Refuses an autoencoder of other images than are read: RGB and square."""
    for name in ("in_channels", "out_channels"):
        if autoencoder.get(name, 3) != 3:
            parser.error(f"autoencoder.{name} is {autoencoder[name]}; images are read as RGB, so leave it at 3")
    for name in ("sample_size", "feature_size"):
        if not isinstance(autoencoder.get(name, 1), int):
            parser.error(f"autoencoder.{name} is {autoencoder[name]}; images are cut to squares, so give one number")


def flag_words(name: str, value) -> list[str]:
    """A flag as words of a command line: `--name`, `--no-name`, `--name=value`, or none for `None`."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [] if value is None else [f"--{name}={value}"]


def run_settings(args: argparse.Namespace, accelerator: Accelerator, num_images: int) -> dict:
    """What a resumed run must share with the one before to end as an uninterrupted one would."""
    settings = {name: value for name, value in vars(args).items() if name not in FREE_FLAGS}
    if args.lr_scheduler == "constant":
        del settings["max_train_steps"]  # no schedule bends to it
    processes = {"number of processes": accelerator.num_processes, "mixed_precision": accelerator.mixed_precision}
    return settings | processes | {"number of training images": num_images}


def add_hub_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for pushing, with the names that diffusers' training scripts have."""
    add = parser.add_argument
    add(
        "--push_to_hub",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="Push the result to the Hub, with the login of `hf auth login`.",
    )
    add("--hub_model_id", help="Repository, `user/name` or `name`; default: the name of the folder.")
    add(
        "--hub_private_repo",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="Make the repository private if it does not exist.",
    )


def add_license_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--hub_license`, for what makes a card."""
    parser.add_argument(
        "--hub_license",
        type=license_identifier,
        help="License of the weights for a card that names none, such as apache-2.0 or cc-by-4.0; default: unknown.",
    )


def license_identifier(text: str) -> str:
    """A license as the Hub writes it."""
    if not re.fullmatch(r"[a-z0-9.-]+", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no identifier of a license; give lower case letters, digits, dots and hyphens, for instance "
            "apache-2.0."
        )
    return text

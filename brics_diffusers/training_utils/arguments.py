"""Flags and config files of both training scripts."""

import argparse
import contextlib
import functools
import importlib.util
import re
import sys
from pathlib import Path

import yaml
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType
from diffusers.optimization import SchedulerType

from ..utils.sizes import height_and_width
from .augmentation import POLICIES
from .optimization import OPTIMIZERS
from .pretrained import check_image_channels, resized


MAX_TRAIN_STEPS = 100_000
CONFIG_SECTIONS = ("autoencoder", "discriminator", "train_autoencoder", "unet", "scheduler", "train_key_codes")


# Flags that a resumed run may have otherwise without another result.
FREE_FLAGS = {
    *("config", "changes", "dataset_name", "cache_dir", "output_dir", "key_codes_dir", "resume_from_checkpoint"),
    *("mixed_precision", "gradient_checkpointing", "dataloader_num_workers", "encode_batch_size", "shard_size"),
    *("checkpointing_steps", "checkpoints_total_limit", "validation_steps", "logging_steps", "max_nonfinite_steps"),
    *("validation_split", "num_validation_images", "num_inference_steps", "pretrained_autoencoder_name_or_path"),
    *("best_metric", "save_validation_weights", "cache_resized", "compile", "ema_snapshot_steps"),
    *("num_held_out_images", "validation_metrics", "feature_extractor", "num_metric_samples"),
    *("resolution", "num_train_epochs", "report_to", "logging_dir", "tracker_project_name"),  # epochs are steps too
    *("pretrained_model_name_or_path", "autoencoder_name_or_path", "save_dtype"),
    "scaling_factor",  # which a resumed run can't change
    *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_license"),
}


def positive(text: str) -> int:
    """Type of a flag that counts something: an `int` of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


def positive_number(text: str) -> float:
    """Type of a flag that scales something: a finite `float` above 0."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0 and finite, not {text}")
    return float(text)


def not_negative(text: str) -> int:
    """Type of a flag that may be 0: an `int` of at least 0."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {text}")
    return int(text)


def step_rules(text: str) -> str:
    """Type of a flag for diffusers' piecewise constant schedule: `factor:step,...,factor`."""
    *rules, last = text.split(",")
    try:
        steps = [int(step) for _, step in (rule.split(":") for rule in rules)]
        factors = [float(rule.split(":")[0]) for rule in rules] + [float(last)]
    except ValueError:
        steps, factors = [], []
    if not steps or steps != sorted(set(steps)) or min(steps) < 1 or not all(0 <= x < float("inf") for x in factors):
        raise argparse.ArgumentTypeError(
            f"must be factors of the learning rate with the steps at which they end, and a last factor, such as "
            f"1:1000,0.1:5000,0.01, not {text}"
        )
    return text


def policy(text: str) -> str:
    """Type of a flag that names augmentations, such as `color,translation`; empty for none."""
    unknown = [name for name in filter(None, text.split(",")) if name not in POLICIES]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"must be some of {', '.join(POLICIES)} with commas between, not {', '.join(unknown)}"
        )
    return text


def tracker_names(text: str) -> list[str]:
    """Type of `--report_to`: names of accelerate's trackers beside TensorBoard's, which is there in any case."""
    available = [str(name) for name in get_available_trackers()]
    own = LOGGER_TYPE_TO_CLASS.keys() - set(LoggerType.list())  # registered with accelerate by who needs them
    names = available if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in {*LOGGER_TYPE_TO_CLASS, "none"}:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise argparse.ArgumentTypeError(f"{name!r} is no tracker; give all, none, or some of {known}")
        if name not in {*available, *own, "none"}:
            raise argparse.ArgumentTypeError(f"{name} needs its package; install it, for instance with pip")
    return [name for name in dict.fromkeys(names) if name not in ("tensorboard", "none")]


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


def add_dataset_arguments(parser: argparse.ArgumentParser, *aliases: str, required: bool = False) -> None:
    """Adds the flags that name a collection, for all programs that read one; `aliases` are those of its own flag."""
    add = parser.add_argument
    add(
        "--dataset_name",
        *aliases,
        dest="dataset_name",
        required=required,
        help="Folder of images or of parquet files, zip or tar of images, or name of a data set on the Hub.",
    )
    add("--dataset_config_name", help="Configuration of a data set that has several.")
    add("--image_column", help="Column that holds the images; default: `image`, or the only one.")
    add("--cache_dir", help="Folder in which `datasets` keeps prepared data.")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that both training scripts have."""
    add = parser.add_argument
    flag = functools.partial(add, action=argparse.BooleanOptionalAction, default=False)
    add("--config", help="YAML file with models and flags; flags on the command line beat it.")
    add(
        "--set",
        dest="changes",
        type=setting,
        nargs="+",
        action="extend",
        default=[],
        metavar="SECTION.NAME=VALUE",
        help="Changes to the models of the config, for instance autoencoder.key_length=2; of a pretrained "
        "autoencoder, to its noise in training.",
    )
    add_dataset_arguments(parser, "--train_data_dir")
    add("--dataset_split", default="train", help="Split to train on.")
    flag("--streaming", help="Read the collection as a stream of shards, so that it need not fit on disk.")
    add("--max_train_samples", type=int, help="Use the first images only.")
    add(
        "--resolution",
        type=positive,
        help="Height and width of the images: sets sample_size of the autoencoder and scales its feature_size; in "
        "stage two that of the autoencoder.",
    )
    flag("--random_flip", help="Add mirror images.")
    add("--output_dir", help="Folder for checkpoints, logs and the result.")
    add("--seed", type=not_negative, default=0, help="Seed of weights, data order and noise.")
    add("--train_batch_size", type=positive, default=16, help="Images of one process in one step.")
    add("--gradient_accumulation_steps", type=positive, default=1, help="Batches to sum gradients over before a step.")
    flag("--gradient_checkpointing", help="Less memory, slower.")
    add("--max_train_steps", type=positive, help=f"Optimizer steps. Default: {MAX_TRAIN_STEPS}.")
    add("--num_train_epochs", type=positive, help="Train until each image was seen so often, in place of the steps.")
    flag("--scale_lr", help="Multiply learning rates by the images of one step.")
    add(
        "--optimizer",
        choices=OPTIMIZERS,
        default="adam",
        help="Adam, or Muon for the weights of layers and Adam for grids and all else; the discriminator has Adam.",
    )
    flag("--use_8bit_adam", help="Keep Adam's moments in 8 bits, by bitsandbytes; stage two only.")
    add(
        "--lr_scheduler",
        choices=[name.value for name in SchedulerType],
        default="constant",
        help="Schedule of the learning rate.",
    )
    add(
        "--lr_step_rules",
        type=step_rules,
        metavar="RULES",
        help="For piecewise_constant: 1:1000,0.1:5000,0.01 is the rate up to step 1000, a tenth up to step 5000, then "
        "a hundredth.",
    )
    add("--lr_warmup_steps", type=not_negative, default=0, help="Steps in which the learning rate rises from 0.")
    add("--max_grad_norm", type=float, default=None, help="Clip gradients to this norm; not clipped by default.")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="Default: what `accelerate config` has chosen.")
    flag("--allow_tf32", help="Multiply matrices in TF32 on GPUs that can: faster, with 10 bits.")
    flag("--compile", help="Compile the networks: what `accelerate launch --dynamo_backend inductor` does.")
    add(
        "--dataloader_num_workers",
        type=not_negative,
        help="Processes that read data, for each training process. Default: some beside a GPU, 0 beside a CPU.",
    )
    add("--checkpointing_steps", type=positive, default=5000, help="Steps between checkpoints.")
    add("--checkpoints_total_limit", type=positive, help="Checkpoints to keep; all by default.")
    add(
        "--resume_from_checkpoint",
        help="A checkpoint's path, its name in --output_dir, or `latest`, which starts afresh if there is none.",
    )
    add("--validation_steps", type=positive, default=2000, help="Steps between validations.")
    add("--logging_steps", type=positive, default=10, help="Steps between entries in the logs.")
    add("--logging_dir", default="logs", help="Folder for logs, in --output_dir unless it is absolute.")
    add(
        "--report_to",
        type=tracker_names,
        default="tensorboard",
        help="Trackers beside TensorBoard's, such as wandb or wandb,trackio; all for all that are installed.",
    )
    add("--tracker_project_name", default="brics-diffusers", help="What these trackers call the project.")
    add("--max_nonfinite_steps", type=positive, default=25, help="Skipped steps in a row after which a run stops.")
    add_hub_arguments(parser)
    add_license_argument(parser)


def parse_arguments(parser: argparse.ArgumentParser, section: str, models: tuple[str, ...], argv=None):
    """
    Parses flags, with defaults from the `section` of a config file, whose sections `models` become attributes too:
    keyword arguments, empty where the file has no such section. Exits if the file can't be read or names an unknown
    flag, or `--set` one of another section's models.
    """
    argv = sys.argv[1:] if argv is None else argv
    typed = parser.parse_known_args(argv)[0]
    path = typed.config
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
    check_schedule(parser, args, typed)
    if args.use_8bit_adam:
        check_8bit_adam(parser, args, models)
    if args.streaming:
        check_streaming(parser, args, models)
    if "autoencoder" in models and args.resolution is not None:
        resize(parser, args)
    if args.dataset_name is None:
        parser.error("no collection: give --dataset_name (a folder, a zip, or a name on the Hub)")
    return args


def check_images(parser: argparse.ArgumentParser, autoencoder: dict) -> None:
    """Refuses an autoencoder of other images than are read, or that gives back others than it takes."""
    try:
        check_image_channels(autoencoder.get("in_channels", 3), autoencoder.get("out_channels", 3))
        for name in ("sample_size", "feature_size"):
            height_and_width(autoencoder.get(name, 1), f"autoencoder.{name}")
    except ValueError as error:
        parser.error(str(error))


def check_8bit_adam(parser: argparse.ArgumentParser, args: argparse.Namespace, models: tuple[str, ...]) -> None:
    """Refuses Adam in 8 bits where it would harm, beside another optimizer, and without its package."""
    if args.optimizer != "adam":
        parser.error(f"--use_8bit_adam is for Adam, not --optimizer {args.optimizer}; give one of them")
    if "autoencoder" in models:
        parser.error(
            "--use_8bit_adam is for stage two: second moments of rarely hit grid entries are too small for 8 bits, so "
            "leave it out"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        parser.error("--use_8bit_adam needs bitsandbytes, which is not installed: pip install bitsandbytes")


def check_streaming(parser: argparse.ArgumentParser, args: argparse.Namespace, models: tuple[str, ...]) -> None:
    """Refuses what a collection that is read as a stream can't have."""
    names = ["max_train_samples", "cache_resized"] + ["num_train_epochs"] * ("autoencoder" in models)
    given = [name for name in names if getattr(args, name, None)]
    if given:
        remedy = "give --max_train_steps" if given[0] == "num_train_epochs" else "leave it out"
        parser.error(f"--{given[0]} is not for --streaming, of whose images the number is not known; {remedy}")


def check_schedule(parser: argparse.ArgumentParser, args: argparse.Namespace, typed: argparse.Namespace) -> None:
    """Of steps and epochs, leaves what was typed, or is in the file; refuses both, and rules for no schedule."""
    lengths = "max_train_steps", "num_train_epochs"
    for source in (typed, args):
        given = [name for name in lengths if getattr(source, name) is not None]
        if len(given) == 2:
            parser.error("--max_train_steps and --num_train_epochs both say how long to train; give one of them")
        if given:  # the command line beats the file
            for name in lengths:
                setattr(args, name, getattr(source, name))
            break
    else:
        args.max_train_steps = MAX_TRAIN_STEPS
    if args.lr_scheduler == "piecewise_constant" and args.lr_step_rules is None:
        parser.error("--lr_scheduler piecewise_constant needs --lr_step_rules, for instance 1:1000,0.1:5000,0.01")
    if typed.lr_step_rules is not None and args.lr_scheduler != "piecewise_constant":
        parser.error(f"--lr_step_rules are for --lr_scheduler piecewise_constant, not {args.lr_scheduler}")


def resize(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Gives the config of a new autoencoder the size of `--resolution`."""
    changes = {name: value for section, name, value in args.changes if section == "autoencoder"}
    if changes.get("sample_size", args.resolution) != args.resolution:
        size = changes["sample_size"]
        parser.error(f"--set autoencoder.sample_size={size} is not --resolution {args.resolution}; give one of them")
    if args.pretrained_autoencoder_name_or_path is None:
        try:
            args.autoencoder |= resized(args.autoencoder, args.resolution, changes.get("feature_size"))
        except ValueError as error:
            parser.error(str(error))


def flag_words(name: str, value) -> list[str]:
    """A flag as words of a command line: `--name`, `--no-name`, `--name=value`, or none for `None`."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [] if value is None else [f"--{name}={value}"]


def run_settings(args: argparse.Namespace, accelerator: Accelerator, num_images: int | None) -> dict:
    """What a resumed run must share with the one before to end as an uninterrupted one would."""
    settings = {name: value for name, value in vars(args).items() if name not in FREE_FLAGS}
    if args.lr_scheduler in ("constant", "constant_with_warmup", "piecewise_constant"):
        del settings["max_train_steps"]  # no schedule bends to it
    processes = {"number of processes": accelerator.num_processes, "mixed_precision": accelerator.mixed_precision}
    if args.streaming:  # whose length nobody knows, and from which these may take images away
        held_out = ("validation_split", "num_validation_images", "num_held_out_images")
        settings |= {name: getattr(args, name) for name in held_out if hasattr(args, name)}
    return settings | processes | {"number of training images": num_images}


def add_hub_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for pushing, with the names that diffusers' training scripts have."""
    add = parser.add_argument
    flag = functools.partial(add, action=argparse.BooleanOptionalAction, default=False)
    flag("--push_to_hub", help="Push the result to the Hub, with the login of `hf auth login`.")
    add("--hub_model_id", help="Repository, `user/name` or `name`; default: the name of the folder.")
    flag("--hub_private_repo", help="Make the repository private if it does not exist.")


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

"""What both training scripts share: flags and config files, data splits, optimizer steps, averaged weights."""

import argparse
import contextlib
import json
import logging
import resource
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, set_seed
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from .checkpoints import RunState, check_shared_folder, clean_up, list_checkpoints, resume
from .data import load_collection
from .hub import add_hub_arguments, add_license_argument, open_repository
from .models import BricsAutoencoder
from .safe_loading import check_local, load_class_safely


logger = logging.getLogger(__name__)

CONFIG_SECTIONS = ("autoencoder", "discriminator", "train_autoencoder", "unet", "scheduler", "train_key_codes")


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
    add("--dataset_split", default="train", help="Split to train on.")
    add("--image_column", help="Column that holds the images; found by itself if there is one.")
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
    if args.dataset_name is None:
        parser.error("no collection: give --dataset_name (a folder, a zip, or a name on the Hub)")
    return args


def flag_words(name: str, value) -> list[str]:
    """A flag as words of a command line: `--name`, `--no-name`, `--name=value`, or none for `None`."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [] if value is None else [f"--{name}={value}"]


def start_run(args: argparse.Namespace) -> Accelerator:
    r"""
    Sets up accelerate, TensorBoard, the output folder and the random states.

    Args:
        args (`argparse.Namespace`): Result of [`parse_arguments`].

    Returns:
        `Accelerator`: with its tracker started and all processes seeded alike.

    Raises:
        `FileExistsError`: If a run is to start afresh in a folder that has checkpoints.
        `OSError`: If the processes don't share the output folder, or the result can't be pushed to the Hub.
        `ValueError`: If it is to be pushed to a private repository, and that is public.
    """
    # With an epsilon of 1e-15, Adam's second moments become denormal numbers, on which CPUs are slow.
    torch.set_flush_denormal(True)
    output_dir = Path(args.output_dir)
    if args.resume_from_checkpoint is None and list_checkpoints(output_dir):
        raise FileExistsError(
            f"{output_dir} has checkpoints of an earlier run; go on with --resume_from_checkpoint latest, or name "
            "another --output_dir."
        )
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with="tensorboard",
        # One process may have to download or prepare a collection while the others wait.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
    )
    level = logging.INFO if accelerator.is_main_process else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(name)s: %(message)s", force=True)
    quiet_libraries()
    if args.push_to_hub and accelerator.is_main_process:  # days before the push
        args.hub_model_id = open_repository(args.hub_model_id or output_dir.resolve().name, args.hub_private_repo)
    set_seed(args.seed)  # the same weights on every process; the loops reseed for their noise
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        clean_up(output_dir)
        partial = output_dir / ".partial-training_config.json"
        partial.write_text(json.dumps(vars(args), indent=2, default=str) + "\n")
        partial.replace(output_dir / "training_config.json")
    accelerator.wait_for_everyone()
    check_shared_folder(accelerator, output_dir)
    flags = {name: value for name, value in vars(args).items() if isinstance(value, (int, float, str, bool))}
    accelerator.init_trackers("tensorboard", config=flags)
    return accelerator


def quiet_libraries() -> None:
    """Leaves the requests of other libraries out of the log."""
    for noisy in ("httpx", "httpx2", "datasets", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def tensorboard(accelerator: Accelerator):
    """TensorBoard's `SummaryWriter` of the main process; use it there only."""
    return accelerator.get_tracker("tensorboard", unwrap=True)


def ema_half_life_decay(batch_size: int, half_life_images: float) -> float:
    """Decay of averaged weights that forgets half in `half_life_images` images at `batch_size` images a step."""
    return 0.5 ** (batch_size / half_life_images)


@contextlib.contextmanager
def averaged_weights(model: torch.nn.Module, ema: EMAModel):
    """Within the context, `model` has the averaged weights and is in eval mode."""
    was_training = model.training
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    model.eval()
    try:
        yield model
    finally:
        ema.restore(model.parameters())
        model.train(was_training)


def load_autoencoder(name_or_path: str, **changes) -> BricsAutoencoder:
    r"""
    A saved autoencoder, or the one in the `autoencoder` folder of a run or of a pipeline, here or on the Hub.

    Args:
        name_or_path (`str`): A folder, or a name on the Hub.
        changes: Values that replace those of the saved config.

    Returns:
        `BricsAutoencoder`.

    Raises:
        `FileNotFoundError`: If a folder does not exist, or holds no autoencoder.
        `ValueError`: If what is there is a model of another class.
    """
    check_local(name_or_path, "a saved autoencoder, a run")
    if Path(name_or_path).is_dir():
        subfolder = "autoencoder" if (Path(name_or_path) / "autoencoder").is_dir() else None
        if subfolder is None and not (Path(name_or_path) / "config.json").is_file():
            raise FileNotFoundError(
                f"{name_or_path} holds neither config.json nor a folder `autoencoder`; name a saved autoencoder, a "
                "run of training or a pipeline."
            )
        return load_class_safely(BricsAutoencoder, name_or_path, subfolder=subfolder, **changes)
    try:
        return load_class_safely(BricsAutoencoder, name_or_path, subfolder="autoencoder", **changes)
    except OSError as error:
        if "config.json" not in str(error):
            raise
    return load_class_safely(BricsAutoencoder, name_or_path, **changes)


def load_splits(args: argparse.Namespace):
    r"""
    The training images of a run and those held out from it.

    Args:
        args (`argparse.Namespace`):
            Flags of [`add_common_arguments`], `validation_split` and `num_validation_images`. With no
            `validation_split`, a split called `validation` is taken if there is one; else `num_validation_images`, at
            most a tenth, are taken from the training images by the seed.

    Returns:
        `tuple`: training and validation `datasets.Dataset`; the second may be `None`.
    """
    options = {"image_column": args.image_column, "cache_dir": args.cache_dir}
    train = load_collection(args.dataset_name, args.dataset_split, max_images=args.max_train_samples, **options)
    if args.num_validation_images == 0:
        return train, None
    if args.validation_split is not None:
        validation = load_collection(args.dataset_name, args.validation_split, **options)
    else:
        try:
            validation = load_collection(args.dataset_name, "validation", **options)
        except (ValueError, FileNotFoundError):
            held_out = min(args.num_validation_images, len(train) // 10)
            if held_out == 0:
                return train, None
            parts = train.train_test_split(test_size=held_out, seed=args.seed)
            logger.info("No validation split: %d of %d images are held out.", held_out, len(train))
            return parts["train"], parts["test"]
    return train, validation.select(range(min(args.num_validation_images, len(validation))))


def resume_run(
    args: argparse.Namespace,
    accelerator: Accelerator,
    state: RunState,
    ema: EMAModel,
    lr_scheduler,
    optimizers: list,
) -> None:
    r"""
    Does what `--resume_from_checkpoint` says. Call on every process, after everything is prepared and registered.
    Flags beat the checkpoint: Adam's rates and epsilon and the decay of the averaged weights are those of this run.

    Args:
        args (`argparse.Namespace`): Flags of the run.
        accelerator (`Accelerator`): The run's accelerator.
        state (`RunState`): Its counters.
        ema (`EMAModel`): Its averaged weights.
        lr_scheduler (`LambdaLR`):
            Its schedule. From the second step on it follows this run's learning rates, whatever they were before.
        optimizers (`list`): Its optimizers.
    """
    decay, rates = ema.decay, lr_scheduler.base_lrs
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    adam = [{name: group[name] for name in ("betas", "eps")} for group in groups]
    resume(accelerator, args.output_dir, args.resume_from_checkpoint, state)
    ema.decay = decay
    ema.to(accelerator.device)  # checkpoints come back on the CPU
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group, values in zip(groups, adam, strict=True):
        group.update(values)
    lr_scheduler.base_lrs = rates


# Flags that a resumed run may have otherwise without another result.
FREE_FLAGS = {
    *("config", "changes", "dataset_name", "cache_dir", "output_dir", "key_codes_dir", "resume_from_checkpoint"),
    *("mixed_precision", "gradient_checkpointing", "dataloader_num_workers", "encode_batch_size", "shard_size"),
    *("checkpointing_steps", "checkpoints_total_limit", "validation_steps", "logging_steps", "max_nonfinite_steps"),
    *("validation_split", "num_validation_images", "num_inference_steps", "pretrained_autoencoder_name_or_path"),
    *("best_metric", "save_validation_weights"),
    *("autoencoder_name_or_path", "save_dtype", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_license"),
}


def run_settings(args: argparse.Namespace, accelerator: Accelerator, num_images: int) -> dict:
    """What a resumed run must share with the one before to end as an uninterrupted one would."""
    settings = {name: value for name, value in vars(args).items() if name not in FREE_FLAGS}
    if args.lr_scheduler == "constant":
        del settings["max_train_steps"]  # no schedule bends to it
    processes = {"number of processes": accelerator.num_processes, "mixed_precision": accelerator.mixed_precision}
    return settings | processes | {"number of training images": num_images}


def peak_memory(device: torch.device) -> float:
    """Largest memory in use so far, in MiB: allocated on a GPU, resident of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


class StepLog:
    r"""
    Progress bar on the terminal, and curves in TensorBoard: losses averaged over processes and steps, skipped steps,
    images a second, the share of time that the main process waits for data, and peak memory.

    Args:
        accelerator (`Accelerator`): The run's accelerator.
        state (`RunState`): Counts the steps.
        total (`int`): Steps of the whole run.
        images_per_step (`int`): Of all processes.
        interval (`int`): Steps between entries.
    """

    def __init__(self, accelerator: Accelerator, state: RunState, total: int, images_per_step: int, interval: int):
        self.accelerator = accelerator
        self.state = state
        self.images_per_step = images_per_step
        self.interval = interval
        hidden = not accelerator.is_main_process
        self.bar = tqdm(total=total, initial=state.global_step, desc="Training", disable=hidden)
        self.losses: dict[str, list[torch.Tensor]] = {}
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves the time since the last entry out of images a second, for instance after a validation."""
        self.started, self.steps, self.waited = time.monotonic(), 0, 0.0

    @contextlib.contextmanager
    def waiting(self):
        """Put around what fetches a batch: the time is that of waiting for data."""
        started = time.monotonic()
        yield
        self.waited += time.monotonic() - started

    def add(self, losses: dict[str, torch.Tensor]) -> None:
        """Call after every batch, with detached scalars of this process; the same names on every process."""
        for name, loss in losses.items():
            self.losses.setdefault(name, []).append(loss)

    def step(self, values: dict[str, float]) -> None:
        """Call after every optimizer step, with values to log as they are."""
        self.bar.update()
        self.steps += 1
        if self.state.global_step % self.interval:
            return
        means = {name: torch.stack(losses).mean() for name, losses in self.losses.items()}
        means = {name: self.accelerator.reduce(mean, reduction="mean").item() for name, mean in means.items()}
        self.losses.clear()
        values = means | values
        seconds = time.monotonic() - self.started
        values |= {
            "skipped_steps": self.state.skipped_steps,
            "images_per_second": self.steps * self.images_per_step / seconds,
            "data_wait_share": self.waited / seconds,
            "peak_memory_mib": peak_memory(self.accelerator.device),
        }
        self.accelerator.log({f"train/{k}": v for k, v in values.items()}, step=self.state.global_step)
        self.bar.set_postfix({name: f"{mean:.4f}" for name, mean in means.items()})
        self.restart_clock()

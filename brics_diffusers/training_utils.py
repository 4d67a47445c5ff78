"""What both training scripts share: flags and config files, checkpoints, averaged weights, pictures."""

import argparse
import contextlib
import json
import logging
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.training_utils import EMAModel
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from .data import load_collection


logger = logging.getLogger(__name__)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that both training scripts have."""
    add = parser.add_argument
    add("--config", help="YAML file with models and flags; flags on the command line beat it.")
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
    add("--output_dir", default="runs/brics", help="Folder for checkpoints, logs and the result.")
    add("--seed", type=int, default=0, help="Seed of weights, data order and noise.")
    add("--train_batch_size", type=int, default=16, help="Images of one process in one step.")
    add("--gradient_accumulation_steps", type=int, default=1, help="Batches to sum gradients over before a step.")
    add("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=False, help="Less memory, slower.")
    add("--max_train_steps", type=int, default=100_000, help="Optimizer steps.")
    add(
        "--lr_scheduler", default="constant", help="Schedule of the learning rate, a name of diffusers' get_scheduler."
    )
    add("--lr_warmup_steps", type=int, default=0, help="Steps in which the learning rate rises from 0.")
    add("--max_grad_norm", type=float, default=None, help="Clip gradients to this norm; not clipped by default.")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="Default: what `accelerate config` has chosen.")
    add("--dataloader_num_workers", type=int, default=0, help="Processes that read data, for each training process.")
    add("--checkpointing_steps", type=int, default=5000, help="Steps between checkpoints.")
    add("--checkpoints_total_limit", type=int, help="Checkpoints to keep; all by default.")
    add("--resume_from_checkpoint", help="Path of a checkpoint, or `latest`.")
    add("--validation_steps", type=int, default=2000, help="Steps between validations.")
    add("--logging_steps", type=int, default=10, help="Steps between entries in the logs.")


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
        `SystemExit`: If the file can't be read or names an unknown flag.
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
        flags = config.get(section) or {}
        unknown = sorted(set(flags) - {action.dest for action in parser._actions})
        if unknown:
            parser.error(f"--config {path} names unknown flags in {section}: {', '.join(unknown)}")
        # Before the command line's own flags, which so have the last word; both are checked alike.
        argv = [text for name, value in flags.items() for text in _as_flag(name, value)] + list(argv)
    args = parser.parse_args(argv)
    for name in models:
        setattr(args, name, config.get(name) or {})
    if args.dataset_name is None:
        parser.error("no collection: give --dataset_name (a folder, a zip, or a name on the Hub)")
    return args


def _as_flag(name: str, value) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [] if value is None else [f"--{name}={value}"]


def start_run(args: argparse.Namespace) -> Accelerator:
    r"""
    Sets up accelerate, TensorBoard, the output folder and the random states.

    Args:
        args (`argparse.Namespace`): Result of [`parse_arguments`].

    Returns:
        `Accelerator`: with its tracker started and all processes seeded differently.
    """
    # With an epsilon of 1e-15, Adam's second moments become denormal numbers, on which CPUs are slow.
    torch.set_flush_denormal(True)
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
    )
    level = logging.INFO if accelerator.is_main_process else logging.ERROR
    logging.basicConfig(level=level, format="%(asctime)s %(name)s: %(message)s", force=True)
    for noisy in ("httpx", "httpx2", "datasets", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    set_seed(args.seed)  # the same weights on every process; the loops reseed for their noise
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "training_config.json").write_text(json.dumps(vars(args), indent=2, default=str) + "\n")
    flags = {name: value for name, value in vars(args).items() if isinstance(value, (int, float, str, bool))}
    accelerator.init_trackers("tensorboard", config=flags)
    return accelerator


def tensorboard(accelerator: Accelerator):
    """TensorBoard's `SummaryWriter` of the main process; use it there only."""
    return accelerator.get_tracker("tensorboard", unwrap=True)


class RunState:
    """Counters of a run that belong in its checkpoints."""

    def __init__(self):
        self.global_step = 0

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


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


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    paths = Path(output_dir).glob("checkpoint-*")
    numbered = [path for path in paths if path.is_dir() and path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def save_checkpoint(accelerator: Accelerator, output_dir: str | os.PathLike, step: int, limit: int | None = None):
    r"""
    Saves all that is needed to go on: networks, optimizers, schedules, averaged weights, counters and random states.
    The folder appears by a rename when it is complete. Call on every process.

    Args:
        accelerator (`Accelerator`): With everything prepared or registered for checkpointing.
        output_dir (`str`): Folder of the run.
        step (`int`): Optimizer step; the folder is called `checkpoint-<step>`.
        limit (`int`, *optional*): Checkpoints to keep, the oldest go first; all by default.
    """
    path = Path(output_dir) / f"checkpoint-{step}"
    partial = Path(output_dir) / f".partial-checkpoint-{step}"
    if accelerator.is_main_process and partial.exists():
        shutil.rmtree(partial)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if path.exists():
            shutil.rmtree(path)
        os.replace(partial, path)
        for old in list_checkpoints(output_dir)[: -max(limit, 1) if limit is not None else 0]:
            shutil.rmtree(old)
        logger.info("Saved %s", path)
    accelerator.wait_for_everyone()


def resume(accelerator: Accelerator, output_dir: str | os.PathLike, checkpoint: str | None) -> None:
    r"""
    Restores a run. Call on every process, after everything is prepared and registered.

    Args:
        accelerator (`Accelerator`): The run's accelerator.
        output_dir (`str`): Folder of the run, searched for `latest`.
        checkpoint (`str`, *optional*): Path of a checkpoint; `"latest"`, which starts afresh if there is none; or
            `None`.

    Raises:
        `FileNotFoundError`: If a path is given that is not a checkpoint.
    """
    if checkpoint is None:
        return
    if checkpoint == "latest":
        found = list_checkpoints(output_dir)
        if not found:
            logger.info("No checkpoint in %s: starting afresh.", output_dir)
            return
        checkpoint = found[-1]
    if not Path(checkpoint).is_dir():
        raise FileNotFoundError(f"{checkpoint} is not a checkpoint folder; give the path of one, or latest.")
    accelerator.load_state(str(checkpoint))
    logger.info("Resumed from %s", checkpoint)


class TerminationSignal:
    """Remembers that SIGTERM was received, so that the loop can save and leave."""

    def __init__(self):
        self.received = False
        signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, *_):
        self.received = True


def image_grid(images: torch.Tensor, columns: int = 8):
    r"""
    Puts images into one picture.

    Args:
        images (`torch.Tensor` of shape (N, 3, H, W)): Images in [-1, 1]; clipped.
        columns (`int`, defaults to 8): Images in a row.

    Returns:
        `PIL.Image.Image`.
    """
    images = images.detach().float().cpu().clamp(-1, 1) / 2 + 0.5
    return to_pil_image(make_grid(images, nrow=columns, padding=2, pad_value=1.0))


def side_by_side(targets: torch.Tensor, samples: torch.Tensor, columns: int = 8):
    """Rows of `columns` images, each followed by the row of their reconstructions, as one picture."""
    rows = [part for pair in zip(targets.split(columns), samples.split(columns), strict=True) for part in pair]
    return image_grid(torch.cat([row.cpu().float() for row in rows]), min(columns, len(targets)))


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


def build_optimizer(parameters, learning_rate: float, beta1: float, beta2: float, epsilon: float):
    """Adam in one fused kernel per step."""
    return torch.optim.Adam(parameters, lr=learning_rate, betas=(beta1, beta2), eps=epsilon, fused=True)


def set_beta1(optimizer, beta1: float) -> None:
    """Changes Adam's momentum from the next step on."""
    for group in optimizer.param_groups:
        group["betas"] = (beta1, group["betas"][1])


def step_if_finite(accelerator: Accelerator, optimizer, parameters, max_grad_norm: float | None) -> bool:
    r"""
    Takes an optimizer step if all gradients are finite, else drops them. Gradients are summed over the processes by
    then, so all come to the same decision.

    Args:
        accelerator (`Accelerator`): The run's accelerator.
        optimizer: Prepared by the accelerator.
        parameters (`list[torch.nn.Parameter]`): What the optimizer updates.
        max_grad_norm (`float`, *optional*): Clip to this norm.

    Returns:
        `bool`: Whether the step was taken.
    """
    norm = accelerator.clip_grad_norm_(parameters, float("inf") if max_grad_norm is None else max_grad_norm)
    finite = bool(torch.isfinite(norm))
    if finite or accelerator.scaler is not None:  # the loss scale of fp16 must see overflows; it skips the step itself
        optimizer.step()
    optimizer.zero_grad()
    return finite

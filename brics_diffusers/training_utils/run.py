"""A training run from its start to its log: output folder, splits of the collection, resuming, losses over time."""

import argparse
import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list, set_seed
from datasets.config import HF_DATASETS_CACHE
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from ..data import ResizedImages, collection_fingerprint, load_collection
from ..hub.push import open_repository
from ..models import BricsAutoencoder
from ..utils.files import atomic_write
from ..utils.locks import locked_folder
from .checkpoints import RunState, check_shared_folder, clean_up, list_checkpoints, resume
from .optimization import scale_learning_rates
from .processes import check_world_size, default_num_workers, peak_memory, refuse_backends
from .tracking import start_trackers


logger = logging.getLogger(__name__)


@contextlib.contextmanager
def start_run(args: argparse.Namespace) -> Iterator[Accelerator]:
    """
    A context with accelerate, its trackers, the output folder and the random states set up, all processes seeded
    alike. The folder is the run's alone until the end: a `BlockingIOError` if another is at work there, a
    `FileExistsError` if a run is to start afresh beside checkpoints, an `OSError` if the processes don't share it, or
    the result can't be pushed to the Hub; a `ValueError` for processes or backends that training does not work with,
    and for a public repository that is to be private.
    """
    refuse_backends()
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
        dynamo_backend="inductor" if args.compile else None,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to or None,  # an empty list makes accelerate warn
        # One process may have to download or prepare a collection while the others wait.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / args.logging_dir)),
    )
    check_world_size(accelerator.num_processes)
    torch.backends.cudnn.benchmark = True  # images of a run have one size
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    if args.dataloader_num_workers is None:
        args.dataloader_num_workers = default_num_workers(accelerator.device, accelerator.num_processes)
    level = logging.INFO if accelerator.is_main_process else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(name)s: %(message)s", force=True)
    quiet_libraries()
    scale_learning_rates(args, accelerator.num_processes)
    if args.push_to_hub and accelerator.is_main_process:  # days before the push
        args.hub_model_id = open_repository(args.hub_model_id or output_dir.resolve().name, args.hub_private_repo)
    with locked_folder(output_dir, is_main_process=accelerator.is_main_process):
        prepare_folder(args, accelerator, output_dir)
        yield accelerator
        accelerator.end_training()


def prepare_folder(args: argparse.Namespace, accelerator: Accelerator, output_dir: Path) -> None:
    """The part of [`start_run`] that writes into the output folder."""
    set_seed(args.seed)  # the same weights on every process; the loops reseed for their noise
    if accelerator.is_main_process:
        clean_up(output_dir)
        write_config(args)
    accelerator.wait_for_everyone()
    check_shared_folder(accelerator, output_dir)
    start_trackers(args, accelerator)


def write_config(args: argparse.Namespace) -> None:
    """Writes `training_config.json`, the flags of the run."""
    with atomic_write(Path(args.output_dir) / "training_config.json") as file:
        file.write((json.dumps(vars(args), indent=2, default=str) + "\n").encode())


def count_steps(args: argparse.Namespace, accelerator: Accelerator, num_items: int) -> None:
    """
    Sets `max_train_steps` where the run is to last for `num_train_epochs`: so many that each image, or key code, is
    seen as often.
    """
    if args.num_train_epochs is None:
        return
    global_batch = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    args.max_train_steps = math.ceil(args.num_train_epochs * num_items / global_batch)
    if accelerator.is_main_process:
        write_config(args)
        logger.info("%d epochs of %d are %d steps.", args.num_train_epochs, num_items, args.max_train_steps)


def quiet_libraries() -> None:
    """Leaves the requests of other libraries out of the log."""
    for noisy in ("httpx", "httpx2", "datasets", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def load_splits(args: argparse.Namespace):
    """
    The training images of a run and those held out from it, which may be `None`. With no `validation_split`, a split
    called `validation` is taken if there is one; else `num_validation_images`, at most a tenth, are held out of the
    training images: the same ones whatever the run's seed.
    """
    options = {"image_column": args.image_column, "cache_dir": args.cache_dir, "config_name": args.dataset_config_name}
    train = load_collection(args.dataset_name, args.dataset_split, max_images=args.max_train_samples, **options)
    return hold_out(args, train, args.num_validation_images)


def hold_out(args: argparse.Namespace, train: datasets.Dataset, count: int, of_training: bool = True):
    """
    Training images, and at most `count` of a validation split, or else, unless `of_training` forbids it, of the
    training images, which no longer are that; `None` for none.
    """
    options = {"image_column": args.image_column, "cache_dir": args.cache_dir, "config_name": args.dataset_config_name}
    if count == 0:
        return train, None
    if args.validation_split is not None:
        validation = load_collection(args.dataset_name, args.validation_split, **options)
    else:
        try:
            validation = load_collection(args.dataset_name, "validation", **options)
        except (ValueError, FileNotFoundError):
            held_out = min(count, len(train) // 10) if of_training else 0
            if held_out == 0:
                return train, None
            parts = train.train_test_split(test_size=held_out, seed=0)
            logger.info("No validation split: %d of %d images are held out.", held_out, len(train))
            return parts["train"], parts["test"]
    return train, validation.select(range(min(count, len(validation))))


def resized_images(args: argparse.Namespace, dataset, autoencoder: BricsAutoencoder) -> ResizedImages | None:
    """
    The file of `--cache_resized` for one collection and the autoencoder's images; `None` without the flag. Call on
    every process.
    """
    if not args.cache_resized:
        return None
    # One process reads all images for it.
    key = broadcast_object_list([collection_fingerprint(dataset) if PartialState().is_main_process else None])[0]
    channels, *size = autoencoder.sample_shape
    resized = ResizedImages(Path(args.cache_dir or HF_DATASETS_CACHE) / "brics-resized", key, size, channels)
    logger.info("Resized images are kept in %s.", resized.path)
    return resized


def resume_run(
    args: argparse.Namespace,
    accelerator: Accelerator,
    state: RunState,
    ema: EMAModel,
    lr_scheduler,
    optimizers: list,
) -> None:
    """
    Does what `--resume_from_checkpoint` says. Call on every process, after everything is prepared and registered.
    Flags beat the checkpoint: Adam's rates and epsilon and the decay of the averaged weights are those of this run.
    From the second step on the schedule follows this run's learning rates, whatever they were before.
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


class StepLog:
    """
    Progress bar on the terminal, and every `interval` steps curves in TensorBoard: losses averaged over processes and
    steps, skipped steps, images a second (`images_per_step` of all processes), the share of time that the main process
    waits for data, and peak memory.
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
        }
        if (memory := peak_memory(self.accelerator.device)) is not None:
            values["peak_memory_mib"] = memory
        self.accelerator.log({f"train/{k}": v for k, v in values.items()}, step=self.state.global_step)
        self.bar.set_postfix({name: f"{mean:.4f}" for name, mean in means.items()})
        self.restart_clock()

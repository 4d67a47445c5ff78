"""Saves and restores training checkpoints: they appear by a rename, and a resumed run ends in the same bits."""

import contextlib
import errno
import logging
import os
import shutil
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import SCALER_NAME, broadcast_object_list, gather_object
from safetensors import SafetensorError

from ..utils.files import free_path


logger = logging.getLogger(__name__)

# `accelerate launch` sets this variable for the processes that it starts. Its own number is read as early as can be:
# when it has ended, its children have another parent.
LAUNCHER = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None


# Settings of checkpoints of earlier versions, by what they are called now.
RENAMED = {"lpips_weight": "perceptual_weight", "lpips_network": "perceptual_network"}


class RunState:
    """
    Counters of a run that belong in its checkpoints: whatever is set as an attribute. `settings` are what a resumed
    run must share with the one before to end as an uninterrupted one would.
    """

    def __init__(self, settings: dict, **values):
        self.settings = settings
        self.global_step = 0
        self.images_seen = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        vars(self).update(values)

    def state_dict(self) -> dict:
        """All attributes."""
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        """Sets attributes from a `state_dict`."""
        vars(self).update(state)


# What a state knows of validations before the first.
NO_BEST = {"best_psnr": float("-inf"), "best_perceptual": None}


def improves(state: RunState, metrics: dict[str, float], name: str) -> bool:
    """
    Whether the metrics of a validation, empty if no image could be read, are the best so far by the one called `name`:
    `"psnr"`, of which more is better, or a distance. The state, with the attributes of `NO_BEST`, then remembers it.
    PSNR and each kind of distance, that of a perceptual network or of samples, are kept apart, so that where another
    takes over, its first value is the best.
    """
    if name not in metrics:
        return False
    value = metrics[name]
    if name == "psnr":
        better = value > state.best_psnr
        state.best_psnr = max(value, state.best_psnr)
        return better
    best = state.best_perceptual
    better = best is None or best[0] != name or value < best[1]
    if better:
        state.best_perceptual = (name, value)
    return better


@contextlib.contextmanager
def appearing_folder(path: str | os.PathLike) -> Iterator[Path]:
    """
    A folder that appears at `path`, in place of what is there, by a rename when the context ends, complete, or not at
    all; what is yielded is a folder beside it to write into. An `OSError` if writing fails, for instance on a full
    disk.
    """
    path = Path(path)
    partial, old = (path.with_name(f".{kind}-{path.name}") for kind in ("partial", "old"))
    _restore(old)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in (*partial.rglob("*"), partial):
            _sync(file)  # to the disk before the rename says that it is complete
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if path.exists():
        os.replace(path, old)
    os.replace(partial, path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems can't for folders
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def _restore(old: Path) -> None:
    """Ends a replacement that was killed between its two renames, or after them."""
    path = old.with_name(old.name.removeprefix(".old-"))
    if old.exists() and not path.exists():
        os.replace(old, path)
    shutil.rmtree(old, ignore_errors=True)


def clean_up(output_dir: str | os.PathLike) -> None:
    """
    Removes what a killed run has left half written or half removed, and brings back what it was replacing. No other
    process may be writing into the folder.
    """
    for kind in ("partial", "removed", "shared"):
        for path in Path(output_dir).glob(f".{kind}-*"):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    for old in Path(output_dir).glob(".old-*"):
        _restore(old)


def check_shared_folder(
    accelerator: Accelerator, output_dir: str | os.PathLike, flag: str = "--output_dir", patience: float = 30.0
) -> None:
    """
    Makes sure that all processes see the same folder, called `flag` on the command line; an `OSError` if one does not
    see in `patience` seconds, which a network file system may take, what the main process has written. Call on every
    process; the folder must exist on the first.
    """
    if accelerator.num_processes == 1:
        return
    name = broadcast_object_list([f".shared-{uuid.uuid4().hex}"])[0]
    path = Path(output_dir) / name
    if accelerator.is_main_process:
        path.touch()
    accelerator.wait_for_everyone()
    started = time.monotonic()
    while name not in (os.listdir(output_dir) if os.path.isdir(output_dir) else ()):
        if time.monotonic() - started > patience:
            break
        time.sleep(0.1)
    seen = gather_object([path.exists()])
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        path.unlink()
    if not all(seen):
        blind = ", ".join(str(rank) for rank, sees in enumerate(seen) if not sees)
        raise OSError(
            f"{output_dir} of process {blind} is not that of process 0; name one with {flag} that all machines share."
        )


def checkpoint_step(path: Path) -> int:
    """Optimizer step of a checkpoint's folder, or -1 if the name is none of a checkpoint."""
    number = path.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() and number != path.name else -1


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir() and checkpoint_step(path) >= 0]
    return sorted(found, key=checkpoint_step)


@contextlib.contextmanager
def naming_the_last_checkpoint(
    output_dir: str | os.PathLike, what: str | os.PathLike, errors: tuple = (OSError, SafetensorError)
) -> Iterator[None]:
    """`errors` of writing `what`, for instance on a full disk, become an `OSError` that says how to go on."""
    try:
        yield
    except errors as error:
        kept = [str(path) for path in list_checkpoints(output_dir)]
        raise OSError(
            f"{what} could not be written ({error}); make room and resume from "
            f"{kept[-1] if kept else 'the start, as there is no earlier checkpoint'}."
        ) from error


def save_checkpoint(accelerator: Accelerator, output_dir: str | os.PathLike, step: int, limit: int | None = None):
    """
    Saves all that is needed to go on: networks, optimizers, schedules, averaged weights, counters and random states.
    The folder, `checkpoint-<step>`, appears by a rename when it is complete. Of more than `limit` checkpoints the
    oldest go; the new one always stays. An `OSError` if a file could not be written; earlier ones are still there.
    Call on every process.
    """
    path = Path(output_dir) / f"checkpoint-{step}"
    partial = path.with_name(f".partial-{path.name}")
    # Every process writes its own random state into the partial folder; the main process renames it.
    with (
        naming_the_last_checkpoint(output_dir, path, errors=(Exception,)),  # torch.save has errors of many kinds
        appearing_folder(path) if accelerator.is_main_process else contextlib.nullcontext(),
    ):
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        others = [old for old in list_checkpoints(output_dir) if old != path]
        for old in others[: max(len(others) + 1 - limit, 0) if limit is not None else 0]:
            removed = old.with_name(f".removed-{old.name}")
            os.replace(old, removed)  # so that none is ever half there
            shutil.rmtree(removed, ignore_errors=True)
        logger.info("Saved %s", path)
    accelerator.wait_for_everyone()


def resume(accelerator: Accelerator, output_dir: str | os.PathLike, checkpoint: str | None, state: RunState) -> None:
    """
    Restores a run, and warns if its settings were others. Call on every process, after everything is prepared and
    registered.

    `checkpoint` is the path of one, or its name in the run's folder; `"latest"`, which starts afresh if there is none;
    or `None`. Later checkpoints in the run's folder are renamed to `superseded-...`, so that `latest` stays on the
    branch that was chosen. A `FileNotFoundError` if a path is not a checkpoint, an `OSError`, which names the others,
    if it can't be read.
    """
    if checkpoint is None:
        return
    found = broadcast_object_list([list_checkpoints(output_dir)])[0]  # one process's view is all processes' choice
    if checkpoint == "latest":
        if not found:
            logger.info("No checkpoint in %s: starting afresh.", output_dir)
            return
        checkpoint = found[-1]
    elif any(path.name == checkpoint for path in found):
        checkpoint = Path(output_dir, checkpoint)
    if not Path(checkpoint).is_dir():
        names = ", ".join(path.name for path in found) or "none"
        raise FileNotFoundError(
            f"{checkpoint} is not a checkpoint folder; give the path of one, latest, or a name in {output_dir}, which "
            f"has {names}."
        )
    checkpoint, settings = Path(checkpoint), state.settings
    random_states = checkpoint / f"random_states_{accelerator.process_index}.pkl"
    scaler = accelerator.scaler
    if not (checkpoint / SCALER_NAME).exists():  # of a run in another precision: this one starts with a new loss scale
        accelerator.scaler = None
    try:
        # accelerate goes on without random states that it can't read. There are none for a process that is new.
        if random_states.exists():
            torch.load(random_states, weights_only=False)
        accelerator.load_state(str(checkpoint))
    except Exception as error:
        if "parameter groups" in str(error):
            known = ("encoder_learning_rate", "decoder_learning_rate", "optimizer")
            flags = " or ".join(f"--{name}" for name in known if name in settings)
            raise ValueError(
                f"{checkpoint} was trained with other groups of parameters; give {flags} if, and only if, the run "
                "before had it."
            ) from error
        raise OSError(
            f"{checkpoint} can't be read ({type(error).__name__}: {error}); resume from another checkpoint, of "
            f"{', '.join(path.name for path in found if path != checkpoint) or 'which there is none'}."
        ) from error
    finally:
        accelerator.scaler = scaler
    accelerator.step = 0  # checkpoints are saved between steps: the next batch is the first that is accumulated
    logger.info("Resumed from %s", checkpoint)
    earlier = {RENAMED.get(name, name): value for name, value in state.settings.items()}
    if earlier.get("adversarial_weight", 0) > 0:
        earlier.setdefault("lazy_r1_correction", False)  # earlier versions had none
    pairs = {name: (earlier.get(name, value), value) for name, value in settings.items()}
    changes = [f"{name} was {before} and is {now}" for name, (before, now) in pairs.items() if before != now]
    if changes and accelerator.is_main_process:
        logger.warning("The run can't end as it would have without the break: %s.", ", ".join(changes))
    state.settings = settings
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for later in list_checkpoints(output_dir):
            if checkpoint_step(later) > state.global_step:
                _supersede(later)
    accelerator.wait_for_everyone()


def _supersede(path: Path) -> None:
    """Sets a checkpoint of a branch that the run leaves aside."""
    target = free_path(path.with_name(f"superseded-{path.name}"))
    os.replace(path, target)
    logger.info("%s is kept as %s", path, target.name)


def launcher_is_gone() -> bool:
    """Whether `accelerate launch` has ended before this process: it passes no signals on to a single process."""
    return LAUNCHER is not None and os.getppid() != LAUNCHER


class TerminationSignal:
    """Notices SIGTERM to this process or to the launcher, so that a loop can save and leave."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._received = False
        signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, *_):
        self._received = True

    def received(self) -> bool:
        """Whether any process has received the signal; call once a step on every process: all leave at the same."""
        received = self._received or launcher_is_gone()
        if self.accelerator.num_processes == 1:
            return received
        flag = torch.tensor(float(received), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)

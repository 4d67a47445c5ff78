"""Checkpoints of a training run: complete or not there, and enough to go on bit by bit."""

import contextlib
import logging
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator


logger = logging.getLogger(__name__)


class RunState:
    """Counters and tensors of a run that belong in its checkpoints: whatever is set as an attribute."""

    def __init__(self, **values):
        self.global_step = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        vars(self).update(values)

    def state_dict(self) -> dict:
        """All attributes."""
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        """Sets attributes from a `state_dict`."""
        vars(self).update(state)


@contextlib.contextmanager
def appearing_folder(path: str | os.PathLike) -> Iterator[Path]:
    r"""
    A folder that appears at `path` by a rename when the context ends, complete, or not at all.

    Args:
        path (`str`): The folder; one that exists is replaced.

    Yields:
        `Path`: A folder beside it to write into.

    Raises:
        `OSError`: If writing fails, for instance on a full disk; what was at `path` before is still there.
    """
    path = Path(path)
    partial, old = (path.with_name(f".{kind}-{path.name}") for kind in ("partial", "old"))
    if old.exists() and not path.exists():  # killed between the two renames below
        os.replace(old, path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                with open(file, "rb") as opened:  # to the disk before the rename says that it is complete
                    os.fsync(opened.fileno())
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(partial, path)
    shutil.rmtree(old, ignore_errors=True)


def checkpoint_step(path: Path) -> int:
    """Optimizer step of a checkpoint's folder, or -1 if the name is none of a checkpoint."""
    number = path.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() and number != path.name else -1


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir() and checkpoint_step(path) >= 0]
    return sorted(found, key=checkpoint_step)


def save_checkpoint(accelerator: Accelerator, output_dir: str | os.PathLike, step: int, limit: int | None = None):
    r"""
    Saves all that is needed to go on: networks, optimizers, schedules, averaged weights, counters and random states.
    The folder appears by a rename when it is complete. Call on every process.

    Args:
        accelerator (`Accelerator`): With everything prepared or registered for checkpointing.
        output_dir (`str`): Folder of the run.
        step (`int`): Optimizer step; the folder is called `checkpoint-<step>`.
        limit (`int`, *optional*): Checkpoints to keep, the oldest go first; all by default. The new one always stays.

    Raises:
        `OSError`: If a file could not be written; earlier checkpoints are still there.
    """
    path = Path(output_dir) / f"checkpoint-{step}"
    partial = path.with_name(f".partial-{path.name}")
    try:
        # Every process writes its own random state into the partial folder; the main process renames it.
        with appearing_folder(path) if accelerator.is_main_process else contextlib.nullcontext():
            accelerator.wait_for_everyone()
            accelerator.save_state(str(partial))
            accelerator.wait_for_everyone()
    except Exception as error:
        kept = [str(path) for path in list_checkpoints(output_dir)]
        raise OSError(
            f"{path} could not be written ({error}); make room and resume from "
            f"{kept[-1] if kept else 'the start, as there is no earlier checkpoint'}."
        ) from error
    if accelerator.is_main_process:
        others = [old for old in list_checkpoints(output_dir) if old != path]
        for old in others[: max(len(others) + 1 - limit, 0) if limit is not None else 0]:
            removed = old.with_name(f".old-{old.name}")
            os.replace(old, removed)  # so that none is ever half there
            shutil.rmtree(removed, ignore_errors=True)
        logger.info("Saved %s", path)
    accelerator.wait_for_everyone()


def resume(accelerator: Accelerator, output_dir: str | os.PathLike, checkpoint: str | None) -> None:
    r"""
    Restores a run. Call on every process, after everything is prepared and registered.

    Args:
        accelerator (`Accelerator`): The run's accelerator.
        output_dir (`str`): Folder of the run, searched for `latest`.
        checkpoint (`str`, *optional*):
            Path of a checkpoint; `"latest"`, which starts afresh if there is none; or `None`. Later checkpoints of the
            run are renamed to `superseded-...`, so that `latest` stays on the branch that was chosen.

    Raises:
        `FileNotFoundError`: If a path is given that is not a checkpoint.
        `OSError`: If a checkpoint can't be read; names the others.
    """
    found = list_checkpoints(output_dir)
    if checkpoint is None:
        return
    if checkpoint == "latest":
        if not found:
            logger.info("No checkpoint in %s: starting afresh.", output_dir)
            return
        checkpoint = found[-1]
    if not Path(checkpoint).is_dir():
        raise FileNotFoundError(f"{checkpoint} is not a checkpoint folder; give the path of one, or latest.")
    checkpoint = Path(checkpoint)
    try:
        # accelerate goes on without random states that it can't read.
        torch.load(checkpoint / f"random_states_{accelerator.process_index}.pkl", weights_only=False)
        accelerator.load_state(str(checkpoint))
    except Exception as error:
        raise OSError(
            f"{checkpoint} can't be read ({type(error).__name__}: {error}); resume from another checkpoint, of "
            f"{', '.join(path.name for path in found if path != checkpoint) or 'which there is none'}."
        ) from error
    logger.info("Resumed from %s", checkpoint)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and checkpoint in found:
        for later in found[found.index(checkpoint) + 1 :]:  # of a branch that this run leaves
            os.replace(later, later.with_name(f"superseded-{later.name}"))
            logger.info("%s is kept as superseded-%s", later, later.name)
    accelerator.wait_for_everyone()


class TerminationSignal:
    r"""
    Notices SIGTERM, so that a loop can save and leave.

    Args:
        accelerator (`Accelerator`): The run's accelerator.
        interval (`int`, defaults to 10):
            Steps between the moments at which several processes compare notes: all have to leave at the same step.
    """

    def __init__(self, accelerator: Accelerator, interval: int = 10):
        self.accelerator = accelerator
        self.interval = interval
        self._received = False
        signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, *_):
        self._received = True

    def received(self, step: int) -> bool:
        """Whether any process has received the signal; call once a step on every process."""
        if self.accelerator.num_processes == 1:
            return self._received
        if step % self.interval:
            return False
        flag = torch.tensor(float(self._received), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)

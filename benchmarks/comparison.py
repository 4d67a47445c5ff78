"""What the three comparisons share: flags, settings that a run goes on with, rows of a collection, text, colours."""

import argparse
import contextlib
import functools
import itertools
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from brics_diffusers.metrics.reconstruction import image_batches
from brics_diffusers.training_utils.arguments import add_dataset_arguments, positive
from brics_diffusers.utils.plots import COLORS


BATCH_SIZE = 32  # of measurements
TRAINING = Path(__file__).resolve().parents[1] / "training"
sys.path.insert(0, str(TRAINING))  # for whoever runs a comparison


def config_path(name: str) -> str:
    """Type of a flag: path of a YAML file, or name of one in training/configs."""
    known = TRAINING / "configs" / f"{name}.yaml"
    path = known if known.is_file() else Path(name)
    if not path.is_file():
        names = ", ".join(sorted(path.stem for path in known.parent.glob("*.yaml")))
        raise argparse.ArgumentTypeError(f"must be a YAML file or one of {names}, not {name}")
    return str(path)


def add_collection_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which images of a collection to train on and to hold out."""
    add_dataset_arguments(parser, required=True)
    parser.add_argument("--max_train_samples", type=positive, help="Use the first images only.")
    parser.add_argument(
        "--num_validation_images", type=positive, default=256, help="Held-out images to use at most. Default: 256."
    )
    # What is held out, if the collection has no split for it, is the same for all seeds.
    parser.set_defaults(dataset_split="train", validation_split=None, seed=0)


def add_report_arguments(parser: argparse.ArgumentParser, output_dir: str) -> None:
    """Adds the flags for seeds and report."""
    add = parser.add_argument
    flag = functools.partial(add, action=argparse.BooleanOptionalAction, default=True)
    add("--output_dir", default=output_dir, help="Folder for the report, and for runs to go on from.")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Seeds of weights, data order and noise.")
    flag("--show_images", help="Images of the collection in pictures; not for those that must not be passed on.")
    flag("--report", help="Write the report at the end; --no-report for processes that train a part.")


def check_settings(folder: Path, before: dict, now: dict) -> None:
    """A `ValueError` if the run in a folder was trained with other settings than are asked for now."""
    for name, value in now.items():
        if before.get(name) != value:
            raise ValueError(
                f"{folder} was trained with {name} {before.get(name)}, not {value}; give the same flags as before, or "
                "another --output_dir."
            )


def run_script(script: Path | str, words: list[str], log: Path) -> None:
    """
    Runs a script, or a module by its name, with flags, what it prints added to `log`; an exception here ends it
    too, and it saves its checkpoint. A `RuntimeError` if it fails.
    """
    program = ["-m", script] if isinstance(script, str) else [str(script)]
    with log.open("a") as file:
        process = subprocess.Popen(
            [sys.executable, *program, *words],
            stdout=file,
            stderr=file,
            env={"TQDM_MININTERVAL": "30"} | os.environ,  # seconds from one line of the progress bar to the next
        )
        try:
            process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if process.returncode:
        last = log.read_text().strip().splitlines()[-1:]
        raise RuntimeError(f"{log.parent} ended early ({''.join(last)}); see {log}, and run the command again.")


@contextlib.contextmanager
def stopping_on_sigterm():
    """Within, SIGTERM ends this process by an exception, so that what it has started by [`run_script`] ends too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped; run the same command to go on."))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def reconstructions(model, loader):
    """Batches as a loader's, with reconstructions in place of the images."""
    for images, rows in image_batches(loader, next(model.parameters()).device, least=0, progress=False):
        yield {"pixel_values": model(images).sample.float(), "index": rows, "unreadable": []}


def training_rows(count: int) -> list[int]:
    """Rows of the training images in an order of chance, the same for all runs, so that any number may be taken."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation over seeds, as text."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def line_colors(names) -> dict[str, str]:
    """A color for each of some names, as different as they can be."""
    return dict(zip(names, itertools.cycle((*COLORS, *(f"C{index}" for index in (5, 7, 8, 9, 6))))))


def origin(on: dict) -> str:
    """The lines of a report that say how it was made and where; `on` is of `reports.machine`."""
    return f"`{on['command']}`\n\n{on['device']}; torch {on['torch']}, diffusers {on['diffusers']}."

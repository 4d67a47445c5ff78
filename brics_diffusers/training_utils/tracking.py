"""Trackers of a run: TensorBoard's, from whose files its curves are read, and others that accelerate knows."""

import argparse
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from torchvision.transforms.functional import to_tensor


# Trackers whose `log_images` takes one image under a name, not a list of them.
ONE_IMAGE = ("aim", "clearml")


def start_trackers(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Starts TensorBoard's tracker and those of `--report_to`, with the run's flags."""
    folder = Path(args.output_dir, args.logging_dir)
    # One of its own: its folder is called tensorboard, whatever the others call the project.
    accelerator.log_with = [TensorBoardTracker("tensorboard", str(folder)), *accelerator.log_with]
    flags = {name: value for name, value in vars(args).items() if isinstance(value, (int, float, str, bool))}
    accelerator.init_trackers(args.tracker_project_name, config=flags)


def log_image(accelerator: Accelerator, name: str, image, step: int) -> None:
    """Hands a PIL picture, called `name`, to all trackers that take pictures. Call on the main process."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image(name, to_tensor(image), step)
        elif tracker.name == "trackio":
            import trackio  # noqa: PLC0415 - of those who track with it

            tracker.log({name: trackio.Image(image)}, step=step)
        elif hasattr(tracker, "log_images"):
            tracker.log_images({name: image if tracker.name in ONE_IMAGE else [image]}, step=step)


def log_histogram(accelerator: Accelerator, name: str, values, step: int) -> None:
    """Hands TensorBoard numbers for a histogram. Call on the main process."""
    accelerator.get_tracker("tensorboard", unwrap=True).add_histogram(name, values, step)

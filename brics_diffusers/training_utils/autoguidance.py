"""The guide of a pipeline: the diffusion model as it was early in its training (Karras et al., arXiv 2406.02507)."""

import argparse
from pathlib import Path

from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel

from ..utils.safe_loading import load_class_safely
from .checkpoints import RunState, appearing_folder
from .ema import averaged_weights


GUIDE = "guide"


def check_guide_step(args: argparse.Namespace, state: RunState) -> None:
    r"""
    Refuses a `--guide_step` that will not come. Call when the run is resumed.

    Args:
        args (`argparse.Namespace`): Flags of the run.
        state (`RunState`): Its counters.

    Raises:
        `ValueError`: If the step lies behind the end, or has passed without a guide in the run's folder.
    """
    if args.guide_step is None:
        return
    if args.guide_step > args.max_train_steps:
        raise ValueError(f"--guide_step is {args.guide_step}; give at most the {args.max_train_steps} training steps.")
    if args.guide_step <= state.global_step and not (Path(args.output_dir) / GUIDE).is_dir():
        raise ValueError(
            f"--guide_step is {args.guide_step}, but the run is at step {state.global_step} and {args.output_dir} has "
            "no guide; give a later step or leave it out."
        )


def keep_guide(unet: UNet2DModel, ema: EMAModel, output_dir: Path) -> None:
    """Writes the averaged weights as the guide, complete or not at all; on the main process."""
    with averaged_weights(unet, ema), appearing_folder(output_dir / GUIDE) as folder:
        unet.save_pretrained(folder)


def load_guide(output_dir: Path) -> UNet2DModel:
    """What [`keep_guide`] has written."""
    return load_class_safely(UNet2DModel, output_dir / GUIDE)

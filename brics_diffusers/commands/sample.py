"""Generates images with a pipeline: PNG files, and the first of them in one picture.

The files are `samples/0000000.png`, `samples/0000001.png`, ... in --output_dir, the picture is `grid.png`. Sample i
follows from --seed and i alone: an interrupted command goes on where it stopped, and a set can be made larger. Runs on
several processes under `accelerate launch -m brics_diffusers.commands sample ...`.
"""

import argparse
from pathlib import Path

import torch
from accelerate import PartialState
from torchvision.transforms.functional import pil_to_tensor

from ..data import read_image
from ..pipelines.sampling import sample_path
from ..training_utils.arguments import positive
from ..utils.files import atomic_write
from ..utils.image_grids import image_grid
from .generated import add_sampling_arguments, sample_to_folder
from .shared import add_run_arguments, choose_device


SHOWN = 64  # samples in the picture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this subcommand."""
    parser.add_argument("model", help="Pipeline: its folder, or its name on the Hub.")
    parser.add_argument("--num_samples", type=positive, default=16, help="Images to make. Default: %(default)s.")
    parser.add_argument("--batch_size", type=positive, default=16, help="Images made at once. Default: %(default)s.")
    add_sampling_arguments(parser)
    add_run_arguments(parser, seed="the samples", output_dir="runs/samples")


def run(args: argparse.Namespace) -> None:
    """Makes a share of the samples on every process, and the picture `grid.png` on the first."""
    device, state = choose_device(args.device), PartialState()
    folder = sample_to_folder(args, args.model, Path(args.output_dir) / "samples", state, device)
    if not state.is_main_process:
        return
    shown = [read_image(sample_path(folder, index)) for index in range(min(args.num_samples, SHOWN))]
    grid = image_grid(torch.stack([pil_to_tensor(image) for image in shown]) / 127.5 - 1)
    with atomic_write(Path(args.output_dir) / "grid.png") as file:
        grid.save(file, "PNG")
    print(f"{args.num_samples} images in {folder}, the first {len(shown)} in {args.output_dir}/grid.png")

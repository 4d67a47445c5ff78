"""Encodes and decodes a collection of images: PNG files, and the first beside their reconstructions in one picture.

Images are cut to their centre and resized to the size that the model was trained with. The files are
`reconstructions/0000000-name.png`, ... in --output_dir, with an image's number in the collection and its file's name.
"""

import argparse
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image

from ..data import UnreadableLog
from ..metrics.image_features import to_uint8
from ..metrics.reconstruction import image_batches, reconstruct
from ..utils.files import atomic_write
from ..utils.image_grids import side_by_side
from .shared import MODEL_HELP, add_collection_arguments, add_run_arguments, choose_device, open_collection, open_model


SHOWN = 16  # images in the picture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this subcommand."""
    parser.add_argument("model", help=MODEL_HELP)
    add_collection_arguments(parser, split="train")
    add_run_arguments(parser, output_dir="runs/reconstructions")


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    """Writes a reconstruction for every readable image, and the picture `side-by-side.png`."""
    device = choose_device(args.device)
    if PartialState().num_processes > 1:
        raise ValueError("reconstruct runs on one process; start it without accelerate launch.")
    folder = Path(args.output_dir) / "reconstructions"
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds files, and results of two runs would mix; delete it or name another folder.")
    autoencoder = open_model(args.model, device)
    dataset, loader = open_collection(args, autoencoder)
    folder.mkdir(exist_ok=True)
    unreadable, count, shown = UnreadableLog(), 0, []
    for images, rows in image_batches(loader, device, unreadable, "Reconstructing"):
        samples = reconstruct(autoencoder, images, rows)
        for row, pixels in zip(rows.tolist(), to_uint8(samples).cpu(), strict=True):
            image = Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy())  # (H, W, C), or (H, W) if gray
            path = folder / f"{row:07d}{file_stem(dataset[row]['image'])}.png"
            with atomic_write(path) as file:
                image.save(file, "PNG")
        if count < SHOWN:
            shown.append((images.cpu(), samples.float().cpu()))
        count += len(rows)
    originals, samples = (torch.cat(parts)[:SHOWN] for parts in zip(*shown, strict=True))
    picture = side_by_side(originals, samples)
    with atomic_write(Path(args.output_dir) / "side-by-side.png") as file:
        picture.save(file, "PNG")
    skipped = f" ({unreadable.summary()})" if unreadable.count else ""
    print(
        f"{count} reconstructions in {folder}, some beside their images in {args.output_dir}/side-by-side.png{skipped}"
    )


def file_stem(image: dict) -> str:
    """`-` and what an image's file is called, without its ending and not too long; nothing if it has no name."""
    path = (image.get("path") or "").split("::")[0]  # of an archive, the member comes first
    return f"-{Path(path).stem[:50]}" if path else ""

"""The training images nearest to generated ones, as a picture, and the share of near copies.

Distances are LPIPS, mean squared errors or squared distances between the features of an extractor. A near copy is
nearer to a training image than that one is to any other training image. Training images pass by in batches, twice:
memory does not grow with their number.
"""

import argparse

import torch
from accelerate import PartialState

from ..data import evaluation_loader, image_name
from ..metrics.image_features import common_image_size, to_uint8
from ..metrics.nearest_neighbours import load_embedding, near_copies, nearest_in_collection, neighbour_grid
from ..training_utils.arguments import positive
from ..utils.reports import markdown_table
from ..utils.sizes import size_text
from .generated import add_generated_arguments, load_generated, make_samples
from .shared import add_collection_arguments, add_run_arguments, choose_device, publish, read_collection


SHOWN = 32  # generated images in the picture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this command."""
    add = parser.add_argument
    add_generated_arguments(parser, num_samples=8)
    add_collection_arguments(parser, split="train")
    add_run_arguments(parser, seed="the samples")
    add(
        "--distance",
        default="lpips-vgg",
        metavar="NAME",
        help="lpips-vgg, lpips-alex, lpips-squeeze, pixels, random-conv or a name of torch-fidelity's registry. "
        "Default: lpips-vgg.",
    )
    add("--num_neighbours", type=positive, default=5, help="Training images to show for each generated one.")


def run(args: argparse.Namespace) -> None:
    """Makes the samples, finds their neighbours on the main process and writes the report."""
    device, state = choose_device(args.device), PartialState()
    if state.is_main_process:  # what can fail does so before the samples are made
        training = read_collection(args)
        embedding = load_embedding(args.distance, device)
    folder = make_samples(args, state, device)
    if not state.is_main_process:
        return
    generated, origin = load_generated(args, folder)
    resolution = common_image_size(generated)
    queries, rows = _read(generated, resolution)
    of_training = training, embedding
    reading = args.batch_size, args.dataloader_num_workers, device
    distances, indices, unreadable = nearest_in_collection(queries, *of_training, args.num_neighbours, *reading)
    nearest = sorted(set(indices[:, 0].tolist()))
    neighbours, _ = _read(training.select(nearest), resolution)
    *of_neighbours, _ = nearest_in_collection(neighbours, *of_training, 2, *reading)
    copies = near_copies(distances, indices, of_neighbours, nearest)
    names = [image_name(generated[row]["image"], row) for row in rows]
    result = {
        "distance": embedding.description,
        "near_copies": sum(copies) / len(copies),
        "queries": [
            {"image": name, "near_copy": copy, "neighbours": _neighbours(training, *found)}
            for name, copy, *found in zip(names, copies, indices.tolist(), distances.tolist(), strict=True)
        ],
        "generated": origin | {"num_images": len(queries), "num_unreadable": len(generated) - len(queries)},
        "training": {
            "source": args.dataset_name,
            "split": args.dataset_split,
            "num_images": len(training) - unreadable.count,
            "num_unreadable": unreadable.count,
            "resizing": f"central part, then Pillow's Lanczos, to {size_text(resolution)}",
        },
    }
    neighbours = torch.stack([_read(training.select(row), resolution)[0] for row in indices[:SHOWN].tolist()])
    grid = neighbour_grid(queries[:SHOWN], neighbours, distances)
    publish(args, "nearest-neighbours", result, _describe(result), lambda: {"grid": grid}, device)


def _read(dataset, resolution: int | tuple[int, int]) -> tuple[torch.Tensor, list[int]]:
    """All readable images of a small collection, uint8 (N, 3, H, W), and their rows."""
    (batch,) = evaluation_loader(dataset, resolution, batch_size=len(dataset))
    return to_uint8(batch["pixel_values"]), batch["index"].tolist()


def _neighbours(dataset, indices: list[int], distances: list[float]) -> list[dict]:
    return [
        {"index": index, "image": image_name(dataset[index]["image"], index), "distance": distance}
        for index, distance in zip(indices, distances, strict=True)
    ]


def _describe(result: dict) -> str:
    rows = []
    for number, query in enumerate(result["queries"][:SHOWN]):
        cells = [f"{found['index']} ({found['distance']:.4g})" for found in query["neighbours"]]
        row = {"generated": number, "near copy": "yes" if query["near_copy"] else ""}
        rows.append(row | {f"neighbour {rank}": cell for rank, cell in enumerate(cells, start=1)})
    training, count = result["training"], len(result["queries"])
    return (
        f"# Nearest training images\n\n{result['near_copies']:.1%} of {count} generated images are near copies: "
        "nearer to a training image than that one is to any other.\n\n"
        f"The first {len(rows)}:\n\n{markdown_table(rows)}\n"
        f"Index in the collection (distance): {result['distance']['definition']}. {training['num_images']} images of "
        f"{training['source']}, {training['num_unreadable']} unreadable ones left out; {training['resizing']}.\n"
    )

"""The training images nearest to generated ones, as a picture, and the share of near copies.

Distances are LPIPS, mean squared errors or squared distances between the features of an extractor. A near copy is
nearer to a training image than that one is to any other training image. Now and then images that are new are so too:
--held_out_split says how often those of a split are that was not trained on. Training images pass by in batches,
twice: memory does not grow with their number.
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
from .shared import add_collection_arguments, add_run_arguments, choose_device, load_split, publish, read_collection


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
    add("--held_out_split", help="Split whose images, as many as generated ones at most, are compared too.")


def run(args: argparse.Namespace) -> None:
    """Makes the samples, finds their neighbours on the main process and writes the report."""
    device, state = choose_device(args.device), PartialState()
    if state.is_main_process:  # what can fail does so before the samples are made
        training = read_collection(args)
        held_out = None if args.held_out_split is None else load_split(args, args.held_out_split)
        embedding = load_embedding(args.distance, device)
    folder = make_samples(args, state, device)
    if not state.is_main_process:
        return
    generated, origin = load_generated(args, folder)
    resolution = common_image_size(generated)
    queries, rows = _read(generated, resolution)
    comparing = training, embedding, args.num_neighbours, args.batch_size, args.dataloader_num_workers, device
    distances, indices, unreadable, copies = find_copies(queries, *comparing)
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
    if held_out is not None:
        images, _ = _read(held_out.select(range(0, len(held_out), -(-len(held_out) // len(queries)))), resolution)
        *_, known = find_copies(images, *comparing)
        result["held_out"] = {
            "split": args.held_out_split,
            "num_images": len(known),
            "near_copies": sum(known) / len(known),
        }
    neighbours = torch.stack([_read(training.select(row), resolution)[0] for row in indices[:SHOWN].tolist()])
    grid = neighbour_grid(queries[:SHOWN], neighbours, distances)
    publish(args, "nearest-neighbours", result, _describe(result), lambda: {"grid": grid}, device)


def find_copies(queries: torch.Tensor, training, embedding, num_neighbours: int, *reading) -> tuple:
    """What `nearest_in_collection` returns for images, and which of them are near copies."""
    distances, indices, unreadable = nearest_in_collection(queries, training, embedding, num_neighbours, *reading)
    nearest = sorted(set(indices[:, 0].tolist()))
    neighbours, _ = _read(training.select(nearest), queries.shape[-2:])
    *of_neighbours, _ = nearest_in_collection(neighbours, training, embedding, 2, *reading)
    return distances, indices, unreadable, near_copies(distances, indices, of_neighbours, nearest)


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
    training, count, held_out = result["training"], len(result["queries"]), ""
    if "held_out" in result:
        found = result["held_out"]
        held_out = f" Of {found['num_images']} images of the split {found['split']}, {found['near_copies']:.1%} are."
    return (
        f"# Nearest training images\n\n{result['near_copies']:.1%} of {count} generated images are near copies: "
        f"nearer to a training image than that one is to any other.{held_out}\n\n"
        f"The first {len(rows)}:\n\n{markdown_table(rows)}\n"
        f"Index in the collection (distance): {result['distance']['definition']}. {training['num_images']} images of "
        f"{training['source']}, {training['num_unreadable']} unreadable ones left out; {training['resizing']}.\n"
    )

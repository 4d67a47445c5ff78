"""Parameters, multiply-adds and training memory of an autoencoder's parts, counted without running them.

For every preset of the paper, or for YAML files with an `autoencoder` section, and every type of decoder; retrieval by
formula and as counted for other T, levels, groups and key lengths; decoders of other autoencoders. Multiply-adds are
counted by torch.utils.flop_counter from the shapes of matrix products, convolutions, attention and lookups.
"""

import argparse
from pathlib import Path

import yaml
from tqdm.auto import tqdm

from ..analysis.cost import (
    autoencoder_cost,
    peer_decoder_cost,
    peers_of_size,
    retrieval_cost,
    retrieval_formula,
    retrieval_memory,
    sample_size,
    variations,
)
from ..analysis.plots import cost_plot
from ..models.configuration import DECODER_TYPES
from ..models.presets import PRESETS
from ..utils.reports import markdown_table
from ..utils.sizes import size_text
from .shared import publish


# Names of a part's parameters and of its work.
TITLES = {
    "encoder": ("encoder M", "encoder G"),
    "lookup": ("grids M", "lookup G"),
    "mlp": ("MLPs M", "MLPs G"),
    "decoder": ("decoder M", "decoder G"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this subcommand."""
    parser.add_argument(
        "configs",
        nargs="*",
        metavar="config",
        default=list(PRESETS),
        help=f"Presets ({', '.join(PRESETS)}) or YAML files, all presets by default. The first is varied.",
    )
    parser.add_argument(
        "--decoder_types",
        nargs="+",
        choices=DECODER_TYPES,
        help="Decoders to count; default: all for presets, the file's own for YAML files.",
    )
    parser.add_argument("--output_dir", default="runs/reports", help="Folder for the report. Default: %(default)s.")


def read_config(name: str) -> dict:
    """Keyword arguments of the autoencoder of a preset or a YAML file; an error for anything else."""
    if name in PRESETS:
        return PRESETS[name]
    try:
        content = yaml.safe_load(Path(name).read_text())
    except OSError as error:
        raise FileNotFoundError(
            f"{name} is neither a preset nor a YAML file that can be read ({error.strerror}); presets are "
            f"{', '.join(PRESETS)}."
        ) from error
    except yaml.YAMLError as error:
        raise ValueError(
            f"{name} is not valid YAML ({error}); give a file such as training/configs/*.yaml."
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("autoencoder"), dict):
        raise ValueError(f"{name} has no section `autoencoder`; give a file such as training/configs/*.yaml.")
    return content["autoencoder"]


def run(args: argparse.Namespace) -> None:
    """Counts, and writes `cost`."""
    configs = {name if name in PRESETS else Path(name).stem: read_config(name) for name in args.configs}
    sizes = {name: sample_size(config) for name, config in configs.items()}
    pairs = [
        (name, decoder)
        for name, config in configs.items()
        for decoder in args.decoder_types
        or (DECODER_TYPES if name in args.configs else [config.get("decoder_type", "style")])
    ]
    parts = [
        part_row(name, decoder, sizes[name], autoencoder_cost(configs[name] | {"decoder_type": decoder}))
        for name, decoder in tqdm(pairs, desc="Counting parts", leave=False)
    ]
    memory = [
        {"config": name, "image": size_text(sizes[name]), "batch": size} | retrieval_memory(config, size)
        for name, config in tqdm(configs.items(), desc="Counting memory", leave=False)
        for size in (1, 2)
    ]
    varied = next(iter(configs))
    retrieval = [
        {"changed": name, "value": value} | retrieval_row(config)
        for name, value, config in tqdm(variations(configs[varied]), desc="Varying", leave=False)
    ]
    squares = [height for height, width in dict.fromkeys(sizes.values()) if height == width]
    pairs = [(name, size) for size in squares for name in peers_of_size(size)]
    peers = [
        {"decoder": name, "image": size_text(size)} | peer_row(peer_decoder_cost(name, size))
        for name, size in tqdm(pairs, desc="Counting others", leave=False)
    ]
    result = {"parts": parts, "memory": memory, "varied": varied, "image": size_text(sizes[varied])}
    result |= {"retrieval": retrieval, "peers": peers}
    publish(args, "cost", result, as_text(result), lambda: {"decoders": plot(result)})


def part_row(name: str, decoder: str, size: tuple[int, int], cost: dict) -> dict:
    """One row of the first table."""
    sizes = {TITLES[part][0]: values["parameters"] for part, values in cost.items()}
    work = {TITLES[part][1]: values["multiply_adds"] for part, values in cost.items()}
    decode = sum(value for part, value in work.items() if part != "encoder G")
    return {"config": name, "image": size_text(size), "decoder type": decoder} | sizes | work | {"decode G": decode}


def retrieval_row(config: dict) -> dict:
    """One row of the table of variations."""
    counted, formula = retrieval_cost(config), retrieval_formula(config)
    row = {TITLES["lookup"][0]: counted["lookup"]["parameters"]}
    for part, value in formula.items():
        title = TITLES[part][1]
        row |= {f"{title}, formula": value, f"{title}, counted": counted[part]["multiply_adds"]}
    return row


def peer_row(cost: dict) -> dict:
    """One row of the table of other decoders."""
    return {"decoder M": cost["parameters"], "decode G": cost["multiply_adds"]}


def plot(result: dict):
    """
    Decoders of the first config beside the others at its size. Parameters of a decode are those of lookup, MLPs and
    decoder.
    """
    parameters, work = {}, {}
    for row in result["parts"]:
        if row["config"] == result["varied"]:
            name = f"{row['config']}, {row['decoder type']}"
            parameters[name] = row["grids M"] + row["MLPs M"] + row["decoder M"]
            work[name] = row["decode G"]
    for row in result["peers"]:
        if row["image"] == result["image"]:
            parameters[row["decoder"]], work[row["decoder"]] = row["decoder M"], row["decode G"]
    return cost_plot(parameters, work, result["image"])


def peer_paragraphs(rows: list[dict]) -> list[str]:
    """The table of other decoders."""
    if not rows:
        return ["Decoders of other autoencoders are left out: their encoders don't divide these sizes evenly.\n"]
    return ["Decoders of other autoencoders for images of the same size, counted alike:\n", markdown_table(rows)]


def as_text(result: dict) -> str:
    """The Markdown report."""
    paragraphs = [
        "# Cost\n\nM: million parameters. G: 10^9 multiply-adds for one image of the row's size in pixels. Decode: "
        "lookup, MLPs and decoder.\n",
        markdown_table(result["parts"]),
        *peer_paragraphs(result["peers"]),
        f"Retrieval of {result['varied']} ({result['image']} pixels) with one thing changed:\n",
        markdown_table(result["retrieval"]),
        "Memory of retrieval in a training step, 10^6 bytes of float32: what autograd saves (every storage once, no "
        "parameters), outputs and their gradients; `activations` is all but the grids and their gradient:\n",
        markdown_table(result["memory"]),
    ]
    return "\n".join(paragraphs)

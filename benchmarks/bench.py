"""Everything that is claimed about speed, in one run: `make bench`.

    python benchmarks/bench.py [--parts decoding growth] [--dataset_name IMAGES]

Writes `speed.json`, `speed.md` and plots into `benchmarks/results/<device>`. Figures compare only within one run. On a
CPU they are times that the process computes on one thread, which other work on the machine hardly changes.
"""

import argparse
import time
from pathlib import Path

import convolutions
import decoding
import growth
import retrieval
import sampling
import torch
from diffusers import VQModel

import training
from brics_diffusers.utils.reports import machine, write_report


PARTS = {
    "retrieval": retrieval,
    "decoding": decoding,
    "convolutions": convolutions,
    "sampling": sampling,
    "training": training,
    "growth": growth,
}
ROUNDS_ON_CUDA = 20  # where a turn takes milliseconds
TITLES = {
    "retrieval": "The lookup beside grid_sample",
    "decoding": "Decoding beside other autoencoders",
    "convolutions": "Ways to compute modulated convolutions",
    "sampling": "Sampling with few steps and with many",
    "training": "Training",
    "growth": "Growth of time and memory",
}
EMOJI = Path(__file__).parents[1] / "model_cards/brics-noto-emoji-64"
TINY_AUTOENCODER = {
    "sample_size": 32,
    "encoder_block_out_channels": (8, 16, 16),
    "encoder_layers_per_block": 1,
    "norm_num_groups": 4,
    "feature_size": 16,
    "feature_channels": 16,
    "num_levels": 4,
    "min_resolution": 4,
    "max_resolution": 16,
    "style_dim": 16,
    "decoder_block_out_channels": (16, 8),
}
TINY_UNET = sampling.SMALL_UNET | {"block_out_channels": (16, 16, 32), "norm_num_groups": 4, "attention_head_dim": 16}
# Arguments of `measure` that show within seconds whether everything runs; the numbers mean nothing.
TINY = {
    "retrieval": {"batch_sizes": (1,), "rounds": 1},
    "decoding": {
        "batch_rounds": ((1, 1), (2, 0)),
        "config": TINY_AUTOENCODER,
        "peers": {"VQ": (VQModel, (4, 8, 8), (32, 32), "AttnUpDecoderBlock2D")},
    },
    "convolutions": {"rounds": 1, "layers": {"up-convolution": (8, 4, 6), "convolution": (4, 4, 12)}},
    "sampling": {
        "batch_size": 1,
        "samplers": tuple(
            (*sampler, steps) for (*sampler, _), steps in zip(sampling.SAMPLERS, (2, 3, 4), strict=True)
        ),
        "autoencoder": TINY_AUTOENCODER,
        "unet": TINY_UNET,
    },
    "training": {"rounds": 1, "autoencoder": TINY_AUTOENCODER, "unet": TINY_UNET},
    "growth": {
        "config": TINY_AUTOENCODER,
        "axes": {"batch": (4, 8), "resolution": (32, 64), "levels": (2, 4), "groups": (1, 2), "T": (16, 256)},
    },
}


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="What to measure.")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="Where to work.")
    add("--threads", type=int, default=1, help="Threads of a CPU.")
    add("--pipeline", default=EMOJI, help="Folder of a trained pipeline, whose sampling is measured; default: emoji.")
    add("--dataset_name", help="The images it was trained on, for the quality of its samples.")
    add("--num_images", type=int, default=64, help="Samples whose quality is measured, of every sampler.")
    add("--compile", action="store_true", help="Time torch.compile too; it needs a C++ compiler on a CPU.")
    add("--tiny", action="store_true", help="Tiny models: whether it all runs, without meaning.")
    add("--output_dir", help="Folder of the report; default: benchmarks/results/<device>, of some parts runs/bench.")
    args = parser.parse_args(argv)
    if args.tiny:
        args.pipeline = None
    if args.output_dir is None:
        whole = set(args.parts) == set(PARTS) and not args.tiny
        results = Path(__file__).parent / "results" / torch.device(args.device).type
        args.output_dir = results if whole else Path("runs/bench")
    return args


def measure(args: argparse.Namespace) -> dict:
    """Numbers of every part, and how many minutes they took."""
    result = {"parts": {}, "minutes": {}}
    for name in args.parts:
        options = dict(TINY[name]) if args.tiny else {}
        if torch.device(args.device).type == "cuda" and name != "decoding" and not args.tiny:
            options["rounds"] = 2 if name == "sampling" else ROUNDS_ON_CUDA
        if name == "sampling":
            options |= {name: getattr(args, name) for name in ("pipeline", "dataset_name", "num_images")}
            options |= {"compiled": args.compile}
        print(f"{TITLES[name]} ...", flush=True)
        start = time.perf_counter()
        result["parts"][name] = PARTS[name].measure(device=args.device, **options)
        result["minutes"][name] = (time.perf_counter() - start) / 60
    return result


def report(result: dict, on: dict) -> tuple[str, dict]:
    """The Markdown file, and its plots by name."""
    took = ", ".join(f"{name} {minutes:.1f}" for name, minutes in result["minutes"].items())
    text = f"""# Speed

`{on["command"]}`

{on["device"]}; torch {on["torch"]}, diffusers {on["diffusers"]}. Figures compare only within this run: medians of
turns that all candidates take in one process (of one turn where it takes many seconds). Minutes on the clock: {took}.
"""
    figures = {}
    for name, found in result["parts"].items():
        text += f"\n## {TITLES[name]}\n\n{PARTS[name].describe(found)}"
        if hasattr(PARTS[name], "figures"):
            figures |= PARTS[name].figures(found)
    return text, figures


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    result = measure(args)
    on = machine(args.device)
    text, figures = report(result, on)
    write_report(args.output_dir, "speed", {"machine": on, **result}, text, figures)
    print(text)


if __name__ == "__main__":
    main()

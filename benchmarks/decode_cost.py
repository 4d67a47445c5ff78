"""Parameters and multiply-adds of decoding one image, for every preset (compare Tables 3 and 7 of the paper).

Counted by `torch.utils.flop_counter` (two operations a multiply-add) on tensors without storage; the counter knows
matrix products and convolutions. The lookup in the grids has none of them: its cost is 8 corners x 4 channels a point
and level.
"""

import argparse
from pathlib import Path

import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from brics_diffusers import BricsAutoencoder


CONFIGS = Path(__file__).parents[1] / "training" / "configs"


def decode_cost(config: dict) -> dict[str, float]:
    """Parameters in millions and multiply-adds in 10**9 of one decode."""
    with torch.device("meta"):
        autoencoder = BricsAutoencoder(**config).eval()
        key_codes = torch.empty(1, *autoencoder.key_code_shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        autoencoder.decode(key_codes)
    size = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in autoencoder.named_children()}
    counts = {name: sum(values.values()) / 2e9 for name, values in counter.get_flop_counts().items()}
    mlp = counts.get("GroupMLP", 0.0)
    total = counter.get_total_flops() / 2e9
    points = autoencoder.config.feature_size**2 * autoencoder.grids.num_groups
    lookups = points * autoencoder.grids.num_features * 2**autoencoder.grids.num_dims / 1e9
    return {
        "encoder M": size["encoder"],
        "grids M": size["grids"],
        "MLPs M": size["mlp"],
        "decoder M": size["decoder"],
        "lookup G": lookups,
        "MLPs G": mlp,
        "decoder G": total - mlp,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", type=Path, default=sorted(CONFIGS.glob("*.yaml")))
    paths = parser.parse_args().configs
    rows = {path.stem: decode_cost(yaml.safe_load(path.read_text())["autoencoder"]) for path in paths}
    names = list(next(iter(rows.values())))
    print("M: million parameters. G: 10^9 multiply-adds of one decode.\n")
    print("| preset | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for preset, row in rows.items():
        print(f"| {preset} | " + " | ".join(f"{row[name]:.2f}" for name in names) + " |")


if __name__ == "__main__":
    main()

"""BricsAutoencoder with squared error alone, with a perceptual distance, and with a discriminator: what each is worth.

    python benchmarks/compare_losses.py --config noto-emoji-64 --dataset_name FOLDER --output_dir DIR

Every run is one of training/train_autoencoder.py, in `runs/VARIANT-SEED`; the weights of every validation are kept.
The perceptual network is EfficientNet-lite0, whose weights come as a Python package (the extra `learned-features`);
EfficientNet-lite2 judges the reconstructions. Several processes may share the work, each with other --variants or
--seeds, with --no-report. After an interruption, run the same command again: what is finished is not done twice.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import yaml

from brics_diffusers import BricsAutoencoder
from brics_diffusers.checkpoints import appearing_folder
from brics_diffusers.data import evaluation_loader, load_collection
from brics_diffusers.evaluation import reconstruction_metrics
from brics_diffusers.feature_distances import (
    KID_SCALE,
    collection_features,
    frechet_distance,
    kernel_distance,
    reconstruction_features,
)
from brics_diffusers.feature_extractors import load_feature_extractor
from brics_diffusers.perceptual import load_perceptual_network
from brics_diffusers.reports import machine, markdown_table, write_report
from brics_diffusers.training_utils import positive
from brics_diffusers.visualization import image_grid


ROOT = Path(__file__).parents[1]
PERCEPTUAL = {"perceptual_network": "efficientnet-lite0", "perceptual_weight": 1}
GAN = PERCEPTUAL | {
    "adversarial_weight": 0.02,
    "discriminator_learning_rate": 2e-3,
    "gradient_penalty_weight": 0.5,
    "augmentation": "color,translation",
}
# Flags of the training script beyond the config's. Shares of the steps: when the discriminator starts to count, and in
# how much time it comes to its full weight and has learned before.
VARIANTS = {
    "MSE": {"perceptual_weight": 0},
    "MSE + perceptual": PERCEPTUAL,
    "MSE + perceptual + GAN": GAN,
    "GAN, no head start of the discriminator": GAN | {"head_start": 0.0},
    "GAN, no correction for lazy R1": GAN | {"lazy_r1_correction": False},
    "GAN, adaptive weight": GAN | {"adaptive_gan_weight": True},
    "GAN, no augmentation": GAN | {"augmentation": ""},
}
DEFAULT_VARIANTS = list(VARIANTS)[:3]
GAN_START, GAN_WARMUP, HEAD_START = 0.5, 0.1, 0.1
DISCRIMINATOR = {"base_channels": 2048, "max_channels": 64}  # a step of it costs about as much as one of small models
CURVE_IMAGES = 1000  # of which the curve of rFID is


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", default="noto-emoji-64", help="Name of a file in training/configs, or a path.")
    add(
        "--dataset_name",
        required=True,
        help="Any collection that training/train_autoencoder.py takes, with a split `validation`.",
    )
    add("--output_dir", default="runs/losses", help="Folder for the runs and the report.")
    add(
        "--variants",
        nargs="+",
        choices=list(VARIANTS),
        default=DEFAULT_VARIANTS,
        metavar="VARIANT",
        help=f"Of {'; '.join(VARIANTS)}. Default: the first {len(DEFAULT_VARIANTS)}; the first is compared with.",
    )
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Seeds of weights, data order and noise.")
    add("--max_train_steps", type=positive, help="Steps of each run; default: the config's.")
    add("--validations", type=positive, default=8, help="Validations of a run, points of the curves.")
    add("--num_reference_images", type=positive, default=3000, help="Training images for rFID and KID, at most.")
    add("--feature_extractor", default="efficientnet-lite2", help="Features that judge.")
    add("--report", action=argparse.BooleanOptionalAction, default=True, help="Write the report at the end.")
    add("--show_images", action=argparse.BooleanOptionalAction, default=True, help="Held-out images in the picture.")
    add("--set", nargs="+", default=[], metavar="SECTION.NAME=VALUE", help="Changes of the config's models.")
    add("--training_flags", nargs=argparse.REMAINDER, default=[], help="Last: flags of the training script, for all.")
    args = parser.parse_args(argv)
    args.path = ROOT / f"training/configs/{args.config}.yaml"
    args.path = args.path if args.path.is_file() else Path(args.config)
    if args.max_train_steps is None:
        args.max_train_steps = yaml.safe_load(args.path.read_text())["train_autoencoder"]["max_train_steps"]
    return args


def run_folder(args, variant: str, seed: int) -> Path:
    name = variant.replace(" + ", "-").replace(", ", "-").replace(" ", "-")
    return Path(args.output_dir) / "runs" / f"{name}-{seed}"


def training_flags(args, variant: str, seed: int) -> list[str]:
    """Command line of the training script."""
    steps, chosen = args.max_train_steps, {"adversarial_weight": 0} | VARIANTS[variant]
    head_start = chosen.pop("head_start", HEAD_START)
    if chosen["adversarial_weight"] > 0:
        start = round(GAN_START * steps)
        chosen |= {"gan_start_step": start, "gan_warmup_steps": round(GAN_WARMUP * steps)}
        chosen["discriminator_start_step"] = start - round(head_start * steps)
    chosen |= {"max_train_steps": steps, "lr_warmup_steps": steps // 50, "seed": seed}
    interval = -(-steps // args.validations)
    chosen |= {"validation_steps": interval, "checkpointing_steps": interval, "checkpoints_total_limit": 1}
    words = ["--config", args.path, "--dataset_name", args.dataset_name, "--save_validation_weights"]
    words += ["--output_dir", run_folder(args, variant, seed), "--resume_from_checkpoint", "latest"]
    for name, value in chosen.items():
        words += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", value]
    sets = [f"discriminator.{name}={value}" for name, value in DISCRIMINATOR.items()] + args.set
    return [str(word) for word in [*words, *args.training_flags, "--set", *sets]]


def train(args, variant: str, seed: int) -> None:
    """Trains one run, or what is left of it."""
    if (run_folder(args, variant, seed) / "training_summary.json").is_file():
        return
    command = [sys.executable, str(ROOT / "training/train_autoencoder.py"), *training_flags(args, variant, seed)]
    subprocess.run(command, check=True)
    print(f"{run_folder(args, variant, seed).name} is trained", flush=True)


class Judge:
    """Measures reconstructions of held-out and of training images."""

    def __init__(self, args):
        self.args, self.device = args, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.extractor = load_feature_extractor(args.feature_extractor, self.device)
        self.perceptual = load_perceptual_network(PERCEPTUAL["perceptual_network"]).to(self.device)
        self.held_out = load_collection(args.dataset_name, "validation")
        train_set = load_collection(args.dataset_name, "train")
        count = min(args.num_reference_images, len(train_set))
        self.references = train_set.select(range(0, count * (len(train_set) // count), len(train_set) // count))
        self.features = {}

    def loader(self, dataset, size: int):
        return evaluation_loader(dataset, size, 16)

    def reference_features(self, size: int) -> torch.Tensor:
        """Of real training images at a size, which KID compares with."""
        if size not in self.features:
            loader = self.loader(self.references, size)
            self.features[size] = collection_features(loader, self.extractor, self.device)
        return self.features[size]

    @torch.no_grad()
    def measure(self, folder: Path, whole: bool) -> dict:
        """Metrics of saved weights; `whole` with rFID of all references and KID, else with that of the first ones."""
        model = BricsAutoencoder.from_pretrained(folder).eval().to(self.device)
        size = model.config.sample_size
        metrics = reconstruction_metrics(model, self.loader(self.held_out, size), self.perceptual, progress=False)
        result = {name: values.mean().item() for name, values in metrics.items() if name != "index"}
        some = self.references if whole else self.references.select(range(min(CURVE_IMAGES, len(self.references))))
        pair = reconstruction_features(model, self.loader(some, size), self.extractor, progress=False)
        result["rfid"] = frechet_distance(pair[1], pair[0])
        if whole:
            pair = reconstruction_features(model, self.loader(self.held_out, size), self.extractor, progress=False)
            reference = self.reference_features(size)
            kid = {"kid": pair[1], "kid_real": pair[0]}
            result |= {name: KID_SCALE * kernel_distance(some, reference) for name, some in kid.items()}
        return result


def judged(args, judge: Judge, variant: str, seed: int) -> dict:
    """Results of a run, measured once: the last weights, and a curve over the validations."""
    folder = run_folder(args, variant, seed)
    path = folder / "judged" / "results.json"
    if not path.is_file():
        steps = sorted(int(found.name.split("-")[-1]) for found in folder.glob("autoencoder-[0-9]*"))
        curve = [{"step": step} | judge.measure(folder / f"autoencoder-{step}", whole=False) for step in steps]
        summary = json.loads((folder / "training_summary.json").read_text())
        result = {"last": judge.measure(folder / "autoencoder", whole=True), "curve": curve}
        with appearing_folder(path.parent) as appearing:
            (appearing / path.name).write_text(json.dumps(result | {"hours": summary["hours"]}, indent=2))
    return json.loads(path.read_text())


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation over seeds, as text."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def table_row(variant: str, results: list[dict], first: list[dict]) -> dict:
    """A variant's line in the report."""
    last = [result["last"] for result in results]
    above = [found["kid"] - found["kid_real"] for found in last]
    first_above = statistics.mean(result["last"]["kid"] - result["last"]["kid_real"] for result in first)
    rfid, first_rfid = [found["rfid"] for found in last], statistics.mean(found["last"]["rfid"] for found in first)
    return {
        "loss": variant,
        "PSNR": spread([found["psnr"] for found in last], 2),
        "SSIM": spread([found["ssim"] for found in last], 3),
        "perceptual_efficientnet_lite0": spread([found["perceptual_efficientnet_lite0"] for found in last], 4),
        "rFID": spread(rfid, 2),
        "of the first's": f"{statistics.mean(rfid) / first_rfid:.2f}",
        "KID": spread([found["kid"] for found in last], 1),
        "above the images' own": spread(above, 1),
        "of the first's, too": f"{statistics.mean(above) / first_above:.2f}",
    }


def plot_curves(args, results: dict):
    """Held-out PSNR and perceptual distance, and rFID, over steps, a line a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    names = {"psnr": "held-out PSNR (dB)", "perceptual_efficientnet_lite0": "held-out perceptual distance"}
    names["rfid"] = f"rFID of {CURVE_IMAGES} training images"
    for axes, (key, label) in zip(figure.subplots(1, 3), names.items(), strict=True):
        for index, (variant, of_seeds) in enumerate(results.items()):
            for seed, result in enumerate(of_seeds):
                points = [(point["step"], point[key]) for point in result["curve"]]
                name = variant if key == "psnr" and seed == 0 else None
                axes.plot(*zip(*points, strict=True), color=f"C{index}", linewidth=1, marker=".", label=name)
        for share in (GAN_START - HEAD_START, GAN_START):
            axes.axvline(share * args.max_train_steps, color="grey", linestyle=":")
        axes.set(xlabel="step (dotted: the discriminator learns, counts)", ylabel=label)
        axes.grid(alpha=0.3)
        if key != "psnr":
            axes.set_yscale("log")
    figure.legend(loc="outside lower center", ncols=4)
    return figure


@torch.no_grad()
def picture(args, judge: Judge, columns: int = 8):
    """Held-out images, and below them the reconstructions of each variant's first seed; small ones enlarged."""
    rows = []
    for variant in args.variants:
        model = BricsAutoencoder.from_pretrained(run_folder(args, variant, args.seeds[0]) / "autoencoder").eval()
        places = range(0, len(judge.held_out), max(len(judge.held_out) // columns, 1))[:columns]
        loader = evaluation_loader(judge.held_out, model.config.sample_size, columns, rows=places)
        images = next(iter(loader))["pixel_values"]
        rows += ([images] if args.show_images and not rows else []) + [model(images).sample.clamp(-1, 1)]
    grid = torch.cat(rows)
    if grid.shape[-1] <= 64:
        grid = torch.nn.functional.interpolate(grid, scale_factor=2.0, mode="nearest")
    return image_grid(grid, columns=len(images))


def write_comparison(args, judge: Judge) -> None:
    """Writes JSON, Markdown and pictures of finished runs."""
    results = {variant: [judged(args, judge, variant, seed) for seed in args.seeds] for variant in args.variants}
    first = next(iter(results.values()))
    table = [table_row(variant, of_seeds, first) for variant, of_seeds in results.items()]
    on, flags = machine(judge.device), {name: training_flags(args, name, args.seeds[0]) for name in args.variants}
    settings = [{"loss": name, "flags": " ".join(map(str, VARIANTS[name].items()))} for name in args.variants]
    rows = ", ".join([*(["images"] if args.show_images else []), *args.variants])
    text = f"""# Losses of stage one: {args.config}

`{on["command"]}`

{on["device"]}; torch {on["torch"]}, diffusers {on["diffusers"]}.

{args.max_train_steps} steps, seeds {", ".join(map(str, args.seeds))}: mean ± standard deviation over the seeds.
{len(judge.held_out)} held-out images for PSNR, SSIM, the perceptual distance (which the second and third were trained
with) and KID; rFID, the Fréchet distance between images and their reconstructions, is of {len(judge.references)}
training images, and KID's references are these. rFID and KID (x 1,000) are by {args.feature_extractor}, which took no
part in training.

{markdown_table(table)}
{markdown_table(settings)}
The discriminator counts after {GAN_START:.0%} of the steps, with its full weight {GAN_WARMUP:.0%} later, and learns
from {HEAD_START:.0%} before. Rows of the picture, first seed: {rows}.
"""
    runs = {name: dict(zip(map(str, args.seeds), of_seeds, strict=True)) for name, of_seeds in results.items()}
    figures = {"curves": plot_curves(args, results), "reconstructions": picture(args, judge)}
    result = {"machine": on, "table": table, "training_flags": flags, "runs": runs}
    write_report(args.output_dir, "losses", result, text, figures)


def main(argv=None):
    args = parse_args(argv)
    for seed in args.seeds:
        for variant in args.variants:
            train(args, variant, seed)
    if args.report:
        write_comparison(args, Judge(args))


if __name__ == "__main__":
    main()

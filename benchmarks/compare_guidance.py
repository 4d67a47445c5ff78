"""What classes and guidance are worth: UNets with and without classes, unguided, autoguided, and guided by no class.

    python benchmarks/compare_guidance.py --autoencoders runs/comparison/models --config noto-emoji-64 \
        --dataset_name FOLDER --class_column COLUMN --output_dir DIR

--autoencoders is the folder `models` of a comparison by compare_autoencoders.py. On the key codes of BRICS of each
seed, training/train_key_codes.py trains a UNet without classes and one with, alike in all else but for the images of
classes that are too small, and keeps the averaged weights of --guide_step as a guide; `brics-diffusers
guidance-search` then tries each of --guidance_scales on the same noise: autoguidance for both, and for the one with
classes guidance by no class in place of the guide. Flags that this script does not know are passed on to the training.

After an interruption, run the same command again. Several processes may share the work, each with other --seeds and
with --no-report, before one command with all of them writes the report.
"""

import argparse
import json
from pathlib import Path

import torch
from autoencoder_models import folder_name
from comparison import (
    TRAINING,
    add_report_arguments,
    check_settings,
    config_path,
    origin,
    run_script,
    spread,
    stopping_on_sigterm,
)

from brics_diffusers import BricsKeyCodePipeline
from brics_diffusers.data import evaluation_loader
from brics_diffusers.metrics.generation import KID_FEATURES
from brics_diffusers.pipelines.sampling import load_samples
from brics_diffusers.training_utils.arguments import flag_words, positive
from brics_diffusers.training_utils.checkpoints import appearing_folder
from brics_diffusers.utils.files import atomic_write
from brics_diffusers.utils.image_grids import image_grid
from brics_diffusers.utils.reports import machine, markdown_table, write_report


# What is tried, by the name of its folders: the name of the UNet's, and how the table calls it.
VARIANTS = {
    "none": ("none", "without classes, autoguidance"),
    "classes": ("classes", "with classes, autoguidance"),
    "classes-unguided": ("classes", "with classes, guidance by no class"),
}
COLUMNS = 12  # samples of a variant in the picture


def parse_args(argv=None) -> argparse.Namespace:
    """Flags of this script, those for training in `extra`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--autoencoders", required=True, type=Path, help="Folder `models` that compare_autoencoders.py has written.")
    add("--config", type=config_path, default="noto-emoji-64", help="A YAML file, or the name of training/configs'.")
    add("--dataset_name", required=True, help="The collection that the autoencoders were trained on.")
    add("--class_column", help="Its column with classes, as of train_key_codes.py.")
    add("--min_class_images", type=positive, default=10, help="Smaller classes are left out by the one with classes.")
    add_report_arguments(parser, "runs/guidance")
    add("--max_train_steps", type=positive, default=1500, help="Steps of each UNet.")
    add("--guide_step", type=positive, default=300, help="The step whose averaged weights are the guide.")
    add("--guidance_scales", type=float, nargs="+", default=[1.5, 2, 3], help="Scales to try beside 1, which is none.")
    add("--num_samples", type=positive, default=500, help="Images of each scale.")
    add("--num_inference_steps", type=positive, default=25, help="DPM-Solver++ steps of these.")
    add("--extractor", default=KID_FEATURES, help="Network whose features judge.")
    args, args.extra = parser.parse_known_args(argv)
    args.guidance_scales = [1, *(scale for scale in args.guidance_scales if scale != 1)]
    return args


def train(args: argparse.Namespace, name: str, seed: int) -> Path:
    """The folder of a UNet's pipeline with its guide, trained if it is not yet."""
    folder = Path(args.output_dir) / f"{name}-{seed}"
    if not (folder / "model_index.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        words = [f"--config={args.config}", f"--dataset_name={args.dataset_name}", f"--output_dir={folder}"]
        words += [f"--autoencoder_name_or_path={args.autoencoders / folder_name('BRICS', seed)}", f"--seed={seed}"]
        words += [f"--max_train_steps={args.max_train_steps}", f"--guide_step={args.guide_step}"]
        words += ["--num_validation_images=0", "--num_held_out_images=0", "--checkpoints_total_limit=1"]
        if name == "classes":
            words += ["--class_conditional", f"--min_class_images={args.min_class_images}"]
            words += flag_words("class_column", args.class_column)
        words += [*args.extra, "--resume_from_checkpoint=latest"]
        run_script(TRAINING / "train_key_codes.py", words, folder / "train.log")
    return folder


def check(args: argparse.Namespace) -> None:
    """Notes what all results depend on in --output_dir; a `ValueError` if those there are of other settings."""
    path = Path(args.output_dir) / "settings.json"
    names = ("config", "dataset_name", "class_column", "min_class_images", "max_train_steps", "guide_step")
    names += ("num_samples", "num_inference_steps", "extractor", "extra")
    settings = {name: getattr(args, name) for name in names} | {"autoencoders": str(args.autoencoders)}
    if path.is_file():
        check_settings(path.parent, json.loads(path.read_text()), settings)
    with atomic_write(path) as file:
        file.write((json.dumps(settings, indent=2) + "\n").encode())


def search(args: argparse.Namespace, pipeline: Path, name: str, seed: int) -> dict[float, float]:
    """KID of a pipeline's samples by scale of guidance."""
    folder = reports_folder(args, name, seed)
    path, scales = folder / "guidance-search.json", args.guidance_scales
    if name == "classes-unguided":
        scales = [scale for scale in scales if scale != 1]  # 1 is that of `classes`
    found = json.loads(path.read_text()) if path.is_file() else {"metric": None, "values": []}
    if not set(scales) <= {row["guidance_scale"] for row in found["values"]}:
        folder.mkdir(parents=True, exist_ok=True)
        words = ["guidance-search", str(pipeline), f"--dataset_name={args.dataset_name}", f"--output_dir={folder}"]
        words += ["--guidance_scales", *(f"{scale:g}" for scale in scales), "--guidance_intervals", "0:1"]
        words += [f"--num_samples={args.num_samples}", f"--num_inference_steps={args.num_inference_steps}"]
        words += ["--scheduler=DPMSolverMultistepScheduler", '--scheduler_options={"use_karras_sigmas": true}']
        words += [f"--feature_extractor={args.extractor}", f"--seed={seed}", "--batch_size=32"]
        run_script("brics_diffusers.commands", words, folder / "search.log")
        found = json.loads(path.read_text())
    return {row["guidance_scale"]: row[found["metric"]] for row in found["values"]}


def reports_folder(args: argparse.Namespace, name: str, seed: int) -> Path:
    """Where the search of a variant has its report, and its samples in folders beside it."""
    return Path(args.output_dir) / "reports" / f"{name}-{seed}"


def write_guidance_report(args: argparse.Namespace, found: dict[tuple[str, int], dict[float, float]]) -> None:
    """A table of all scales, and the first samples of the first seed, the same noise in each row."""
    rows, pictures, columns = [], [], min(COLUMNS, args.num_samples)
    config = json.loads((args.autoencoders / folder_name("BRICS", args.seeds[0]) / "config.json").read_text())
    size = config["sample_size"]
    for name, (_, label) in VARIANTS.items():
        for scale in args.guidance_scales:
            if scale not in found[name, args.seeds[0]]:
                continue
            values = [found[name, seed][scale] for seed in args.seeds]
            unguided = [found["none", seed][1] for seed in args.seeds]
            row = {"UNet": label if scale != 1 else label.partition(",")[0], "guidance scale": scale}
            row |= {f"KID ({args.extractor})": spread(values, 0), "by seed": ", ".join(f"{v:.0f}" for v in values)}
            shares = [value / base for value, base in zip(values, unguided, strict=True)]
            rows.append(row | {"of that without classes and guidance": spread(shares, 2)})
            folder = reports_folder(args, name, args.seeds[0]) / f"samples-{scale:g}-0-1"
            loader = evaluation_loader(load_samples(folder, columns), size, columns)
            pictures.append(next(iter(loader))["pixel_values"])
    on = machine("cuda" if torch.cuda.is_available() else "cpu")
    text = f"# Classes and guidance\n\n{origin(on)}\n\n{args.max_train_steps} steps; the guide is the average of step "
    text += (
        f"{args.guide_step}; {args.num_samples} samples of {args.num_inference_steps} steps, the same noise for all; "
    )
    text += f"mean ± standard deviation over seeds {', '.join(map(str, args.seeds))}.\n\n{markdown_table(rows)}"
    if args.show_images:
        text += f"\nThe first {columns} samples of seed {args.seeds[0]}, a row for each line of the table.\n"
    values = [{"variant": name, "seed": seed, "kid": kid} for (name, seed), kid in found.items()]
    figures = {"samples": image_grid(torch.cat(pictures), columns)} if args.show_images else {}
    write_report(args.output_dir, "guidance", {"machine": on, "rows": rows, "values": values}, text, figures)


def main(argv=None):
    """Trains, samples, reports."""
    args = parse_args(argv)
    check(args)
    found = {}
    with stopping_on_sigterm():
        for seed in args.seeds:
            for name, (trained, _) in VARIANTS.items():
                pipeline = train(args, trained, seed)
                if name != trained and not (unguided := pipeline.with_name(f"{name}-{seed}")).exists():
                    with appearing_folder(unguided) as partial:
                        BricsKeyCodePipeline.from_pretrained(pipeline, guide=None).save_pretrained(partial)
                found[name, seed] = search(args, pipeline.with_name(f"{name}-{seed}"), name, seed)
                print(f"{name}-{seed}: {found[name, seed]}", flush=True)
    if args.report:
        write_guidance_report(args, found)


if __name__ == "__main__":
    main()

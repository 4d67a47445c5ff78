"""Shows what the trained model of this repository makes, then trains both stages small on crops of photographs that
ship with scikit-image, and shows what comes out of that: held-out crops and the photographs, reconstructed. In the end
samples of the trained model turn into one another.

Run by `make demo`. Everything is written to one folder, which is named at the end.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor

from brics_diffusers import BricsKeyCodePipeline
from brics_diffusers.data import evaluation_loader, load_collection
from brics_diffusers.metrics.reconstruction import reconstruction_metrics
from brics_diffusers.utils.image_grids import image_grid, side_by_side


ROOT = Path(__file__).parent
TRAINED = ROOT / "model_cards/brics-fluent-emoji-128"
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "motorcycle")
CROPS = {"train": 160, "validation": 12}  # of each photograph
SIZE = 64
PHOTOGRAPH_SIZE = 256  # of those that the model of 64 x 64 crops reconstructs in the end
MARKER = ".brics-demo"  # in a folder that a demo has made
PARTS = ("photos", "stage-one", "pipeline")


def claim_folder(folder: Path) -> None:
    """Makes the folder, or takes out what an earlier demo left; a `ValueError` if it holds anything else."""
    if folder.exists() and not (folder / MARKER).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{folder} has no {MARKER}, the mark of a folder that a demo may clear; name another folder, or delete "
            "this one if an older demo made it."
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    for name in PARTS:
        shutil.rmtree(folder / name, ignore_errors=True)


def load_photograph(name: str) -> Image.Image:
    """One of the colour photographs in scikit-image's wheel (none is downloaded)."""
    pixels = skimage.data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(skimage.data, name)()
    return Image.fromarray(np.asarray(pixels)[..., :3])


def write_crops(folder: Path, seed: int = 0) -> None:
    """Random square crops at several scales; validation crops come from the right quarter, training ones do not."""
    random = np.random.default_rng(seed)
    for name in PHOTOGRAPHS:
        photograph = load_photograph(name)
        border = photograph.width * 3 // 4
        areas = {"train": (0, border), "validation": (border, photograph.width)}
        for split, (left, right) in areas.items():
            (folder / split).mkdir(parents=True, exist_ok=True)
            largest = min(right - left, photograph.height)
            for index in range(CROPS[split]):
                side = int(random.integers(min(SIZE, largest), largest + 1))
                x = int(random.integers(left, right - side + 1))
                y = int(random.integers(0, photograph.height - side + 1))
                crop = photograph.crop((x, y, x + side, y + side)).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
                crop.save(folder / split / f"{name}-{index:03d}.png")


def show_trained_model(pipe: BricsKeyCodePipeline, output_dir: Path, seed: int) -> torch.Tensor:
    """Samples of the model that ships with this repository, (16, 3, H, W) in [0, 1]; photographs above its
    reconstructions of them."""
    samples = pipe(batch_size=16, generator=torch.Generator().manual_seed(seed), output_type="pt").images
    image_grid(2 * samples - 1).save(output_dir / "emoji-samples.png")
    size = (pipe.autoencoder.config.sample_size,) * 2
    photographs = [ImageOps.fit(load_photograph(name), size, Image.Resampling.LANCZOS) for name in PHOTOGRAPHS]
    reconstructions = pipe.reconstruct(photographs, output_type="pt").images
    targets = pipe.image_processor.preprocess(photographs)
    side_by_side(targets, 2 * reconstructions - 1).save(output_dir / "emoji-reconstructions.png")
    return samples


def show_interpolations(
    pipe: BricsKeyCodePipeline, samples: torch.Tensor, path: Path, seed: int, count: int = 4
) -> None:
    """An animation from the first of some images to the next, and back to the first."""
    ring = [*samples[:4], samples[0]]
    generator, frames = torch.Generator().manual_seed(seed), []
    for pair in zip(ring, ring[1:], strict=False):
        frames += pipe.interpolate(*pair, num_images=9, strength=0.1, generator=generator).images[:-1]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=150, loop=0)


@torch.no_grad()
def show_photographs(autoencoder, path: Path) -> None:
    """The photographs' central squares above reconstructions; the autoencoder has seen crops a quarter as wide."""
    photographs = [
        ImageOps.fit(load_photograph(name), (PHOTOGRAPH_SIZE,) * 2, Image.Resampling.LANCZOS) for name in PHOTOGRAPHS
    ]
    images = torch.stack([pil_to_tensor(photograph) for photograph in photographs]) / 127.5 - 1
    side_by_side(images, autoencoder(images).sample).save(path)


def launch(script: str, *arguments: str) -> None:
    """Runs a training script as a user would."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--mixed_precision", "no"]
    command += ["--num_cpu_threads_per_process", str(os.cpu_count())]  # accelerate's default is one
    command += ["--num_machines", "1", "--dynamo_backend", "no", str(ROOT / "training" / script), *arguments]
    subprocess.run(command, check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", default="demo-output", help="Folder for everything: a new one, or an earlier demo's."
    )
    parser.add_argument("--seed", type=int, default=0, help="Of training and samples; the crops are always the same.")
    args = parser.parse_args()
    started = time.monotonic()
    output_dir = Path(args.output_dir)
    photos, stage_one, pipeline = (output_dir / name for name in PARTS)
    try:
        claim_folder(output_dir)
    except ValueError as error:
        parser.error(str(error))
    trained = BricsKeyCodePipeline.from_pretrained(TRAINED)
    samples_of_trained = show_trained_model(trained, output_dir, args.seed)
    print(f"Samples and reconstructions of the trained model after {time.monotonic() - started:.0f} s: {output_dir}")
    write_crops(photos)

    common = ["--config", str(ROOT / "training/configs/photos-demo.yaml"), "--dataset_name", str(photos)]
    common += ["--seed", str(args.seed)]
    launch("train_autoencoder.py", *common, "--output_dir", str(stage_one))
    stages = ["--autoencoder_name_or_path", str(stage_one), "--output_dir", str(pipeline)]
    launch("train_key_codes.py", *common, *stages)

    pipe = BricsKeyCodePipeline.from_pretrained(pipeline)
    generator = torch.Generator().manual_seed(args.seed)
    samples = pipe(batch_size=16, num_inference_steps=50, generator=generator, output_type="pt").images
    image_grid(samples * 2 - 1).save(output_dir / "samples.png")

    loader = evaluation_loader(load_collection(photos, "validation"), SIZE, batch_size=16)
    metrics = reconstruction_metrics(pipe.autoencoder.eval(), loader)
    summary = {name: round(metrics[name].mean().item(), 4) for name in ("psnr", "ssim")}
    summary |= {"images": len(metrics["index"]), "seconds": round(time.monotonic() - started)}
    (output_dir / "metrics.json").write_text(json.dumps(summary, indent=2) + "\n")
    images = torch.cat([batch["pixel_values"] for batch in loader])[:: max(len(metrics["index"]) // 16, 1)][:16]
    with torch.no_grad():
        side_by_side(images, pipe.autoencoder(images).sample).save(output_dir / "reconstructions.png")
    show_photographs(pipe.autoencoder, output_dir / "photographs.png")
    show_interpolations(trained, samples_of_trained, output_dir / "emoji-interpolations.webp", args.seed)
    print(f"\nHeld-out crops: PSNR {summary['psnr']:.2f} dB, SSIM {summary['ssim']:.3f} ({summary['images']} images)")
    print(
        f"After {summary['seconds']} s, {output_dir.resolve()} holds reconstructions of held-out crops and of the "
        "photographs (photographs.png), samples and metrics; of the trained model samples, and how they turn into one "
        "another (emoji-interpolations.webp)"
    )


if __name__ == "__main__":
    main()

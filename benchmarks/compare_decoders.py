"""What finetuning an autoencoder's decoder on noisier key codes brings to generated images: encoder, diffusion model
and generated key codes stay as they are, so that nothing else differs.

    python benchmarks/compare_decoders.py --autoencoders runs/comparison/models --generation runs/generation \
        --dataset_name FOLDER --output_dir DIR

--autoencoders is the folder `models` of a comparison by compare_autoencoders.py, and --generation that of
compare_generation.py over the same collection, whose last samples' key codes are decoded once more. Flags that this
script does not know are passed on to training/train_autoencoder.py, and beat those in DEFAULTS. After an interruption,
run the same command again: finished runs are not trained again.
"""

import argparse
import json
from pathlib import Path

import safetensors.torch
import torch
from autoencoder_models import folder_name
from comparison import (
    BATCH_SIZE,
    TRAINING,
    add_report_arguments,
    check_settings,
    origin,
    reconstructions,
    run_script,
    spread,
    stopping_on_sigterm,
    training_rows,
)
from generation_models import LatentSpace, load_saved_autoencoder

from brics_diffusers.data import evaluation_loader
from brics_diffusers.metrics.feature_distances import (
    KID_SCALE,
    collection_features,
    kernel_distance,
    name_with_features,
)
from brics_diffusers.metrics.feature_extractors import load_feature_extractor
from brics_diffusers.metrics.generation import KID_FEATURES
from brics_diffusers.metrics.image_features import cached_features, to_uint8
from brics_diffusers.metrics.nearest_neighbours import FeatureEmbedding, embed_images
from brics_diffusers.metrics.reconstruction import reconstruction_metrics
from brics_diffusers.training_utils.arguments import flag_words, positive
from brics_diffusers.training_utils.run import load_splits
from brics_diffusers.utils.reports import machine, markdown_table, write_report


import train_autoencoder  # isort: skip  (comparison.py says where it is)


# Flags of training.
DEFAULTS = {
    **{"train_batch_size": 8, "learning_rate": 3e-3, "random_flip": True, "ema_half_life_images": 1000.0},
    **{"perceptual_weight": 0.0, "adversarial_weight": 0.0},
}
WARMUP = 0.1  # of the steps


def parse_args(argv=None) -> argparse.Namespace:
    """Flags of this script, and in `words` those of training."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--autoencoders", required=True, type=Path, help="Folder `models` that compare_autoencoders.py has written.")
    add("--generation", required=True, type=Path, help="Folder that compare_generation.py has written.")
    add("--dataset_name", required=True, help="The collection of both.")
    add_report_arguments(parser, "runs/decoders")
    add("--model", default="BRICS", help="Its name in compare_autoencoders.py.")
    add("--schedule", default="b", help="The schedule in compare_generation.py.")
    add("--noise", type=float, nargs="+", default=[0.015625, 0.0625, 0.125], help="Scales to finetune on, each alone.")
    add("--max_train_steps", type=positive, default=500, help="Steps of finetuning.")
    add("--extractor", default=KID_FEATURES, help="Network whose features judge.")
    add("--num_reference_images", type=positive, default=3000, help="Training images to compare with, at most.")
    args, extra = parser.parse_known_args(argv)
    args.words = [f"--dataset_name={args.dataset_name}", "--train_decoder_only"]
    steps = {"max_train_steps": args.max_train_steps, "lr_warmup_steps": max(round(WARMUP * args.max_train_steps), 1)}
    args.words += [word for name, value in (DEFAULTS | steps).items() for word in flag_words(name, value)] + extra
    args.flags = train_autoencoder.parse_args([*args.words, "--pretrained_autoencoder_name_or_path=each"])
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return args


def finetuned(args: argparse.Namespace, noise: float, seed: int) -> Path:
    """Folder of an autoencoder whose decoder was finetuned on so much noise, which is done now if it is not yet."""
    name = folder_name(args.model, seed)
    folder = Path(args.output_dir) / "runs" / f"{name}-{noise:g}"
    words = [*args.words, f"--pretrained_autoencoder_name_or_path={args.autoencoders / name}", f"--seed={seed}"]
    words += [f"--key_noise_scale={noise}"]
    path, settings = folder / "settings.json", {"words": words}
    if path.exists():
        check_settings(folder, json.loads(path.read_text()), settings)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2) + "\n")
    if not (folder / "training_summary.json").is_file():
        words += [f"--output_dir={folder}", "--resume_from_checkpoint=latest"]
        run_script(TRAINING / "train_autoencoder.py", words, folder / "train.log")
    return folder / "autoencoder"


@torch.no_grad()
def measure(args: argparse.Namespace, folder: Path, seed: int, train_set, validation_set, extractor) -> dict:
    """PSNR of held-out images, KID of their reconstructions and of samples that an autoencoder of `folder` decodes."""
    model = load_saved_autoencoder(folder).to(args.device)
    size = model.config.sample_size
    rows, cache = training_rows(len(train_set))[: args.num_reference_images], Path(args.output_dir) / "features"
    of_training = train_set.select(rows)
    references = cached_features(of_training, size, extractor, cache, device=args.device, progress=False)[0].features
    loader = evaluation_loader(validation_set, size, BATCH_SIZE)
    found = {"psnr": reconstruction_metrics(model, loader, progress=False)["psnr"].mean().item()}
    features = collection_features(reconstructions(model, loader), extractor, args.device, progress=False)
    kid = name_with_features("kid", extractor)
    found[f"{kid}_reconstructions"] = KID_SCALE * kernel_distance(features, references)
    run = args.generation / "runs" / folder_name(f"{args.model}-{args.schedule}", seed)
    latents = safetensors.torch.load_file(run / "samples.safetensors")["latents"]
    deviation = json.loads((run / "state/progress.json").read_text())["settings"]["deviation"]
    space = LatentSpace(model, deviation, None, None, None, None, run.name)
    images = torch.cat([to_uint8(space.decode(part.to(args.device))) for part in latents.split(BATCH_SIZE)])
    features = embed_images(images, FeatureEmbedding(extractor), BATCH_SIZE).cpu()
    found[f"{kid}_samples"] = KID_SCALE * kernel_distance(features, references)
    return found


def main(argv=None):
    """Finetunes, measures, reports."""
    args = parse_args(argv)
    train_set, validation_set = load_splits(args.flags)
    if validation_set is None or len(validation_set) < 2:
        raise ValueError(f"{args.dataset_name} has fewer than 2 images to hold out; give a larger collection.")
    extractor = load_feature_extractor(args.extractor, args.device)
    found = {}
    with stopping_on_sigterm():
        for seed in args.seeds:
            folders = {"as trained": args.autoencoders / folder_name(args.model, seed)}
            folders |= {f"{noise:g}": finetuned(args, noise, seed) for noise in args.noise}
            for name, folder in folders.items():
                measured = measure(args, folder, seed, train_set, validation_set, extractor)
                found.setdefault(name, {})[str(seed)] = measured
                print(f"seed {seed}, {name}: {measured}", flush=True)
    if args.report:
        write_decoder_report(args, found)


def write_decoder_report(args: argparse.Namespace, found: dict) -> None:
    """Writes JSON and Markdown into `args.output_dir`."""
    table = []
    for name, by_seed in found.items():
        values = {key: [of_seed[key] for of_seed in by_seed.values()] for key in next(iter(by_seed.values()))}
        cells = {key: spread(of_key, 2 if key == "psnr" else 0) for key, of_key in values.items()}
        table.append({"noise of finetuning": name} | cells)
    result = {"machine": machine(args.device), "table": table, "runs": found}
    text = f"""# What a decoder finetuned on noisier key codes makes of samples

{origin(result["machine"])}

`{args.model}`, {args.max_train_steps} steps of the decoder alone on key codes with noise of a standard deviation;
seeds {", ".join(map(str, args.seeds))}, mean ± standard deviation. Samples are decoded from the same key codes in all
lines. KID times 1,000; held-out images' reconstructions, and samples, from training images.

{markdown_table(table)}"""
    write_report(args.output_dir, "decoders", result, text)


if __name__ == "__main__":
    main()

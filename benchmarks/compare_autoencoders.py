"""BricsAutoencoder beside diffusers' AutoencoderKL and VQModel: the paper's main claim at a scale anyone can rerun.

    python benchmarks/compare_autoencoders.py --config noto-emoji-64 --dataset_name FOLDER --output_dir DIR

All models see the same images in the same order, with the same loss, batch, number of steps, shape of the
learning-rate schedule (warm-up, then cosine to 0) and averaging of the weights; each has its own regularizer and
learning rate (`--sweep` trains the peers with several). Validation is protocol `standard`: outputs of the averaged
weights clipped, codes exact. The models take turns, `--validation_steps` at a time, and after each turn its state is
saved: after an interruption, run the same command again.
"""

import argparse
import time
from pathlib import Path

import torch
from comparison_report import write_comparison
from diffusers import AutoencoderKL, VQModel
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from brics_diffusers import BricsAutoencoder
from brics_diffusers.checkpoints import appearing_folder, clean_up
from brics_diffusers.data import (
    ImageCollection,
    UnreadableLog,
    collate_images,
    collection_fingerprint,
    evaluation_loader,
    training_loader,
)
from brics_diffusers.evaluation import reconstruction_metrics
from brics_diffusers.losses import reconstruction_loss
from brics_diffusers.optimization import build_lr_scheduler, build_optimizer
from brics_diffusers.perceptual import load_lpips, lpips_is_cached
from brics_diffusers.training_utils import averaged_weights, ema_half_life_decay, load_splits, positive


# LDM's weight of the KL divergence; a few percent of the loss here.
KL_WEIGHT = 1e-6

SMALL_BRICS = {
    "encoder_block_out_channels": (16, 32, 64),
    "encoder_layers_per_block": 1,
    "norm_num_groups": 16,
    "key_channels": 4,
    "feature_channels": 64,
    "num_levels": 8,
    "min_resolution": 4,
    "style_dim": 64,
    "decoder_block_out_channels": (64, 32),
}
# The same encoder but for attention, which BRICS has once more; a decoder that costs half as much again as BRICS'.
SMALL_PEER = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (16, 32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
}
CODEBOOK = {"num_vq_embeddings": 1024, "vq_embed_dim": 4}

# Photographs are shrunk to 128 x 128: at 256 x 256 two CPU cores would not get through some hundred steps.
PRESETS = {
    "noto-emoji-64": {
        "train_batch_size": 8,
        "BricsAutoencoder": SMALL_BRICS | {"sample_size": 64, "feature_size": 32, "max_resolution": 32},
        "AutoencoderKL": SMALL_PEER | {"sample_size": 64},
        "VQModel": SMALL_PEER | CODEBOOK | {"sample_size": 64},
    },
    "photos-256": {
        "train_batch_size": 4,
        "BricsAutoencoder": SMALL_BRICS | {"sample_size": 128, "feature_size": 64, "max_resolution": 64},
        "AutoencoderKL": SMALL_PEER | {"sample_size": 128},
        "VQModel": SMALL_PEER | CODEBOOK | {"sample_size": 128},
    },
}
CLASSES = {"BricsAutoencoder": BricsAutoencoder, "AutoencoderKL": AutoencoderKL, "VQModel": VQModel}
# BRICS': the paper's. The peers': of SWEEP, after 200 steps of 4 emoji (results/noto-emoji-64-sweep), the lower of two
# that are level.
LEARNING_RATES = {"BricsAutoencoder": 2e-3, "AutoencoderKL": 1e-3, "VQModel": 1e-3}
SWEEP = (2e-3, 1e-3, 5e-4, 2e-4)
# What BRICS' result may hang on, one change at a time: learning rate and arguments. Coarse grids have the noise of the
# fine ones of emoji. The peers' decoder begins at the resolution of the key code, as it does there.
ABLATIONS = {
    "BricsAutoencoder": (2e-3, {}),
    "learning rate 1e-3": (1e-3, {}),
    "decoder as costly as a peer": (2e-3, {"decoder_block_out_channels": (80, 40)}),
    "decoder of a peer": (
        2e-3,
        {"feature_size": 16, "decoder_type": "vqgan", "decoder_block_out_channels": (64, 32, 16)},
    ),
    "coarse grids": (2e-3, {"min_resolution": 1, "max_resolution": 8, "key_noise_scale": 1 / 128}),
    "codes without noise": (2e-3, {"key_noise_scale": 0.0}),
    "costly decoder, no noise": (2e-3, {"decoder_block_out_channels": (80, 40), "key_noise_scale": 0.0}),
}
# The paper's, and Adam's usual one.
ADAM_EPSILON = {"BricsAutoencoder": 1e-15, "AutoencoderKL": 1e-8, "VQModel": 1e-8}


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", choices=sorted(PRESETS), default="noto-emoji-64", help="Models and batch size.")
    add("--dataset_name", required=True, help="Any collection that training/train_autoencoder.py takes.")
    add("--image_column", help="Column that holds the images; found by itself if there is one.")
    add("--cache_dir", help="Folder in which `datasets` keeps prepared data.")
    add("--max_train_samples", type=positive, help="Use the first images only.")
    add("--num_validation_images", type=positive, default=256, help="Held-out images to use at most.")
    add("--output_dir", default="runs/comparison", help="Folder for the report, and for states to go on from.")
    instead = parser.add_mutually_exclusive_group().add_argument
    instead("--sweep", action="store_true", help=f"Train the peers alone, with learning rates {SWEEP}.")
    instead(
        "--ablate",
        nargs="*",
        choices=list(ABLATIONS),
        metavar="CHANGE",
        help=f"Train BRICS changed so, each alone, beside AutoencoderKL; of {{{', '.join(ABLATIONS)}}}, default all.",
    )
    add(
        "--show_images",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Held-out images above their reconstructions in the picture; not for those that must not be passed on.",
    )
    add("--peer_channels", type=positive, nargs="+", help="Widths of the peers' blocks, instead of the config's.")
    add("--max_train_steps", type=positive, default=3000, help="Steps of each model.")
    add("--validation_steps", type=positive, default=250, help="Steps from one validation to the next.")
    add("--train_batch_size", type=positive, help="Images in a step; default: the config's.")
    add("--lpips_weight", type=float, default=0.0, help="Weight of LPIPS (VGG), 5 in the paper, which needs weights.")
    add("--mse_weight", type=float, default=20.0, help="Weight of the mean squared error.")
    add("--seed", type=int, default=0, help="Seed of weights, data order and noise.")
    args = parser.parse_args(argv)
    args.preset = dict(PRESETS[args.config])
    batch_size = args.preset.pop("train_batch_size")
    args.train_batch_size = args.train_batch_size or batch_size
    if args.peer_channels is not None:
        for name in ("AutoencoderKL", "VQModel"):
            args.preset[name] = args.preset[name] | {"block_out_channels": tuple(args.peer_channels)}
    args.lr_scheduler, args.lr_warmup_steps = "cosine", args.max_train_steps // 50
    args.dataset_split, args.validation_split = "train", None
    return args


def planned_runs(args) -> dict[str, tuple[str, float, dict]]:
    """Class, learning rate and changed arguments of every run, by the run's name."""
    if args.sweep:
        return {f"{name} {rate:g}": (name, rate, {}) for name in ("AutoencoderKL", "VQModel") for rate in SWEEP}
    plain = {name: (name, rate, {}) for name, rate in LEARNING_RATES.items()}
    if args.ablate is not None:
        changed = {name: ("BricsAutoencoder", *ABLATIONS[name]) for name in args.ablate or ABLATIONS}
        return changed | {"AutoencoderKL": plain["AutoencoderKL"]}
    return plain


def reconstruct(model, images: torch.Tensor):
    """Reconstructions as in training, and the model's own regularizer, weighted."""
    if isinstance(model, AutoencoderKL):
        posterior = model.encode(images).latent_dist
        return model.decode(posterior.sample()).sample, KL_WEIGHT * posterior.kl().mean()
    output = model(images)
    # As diffusers weighs them by default: the encoder's loss, and a quarter of the codebook's. VQGAN's paper weighs
    # them the other way round. BRICS' regularizer is the noise on its codes.
    return output.sample, output.commit_loss if isinstance(model, VQModel) else 0.0


class Run:
    """One model in training, with a folder that it can go on from."""

    def __init__(self, args, class_name: str, learning_rate: float, changes: dict, folder: Path, collections: dict):
        self.args, self.folder = args, folder
        torch.manual_seed(args.seed)
        arguments = args.preset[class_name] | changes
        self.model = CLASSES[class_name](**arguments).to(args.device)
        self.optimizer = build_optimizer(self.model, learning_rate, 0.9, 0.99, ADAM_EPSILON[class_name])
        self.lr_scheduler = build_lr_scheduler(args, self.optimizer)
        # Half of the average is the last hundredth of the run.
        decay = ema_half_life_decay(1, args.max_train_steps / 100)
        self.ema = EMAModel(self.model.parameters(), decay=decay, foreach=True)
        self.stateful = {name: getattr(self, name) for name in ("model", "optimizer", "lr_scheduler", "ema")}
        names = ("max_train_steps", "validation_steps", "num_validation_images", "train_batch_size", "seed")
        names += ("mse_weight", "lpips_weight")
        self.settings = {name: getattr(args, name) for name in names} | collections
        self.settings |= {"model": repr(arguments), "learning_rate": learning_rate}
        self.seconds, self.curve = 0.0, []
        self.resume()

    @property
    def step(self) -> int:
        """Steps taken up to the last validation."""
        return self.curve[-1]["step"] if self.curve else 0

    def resume(self) -> None:
        """Goes on from the folder, if there is one."""
        if not self.folder.exists():
            return
        state = torch.load(self.folder / "state.pt", map_location=self.args.device, weights_only=True)
        for name, value in self.settings.items():
            if state["settings"].get(name) != value:
                raise ValueError(
                    f"{self.folder} was trained with {name} {state['settings'].get(name)}, not {value}; give the same "
                    "flags as before, or another --output_dir."
                )
        for name, part in self.stateful.items():
            part.load_state_dict(state[name])
        self.ema.to(self.args.device)
        self.seconds, self.curve = state["seconds"], state["curve"]
        self.args.unreadable.add(state["unreadable"])

    def save(self) -> None:
        """Writes everything, complete or not at all."""
        state = {name: part.state_dict() for name, part in self.stateful.items()}
        state |= {"settings": self.settings, "seconds": self.seconds, "curve": self.curve}
        state["unreadable"] = self.args.unreadable.names
        with appearing_folder(self.folder) as folder:
            torch.save(state, folder / "state.pt")

    def train(self, dataset, last_step: int, lpips_metric) -> None:
        """Takes the steps up to `last_step`."""
        args, size = self.args, self.model.config.sample_size
        images = ImageCollection(dataset, size, random_flip=True, replace_unreadable=True)
        loader = iter(training_loader(images, args.train_batch_size, args.seed, self.step, collate_fn=collate_images))
        torch.manual_seed(args.seed + 1 + self.step)  # noise is the same whether or not the run was interrupted
        self.model.train()
        # Other work on a CPU does not lengthen the time that a process has computed.
        clock = time.perf_counter if args.device.type == "cuda" else time.process_time
        for _ in tqdm(range(self.step, last_step), desc=self.folder.name, leave=False):
            batch = next(loader)
            args.unreadable.add(batch["unreadable"])
            batch = batch["pixel_values"].to(args.device)
            started = clock()
            sample, regularizer = reconstruct(self.model, batch)
            loss, _ = reconstruction_loss(sample, batch, args.mse_weight, args.lpips_weight, lpips_metric)
            (loss + regularizer).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.lr_scheduler.step()
            self.ema.step(self.model.parameters())
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            self.seconds += clock() - started

    def validate(self, dataset, step: int, lpips_metric) -> None:
        """Appends a point to the curve: means and two standard deviations over the images."""
        loader = evaluation_loader(dataset, self.model.config.sample_size, self.args.train_batch_size)
        with averaged_weights(self.model, self.ema) as model:
            metrics = reconstruction_metrics(model, loader, lpips_metric, self.args.unreadable, progress=False)
        point = {"step": step, "seconds": self.seconds, "images": len(metrics.pop("index"))}
        for name, values in metrics.items():
            point |= {name: values.mean().item(), f"{name}_2sd": 2 * values.std().item()}
        self.curve.append(point)


def main(argv=None):
    args = parse_args(argv)
    torch.set_flush_denormal(True)  # Adam's second moments become denormal numbers, on which CPUs are slow
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_set, validation_set = load_splits(args)
    if validation_set is None:
        raise ValueError(f"{args.dataset_name} has fewer than 10 images, none to hold out; give a larger collection.")
    if len(validation_set) < 2:
        raise ValueError("1 image is held out; at least 2 are needed for a standard deviation, so hold out more.")
    lpips_metric = load_lpips().to(args.device) if args.lpips_weight > 0 or lpips_is_cached() else None
    folder, args.unreadable = Path(args.output_dir) / "runs", UnreadableLog()
    sets = {"collection": train_set, "validation_collection": validation_set}
    collections = {name: collection_fingerprint(dataset) for name, dataset in sets.items()}
    clean_up(folder)
    runs = {
        name: Run(args, *run, folder / name.replace(" ", "-"), collections) for name, run in planned_runs(args).items()
    }
    turns = range(args.validation_steps, args.max_train_steps, args.validation_steps)
    for last_step in [*turns, args.max_train_steps]:
        for name, run in runs.items():
            if run.step < last_step:
                run.train(train_set, last_step, lpips_metric)
                run.validate(validation_set, last_step, lpips_metric)
                run.save()
                print(f"{name}: {run.curve[-1]['psnr']:.2f} dB after {last_step} steps", flush=True)
    write_comparison(args, runs, train_set, validation_set)


if __name__ == "__main__":
    main()

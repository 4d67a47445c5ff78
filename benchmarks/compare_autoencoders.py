"""BricsAutoencoder beside diffusers' AutoencoderKL and VQModel: the paper's main claim at a scale anyone can rerun.

    python benchmarks/compare_autoencoders.py --config noto-emoji-64 --dataset_name FOLDER --output_dir DIR

For each seed, all models see the same images in the same order, with the same loss, batch, number of steps (unless the
name says otherwise), shape of the learning-rate schedule (warm-up, then cosine to 0) and averaging of the weights;
each has its own regularizer, learning rate and warm-up (`--search` tries others, as many for each). Validation
is protocol `standard`: outputs of the averaged weights clipped, codes exact. The models take turns,
`--validation_steps` at a time, and after each turn its state is saved: after an interruption, run the same command
again. What is finished in --output_dir is not trained again, so several processes may share the work, each with
--no-report and other --models or --seeds, before one command with all of them writes the report. The averaged weights
are saved in `models`, by `save_pretrained`.
"""

import argparse
import logging
import time
from pathlib import Path

import torch
from autoencoder_models import DEFAULT_MODELS, PRESETS, VARIANTS, Variant, folder_name, reconstruct, search_variants
from autoencoder_report import write_comparison
from comparison import add_collection_arguments, add_report_arguments, check_settings
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from brics_diffusers.data import (
    ImageCollection,
    UnreadableLog,
    collate_images,
    collection_fingerprint,
    evaluation_loader,
    training_loader,
)
from brics_diffusers.metrics.perceptual import PERCEPTUAL_NETWORKS, load_perceptual_network, perceptual_is_cached
from brics_diffusers.metrics.reconstruction import reconstruction_metrics
from brics_diffusers.training_utils.arguments import not_negative, positive
from brics_diffusers.training_utils.checkpoints import RENAMED, appearing_folder, clean_up
from brics_diffusers.training_utils.ema import averaged_weights, ema_half_life_decay
from brics_diffusers.training_utils.losses import reconstruction_loss
from brics_diffusers.training_utils.optimization import build_lr_scheduler
from brics_diffusers.training_utils.run import load_splits


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", choices=sorted(PRESETS), default="noto-emoji-64", help="Models, batch size and steps.")
    add_collection_arguments(parser)
    add_report_arguments(parser, "runs/comparison")
    add(
        "--models",
        nargs="+",
        choices=list(VARIANTS),
        default=DEFAULT_MODELS,
        metavar="MODEL",
        help=f"What to train, the first is what the others are compared with; of {'; '.join(VARIANTS)}. Default: the "
        f"first {len(DEFAULT_MODELS)}.",
    )
    add("--search", action="store_true", help="Train each model with several learning rates, betas and warm-ups.")
    add("--max_train_steps", type=positive, help="Steps of each model; default: the config's.")
    add("--validation_steps", type=positive, default=250, help="Steps from one validation to the next.")
    add("--train_batch_size", type=positive, help="Images in a step; default: the config's.")
    add(
        "--perceptual_network",
        choices=PERCEPTUAL_NETWORKS,
        default="vgg",
        help="Perceptual distance, measured where its weights are, and in the loss by its weight. Default: LPIPS.",
    )
    add("--perceptual_weight", "--lpips_weight", type=float, default=0.0, help="Its weight; 5 in the paper.")
    add("--mse_weight", type=float, default=20.0, help="Weight of the mean squared error.")
    add("--dataloader_num_workers", type=not_negative, default=0, help="Processes that read images.")
    args = parser.parse_args(argv)
    args.preset = dict(PRESETS[args.config])
    for name in ("train_batch_size", "max_train_steps"):
        setattr(args, name, getattr(args, name) or args.preset[name])
    args.variants = search_variants(args.models) if args.search else {name: VARIANTS[name] for name in args.models}
    return args


class Run:
    """One model of one seed in training, with a folder that it can go on from."""

    def __init__(self, args, name: str, variant: Variant, seed: int, collections: dict):
        self.args, self.name, self.seed = args, name, seed
        self.folder = Path(args.output_dir) / "runs" / folder_name(name, seed)
        torch.manual_seed(seed)
        self.model = variant.build(args.preset).to(args.device)
        self.optimizer = variant.build_optimizer(self.model)
        self.last_step = round(args.max_train_steps * variant.steps)
        schedule = {"max_train_steps": self.last_step, "lr_warmup_steps": round(self.last_step * variant.warmup)}
        self.lr_scheduler = build_lr_scheduler(argparse.Namespace(lr_scheduler="cosine", **schedule), self.optimizer)
        # Half of the average is the last hundredth of the run.
        decay = ema_half_life_decay(1, self.last_step / 100)
        self.ema = EMAModel(self.model.parameters(), decay=decay, foreach=True)
        self.stateful = {name: getattr(self, name) for name in ("model", "optimizer", "lr_scheduler", "ema")}
        names = ("validation_steps", "num_validation_images", "train_batch_size", "mse_weight")
        names += ("perceptual_weight", "measured_network")
        self.settings = {name: getattr(args, name) for name in names} | collections
        self.settings |= {"max_train_steps": self.last_step, "seed": seed}
        self.settings |= {"model": repr(variant.arguments(args.preset)), "learning_rate": variant.learning_rate}
        self.settings |= {"part_learning_rates": variant.part_learning_rates, "adam_beta2": variant.adam_beta2}
        self.settings |= {"warmup": variant.warmup, "optimizer": variant.optimizer}
        self.seconds, self.curve = 0.0, []
        self.resume()

    @property
    def step(self) -> int:
        """Steps taken up to the last validation."""
        return self.curve[-1]["step"] if self.curve else 0

    @property
    def finished(self) -> bool:
        """Whether all steps were taken."""
        return self.step == self.last_step

    def resume(self) -> None:
        """Goes on from the folder, if there is one."""
        clean_up(self.folder)
        if not (self.folder / "state").exists():
            return
        state = torch.load(self.folder / "state/state.pt", map_location=self.args.device, weights_only=True)
        before = {RENAMED.get(name, name): value for name, value in state["settings"].items()}
        before.setdefault("optimizer", "Adam")
        before.setdefault("measured_network", "vgg" if "lpips" in state["curve"][-1] else None)  # older ones don't say
        check_settings(self.folder, before, self.settings)
        for name, part in self.stateful.items():
            part.load_state_dict(state[name])
        self.ema.to(self.args.device)
        self.seconds, self.curve = state["seconds"], state["curve"]
        self.args.unreadable.add(state["unreadable"])

    def save(self) -> None:
        """Writes everything, complete or not at all; the weights first, as a finished state is not trained again."""
        if self.finished:
            models = Path(self.args.output_dir) / "models"
            with averaged_weights(self.model, self.ema), appearing_folder(models / self.folder.name) as folder:
                self.model.save_pretrained(folder)
        state = {name: part.state_dict() for name, part in self.stateful.items()}
        state |= {"settings": self.settings, "seconds": self.seconds, "curve": self.curve}
        state["unreadable"] = self.args.unreadable.names
        with appearing_folder(self.folder / "state") as folder:
            torch.save(state, folder / "state.pt")

    def train(self, dataset, last_step: int, perceptual) -> None:
        """Takes the steps up to `last_step`."""
        args, size = self.args, self.model.config.sample_size
        images = ImageCollection(dataset, size, random_flip=True, replace_unreadable=True)
        reading = {"num_workers": args.dataloader_num_workers, "collate_fn": collate_images}
        loader = iter(training_loader(images, args.train_batch_size, self.seed, self.step, **reading))
        torch.manual_seed(self.seed + 1 + self.step)  # noise is the same whether or not the run was interrupted
        self.model.train()
        # Other work on a CPU does not lengthen the time that a process has computed.
        clock = time.perf_counter if args.device.type == "cuda" else time.process_time
        for _ in tqdm(range(self.step, last_step), desc=self.folder.name, leave=False, disable=None):
            batch = next(loader)
            args.unreadable.add(batch["unreadable"], batch["reasons"])
            batch = batch["pixel_values"].to(args.device)
            started = clock()
            sample, regularizer = reconstruct(self.model, batch)
            loss, _ = reconstruction_loss(sample, batch, args.mse_weight, args.perceptual_weight, perceptual)
            (loss + regularizer).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.lr_scheduler.step()
            self.ema.step(self.model.parameters())
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            self.seconds += clock() - started

    def validate(self, dataset, step: int, perceptual) -> None:
        """Appends a point to the curve: means over the images."""
        loader = evaluation_loader(dataset, self.model.config.sample_size, self.args.train_batch_size)
        with averaged_weights(self.model, self.ema) as model:
            metrics = reconstruction_metrics(model, loader, perceptual, self.args.unreadable, progress=False)
        point = {"step": step, "seconds": self.seconds, "images": len(metrics.pop("index"))}
        self.curve.append(point | {name: values.mean().item() for name, values in metrics.items()})


def main(argv=None):
    args = parse_args(argv)
    logging.getLogger("diffusers").setLevel(logging.ERROR)  # of configs of classes that extend others
    torch.set_flush_denormal(True)  # Adam's second moments become denormal numbers, on which CPUs are slow
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_set, validation_set = load_splits(args)
    if validation_set is None:
        raise ValueError(f"{args.dataset_name} has fewer than 10 images, none to hold out; give a larger collection.")
    if len(validation_set) < 2:
        raise ValueError("1 image is held out; at least 2 are needed for a deviation of the codes, so hold out more.")
    perceptual = None
    if args.perceptual_weight > 0 or perceptual_is_cached(args.perceptual_network):
        perceptual = load_perceptual_network(args.perceptual_network).to(args.device)
    args.measured_network = None if perceptual is None else args.perceptual_network
    args.unreadable = UnreadableLog()
    sets = {"collection": train_set, "validation_collection": validation_set}
    collections = {name: collection_fingerprint(dataset) for name, dataset in sets.items()}
    runs = {}
    for seed in args.seeds:
        of_seed = {name: Run(args, name, variant, seed, collections) for name, variant in args.variants.items()}
        runs[seed] = of_seed
        for turn in range(0, args.max_train_steps, args.validation_steps):
            for run in of_seed.values():
                last_step = min(turn + args.validation_steps, run.last_step)
                if run.step < last_step:
                    run.train(train_set, last_step, perceptual)
                    run.validate(validation_set, last_step, perceptual)
                    run.save()
                    print(f"{run.folder.name}: {run.curve[-1]['psnr']:.2f} dB after {last_step} steps", flush=True)
    if args.report:
        by_model = {name: [runs[seed][name] for seed in args.seeds] for name in args.variants}
        write_comparison(args, by_model, train_set, validation_set)


if __name__ == "__main__":
    main()

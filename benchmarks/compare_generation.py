"""What latents are worth to a diffusion model: BRICS' key codes beside the latents of other autoencoders.

    python benchmarks/compare_generation.py --autoencoders runs/comparison/models --config noto-emoji-64 \
        --dataset_name FOLDER --output_dir DIR

--autoencoders is the folder `models` of a comparison by compare_autoencoders.py, over the same collection. On the
latents of each of them, the same UNet is trained for the same number of steps with the same noise, timesteps and order
of images, once with each of --schedules. The images of one and the same starting noise are compared with the
training images, and with the autoencoder's own reconstructions of them, so that the two stages are told apart. What
the config's sections `unet`, `scheduler` and `train_key_codes` say counts, but for the noise schedule and min-SNR.

After an interruption, run the same command again: states are saved at each validation and every --checkpointing_steps.
What is finished in --output_dir is not trained again, so several processes may share the work, each with --no-report
and other --models, --schedules or --seeds, before one command with all of them writes the report.
"""

import argparse
import json
import logging
from pathlib import Path

import safetensors.torch
import torch
from accelerate import Accelerator
from autoencoder_models import folder_name
from comparison import (
    BATCH_SIZE,
    add_collection_arguments,
    add_report_arguments,
    check_settings,
    config_path,
    training_rows,
)
from diffusers.training_utils import EMAModel
from generation_models import (
    SCHEDULES,
    LatentSpace,
    build_scheduler,
    build_unet,
    clock,
    denoise,
    latent_space,
    starting_noise,
)
from generation_report import features_of, write_generation_report
from tqdm.auto import tqdm

from brics_diffusers.data import collection_fingerprint, training_loader
from brics_diffusers.metrics.feature_distances import KID_SCALE, kernel_distance, name_with_features
from brics_diffusers.metrics.feature_extractors import extractor_digest, load_feature_extractor
from brics_diffusers.metrics.generation import KID_FEATURES, check_image_counts
from brics_diffusers.metrics.image_features import to_uint8
from brics_diffusers.metrics.nearest_neighbours import FeatureEmbedding, embed_images
from brics_diffusers.training_utils.arguments import flag_words, positive
from brics_diffusers.training_utils.checkpoints import appearing_folder, clean_up
from brics_diffusers.training_utils.ema import averaged_weights
from brics_diffusers.training_utils.optimization import (
    OPTIMIZERS,
    build_lr_scheduler,
    build_optimizer,
    step_if_finite,
)
from brics_diffusers.training_utils.run import load_splits
from brics_diffusers.utils.files import atomic_write, weights_digest


import train_key_codes  # isort: skip  (comparison.py says where it is)


DEFAULT_MODELS = [
    "BRICS",
    "BRICS without noise",
    "BRICS, KL regularization",
    "AutoencoderKL",
    "AutoencoderKL, shortcut, noise",
    "VQModel",
]


def parse_args(argv=None) -> argparse.Namespace:
    """Flags of this script, and in `flags` those that a training of key codes has by the config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--autoencoders", required=True, type=Path, help="Folder `models` that compare_autoencoders.py has written.")
    add("--config", type=config_path, default="noto-emoji-64", help="A YAML file, or the name of training/configs'.")
    add("--set", nargs="+", default=[], metavar="SECTION.NAME=VALUE", help="Changes to its unet and scheduler.")
    add_collection_arguments(parser)  # those that the autoencoders were trained on
    add_report_arguments(parser, "runs/generation")
    add(
        "--models",
        nargs="+",
        default=DEFAULT_MODELS,
        metavar="MODEL",
        help=f"Names in compare_autoencoders.py. Default: {'; '.join(DEFAULT_MODELS)}.",
    )
    add("--autoencoder_seed", type=int, help="Of which seed autoencoders are. Default: of the UNet's own.")
    add(
        "--schedules", nargs="+", choices=list(SCHEDULES), default=["b"], help="Those of Table 4, or b with min-SNR-5."
    )
    add("--max_train_steps", type=positive, default=4000, help="Steps of each UNet.")
    add("--validation_steps", type=positive, default=1000, help="Steps from one validation to the next.")
    add("--checkpointing_steps", type=positive, default=500, help="Steps from one saved state to the next.")
    add("--mixed_precision", choices=("no", "bf16"), default="no", help="Of the UNets. Default: %(default)s.")
    add("--compile", action="store_true", help="Compile the UNets.")
    add("--train_batch_size", type=positive, help="Latents in a step; default: the config's.")
    add("--optimizer", choices=OPTIMIZERS, help="Of the UNets; default: the config's.")
    add("--learning_rate", type=float, help="Its learning rate; default: the config's.")
    add("--scaling_factor", type=float, help="Of key codes, as of train_key_codes.py; 2 in the paper.")
    add("--num_samples", type=positive, default=500, help="Images that are generated at each validation.")
    add("--num_inference_steps", type=positive, default=25, help="DPM-Solver++ steps of these.")
    add("--extractor", default=KID_FEATURES, help="Network whose features judge.")
    more = "Others that judge the last samples too, for instance clip-fid or inception-v3-compat."
    add("--more_extractors", nargs="+", default=[], metavar="EXTRACTOR", help=more)
    add("--num_reference_images", type=positive, default=3000, help="Training images to compare with, at most.")
    args = parser.parse_args(argv)
    words = [f"--config={args.config}", f"--dataset_name={args.dataset_name}", "--autoencoder_name_or_path=each"]
    for name in ("max_train_steps", "train_batch_size", "optimizer", "learning_rate", "scaling_factor"):
        words += flag_words(name, getattr(args, name))
    args.flags = train_key_codes.parse_args(words + (["--set", *args.set] if args.set else []))
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return args


class Run:
    """One UNet on the latents of one autoencoder with one schedule, with a folder that it can go on from."""

    def __init__(self, args, name: str, schedule: str, seed: int, space: LatentSpace, settings: dict):
        self.args, self.name, self.schedule, self.seed, self.space = args, name, schedule, seed, space
        self.folder = Path(args.output_dir) / "runs" / folder_name(f"{name}-{schedule}", seed)
        self.scheduler = build_scheduler(args.flags.scheduler, schedule, space.bound)
        self.snr_gamma = SCHEDULES[schedule][1]
        names = ("validation_steps", "num_samples", "num_inference_steps", "num_reference_images", "mixed_precision")
        self.settings = {name: getattr(args, name) for name in names} | settings
        names = ("max_train_steps", "train_batch_size", "lr_scheduler", "lr_warmup_steps", "unet")
        names += ("optimizer", "learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon")
        names += ("ema_max_decay", "max_grad_norm", "random_flip")
        self.settings |= {name: getattr(args.flags, name) for name in names}
        config = dict(self.scheduler.config)
        self.settings["scheduler"] = {name: config[name] for name in sorted(config) if name != "trained_betas"}
        self.settings |= {"snr_gamma": self.snr_gamma, "seed": seed, "deviation": space.deviation}
        self.settings = json.loads(json.dumps(self.settings))  # as they are read again
        self.step, self.seconds, self.curve = 0, 0.0, []
        self.resume()

    @property
    def finished(self) -> bool:
        """Whether all steps were taken."""
        return self.step == self.args.max_train_steps

    def resume(self) -> None:
        """Reads how far the folder's run has come, if there is one."""
        clean_up(self.folder)
        path = self.folder / "state/progress.json"
        if not path.exists():
            return
        progress = json.loads(path.read_text())
        before = {"mixed_precision": "no", "optimizer": "adam"} | progress["settings"]  # older ones don't say
        check_settings(self.folder, before, self.settings)
        self.step, self.seconds, self.curve = (progress[name] for name in ("step", "seconds", "curve"))

    def train(self, accelerator, references: torch.Tensor, extractor) -> None:
        """Takes all steps that are left, with validations; `references` are features of training images."""
        args, flags = self.args, self.args.flags
        torch.manual_seed(self.seed)  # the same weights for all latents of one shape
        self.unet = build_unet(flags.unet, self.space.latents).to(args.device)
        adam = flags.adam_beta1, flags.adam_beta2, flags.adam_epsilon
        self.optimizer = build_optimizer(self.unet, flags.learning_rate, *adam, optimizer=flags.optimizer)
        self.lr_scheduler = build_lr_scheduler(flags, self.optimizer)
        self.ema = EMAModel(self.unet.parameters(), decay=flags.ema_max_decay, foreach=True)
        stateful = {name: getattr(self, name) for name in ("unet", "optimizer", "lr_scheduler", "ema")}
        path = self.folder / "state/training.pt"
        if path.exists():
            state = torch.load(path, map_location=args.device, weights_only=True)
            for name, part in stateful.items():
                part.load_state_dict(state[name])
            self.ema.to(args.device)
        while not self.finished:
            every = args.checkpointing_steps, args.validation_steps
            stops = [(self.step // steps + 1) * steps for steps in every]
            self._take_steps(min(*stops, args.max_train_steps), accelerator)
            if self.finished or self.step % args.validation_steps == 0:
                self._validate(references, extractor)
            self._save({name: part.state_dict() for name, part in stateful.items()})
        for name in stateful:
            delattr(self, name)

    def _take_steps(self, last_step: int, accelerator) -> None:
        flags, device = self.args.flags, self.args.device
        loader = iter(training_loader(self.space.latents, flags.train_batch_size, self.seed, start=self.step))
        num_train_timesteps = self.scheduler.config.num_train_timesteps
        self.unet.train()
        denoiser = torch.compile(self.unet) if self.args.compile else self.unet
        for step in tqdm(range(self.step, last_step), desc=self.folder.name, leave=False, disable=None):
            latents = next(loader).to(device)
            started = clock(device)
            noise = train_key_codes.draw_noise(latents.shape, self.seed, step, accelerator, num_train_timesteps)
            torch.manual_seed(self.seed + step)  # of dropout, where the UNet has it
            with accelerator.autocast():
                loss = train_key_codes.training_loss(denoiser, self.scheduler, latents, *noise, self.snr_gamma)
            accelerator.backward(loss)
            if not step_if_finite(accelerator, [self.optimizer], flags.max_grad_norm, loss.detach()):
                raise FloatingPointError(
                    f"{self.folder.name}: loss or gradient is not finite in step {step}; lower --learning_rate."
                )
            self.lr_scheduler.step()
            self.ema.step(self.unet.parameters())
            self.seconds += clock(device) - started
        self.step = last_step

    @torch.no_grad()
    def _validate(self, references: torch.Tensor, extractor) -> None:
        """Appends a point to the curve, and keeps the samples that it is of."""
        args, device = self.args, self.args.device
        noise = starting_noise(self.space.latents.shape[1:], args.num_samples).split(BATCH_SIZE)
        latents, images, seconds = [], [], {"denoising_seconds": 0.0, "decoding_seconds": 0.0}
        with averaged_weights(self.unet, self.ema) as unet:
            for part in noise:
                started = clock(device)
                latents.append(denoise(unet, self.scheduler, part.to(device), args.num_inference_steps))
                denoised = clock(device)
                images.append(to_uint8(self.space.decode(latents[-1])))
                seconds["denoising_seconds"] += (denoised - started) / args.num_samples
                seconds["decoding_seconds"] += (clock(device) - denoised) / args.num_samples
        images = torch.cat(images)
        samples = {"latents": torch.cat(latents), "images": images}
        samples["features"] = embed_images(images, FeatureEmbedding(extractor), BATCH_SIZE)
        samples = {name: value.cpu().contiguous() for name, value in samples.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.folder / "samples.safetensors") as file:
            file.write(safetensors.torch.save(samples))
        kid, features = name_with_features("kid", extractor), samples["features"]
        point = {"step": self.step, "seconds": self.seconds, **seconds}
        point[kid] = KID_SCALE * kernel_distance(features, references)
        of_reconstructions = kernel_distance(features, self.space.reconstruction_features)
        point[f"{kid}_from_reconstructions"] = KID_SCALE * of_reconstructions
        self.curve.append(point)
        print(f"{self.folder.name}: KID {point[kid]:.0f} after {self.step} steps", flush=True)

    def _save(self, state: dict) -> None:
        """Writes everything, complete or not at all; a finished run keeps its averaged weights alone."""
        if self.finished:
            with averaged_weights(self.unet, self.ema), appearing_folder(self.folder / "unet") as folder:
                self.unet.save_pretrained(folder)
        with appearing_folder(self.folder / "state") as folder:
            progress = {name: getattr(self, name) for name in ("settings", "step", "seconds", "curve")}
            (folder / "progress.json").write_text(json.dumps(progress, indent=2) + "\n")
            if not self.finished:
                torch.save(state, folder / "training.pt")

    def num_parameters(self) -> int:
        """Parameters of the UNet."""
        with torch.device("meta"):
            return build_unet(self.args.flags.unet, self.space.latents).num_parameters()

    def samples(self) -> dict[str, torch.Tensor]:
        """Latents, uint8 images and features of the last validation's samples."""
        return safetensors.torch.load_file(self.folder / "samples.safetensors")


def main(argv=None):
    """Trains, measures, reports."""
    args = parse_args(argv)
    logging.getLogger("diffusers").setLevel(logging.ERROR)  # of configs of classes that extend others
    torch.set_flush_denormal(True)  # Adam's second moments become denormal numbers, on which CPUs are slow
    accelerator = Accelerator(cpu=args.device.type == "cpu", mixed_precision=args.mixed_precision)
    train_set, validation_set = load_splits(args)
    if validation_set is None or len(validation_set) < 2:
        raise ValueError(f"{args.dataset_name} has fewer than 2 images to hold out; give a larger collection.")
    extractor = load_feature_extractor(args.extractor, args.device)
    seeds = {seed: seed if args.autoencoder_seed is None else args.autoencoder_seed for seed in args.seeds}
    names = dict.fromkeys(folder_name(name, seed) for seed in seeds.values() for name in args.models)
    spaces = {
        name: latent_space(args, args.autoencoders / name, train_set, validation_set, extractor) for name in names
    }
    sizes = {space.autoencoder.config.sample_size for space in spaces.values()}
    if len(sizes) > 1:
        raise ValueError(f"the autoencoders are for images of {sizes} pixels; give --models of one size.")
    args.size = sizes.pop()
    rows = training_rows(len(train_set))[: args.num_reference_images]
    references = features_of(args, train_set.select(rows), extractor)
    check_image_counts(("kid", "fid", "precision-recall"), args.num_samples, len(references))
    common = {"extractor": extractor_digest(extractor), "collection": collection_fingerprint(train_set)}
    runs = []
    for seed in args.seeds:
        for schedule in args.schedules:
            for name in args.models:
                space = spaces[folder_name(name, seeds[seed])]
                settings = common | {"autoencoder": weights_digest({"autoencoder": space.autoencoder})}
                runs.append(Run(args, name, schedule, seed, space, settings))
    for run in runs:
        if not run.finished:
            run.train(accelerator, references, extractor)
    if args.report:
        others = [load_feature_extractor(name, args.device) for name in args.more_extractors]
        others = {other: features_of(args, train_set.select(rows), other) for other in others}
        write_generation_report(args, runs, references, train_set, validation_set, extractor, others)


if __name__ == "__main__":
    main()

"""What perceptual and adversarial losses are worth: BRICS trained with three losses, and what keeps a discriminator
from ruining reconstructions, one change at a time.

    python benchmarks/compare_losses.py --config noto-emoji-64 --dataset_name FOLDER --output_dir DIR

Each run is one of training/train_autoencoder.py, in a process of its own and in the folder runs/VARIANT-SEED. Flags
that this script does not know are passed on to all of them, as in `--adversarial_weight 0.2` or `--set
discriminator.max_channels=64`; they beat DEFAULTS below, which beat the config, and what makes a variant beats them.
A run is measured when it ends: held-out images, and features that no loss has seen. After an interruption, run the
same command again: finished runs are skipped, others go on from their last checkpoint. The report has all --variants
and --seeds, so that several processes may share the work, each with other ones and with --no-report. Other values are
tried beside the others by --add_variant, or by flags for all in another --output_dir, into which runs that they don't
concern may be copied.
"""

import argparse
import json
import re
from pathlib import Path

import torch
import yaml
from comparison import TRAINING, add_report_arguments, check_settings, config_path, run_script, stopping_on_sigterm
from loss_report import measure, write_loss_report

from brics_diffusers.training_utils.arguments import FREE_FLAGS, flag_words, positive
from brics_diffusers.training_utils.run import load_splits


import train_autoencoder  # isort: skip  (comparison.py says where it is)


# Flags of training, the same for all variants.
DEFAULTS = {
    "perceptual_network": "efficientnet-lite0",
    "perceptual_weight": 10.0,
    "adversarial_weight": 0.1,
    "discriminator_learning_rate": 2e-3,
    "discriminator_adam_beta1": 0.9,  # it learned faster so in a single trial
    "gradient_penalty_weight": 0.1,  # StyleGAN2's rule, 0.0002 * size**2 / batch, for 64 pixels and 8 images
    "checkpoints_total_limit": 1,
}
# Those that are a share of the steps.
SHARES = {
    "discriminator_start_step": 0.25,
    "gan_start_step": 0.5,
    "gan_warmup_steps": 0.05,
    "validation_steps": 1 / 8,
    "checkpointing_steps": 1 / 8,
}
# For a config without a discriminator: one that judges patches.
DISCRIMINATOR = {"base_channels": 32}
# Flags that make a variant; the name of another flag stands for its value.
VARIANTS = {
    "mse": {"perceptual_weight": 0.0, "adversarial_weight": 0.0},
    "mse + perceptual": {"adversarial_weight": 0.0},
    "mse + perceptual + gan": {},
    "no head start": {"discriminator_start_step": "gan_start_step"},
    "no lazy R1 correction": {"lazy_r1_correction": False},
    "adaptive weight": {"adaptive_gan_weight": True},
    "augmentation": {"augmentation": "color,translation"},
    "no momentum": {"adam_beta1_gan": 0.0},
    # The paper's kind; at 64 pixels, a step of this size costs 0.6 of the autoencoder's.
    "stylegan2 discriminator": {
        "discriminator_type": "stylegan2",
        "discriminator.base_channels": 1024,
        "discriminator.max_channels": 128,
        "augmentation": "translation",
    },
}
DEFAULT_VARIANTS = list(VARIANTS)[:3]
# Without an adversarial loss these change nothing.
OF_DISCRIMINATOR = {
    *("discriminator", "discriminator_type", "discriminator_start_step", "discriminator_learning_rate"),
    *("discriminator_adam_beta1", "discriminator_adam_epsilon"),
    *("gan_start_step", "gan_warmup_steps", "adaptive_gan_weight", "adam_beta1_gan", "augmentation"),
    *("gradient_penalty_weight", "gradient_penalty_interval", "lazy_r1_correction"),
}


def parse_args(argv=None) -> argparse.Namespace:
    """Flags of this script, those for training in `extra`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--config", type=config_path, default="noto-emoji-64", help="A YAML file, or the name of training/configs'.")
    add("--dataset_name", required=True, help="Any collection that training/train_autoencoder.py takes.")
    add_report_arguments(parser, "runs/losses")
    add(
        "--variants",
        nargs="+",
        metavar="VARIANT",
        help=f"What to train; times are in units of the first's; of {'; '.join(VARIANTS)}, and those of --add_variant."
        " Default: the first three, then those.",
    )
    add(
        "--add_variant",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "FLAG=VALUE"),
        help="One more: the third with other flags, for instance `weak adversarial_weight=0.02 "
        "discriminator.max_channels=64`.",
    )
    add("--max_train_steps", type=positive, help="Steps of each run; default: the config's.")
    add("--extractor", default="efficientnet-lite2", help="Network whose features judge; not one of a loss.")
    add("--num_reference_images", type=positive, default=3000, help="Training images for rFID, at most.")
    add("--num_curve_images", type=positive, default=500, help="So many of them for the curve of rFID.")
    add("--num_kid_images", type=positive, default=1500, help="Training images that KID compares with, at most.")
    args, args.extra = parser.parse_known_args(argv)
    if any("=" not in change for _, *changes in args.add_variant for change in changes):
        parser.error("--add_variant needs a name, then changes such as adversarial_weight=0.02")
    added = {}
    for name, *changes in args.add_variant:
        pairs = (change.split("=", 1) for change in changes)
        added[name] = {flag: yaml.safe_load(value) for flag, value in pairs}
    args.known = VARIANTS | added
    args.variants = args.variants or [*DEFAULT_VARIANTS, *added]
    unknown = [name for name in args.variants if name not in args.known]
    if unknown:
        parser.error(f"--variants {', '.join(unknown)}: expected some of {', '.join(args.known)}")
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return args


def training_words(args: argparse.Namespace, variant: str, seed: int) -> list[str]:
    """Command line of a variant's training, without the folder."""
    words = [f"--config={args.config}", f"--dataset_name={args.dataset_name}"]
    words += flag_words("max_train_steps", args.max_train_steps)
    steps = train_autoencoder.parse_args(words + args.extra).max_train_steps
    defaults = DEFAULTS | {name: max(round(share * steps), 1) for name, share in SHARES.items()}
    words += [word for name, value in defaults.items() for word in flag_words(name, value)]
    if not yaml.safe_load(Path(args.config).read_text()).get("discriminator"):
        words += ["--discriminator_type=patch", "--set"]
        words += [f"discriminator.{name}={value}" for name, value in DISCRIMINATOR.items()]
    words += args.extra
    common = vars(train_autoencoder.parse_args(words))
    for name, value in args.known[variant].items():
        value = common.get(value, value) if isinstance(value, str) else value
        words += ["--set", f"{name}={value}"] if "." in name else flag_words(name, value)
    return [*words, f"--seed={seed}", "--save_validation_weights"]


class Run:
    """One variant of one seed: its flags, and the folder with all there is of it."""

    def __init__(self, args: argparse.Namespace, variant: str, seed: int):
        name = re.sub(r"[^a-z0-9]+", "-", variant.lower())
        self.variant, self.seed, self.folder = variant, seed, Path(args.output_dir) / "runs" / f"{name}-{seed}"
        self.words = training_words(args, variant, seed)
        self.flags = train_autoencoder.parse_args([*self.words, f"--output_dir={self.folder}"])
        if self.flags.perceptual_weight and self.flags.perceptual_network == args.extractor:
            raise ValueError(f"{args.extractor} is the network of a loss; give an --extractor that is in none.")

    @property
    def finished(self) -> bool:
        """Whether all steps were taken."""
        return (self.folder / "training_summary.json").is_file()

    def trainer(self, accelerator):
        """What takes the steps of its training, in this process."""
        return train_autoencoder.Trainer(self.flags, accelerator)

    @property
    def settings(self) -> dict:
        """Flags on which the result depends."""
        free = FREE_FLAGS - {"dataset_name", "validation_split", "num_validation_images"}
        left_out = free | (OF_DISCRIMINATOR if self.flags.adversarial_weight == 0 else set())
        return {name: value for name, value in vars(self.flags).items() if name not in left_out}

    def check(self) -> None:
        """A `ValueError` if the folder has a run of other settings."""
        path = self.folder / "settings.json"
        if path.exists():
            before = json.loads(path.read_text())
            # Flags that are newer than the run are not compared.
            check_settings(self.folder, before, {name: self.settings.get(name) for name in before})

    def train(self) -> None:
        """All steps that are left, with what the script prints in train.log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "settings.json").write_text(json.dumps(self.settings, indent=2) + "\n")
        words = [*self.words, f"--output_dir={self.folder}", "--resume_from_checkpoint=latest"]
        run_script(TRAINING / "train_autoencoder.py", words, self.folder / "train.log")
        if not self.finished:
            raise RuntimeError(f"{self.folder} ended early; see its train.log, and run the command again.")


def main(argv=None):
    """Trains, measures, reports."""
    args = parse_args(argv)
    runs = [Run(args, variant, seed) for seed in args.seeds for variant in args.variants]  # flags are checked first
    for run in runs:
        run.check()
    torch.set_flush_denormal(True)  # Adam's second moments become denormal numbers, on which CPUs are slow
    with stopping_on_sigterm():
        for run in runs:
            if not run.finished:
                print(f"{run.folder.name}: {run.flags.max_train_steps} steps", flush=True)
                run.train()
            point = measure(args, run, *load_splits(run.flags))["curve"][-1]
            values = ", ".join(f"{name} {value:.4g}" for name, value in point.items())
            print(f"{run.folder.name}: {values}", flush=True)
    if args.report:
        write_loss_report(args, {name: [run for run in runs if run.variant == name] for name in args.variants})


if __name__ == "__main__":
    main()

"""Runs the training scripts and subcommands on several processes as a user does, on small models."""

import os
import subprocess
import sys

from small_models import AUTOENCODER, ROOT, UNET


def plain(config: dict) -> dict:
    """Tuples to lists: YAML knows no tuples."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}


CONFIG = {
    "autoencoder": plain(AUTOENCODER),
    "discriminator": {"base_channels": 256, "max_channels": 16, "stddev_group_size": 2},
    "train_autoencoder": {"train_batch_size": 4, "max_train_steps": 4, "lpips_weight": 0, "logging_steps": 1},
    "unet": plain(UNET),
    "train_key_codes": {"train_batch_size": 4, "max_train_steps": 4, "num_inference_steps": 2, "shard_size": 5},
}


def environment(threads: int = 1) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(threads), "ACCELERATE_USE_CPU": "true"}


def accelerate_launch(processes: int) -> list[str]:
    words = ["-m", "accelerate.commands.launch", "--num_machines", "1", "--num_processes", str(processes)]
    words += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return words + (["--multi_gpu"] if processes > 1 else [])  # with ACCELERATE_USE_CPU: gloo processes


def command(script: str, *flags, processes: int = 1, launcher: bool = True) -> list[str]:
    words = [sys.executable, *(accelerate_launch(processes) if launcher else [])]
    return words + [str(ROOT / "training" / script), *map(str, flags)]


def launch(script: str, *flags, processes: int = 1, threads: int = 1, check: bool = True):
    """The finished process, `subprocess.CompletedProcess`; with `check`, one that succeeded."""
    words = command(script, *flags, processes=processes)
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment(threads))
    if check:
        assert done.returncode == 0, done.stderr[-4000:]
    return done


def launch_subcommand(name: str, *flags, processes: int):
    """`accelerate launch -m brics_diffusers.commands NAME ...`, which has to succeed."""
    words = [sys.executable, *accelerate_launch(processes), "-m", "brics_diffusers.commands", name, *map(str, flags)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 0, done.stderr[-4000:]
    return done

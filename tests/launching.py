"""Runs the training scripts and subcommands on small models: in this process, or on several as a user does."""

import contextlib
import io
import logging
import os
import signal
import subprocess
import sys
from unittest import mock

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from small_models import AUTOENCODER, ROOT, UNET


# Of this process and of those that it starts. One by default: models this small lose more by sharing work among
# threads than they gain, and two tests run at a time: threads that wait for one another on a busy core get nowhere.
THREADS = int(os.environ.get("BRICS_TEST_THREADS", "1"))


def plain(config: dict) -> dict:
    """Tuples to lists: YAML knows no tuples."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}


CONFIG = {
    "autoencoder": plain(AUTOENCODER),
    "discriminator": {"base_channels": 256, "max_channels": 16, "stddev_group_size": 2},
    "train_autoencoder": {"train_batch_size": 4, "max_train_steps": 4, "perceptual_weight": 0, "logging_steps": 1},
    "unet": plain(UNET),
    "train_key_codes": {
        **{"train_batch_size": 4, "max_train_steps": 4, "logging_steps": 1},
        **{"num_inference_steps": 2, "shard_size": 5},
    },
}


def environment(cpu: bool = True) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(THREADS), "ACCELERATE_USE_CPU": str(cpu).lower()}


def train_here(main, *flags, **variables: str) -> str:
    """
    Calls a training script's `main` with flags in this process, which takes a tenth of the time of one that has to
    import everything first; returns what it printed to standard error. `variables` are those of the environment.
    """
    handler, root, printed = signal.getsignal(signal.SIGTERM), logging.getLogger(), io.StringIO()
    handlers, level = list(root.handlers), root.level
    variables = {"ACCELERATE_USE_CPU": "true"} | variables
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        with mock.patch.dict(os.environ, variables), contextlib.redirect_stderr(printed):
            main(list(map(str, flags)))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        signal.signal(signal.SIGTERM, handler)
        root.handlers[:], root.level = handlers, level
        torch.set_flush_denormal(False)
    return printed.getvalue()


def launcher_words(processes: int) -> list[str]:
    words = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    words += ["--num_processes", str(processes), "--dynamo_backend", "no", "--main_process_port", "0"]
    return words + (["--multi_gpu"] if processes > 1 else [])  # with ACCELERATE_USE_CPU: gloo processes


def command(script: str, *flags, processes: int = 1, launcher: bool = True) -> list[str]:
    words = launcher_words(processes) if launcher else [sys.executable]
    return words + [str(ROOT / "training" / script), *map(str, flags)]


def launch(script: str, *flags, processes: int = 1, check: bool = True, cpu: bool = True):
    """The finished process, `subprocess.CompletedProcess`; with `check`, one that succeeded."""
    words = command(script, *flags, processes=processes)
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment(cpu))
    if check:
        assert done.returncode == 0, done.stderr[-4000:]
    return done


def movement(output_dir, first: int, last: int, names: tuple[str, ...] = ("model",)) -> dict[str, torch.Tensor]:
    """How far every weight has moved between two checkpoints of a run."""
    before, after = (
        {(name, key): value for name in names for key, value in load_file(path / f"{name}.safetensors").items()}
        for path in (output_dir / f"checkpoint-{step}" for step in (first, last))
    )
    return {key: after[key] - before[key] for key in before}


def assert_same_movement(one: dict, other: dict, rtol: float = 1e-3) -> None:
    """Each tensor's movements agree to `rtol` of their size, and at least nine tenths of the tensors have moved."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        # The rest is rounding: of weights near 1 to float32, and of gradients that are 0, as that of attention's keys.
        limit = rtol * value.norm() + 1e-7 * value.numel() ** 0.5 + 1e-6
        assert (value - other[key]).norm() <= limit, (key, value.norm(), (value - other[key]).norm())
    moved = [value.abs().max() > 1e-6 for value in one.values()]
    assert sum(moved) >= 0.9 * len(moved)


def launch_subcommand(name: str, *flags, processes: int):
    """`accelerate launch -m brics_diffusers.commands NAME ...`, which has to succeed."""
    words = [*launcher_words(processes), "-m", "brics_diffusers.commands", name, *map(str, flags)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 0, done.stderr[-4000:]
    return done

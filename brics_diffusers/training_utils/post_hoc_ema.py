"""Averages of weights whose length is chosen after the training (Karras et al. 2024, arXiv 2312.02696).

A power-function average of exponent g gives the weights of step s a share proportional to s^g. The standard deviation
of s, relative to the step t of the average, is its length: it stays as it is while the training goes on. Two such
averages are kept, and snapshots of them; an average of nearly any other length is a linear combination of the
snapshots, found by least squares between the shares that they give to steps, their profiles.
"""

import contextlib
import os
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open

from ..utils.files import atomic_write, free_path
from .checkpoints import RunState, clean_up, naming_the_last_checkpoint
from .optimization import check_weights


SNAPSHOTS = "ema_snapshots"
FILE = "power_ema.safetensors"  # in checkpoints
KEPT_LENGTHS = (0.05, 0.1)  # the paper's
LONGEST = 0.28  # all steps alike, exponent 0, is 12 ** -0.5


def power_exponent(length: float) -> float:
    r"""
    Exponent g of the power function whose relative length is `(g + 1)**0.5 / ((g + 2) * (g + 3)**0.5)`.

    Args:
        length (`float`): Relative length, above 0 and at most 0.28; 6.94 belongs to 0.1 and 16.97 to 0.05.

    Returns:
        `float`.

    Raises:
        `ValueError`: If there is none.
    """
    if not 0 < length <= LONGEST:
        raise ValueError(f"the length of an average is {length:g}; give one above 0 and at most {LONGEST}.")
    # With x = g + 2 the definition is x^3 + x^2 - (x - 1) / length^2 = 0; of its two positive roots the larger counts.
    return max(np.roots([1, 1, -(length**-2), length**-2]).real) - 2


class PowerEMA:
    r"""
    Two power-function averages of a model in training, which are saved in its checkpoints.

    Args:
        accelerator (`Accelerator`): The run's accelerator, with the model prepared.
        model (`torch.nn.Module`): The model, unwrapped.
        output_dir (`str`): Folder of the run; snapshots go into `ema_snapshots`.
        every (`int`): Steps from one snapshot to the next; the last step always has one.
    """

    def __init__(self, accelerator: Accelerator, model: torch.nn.Module, output_dir: str | os.PathLike, every: int):
        self.accelerator, self.model, self.folder, self.every = accelerator, model, Path(output_dir) / SNAPSHOTS, every
        self.weights = dict(model.named_parameters())
        self.averages = {
            length: {name: weight.detach().clone() for name, weight in self.weights.items()} for length in KEPT_LENGTHS
        }
        self.num_steps = 0
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: self._save(Path(folder, FILE)))
        accelerator.register_load_state_pre_hook(lambda models, folder: self._load(Path(folder, FILE)))

    @torch.no_grad()
    def step(self, state: RunState, last: bool) -> None:
        r"""
        Takes the weights of a step into the averages, and keeps a snapshot if one is due. Call on every process.

        Args:
            state (`RunState`): Knows the step.
            last (`bool`): Whether it is the last one.

        Raises:
            `FloatingPointError`: If a weight of a snapshot is not finite.
            `OSError`: If a snapshot could not be written; names the last checkpoint.
        """
        self.num_steps += 1
        for length, average in self.averages.items():
            share = 1 - (1 - 1 / self.num_steps) ** (power_exponent(length) + 1)
            torch._foreach_lerp_(list(average.values()), [weight.detach() for weight in self.weights.values()], share)
        if last or self.num_steps % self.every == 0:
            check_weights([self.model], state, self.folder.parent)
            self.folder.mkdir(exist_ok=True)
            path = self.folder / f"{self.num_steps:08d}.safetensors"
            with naming_the_last_checkpoint(self.folder.parent, path):
                self._save(path)

    def check_resumed(self, step: int) -> None:
        r"""
        Makes sure that the averages begin at the first step, and renames snapshots of a branch that the run leaves.
        Call on every process when the run is resumed.

        Args:
            step (`int`): The run's step.

        Raises:
            `ValueError`: If the checkpoint has no averages.
        """
        if self.num_steps != step:
            raise ValueError(
                f"--ema_snapshot_steps averages from the first step on, but the checkpoint of step {step} has no such "
                "averages; leave it out or start afresh."
            )
        if self.accelerator.is_main_process:
            clean_up(self.folder)
            for path in snapshot_files(self.folder):
                if int(path.stem) > step:
                    os.replace(path, free_path(path.with_name(f"superseded-{path.name}")))

    def _save(self, path: Path) -> None:
        if self.accelerator.is_main_process:
            averages = self.averages.items()
            tensors = {_key(length, name): value for length, average in averages for name, value in average.items()}
            with atomic_write(path) as file:
                file.write(safetensors.torch.save(tensors, {"step": str(self.num_steps)}))

    def _load(self, path: Path) -> None:
        if path.is_file():
            with safe_open(path, "pt") as file:
                self.num_steps = int(file.metadata()["step"])
                for length, average in self.averages.items():
                    for name, value in average.items():
                        value.copy_(file.get_tensor(_key(length, name)))


def _key(length: float, name: str) -> str:
    return f"{length:g}/{name}"


def snapshot_files(folder: str | os.PathLike) -> list[Path]:
    """Snapshots in a folder, the earliest first."""
    return sorted(Path(folder).glob("[0-9]*.safetensors"))


def profile_products(profiles: np.ndarray, others: np.ndarray) -> np.ndarray:
    r"""
    Inner products of profiles, which are densities over steps: `(g + 1) * s**g / t**(g + 1)` from 0 to t.

    Args:
        profiles (`np.ndarray` of shape (N, 2)): Last step t and exponent g of each.
        others (`np.ndarray` of shape (M, 2)): Likewise.

    Returns:
        `np.ndarray` of shape (N, M).
    """
    (ta, ga), (tb, gb) = profiles.T[:, :, None], others.T[:, None, :]  # each (N, 1) and (1, M)
    first, last, exponent_of_last = np.minimum(ta, tb), np.maximum(ta, tb), np.where(ta <= tb, gb, ga)
    return (ga + 1) * (gb + 1) / (ga + gb + 1) * (first / last) ** exponent_of_last / last


def combine_profiles(profiles: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, float]:
    r"""
    The linear combination of profiles that is nearest to another. Its coefficients have the sum 1, so that a weight
    that does not change stays as it is: without that, few snapshots would shrink all weights.

    Args:
        profiles (`np.ndarray` of shape (N, 2)): Last step and exponent of each.
        target (`np.ndarray` of shape (2,)): Those of the other.

    Returns:
        `tuple[np.ndarray, float]`: coefficients of shape (N,), and the root of the squared error's share of the
        target's squared norm.
    """
    scale = np.array([target[0], 1])  # steps in units of the last one
    profiles, target = profiles / scale, (target / scale)[None]
    gram, products = profile_products(profiles, profiles), profile_products(profiles, target)[:, 0]
    size, ones = len(profiles), np.ones((len(profiles), 1))
    system = np.block([[gram, ones], [ones.T, np.zeros((1, 1))]])  # the last unknown is Lagrange's multiplier
    coefficients = np.linalg.lstsq(system, np.append(products, 1), rcond=None)[0][:size]
    norm = profile_products(target, target).item()
    error = norm - 2 * coefficients @ products + coefficients @ gram @ coefficients
    return coefficients, (max(error, 0) / norm) ** 0.5


@torch.no_grad()
def load_average(model: torch.nn.Module, folder: str | os.PathLike, length: float) -> float:
    r"""
    Gives a model the average of its weights that has some length at the end of the training.

    Args:
        model (`torch.nn.Module`): Of the kind that was trained; its parameters are overwritten.
        folder (`str`): `ema_snapshots` of a run.
        length (`float`): Relative length, above 0 and at most 0.28. The nearer to 0.05 to 0.1, and the more snapshots
            there are, the better it is met.

    Returns:
        `float`: Error of the profile, 0 if it is met exactly, else as of [`combine_profiles`].

    Raises:
        `FileNotFoundError`: If there are no snapshots.
        `ValueError`: If there is no such length, the snapshots are of another model, or one can't be read.
    """
    exponent = power_exponent(length)
    paths = snapshot_files(folder)
    if not paths:
        raise FileNotFoundError(f"{folder} has no snapshots of averages; train with --ema_snapshot_steps.")
    pairs = [(path, kept) for path in paths for kept in KEPT_LENGTHS]
    profiles = np.array([(int(path.stem), power_exponent(kept)) for path, kept in pairs], dtype=float)
    coefficients, error = combine_profiles(profiles, np.array([int(paths[-1].stem), exponent]))
    try:
        with contextlib.ExitStack() as stack:
            files = {path: stack.enter_context(safe_open(path, "pt")) for path in paths}
            for name, parameter in model.named_parameters():
                parts = torch.stack([files[path].get_tensor(_key(kept, name)) for path, kept in pairs])
                if parts.shape[1:] != parameter.shape:
                    raise ValueError(
                        f"{folder} has {name} of shape {tuple(parts.shape[1:])}, but the model's is "
                        f"{tuple(parameter.shape)}; name the folder of its own training."
                    )
                parameter.copy_(torch.einsum("n,n...->...", torch.from_numpy(coefficients), parts.double()))
    except SafetensorError as fault:
        raise ValueError(
            f"{folder} can't be read as snapshots of this model ({fault}); remove what is damaged, or name another."
        ) from fault
    return error

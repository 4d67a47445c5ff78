"""Samples of a pipeline as PNG files, made by any number of processes, resumed after an interruption."""

import copy
import hashlib
import inspect
import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path

import datasets
import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from tqdm.auto import tqdm

from ..data.collection import IMAGE_EXTENSIONS
from ..utils.files import atomic_write, weights_digest
from ..utils.safe_loading import load_safely
from .arguments import check_scheduler


MANIFEST = "samples.json"
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"  # the last chunk of every PNG: no data, its name, its checksum
# What takes the place of a pipeline's scheduler: class (its own for `None`) and options. Evenly spaced, the last of
# DPM-Solver++'s few steps would start where noise is still a quarter of the signal. Fresh noise in every step (SDE)
# costs more steps, and mends what a small model gets wrong.
SAMPLERS = {
    "DPM-Solver++": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "SDE-DPM-Solver++": (
        DPMSolverMultistepScheduler,
        {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"},
    ),
    "DDIM": (DDIMScheduler, {}),
    "own": (None, {}),
}


def with_scheduler(
    pipe: DiffusionPipeline, scheduler_class: type | None = None, options: dict | None = None
) -> DiffusionPipeline:
    """
    A pipeline that shares another's networks and has a scheduler to itself, of a class and with options that replace
    those of the other's, which stays as it is. A `ValueError` if the scheduler has no such argument, or is of a kind
    that [`check_scheduler`] refuses.
    """
    scheduler_class = scheduler_class or type(pipe.scheduler)
    known = set(inspect.signature(scheduler_class.__init__).parameters) - {"self"}
    if unknown := sorted(set(options or {}) - known):
        raise ValueError(
            f"{scheduler_class.__name__} has no argument {', '.join(unknown)}; its arguments are "
            f"{', '.join(sorted(known))}."
        )
    result = copy.copy(pipe)
    result.scheduler = scheduler_class.from_config(pipe.scheduler.config, **(options or {}))
    check_scheduler(result.scheduler)
    return result


def load_pipeline(
    name_or_path: str | os.PathLike,
    scheduler: str | None = None,
    scheduler_options: dict | None = None,
    device: str | torch.device = "cpu",
) -> DiffusionPipeline:
    """
    A pipeline for unconditional images, its folder or its name on the Hub, without a progress bar of its own.
    `scheduler`, a class of diffusers such as `"DPMSolverMultistepScheduler"`, and its options take the place of its
    own.

    A `FileNotFoundError` if there is no such folder, an `OSError` if weights are not in safetensors, a `ValueError` if
    the scheduler is unknown, or a weight is missing or shaped otherwise than its config says.
    """
    is_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", str(name_or_path))
    if not (Path(name_or_path) / "model_index.json").is_file() and (Path(name_or_path).exists() or not is_hub_name):
        raise FileNotFoundError(
            f"{name_or_path} holds no model_index.json; name the folder of a pipeline or a pipeline on the Hub."
        )
    pipe = load_safely(DiffusionPipeline.from_pretrained, name_or_path)
    if scheduler is not None or scheduler_options:
        scheduler_class = type(pipe.scheduler) if scheduler is None else getattr(diffusers, scheduler, None)
        if not hasattr(scheduler_class, "set_timesteps"):
            raise ValueError(
                f"{scheduler} is no scheduler of diffusers; give one such as DPMSolverMultistepScheduler."
            )
        pipe = with_scheduler(pipe, scheduler_class, scheduler_options)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def sample_generator(seed: int, index: int) -> torch.Generator:
    """
    The source of all noise of one sample, on the CPU, so that it does not depend on the device. Sets of different
    seeds have no noise in common.
    """
    state = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def sample_label(class_labels: list | dict, seed: int, index: int) -> int | str | None:
    """
    The class of one sample as pipelines take it: of a list, which samples have in turn, or drawn by the weight of each
    class.
    """
    if isinstance(class_labels, list):
        return class_labels[index % len(class_labels)]
    weights = np.array(list(class_labels.values()), np.float64)
    # A third number: other draws than those of noise, which has two.
    return list(class_labels)[np.random.default_rng([seed, index, 1]).choice(len(weights), p=weights / weights.sum())]


def guidance_settings(pipe: DiffusionPipeline, class_labels: list | dict | None, options: dict) -> dict:
    """
    What samples of a pipeline with classes or a guide follow from besides: `"class_labels"`, as in [`sample_label`],
    `"guidance_scale"` and `"guidance_interval"`, the pipeline's own unless `options` has others; empty for other
    pipelines. A `ValueError` if the pipeline does not know a class or can't be guided so.
    """
    if not hasattr(pipe, "prepare_guidance"):
        if class_labels is not None or options:
            raise ValueError(f"{type(pipe).__name__} has neither classes nor guidance; leave them out.")
        return {}
    if class_labels is not None and not class_labels:
        raise ValueError("class_labels are empty; give at least one class, or leave them out.")
    labels = list(class_labels or [None])
    guidance = pipe.prepare_guidance(len(labels), labels if class_labels is not None else None, **options)
    if pipe.num_classes is None and pipe.guide is None:
        return {}
    interval = list(guidance.interval)
    return {"class_labels": class_labels, "guidance_scale": guidance.scale, "guidance_interval": interval}


def sampling_settings(pipe: DiffusionPipeline, num_inference_steps: int, seed: int) -> dict:
    """
    What a set of samples follows from: `"pipeline"` (class), `"weights"` (digest of all parameters and buffers),
    `"dtype"`, `"scheduler"`, `"scheduler_config"` (its own arguments, not those that it keeps of another scheduler;
    long lists as digests, infinities as strings such as `"-inf"`, which JSON has no numbers for),
    `"num_inference_steps"` and `"seed"`.
    """
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    known = inspect.signature(type(pipe.scheduler).__init__).parameters
    config = {name: _shorten(value) for name, value in pipe.scheduler.config.items() if name in known}
    return {
        "pipeline": type(pipe).__name__,
        "weights": weights_digest(modules),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "scheduler": type(pipe.scheduler).__name__,
        "scheduler_config": dict(sorted(config.items())),
        "num_inference_steps": num_inference_steps,
        "seed": seed,
    }


def _shorten(value):
    if isinstance(value, (list, tuple, np.ndarray, torch.Tensor)) and len(value) > 16:
        values = np.asarray(value, dtype=np.float64)
        return f"{len(value)} numbers, sha256 {hashlib.sha256(values.tobytes()).hexdigest()[:16]}"
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def sample_path(folder: str | os.PathLike, index: int) -> Path:
    """File of one sample: names sort as numbers do."""
    return Path(folder) / f"{index:07d}.png"


def sample_is_complete(folder: str | os.PathLike, index: int) -> bool:
    """Whether a sample's file is there and ends as a PNG does: a lost end would otherwise show only on reading."""
    try:
        with open(sample_path(folder, index), "rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:  # no such file, or one that is too short
        return False


def read_sample_settings(folder: str | os.PathLike) -> dict | None:
    """The [`sampling_settings`] of a folder that [`sample_images_to_folder`] has written, `None` for other folders."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    return json.loads(path.read_text(), parse_constant=lambda name: str(float(name)))  # -Infinity, in older files


def claim_sample_folder(folder: str | os.PathLike, settings: dict) -> None:
    """
    Reserves a folder, made if need be, for samples of certain [`sampling_settings`]; all processes may call it at
    once. A `ValueError` if it holds samples of other settings, or images that are no samples.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    has_images = any(path.suffix.lower() in IMAGE_EXTENSIONS for path in folder.rglob("*"))
    found = read_sample_settings(folder)
    if found is None and has_images:
        raise ValueError(f"{folder} holds images that are not samples of a known pipeline; name another folder.")
    text = json.dumps(settings, indent=2, allow_nan=False)
    if not has_images:  # nor does a run that ended before its first sample bind the next one
        with atomic_write(folder / MANIFEST) as file:
            file.write((text + "\n").encode())
        return
    settings = json.loads(text)
    before = found.get("scheduler_config", {})  # older files have arguments of other schedulers besides
    found["scheduler_config"] = {name: before.get(name) for name in settings.get("scheduler_config", ())}
    different = ", ".join(name for name in settings if found.get(name) != settings[name])
    if different:
        raise ValueError(
            f"{folder} holds samples made otherwise (different: {different}); delete it or name another folder."
        )


@torch.no_grad()
def sample_images_to_folder(
    pipe: DiffusionPipeline,
    folder: str | os.PathLike,
    num_images: int,
    batch_size: int = 16,
    num_inference_steps: int = 250,
    seed: int = 0,
    process_index: int = 0,
    num_processes: int = 1,
    progress: bool = True,
    class_labels: list | dict | None = None,
    **guidance,
) -> None:
    """
    Writes a process's share of a set of samples as PNG files `0000000.png`, `0000001.png`, ...

    Sample `i` has noise of its own, from the seed and `i`: the set depends neither on the number of processes nor on
    the batch size, but for rounding (at most 2 of 255). Files appear by a rename; complete ones are kept. So an
    interrupted run goes on where it stopped, and a set can be made larger. It is complete when every process is done.

    The pipeline takes `batch_size`, `num_inference_steps` and a list of generators, and returns PIL images. Classes,
    as in [`sample_label`], are by default those that it draws, or none; `guidance_scale` and `guidance_interval` are
    as in [`BricsKeyCodePipeline`]. A `ValueError` if a number is too small, the pipeline does not know a class or
    can't be guided so, or the folder holds samples made otherwise.
    """
    if num_images < 1 or batch_size < 1 or num_inference_steps < 1 or seed < 0:
        raise ValueError(
            f"num_images is {num_images}, batch_size {batch_size}, num_inference_steps {num_inference_steps}, seed "
            f"{seed}; the first three must be at least 1, seed at least 0."
        )
    weights = pipe.config.get("default_class_weights")
    if class_labels is None and weights is not None:
        class_labels = dict(enumerate(weights))
    settings = sampling_settings(pipe, num_inference_steps, seed)
    claim_sample_folder(folder, settings | guidance_settings(pipe, class_labels, guidance))
    share = range(process_index, num_images, num_processes)
    missing = [index for index in share if not sample_is_complete(folder, index)]
    with tqdm(total=len(share), initial=len(share) - len(missing), desc="Sampling", disable=not progress) as bar:
        for indices in _chunks(missing, batch_size):
            generators = [sample_generator(seed, index) for index in indices]
            options = {"batch_size": len(indices), "num_inference_steps": num_inference_steps} | guidance
            if class_labels is not None:
                options["class_labels"] = [sample_label(class_labels, seed, index) for index in indices]
            for index, image in zip(indices, pipe(generator=generators, **options).images, strict=True):
                with atomic_write(sample_path(folder, index)) as file:
                    image.save(file, "PNG")
            bar.update(len(indices))


def load_samples(folder: str | os.PathLike, num_images: int) -> datasets.Dataset:
    """
    The collection, as of [`load_collection`], of the first samples that [`sample_images_to_folder`] has written, and
    of no other image there.
    """
    paths = [str(sample_path(folder, index).absolute()) for index in range(num_images)]
    return datasets.Dataset.from_dict(
        {"image": paths}, features=datasets.Features({"image": datasets.Image(decode=False)})
    )


def _chunks(items: list, size: int) -> Iterable[list]:
    return (items[start : start + size] for start in range(0, len(items), size))

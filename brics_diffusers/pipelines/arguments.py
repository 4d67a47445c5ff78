"""What the pipeline's methods are called with: names, images and schedulers, checked before any work."""

import difflib
import functools
import inspect
import itertools
import math
from collections.abc import Callable
from numbers import Integral

import numpy as np
import torch
from diffusers import ModelMixin, UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from PIL import Image

from .image_processor import upright


logger = logging.get_logger(__name__)

# What other pipelines call an argument, and the candidates for its name here; of these the first that a method has.
HABITS = {
    "num_images_per_prompt": ("batch_size", "num_images", "images"),
    "num_images": ("batch_size", "images"),
    "num_samples": ("batch_size", "num_images", "images"),
    "image": ("images", "image_a"),
    "mask_image": ("masks",),
    "num_steps": ("num_inference_steps",),
    "steps": ("num_inference_steps",),
    "seed": ("generator",),
    "label": ("class_labels",),
    "labels": ("class_labels",),
    "classes": ("class_labels",),
    "guidance": ("guidance_scale",),
    "cfg_scale": ("guidance_scale",),
    "callback": ("callback_on_step_end",),
}
CONDITIONS = ("prompt", "negative_prompt", "prompt_embeds")


def named_arguments(method: Callable) -> Callable:
    """Decorates a method so that an argument it does not have is a `TypeError` that names the nearest it has."""
    parameters = [name for name in inspect.signature(method).parameters if name != "self"]

    @functools.wraps(method)
    def checked(self, *args, **kwargs):
        for name in kwargs:
            if name not in parameters:
                raise TypeError(f"{method.__name__} has no argument {name}; {_advice(name, parameters)}.")
        return method(self, *args, **kwargs)

    return checked


def _advice(name: str, parameters: list[str]) -> str:
    if name in CONDITIONS:
        return "images are generated without texts, so leave it out"
    habits = [other for other in HABITS.get(name, ()) if other in parameters]
    if habits:
        return f"its place is {habits[0]}"
    nearest = difflib.get_close_matches(name, parameters, n=1)
    return f"the nearest it has is {nearest[0]}" if nearest else f"it has {', '.join(parameters)}"


def check_denoiser(unet: torch.nn.Module) -> None:
    """Refuses models of diffusers that are called otherwise than a [`UNet2DModel`], with a `ValueError`."""
    model = getattr(unet, "_orig_mod", unet)  # of a compiled one
    if isinstance(model, ModelMixin) and not isinstance(model, UNet2DModel):
        raise ValueError(
            f"unet is a {type(model).__name__}, which takes other arguments than key codes and a timestep; give a "
            "UNet2DModel."
        )


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """
    Refuses schedulers that cannot denoise what the diffusion model predicts, with a `ValueError`: those whose noise
    levels are not those of the betas that models are trained with and that a config carries (flow matching, EDM,
    consistency models, IPNDM, CogVideoX), and those whose `step` takes more than a prediction, a timestep and latents.
    """
    config = scheduler.config
    flows = getattr(config, "use_flow_sigmas", False) or getattr(config, "prediction_type", "") == "flow_prediction"
    if flows or not _visits_trained_levels(scheduler) or not _steps_as_denoisers_do(scheduler):
        raise ValueError(
            f"{type(scheduler).__name__}{' for flow matching' if flows else ''} does not denoise predictions of noise "
            "at the noise levels that a model was trained with; give a scheduler such as DPMSolverMultistepScheduler."
        )


def check_bounds(scheduler: SchedulerMixin, scaling_factor: float) -> None:
    """Warns of a scheduler that clamps elsewhere than where latents end: one of the two is another model's."""
    config, bound = scheduler.config, scaling_factor / 2
    clamp = config.get("clip_sample_range") if config.get("clip_sample") else None
    if clamp is not None and not math.isclose(clamp, bound, rel_tol=1e-3):
        logger.warning(
            f"The scheduler clamps latents to [-{clamp:g}, {clamp:g}], but key codes are scaled to [-{bound:g}, "
            f"{bound:g}]; give the autoencoder that the UNet was trained with, or a scheduler with clip_sample_range="
            f"{bound:g}."
        )


def _steps_as_denoisers_do(scheduler: SchedulerMixin) -> bool:
    arguments = list(inspect.signature(scheduler.step).parameters.values())[3:]
    return all(
        argument.default is not argument.empty or argument.kind == argument.VAR_KEYWORD for argument in arguments
    )


def _visits_trained_levels(scheduler: SchedulerMixin) -> bool:
    levels = getattr(scheduler, "alphas_cumprod", None)
    if levels is None or getattr(scheduler.config, "rescale_betas_zero_snr", False):  # asked for by name
        return levels is not None
    betas = getattr(scheduler.config, "trained_betas", None)
    betas = scheduler.betas if betas is None else torch.as_tensor(betas, dtype=torch.float64)
    expected = (1 - betas).cumprod(0)
    return levels.shape == expected.shape and torch.allclose(levels.to(expected), expected, atol=1e-3)


def set_timesteps(
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    timesteps: list[int] | None = None,
    sigmas: list[float] | None = None,
) -> None:
    """
    Sets a scheduler's steps: their number, or custom train steps or noise levels, descending, where it takes them. A
    `ValueError` if both are given, one is not a list that descends, the scheduler does not take it or would go from
    less noise to more, or as [`check_scheduler`].
    """
    check_scheduler(scheduler)
    if not isinstance(num_inference_steps, Integral):
        raise ValueError(f"num_inference_steps is {num_inference_steps!r}; give a whole number of at least 1.")
    custom = {"timesteps": timesteps, "sigmas": sigmas}
    custom = {name: values for name, values in custom.items() if values is not None}
    if len(custom) == 2:
        raise ValueError("timesteps and sigmas are both given; give one of them.")
    for name, values in custom.items():
        if name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(
                f"{type(scheduler).__name__} takes no custom {name}; leave them out or give another scheduler, such "
                "as EulerDiscreteScheduler."
            )
        if not isinstance(values, (list, tuple, np.ndarray, torch.Tensor)) or len(values) == 0:
            raise ValueError(f"{name} is {values!r}; give a list with at least one.")
        if any(later >= earlier for earlier, later in itertools.pairwise(values)):
            raise ValueError(f"{name} is {values!r}; give it in descending order, from noise to image.")
        if name == "sigmas" and values[-1] != 0:
            raise ValueError(f"sigmas is {values!r}; end it with 0, the image without noise.")
    scheduler.set_timesteps(**custom or {"num_inference_steps": num_inference_steps})
    if scheduler.timesteps[0] < scheduler.timesteps[-1]:
        raise ValueError(
            f"{type(scheduler).__name__} goes from images to noise; give a scheduler that denoises, such as "
            "DPMSolverMultistepScheduler."
        )


def check_images(images, name: str = "images") -> None:
    """
    Refuses what a pipeline can't take for images, with a `ValueError`: other kinds than PIL images, arrays, tensors or
    lists of one of them, such as paths and tuples; images of different sizes; arrays and tensors that leave [0, 1].
    """
    images = images if isinstance(images, list) else [images]
    for image in images:
        if not isinstance(image, (Image.Image, np.ndarray, torch.Tensor)):
            raise ValueError(
                f"{name} holds a {type(image).__name__}; give PIL images (PIL.Image.open reads a file), arrays or "
                "tensors, several of them as a list."
            )
    sizes = {upright(image).size if isinstance(image, Image.Image) else tuple(image.shape) for image in images}
    if len(sizes) != 1:
        raise ValueError(f"{name} have sizes {sorted(sizes)}; give at least one, all of one size.")
    for image in images:
        if not isinstance(image, Image.Image) and not (image.min() >= 0 and image.max() <= 1):
            raise ValueError(f"{name} span [{image.min()}, {image.max()}]; scale arrays and tensors to [0, 1].")

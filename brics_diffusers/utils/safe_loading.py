"""Loading models and pipelines from safetensors only, with an error for weights that are missing.

diffusers falls back to pickles where `use_safetensors` is not given, and only warns of missing weights, for which it
draws random numbers.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Self

from diffusers import DiffusionPipeline, ModelMixin

from .errors import first_line


_MISFIT = "the weights of {} are not those of its config.json: {}; restore the one or the other."


def load_safely(
    from_pretrained: Callable, name_or_path: str | os.PathLike, **kwargs
) -> ModelMixin | DiffusionPipeline | tuple:
    """
    Calls `from_pretrained` of a model or a pipeline of diffusers, with its arguments. Pickled weights are refused, and
    missing ones are an error, in every component. With `low_cpu_mem_usage=False` all weights are read twice.

    A `ValueError` if pickles are asked for, or a weight is missing or shaped otherwise than the config says; an
    `OSError` if there are no weights in safetensors.
    """
    if kwargs.get("use_safetensors") is False:
        raise ValueError(
            "use_safetensors is False, but pickled weights are never read, as a pickle can run any code; leave it out."
        )
    place = Path(name_or_path, kwargs.get("subfolder") or "")
    # With low_cpu_mem_usage, weights that are not read stay on the meta device; without it, they have random values.
    twice = kwargs.get("low_cpu_mem_usage") is False
    kwargs |= {"use_safetensors": True, "low_cpu_mem_usage": True}
    try:
        loaded = from_pretrained(name_or_path, **kwargs)
    except OSError as error:
        if "safetensors" not in str(error) or "only safetensors are read" in str(error):  # of a component
            raise
        raise OSError(
            f"{place} can't be loaded ({first_line(error)}); only safetensors are read, as a pickle can run any "
            "code: convert pickled weights with torch.load(..., weights_only=True) and safetensors.torch.save_file."
        ) from error
    except ValueError as error:
        fault = str(error).partition(". If you want")[0].partition("because ")[2]  # without advice to draw weights
        if " expected shape " not in fault:
            raise
        raise ValueError(_MISFIT.format(place, fault)) from error
    if kwargs.get("device_map") is None:  # which may put weights elsewhere
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, component in getattr(model, "components", {"": model}).items():
            _check_complete(place / name, component)
    return from_pretrained(name_or_path, **kwargs | {"low_cpu_mem_usage": False}) if twice else loaded


def load_class_safely(model_class: type[ModelMixin], name_or_path: str | os.PathLike, **kwargs) -> ModelMixin:
    """
    As [`load_safely`], but only for a config that names this class: another's would fail for values that have nothing
    to do with the fault, or be read as what it is not. A `FileNotFoundError` if there is no config.
    """
    place, needed = Path(name_or_path, kwargs.get("subfolder") or ""), model_class.__name__
    try:
        config = model_class.load_config(name_or_path, subfolder=kwargs.get("subfolder"))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{place} provides no {model_class.config_name} ({first_line(error)}); name the folder of a saved "
            f"{needed}, or one on the Hub."
        ) from error
    found = config.get("_class_name", "model without a name")
    if found != needed:
        raise ValueError(
            f"{place / model_class.config_name} is that of a {found}, but a {needed} is needed; name one."
        )
    return load_safely(model_class.from_pretrained, name_or_path, **kwargs)


class SafeLoadingMixin:
    """In front of [`ModelMixin`] or [`DiffusionPipeline`]: reads safetensors only, and all weights of the config."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> Self:
        """As [`load_safely`]; models are in eval mode."""
        return load_safely(super().from_pretrained, pretrained_model_name_or_path, **kwargs)


def _check_complete(place: Path, component) -> None:
    names = [name for name, tensor in getattr(component, "named_parameters", dict)() if tensor.is_meta]
    if names:
        more = f" and {len(names) - 1} more are" if len(names) > 1 else " is"
        raise ValueError(_MISFIT.format(place, f"{min(names)}{more} not there"))

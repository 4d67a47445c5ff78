"""`from_pretrained` that reads safetensors only and names the weights that don't fit."""

import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Self

from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import HfApi


PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def load_model_safely(from_pretrained: Callable, name_or_path: str | os.PathLike, **kwargs) -> ModelMixin | tuple:
    r"""
    Calls `from_pretrained` of a model of diffusers, with two differences: pickled weights are refused, and missing
    ones are an error.

    Args:
        from_pretrained (`Callable`): The class's method.
        name_or_path (`str`): A folder, or a name on the Hub.
        kwargs: As in diffusers.

    Returns:
        What `from_pretrained` returns.

    Raises:
        `ValueError`: For pickled weights, or a weight that is missing or shaped otherwise than the config says.
        `OSError`: If there are no weights.
    """
    kwargs = _safe_options(kwargs)
    place = Path(name_or_path, kwargs.get("subfolder") or "")
    with_info = kwargs.pop("output_loading_info", False)
    try:
        model, info = from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    except OSError:
        _refuse_pickles(name_or_path, kwargs.get("subfolder") or "", kwargs)
        raise
    except (ValueError, RuntimeError) as error:
        fault = str(error).split(". If you want")[0].removeprefix("Cannot load").strip().removeprefix("because ")
        if " shape " not in fault:
            raise
        raise ValueError(
            f"the weights of {place} are not those of its config.json: {fault}; restore the one or the other."
        ) from error
    _refuse_missing(place, {*info["missing_keys"], *_without_values(model, kwargs)})
    return (model, info) if with_info else model


def load_class_safely(model_class: type[ModelMixin], name_or_path: str | os.PathLike, **kwargs) -> ModelMixin:
    r"""
    Calls `from_pretrained` of a class as [`load_model_safely`] does, but only for a config that names this class:
    another's would fail for values that have nothing to do with the fault, or be read as what it is not.

    Args:
        model_class (`type`): A class of models.
        name_or_path (`str`): A folder, or a name on the Hub.
        kwargs: As in diffusers.

    Returns:
        `ModelMixin`: The model.

    Raises:
        `FileNotFoundError`: If a folder or its config does not exist.
        `ValueError`: If the config is that of another class, and as in [`load_model_safely`].
        `OSError`: If the Hub does not provide the config, or there are no weights.
    """
    check_local(name_or_path, f"a saved {model_class.__name__}")
    place = Path(name_or_path, kwargs.get("subfolder") or "")
    if Path(name_or_path).is_dir() and not (place / model_class.config_name).is_file():
        raise FileNotFoundError(
            f"{place} holds no {model_class.config_name}; name the folder of a saved {model_class.__name__}."
        )
    names = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
    try:
        config = model_class.load_config(name_or_path, **{name: kwargs[name] for name in names if name in kwargs})
    except OSError as error:
        if Path(name_or_path).is_dir():
            raise
        reason = str(error).splitlines()[0].rstrip(".")
        raise FileNotFoundError(
            f"{place} is no folder, and the Hub could not provide it ({reason}); check the path, or the name and the "
            "network."
        ) from error
    found = config.get("_class_name")
    if found != model_class.__name__:
        found = "names no class" if found is None else f"is that of a {found}"
        raise ValueError(
            f"{place / model_class.config_name} {found}, but a {model_class.__name__} is needed; name the "
            "folder of one."
        )
    return load_model_safely(model_class.from_pretrained, name_or_path, **kwargs)


def check_local(name_or_path: str | os.PathLike, expected: str) -> None:
    """A `FileNotFoundError` for what is neither a folder nor may be a name on the Hub; `expected` says what is."""
    if not Path(name_or_path).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name_or_path)):
        raise FileNotFoundError(f"{name_or_path} does not exist; name {expected} or a model on the Hub.")


def load_pipeline_safely(from_pretrained: Callable, name_or_path: str | os.PathLike, **kwargs) -> DiffusionPipeline:
    r"""
    Calls `from_pretrained` of a pipeline, with the differences of [`load_model_safely`] for every component.

    Args:
        from_pretrained (`Callable`): The class's method.
        name_or_path (`str`): A folder, or a name on the Hub.
        kwargs: As in diffusers. With `low_cpu_mem_usage=False` all weights are read twice.

    Returns:
        [`DiffusionPipeline`].

    Raises:
        `ValueError`: For pickled weights, or a weight that is missing or shaped otherwise than its config says.
        `OSError`: If there are no weights.
    """
    kwargs = _safe_options(kwargs)
    if not kwargs["low_cpu_mem_usage"]:
        # Then weights that are not read have values too, and nothing tells which they are: a first reading does.
        load_pipeline_safely(from_pretrained, name_or_path, **kwargs | {"low_cpu_mem_usage": True})
    try:
        pipeline = from_pretrained(name_or_path, **kwargs)
    except OSError:
        for name in _component_names(name_or_path, kwargs):
            _refuse_pickles(name_or_path, name, kwargs)
        raise
    for name, component in pipeline.components.items():
        _refuse_missing(f"{name} in {name_or_path}", _without_values(component, kwargs))
    return pipeline


class SafeModelMixin:
    """In front of [`ModelMixin`]: reads safetensors only, and all weights that the config asks for."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> Self:
        """As [`load_model_safely`]; the model is in eval mode."""
        return load_model_safely(super().from_pretrained, pretrained_model_name_or_path, **kwargs)


class SafePipelineMixin:
    """In front of [`DiffusionPipeline`]: reads safetensors only, for every component."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> Self:
        """As [`load_pipeline_safely`]."""
        return load_pipeline_safely(super().from_pretrained, pretrained_model_name_or_path, **kwargs)


def _safe_options(kwargs: dict) -> dict:
    if kwargs.get("use_safetensors") is False:
        raise ValueError(
            "use_safetensors is False, but pickled weights are never read, as a pickle can run any code; leave it out."
        )
    return {"low_cpu_mem_usage": True} | kwargs | {"use_safetensors": True}


def _files(name_or_path: str | os.PathLike, subfolder: str, kwargs: dict) -> list[str]:
    """Names of the files in a folder, here or on the Hub; none where they can't be known."""
    folder = Path(name_or_path, subfolder)
    if folder.is_dir():
        return [path.name for path in folder.iterdir()]
    if Path(name_or_path).is_dir() or kwargs.get("local_files_only"):
        return []
    try:
        api = HfApi(token=kwargs.get("token"))
        paths = map(PurePosixPath, api.list_repo_files(str(name_or_path), revision=kwargs.get("revision")))
    except Exception:  # of the network, of the login or of the name: why the model can't be loaded either
        return []
    return [path.name for path in paths if path.parent == PurePosixPath(subfolder)]


def _component_names(name_or_path: str | os.PathLike, kwargs: dict) -> list[str]:
    if DiffusionPipeline.config_name not in _files(name_or_path, "", kwargs):
        return []
    options = {name: kwargs[name] for name in ("cache_dir", "revision", "token") if name in kwargs}
    index = DiffusionPipeline.load_config(name_or_path, **options)
    return [name for name, entry in index.items() if isinstance(entry, list) and name not in kwargs]


def _refuse_pickles(name_or_path: str | os.PathLike, subfolder: str, kwargs: dict) -> None:
    suffixes = {name: Path(name).suffix for name in sorted(_files(name_or_path, subfolder, kwargs))}
    pickles = [name for name, suffix in suffixes.items() if suffix in PICKLE_SUFFIXES]
    if pickles and ".safetensors" not in suffixes.values():
        raise ValueError(
            f"{Path(name_or_path, subfolder)} has its weights in {', '.join(pickles)}, and a pickle can run any code "
            "when it is read, so only safetensors are; convert it with torch.load(..., weights_only=True) and "
            "safetensors.torch.save_file."
        )


def _without_values(model, kwargs: dict) -> list[str]:
    """Parameters that nothing was read into; with a device map, they may have been put elsewhere."""
    if kwargs.get("device_map") is not None:
        return []
    return [name for name, tensor in getattr(model, "named_parameters", dict)() if tensor.is_meta]


def _refuse_missing(place: str | os.PathLike, names: set[str] | list[str]) -> None:
    if names:
        more = f" and {len(names) - 1} more are" if len(names) > 1 else " is"
        raise ValueError(
            f"the weights of {place} are not those of its config.json: {min(names)}{more} not there; restore the one "
            "or the other."
        )

"""`from_pretrained` that reads safetensors only and names the weights that don't fit."""

import json
import os
from pathlib import Path
from typing import Self


PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def refuse_pickles(folder: str | os.PathLike) -> None:
    r"""
    Makes sure that the weights in a folder are safetensors.

    Args:
        folder (`str`): Folder of a model; what is no folder passes.

    Raises:
        `ValueError`: If it holds pickled weights and no safetensors; names them.
    """
    folder = Path(folder)
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    pickles = [path.name for path in files if path.suffix in PICKLE_SUFFIXES]
    if pickles and not any(path.suffix == ".safetensors" for path in files):
        raise ValueError(
            f"{folder} has its weights in {', '.join(pickles)}, and a pickle can run any code when it is read, so "
            "only safetensors are; convert it with torch.load(..., weights_only=True) and safetensors.torch.save_file."
        )


def _safetensors_only(kwargs: dict) -> dict:
    if kwargs.get("use_safetensors") is False:
        raise ValueError(
            "use_safetensors is False, but pickled weights are never read, as a pickle can run any code; leave it out."
        )
    return kwargs | {"use_safetensors": True}


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more are" if names[1:] else " is"


class SafeModelMixin:
    """In front of [`ModelMixin`]: reads safetensors only, and all weights that the config asks for."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> Self:
        r"""
        As in diffusers, with two differences: pickled weights are refused, and missing ones are an error.

        Args:
            pretrained_model_name_or_path (`str`): A folder, or a name on the Hub.
            kwargs: As in diffusers.

        Returns:
            The model, in eval mode.

        Raises:
            `ValueError`: For pickled weights, or a weight that is missing or shaped otherwise than the config says.
            `OSError`: If there are no safetensors.
        """
        kwargs = _safetensors_only(kwargs)
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        refuse_pickles(folder)
        with_info = kwargs.pop("output_loading_info", False)
        try:
            model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        except (ValueError, RuntimeError) as error:
            fault = str(error).split(". If you want")[0].removeprefix("Cannot load").strip().removeprefix("because ")
            if " shape " not in fault:
                raise
            raise ValueError(
                f"the weights of {folder} are not those of its config.json: {fault}; restore the one or the other."
            ) from error
        # diffusers leaves missing weights without values, and warns.
        missing = sorted(info["missing_keys"])
        if missing:
            raise ValueError(
                f"the weights of {folder} are not those of its config.json: {missing[0]}{_and_more(missing)} not "
                "there; restore the one or the other."
            )
        return (model, info) if with_info else model


class SafePipelineMixin:
    """In front of [`DiffusionPipeline`]: reads safetensors only, for every component."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> Self:
        r"""
        As in diffusers, with two differences: pickled weights are refused, and missing ones are an error.

        Args:
            pretrained_model_name_or_path (`str`): A folder, or a name on the Hub.
            kwargs: As in diffusers.

        Returns:
            The pipeline.

        Raises:
            `ValueError`: For pickled weights, or a weight that is missing or shaped otherwise than its config says.
            `OSError`: If there are no safetensors.
        """
        kwargs = _safetensors_only(kwargs)
        index = Path(pretrained_model_name_or_path, "model_index.json")
        for name in json.loads(index.read_text()) if index.is_file() else ():
            refuse_pickles(index.parent / name)
        pipeline = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        for name, model in pipeline.components.items():
            # Of weights that are not there, diffusers leaves a place without values; a device map can do so too.
            missing = [key for key, tensor in getattr(model, "named_parameters", dict)() if tensor.is_meta]
            if missing and kwargs.get("device_map") is None:
                raise ValueError(
                    f"the weights of {name} in {pretrained_model_name_or_path} are not those of its config.json: "
                    f"{missing[0]}{_and_more(missing)} not there; restore the one or the other."
                )
        return pipeline

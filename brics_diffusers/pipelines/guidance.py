"""Classes of images, and guidance: predictions moved away from those of a weaker model.

Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) moves away from the prediction without a class,
autoguidance (Karras et al., arXiv 2406.02507) from that of a second, weaker model for the same class, or of
one that knows no classes.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from diffusers import UNet2DModel


ClassLabels = int | str | None | list[int | str | None]


@dataclass
class Guidance:
    """
    What a denoising is guided by: the class of each image (B,), or `None` for unconditional models; a scale, of which
    1 is the model's own prediction, 0 that of the weaker model, and more than 1 moves away from the latter; and the
    times in [0, 1] at which to guide, of which 1 is noise.
    """

    labels: torch.Tensor | None = None
    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def applies(self, timestep: torch.Tensor, num_train_timesteps: int) -> bool:
        """Whether predictions at a train step, on the CPU, are guided; the last train step is time 1."""
        low, high = self.interval
        return self.scale != 1 and low <= timestep.item() / max(num_train_timesteps - 1, 1) <= high


class GuidanceMixin:
    """Classes and guidance of a pipeline with `unet`, `guide`, `scheduler` and `config`."""

    @property
    def num_classes(self) -> int | None:
        """Classes that the diffusion model knows; `None` if it is unconditional."""
        embeddings = self.unet.config.num_class_embeds
        return None if embeddings is None else embeddings - 1  # the last one is "no class"

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in the order of their numbers; `None` if they have none."""
        id2label = self.config.id2label
        return None if id2label is None else [id2label[name] for name in sorted(id2label, key=int)]

    @property
    def labels(self) -> dict[str, int]:
        """The number of each class by its name, sorted by name."""
        return {name: number for number, name in sorted(enumerate(self.class_names or ()), key=lambda pair: pair[1])}

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        r"""
        Numbers of classes.

        Args:
            label (`str` or `list[str]`): Names.

        Returns:
            `list[int]`: as `class_labels` takes them.

        Raises:
            `ValueError`: For a name that is not known.
        """
        labels = self.labels
        names = [label] if isinstance(label, str) else list(label)
        for name in names:
            if name not in labels:
                nearest = difflib.get_close_matches(str(name), labels, n=1)
                advice = f"the nearest is {nearest[0]!r}" if nearest else f"give one of {', '.join(labels) or 'none'}"
                raise ValueError(f"{name!r} is no class of the model; {advice}.")
        return [labels[name] for name in names]

    def count_images(self, batch_size: int, class_labels: ClassLabels) -> int:
        """Images to make: one a label where a list is given and `batch_size` is left at 1."""
        return len(class_labels) if batch_size == 1 and isinstance(class_labels, (list, tuple)) else batch_size

    def draw_classes(self, num_images: int, generator: list[torch.Generator] | None) -> list[int] | None:
        """A class for each image by `default_class_weights` of the config, from its generator; `None` without them."""
        weights = self.config.default_class_weights
        if weights is None:
            return None
        weights = torch.tensor(weights, dtype=torch.float64)
        draws = []
        for one in generator or [None] * num_images:
            device = torch.device("cpu") if one is None else one.device
            dtype = torch.float32 if device.type == "mps" else torch.float64  # which mps does not have
            draws.append(torch.rand((), generator=one, device=device, dtype=dtype).cpu().double())
        shares = weights.cumsum(0) / weights.sum()
        return [min(int(torch.searchsorted(shares, draw, right=True)), len(weights) - 1) for draw in draws]

    def prepare_guidance(
        self,
        num_images: int,
        class_labels: ClassLabels = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
    ) -> Guidance:
        """
        Checks the arguments of guidance, which are those of `__call__`, for so many images. A `ValueError` if the
        model has no classes or none of this name or number, if their number is not that of the images, if there is
        nothing to guide by, or if the interval is none.
        """
        can_guide = self.num_classes is not None or self.guide is not None
        if guidance_scale is None:
            guidance_scale = self.config.default_guidance_scale if can_guide else 1.0
        elif guidance_scale != 1 and not can_guide:
            raise ValueError(
                f"guidance_scale is {guidance_scale}, but the model has neither classes nor a guide; leave it out."
            )
        interval = self.config.default_guidance_interval if guidance_interval is None else guidance_interval
        interval = (0.0, 1.0) if interval is None else interval
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(
                f"guidance_interval is {interval}; give two times (low, high) in [0, 1], of which 1 is noise."
            )
        labels = self._label_numbers(class_labels, num_images)
        if labels is not None and self.guide is None and set(labels) == {self.num_classes}:
            guidance_scale = 1.0  # "no class" would be guided by itself
        if labels is not None:
            labels = torch.tensor(labels).to(self._execution_device)
        return Guidance(labels, float(guidance_scale), tuple(interval))

    def _label_numbers(self, class_labels: ClassLabels, num_images: int) -> list[int] | None:
        if self.num_classes is None:
            if class_labels is not None:
                raise ValueError(
                    "class_labels are given, but the model was trained without classes; leave them out, or train one "
                    "with --class_conditional."
                )
            return None
        labels = list(class_labels) if isinstance(class_labels, (list, tuple)) else [class_labels]
        if len(labels) not in (1, num_images):
            raise ValueError(
                f"{len(labels)} class_labels are given for {num_images} images; give one an image, or one."
            )
        numbers = [self._label_number(label) for label in labels]
        return numbers * num_images if len(numbers) == 1 else numbers

    def _label_number(self, label: int | str | None) -> int:
        if label is None:
            return self.num_classes
        if isinstance(label, str):
            return self.get_label_ids(label)[0]
        if not isinstance(label, Integral) or not 0 <= label < self.num_classes:
            raise ValueError(
                f"class_labels holds {label!r}; give names, or numbers from 0 to {self.num_classes - 1}, or None for "
                "no class."
            )
        return int(label)

    def _predict(self, sample: torch.Tensor, timestep: torch.Tensor, guidance: Guidance, guided: bool) -> torch.Tensor:
        """The prediction for noised latents at a timestep, in their type."""

        def call(unet: UNet2DModel, sample: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
            classes = {} if labels is None else {"class_labels": labels}
            return unet(sample.to(unet.dtype), timestep, **classes).sample.to(sample.dtype)

        labels = guidance.labels
        if not guided:
            return call(self.unet, sample, labels)
        if self.guide is not None:
            of_guide = None if self.guide.config.num_class_embeds is None else labels
            strong, weak = call(self.unet, sample, labels), call(self.guide, sample, of_guide)
        else:
            both = torch.cat([labels, torch.full_like(labels, self.num_classes)])
            strong, weak = call(self.unet, torch.cat([sample, sample]), both).chunk(2)
        # Noise, v and clean latents are linear in one another at a timestep: guiding one is guiding the others.
        return weak + guidance.scale * (strong - weak)


def check_id2label(id2label: Mapping | None, unet: UNet2DModel) -> dict[int, str] | None:
    """
    Names of classes by number as a pipeline keeps them; numbers may be strings, as in JSON. A `ValueError` if numbers
    or names are not one for each of the model's classes, or embeddings are of another kind.
    """
    if unet.config.class_embed_type is not None:
        raise ValueError(
            f"unet has class_embed_type={unet.config.class_embed_type!r}; use a UNet with num_class_embeds alone."
        )
    if id2label is None:
        return None
    names = {int(number): str(name) for number, name in id2label.items()}
    count = unet.config.num_class_embeds
    if count is None or sorted(names) != list(range(count - 1)) or len(set(names.values())) != len(names):
        raise ValueError(
            f"id2label names {len(names)} classes, but unet has num_class_embeds={count}; number different names from "
            "0, and let the UNet have one embedding more, for no class."
        )
    return dict(sorted(names.items()))


def check_class_weights(weights: Sequence[float] | None, unet: UNet2DModel) -> list[float] | None:
    """Weights of classes as a pipeline keeps them; a `ValueError` unless there is one a class, and one above 0."""
    count = unet.config.num_class_embeds
    if weights is None:
        return None
    if count is None or len(weights) != count - 1 or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise ValueError(
            f"default_class_weights is {weights}, but unet has num_class_embeds={count}; give one number for each "
            "class, none below 0 and not all 0."
        )
    return [float(weight) for weight in weights]


def check_guide(guide: UNet2DModel | None, unet: UNet2DModel) -> None:
    """Refuses a guide for other key codes or classes than the UNet's, with a `ValueError`; it may know no classes."""
    names: Sequence[str] = ("in_channels", "out_channels", "num_class_embeds", "class_embed_type")
    for name in names if guide is not None else ():
        ours, theirs = (getattr(model.config, name) for model in (unet, guide))
        if ours != theirs and (name, theirs) != ("num_class_embeds", None):
            raise ValueError(f"guide has {name}={theirs}, but unet has {name}={ours}; use a guide trained alike.")

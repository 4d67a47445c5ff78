"""PSNR, SSIM and LPIPS of reconstructions, image by image, by the protocols `standard` or `paper`."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from accelerate.utils import gather_object
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from tqdm.auto import tqdm

from ..data import UnreadableLog
from ..models import BricsAutoencoder
from ..utils.compositing import as_rgb


# What a figure means depends on these sentences, so they are printed by --help and written into every result.
PROTOCOLS = {
    "standard": (
        "The autoencoder is in eval mode: key codes are not perturbed. Reconstructions are clipped to [-1, 1]. PSNR "
        "and SSIM compare images mapped to [0, 1] with a data range of 1; LPIPS takes images in [-1, 1]."
    ),
    "paper": (
        "A BricsAutoencoder is in training mode: its key codes are perturbed (or drawn from the posterior, with KL "
        "regularisation) by noise that depends on the seed and the image's row alone. Reconstructions are not "
        "clipped; PSNR and SSIM compare images whose nominal range is [-1, 1]. Their data range is inferred as "
        "torchmetrics does (for PSNR, its releases that still inferred one), but from one image at a time, so that it "
        "does not depend on the batch: for PSNR the largest minus the smallest value of the original, for SSIM the "
        "larger of that and the same of the reconstruction. LPIPS is that of the network alex and takes the images as "
        "they are."
    ),
}


def image_metrics(sample: torch.Tensor, target: torch.Tensor, protocol: str = "standard") -> dict[str, torch.Tensor]:
    """
    PSNR in dB and SSIM of each image, float32 (B,), of reconstructions and images (B, C, H, W), by a protocol as
    [`PROTOCOLS`] describes it. SSIM has an 11 x 11 Gaussian window of standard deviation 1.5 and averages all pixels,
    those at the border over reflected windows. PSNR is infinite for a perfect reconstruction, and minus infinity where
    the range is inferred from an image of one colour.
    """
    _check_protocol(protocol)
    sample, target = sample.float(), target.float()
    if protocol == "paper":
        ranges = (target.amax(dim=(1, 2, 3)) - target.amin(dim=(1, 2, 3))).tolist()
        psnr = [
            _psnr(a[None], b[None], data_range) if data_range > 0 else sample.new_full((1,), -torch.inf)
            for a, b, data_range in zip(sample, target, ranges, strict=True)
        ]
        ssim = [
            structural_similarity_index_measure(a[None], b[None]).view(1) for a, b in zip(sample, target, strict=True)
        ]
        return {"psnr": torch.cat(psnr), "ssim": torch.cat(ssim)}
    sample, target = (images.clamp(-1, 1) / 2 + 0.5 for images in (sample, target))
    ssim = structural_similarity_index_measure(sample, target, data_range=1.0, reduction="none")
    return {"psnr": _psnr(sample, target, 1.0), "ssim": ssim.reshape(-1)}


def _psnr(sample: torch.Tensor, target: torch.Tensor, data_range: float) -> torch.Tensor:
    return peak_signal_noise_ratio(sample, target, data_range=data_range, reduction="none", dim=(1, 2, 3))


def _check_protocol(protocol: str) -> None:
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol is {protocol!r}; it must be one of {', '.join(map(repr, PROTOCOLS))}.")


def row_generator(seed: int, row: int) -> torch.Generator:
    """
    A random generator for one image, by its row in the collection, on the CPU, so that what it draws depends neither
    on batches nor on processes.
    """
    state = np.random.SeedSequence([seed, row]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def image_batches(
    loader: Iterable[dict],
    device: torch.device | str = "cpu",
    unreadable: UnreadableLog | None = None,
    description: str = "Reading",
    progress: bool = True,
    least: int = 1,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """
    The images (B, C, H, W) of a loader of `collate_images`, B > 0, and their rows (B,) on the CPU, with a progress bar
    and a note of the files that could not be read; a `ValueError` at the end, if there were fewer images than `least`.
    """
    count = 0
    for batch in tqdm(loader, desc=description, disable=not progress, leave=False):
        if unreadable is not None:
            unreadable.add(batch["unreadable"], batch["reasons"])
        count += batch["index"].numel()
        if batch["index"].numel() > 0:
            yield batch["pixel_values"].to(device), batch["index"]
    if count < least:
        raise ValueError(f"{_readable(count, unreadable)}; at least {least} are needed, so give more images.")


def _readable(count: int, unreadable: UnreadableLog | None) -> str:
    return f"{count} readable images" + (f" ({unreadable.summary()})" if unreadable is not None else "")


def reconstruct(
    autoencoder, images: torch.Tensor, rows: torch.Tensor, perturb: bool = False, seed: int = 0
) -> torch.Tensor:
    """
    Reconstructions (B, C, H, W), not clipped, with or without the noise that key codes have in training (Sec. 3.4,
    App. A.4), which follows from the images' rows (B,) and the seed. The model is any module whose `forward(x).sample`
    is an image; those that are no [`BricsAutoencoder`] have no noise and run as they are.
    """
    if not (perturb and isinstance(autoencoder, BricsAutoencoder)):
        return autoencoder(images).sample
    was_training = autoencoder.training
    autoencoder.train()  # the noise is all that it changes: neither encoder nor decoder has dropout or batch norm
    try:
        return autoencoder(images, generator=[row_generator(seed, row) for row in rows.tolist()]).sample
    finally:
        autoencoder.train(was_training)


@torch.no_grad()
def reconstruction_metrics(
    autoencoder,
    loader: Iterable[dict],
    perceptual_metric=None,
    unreadable: UnreadableLog | None = None,
    progress: bool = True,
    protocol: str = "standard",
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """
    Metrics of an autoencoder's reconstructions over a loader: `"index"` and one float32 tensor a metric, each (N,) on
    the CPU. The model is any module in eval mode whose `forward(x).sample` is an image.

    A `perceptual_metric` (`load_perceptual_network`) sees RGBA on white, and adds its distance as its network calls
    it, `"lpips"` for LPIPS. `protocol` is one of [`PROTOCOLS`], `seed` that of the perturbation of `"paper"`.
    """
    _check_protocol(protocol)
    device = next(autoencoder.parameters()).device
    batches = []
    for target, index in image_batches(loader, device, unreadable, "Reconstructing", progress, least=0):
        sample = reconstruct(autoencoder, target, index, protocol == "paper", seed)
        metrics = image_metrics(sample, target, protocol)
        if perceptual_metric is not None:
            compared = sample.float() if protocol == "paper" else sample.float().clamp(-1, 1)
            name = getattr(perceptual_metric, "metric_name", "lpips")
            metrics[name] = perceptual_metric(as_rgb(compared), as_rgb(target)).flatten()
        batches.append({"index": index} | {name: value.cpu() for name, value in metrics.items()})
    if not batches:
        return {"index": torch.empty(0, dtype=torch.int64)}
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def gather_by_index(metrics: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    The metrics of all processes, of which some may have no images, in the order of the collection, so that sums over
    them come out the same.
    """
    shares = gather_object([metrics])
    names = max(shares, key=len)
    gathered = {name: torch.cat([share[name] for share in shares if name in share]) for name in names}
    order = gathered["index"].argsort()
    return {name: values[order] for name, values in gathered.items()}


def summarize_metrics(metrics: dict[str, torch.Tensor], unreadable: UnreadableLog | None = None) -> dict[str, dict]:
    """
    Mean and two standard deviations over the images, the form of the paper's tables: for each metric `"mean"`,
    `"two_std"` (of a sample: divided by N - 1), `"images"` in both, and `"left_out"`, the images whose value is not
    finite: PSNR of a perfect reconstruction, and what has no inferred data range. Mean and deviation are `None` if
    fewer than two images are left. A `ValueError` if there are fewer than two images, or a reconstruction is not a
    number.
    """
    count = metrics["index"].numel()
    if count < 2:
        raise ValueError(
            f"{_readable(count, unreadable)}; a standard deviation needs at least 2, so give more images."
        )
    broken = metrics["index"][metrics["psnr"].isnan()].tolist()
    if broken:
        raise ValueError(
            f"reconstructions of {len(broken)} images hold NaN, the first in row {broken[0]}; expected finite images, "
            "so check the model's weights."
        )
    return {name: _summary(values.double()) for name, values in metrics.items() if name != "index"}


def _summary(values: torch.Tensor) -> dict:
    finite = values[values.isfinite()]
    enough = finite.numel() > 1
    return {
        "mean": finite.mean().item() if enough else None,
        "two_std": 2 * finite.std().item() if enough else None,
        "images": finite.numel(),
        "left_out": values.numel() - finite.numel(),
    }

"""Reconstruction metrics, image by image."""

import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from tqdm.auto import tqdm

from .data import UnreadableLog


def image_metrics(sample: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    r"""
    PSNR and SSIM of each image: both batches clipped to [-1, 1] and mapped to [0, 1], data range 1. SSIM has an 11 x
    11 Gaussian window of standard deviation 1.5 and averages all pixels, those at the border over reflected windows.

    Args:
        sample (`torch.Tensor` of shape (B, 3, H, W)): Reconstructions.
        target (`torch.Tensor` of shape (B, 3, H, W)): Images in [-1, 1].

    Returns:
        `dict`: `"psnr"` in dB and `"ssim"`, float32 of shape (B,).
    """
    sample, target = (images.float().clamp(-1, 1) / 2 + 0.5 for images in (sample, target))
    psnr = peak_signal_noise_ratio(sample, target, data_range=1.0, reduction="none", dim=(1, 2, 3))
    ssim = structural_similarity_index_measure(sample, target, data_range=1.0, reduction="none")
    return {"psnr": psnr, "ssim": ssim.reshape(-1)}


@torch.no_grad()
def reconstruction_metrics(
    autoencoder, loader, lpips_metric=None, unreadable: UnreadableLog | None = None, progress: bool = True
) -> dict[str, torch.Tensor]:
    r"""
    Metrics of an autoencoder's reconstructions over a loader. The autoencoder should be in eval mode.

    Args:
        autoencoder ([`BricsAutoencoder`] or any module whose `forward(x).sample` is an image): The model.
        loader (`Iterable[dict]`): Batches with `pixel_values` in [-1, 1] and `index`.
        lpips_metric (`nn.Module`, *optional*): Result of `load_lpips`; adds `"lpips"`.
        unreadable (`UnreadableLog`, *optional*): Notes the files that the loader could not read.
        progress (`bool`, defaults to `True`): Whether to show a progress bar.

    Returns:
        `dict`: `"index"` and one float32 tensor a metric, each of shape (N,) on the CPU.
    """
    device = next(autoencoder.parameters()).device
    batches = []
    for batch in tqdm(loader, desc="Reconstructing", disable=not progress, leave=False):
        if unreadable is not None:
            unreadable.add(batch["unreadable"])
        if batch["index"].numel() == 0:
            continue
        target = batch["pixel_values"].to(device)
        sample = autoencoder(target).sample
        metrics = image_metrics(sample, target)
        if lpips_metric is not None:
            metrics["lpips"] = lpips_metric(sample.float().clamp(-1, 1), target).flatten()
        batches.append({"index": batch["index"]} | {name: value.cpu() for name, value in metrics.items()})
    if not batches:
        return {"index": torch.empty(0, dtype=torch.int64)}
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

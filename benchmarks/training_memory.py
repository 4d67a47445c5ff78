"""Peak memory of one training step of both stages for the paper's presets, computed on tensors without storage.

Every storage that two steps allocate in `FakeTensorMode` is counted while it is alive: parameters, gradients, Adam's
moments, averaged weights and activations in float32, with LPIPS, discriminator and R1 in stage one. Allocator slack,
CUDA's own context and workspaces are not in it.
"""

import argparse
import weakref
from pathlib import Path

import torch
import yaml
from diffusers import UNet2DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from brics_diffusers import BricsAutoencoder, BricsDiscriminator
from brics_diffusers.losses import DiscriminatorLoss, adversarial_loss, reconstruction_loss
from brics_diffusers.perceptual import load_lpips


CONFIGS = Path(__file__).parents[1] / "training" / "configs"
PRESETS = ("church-32x32x4", "church-32x32x8", "church-64x64x4", "ffhq-16x16x8", "ffhq-16x16x16")


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all storages that are alive and remembers the largest sum."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._see, result)
        return result

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.alive:
            self.alive[storage] = True
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.now -= size


def two_steps(step, optimizers: list[torch.optim.Optimizer]) -> None:
    """The second step has Adam's moments from the start."""
    for _ in range(2):
        step()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def stage_one(config: dict, batch_size: int, checkpointing: bool) -> None:
    autoencoder = BricsAutoencoder(**config["autoencoder"])
    if checkpointing:
        autoencoder.enable_gradient_checkpointing()
    critic = DiscriminatorLoss(BricsDiscriminator(sample_size=autoencoder.config.sample_size))
    lpips_metric = load_lpips("vgg", pretrained=False)
    averaged = [torch.empty_like(parameter) for parameter in autoencoder.parameters()]  # noqa: F841
    optimizers = [torch.optim.Adam(model.parameters(), fused=True) for model in (autoencoder, critic)]

    def step():
        size = autoencoder.config.sample_size
        images = torch.rand(batch_size, 3, size, size) * 2 - 1
        critic.requires_grad_(False)
        sample = autoencoder(images, return_dict=False)[0]
        loss, _ = reconstruction_loss(sample, images, perceptual_metric=lpips_metric)
        (loss + adversarial_loss(critic.discriminator(sample))).backward()
        critic.requires_grad_(True)
        critic(images, sample.detach(), penalize=True)[0].backward()

    two_steps(step, optimizers)


def stage_two(config: dict, batch_size: int, checkpointing: bool) -> None:
    with torch.device("meta"):
        channels, height, width = BricsAutoencoder(**config["autoencoder"]).key_code_shape
    unet = UNet2DModel(sample_size=height, in_channels=channels, out_channels=channels, **config["unet"])
    if checkpointing:
        unet.enable_gradient_checkpointing()
    averaged = [torch.empty_like(parameter) for parameter in unet.parameters()]  # noqa: F841
    optimizer = torch.optim.Adam(unet.parameters(), fused=True)

    def step():
        latents = torch.randn(batch_size, channels, height, width)
        unet(latents, torch.zeros(batch_size, dtype=torch.int64)).sample.square().mean().backward()

    two_steps(step, [optimizer])


def peak_memory(stage, config: dict, batch_size: int, checkpointing: bool) -> int:
    """Bytes at the peak of two training steps; `stage` is `stage_one` or `stage_two`."""
    with FakeTensorMode(), PeakMemory() as memory:
        stage(config, batch_size, checkpointing)
    return memory.peak


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="*", default=PRESETS)
    parser.add_argument("--stage_one_batch_sizes", nargs="*", type=int, default=[1, 4, 8])
    parser.add_argument("--stage_two_batch_sizes", nargs="*", type=int, default=[1, 8, 64])
    args = parser.parse_args()
    columns = [("one", stage_one, size) for size in args.stage_one_batch_sizes]
    columns += [("two", stage_two, size) for size in args.stage_two_batch_sizes]
    print("Computed peak memory in GiB, float32; in brackets with --gradient_checkpointing.\n")
    print("| preset | " + " | ".join(f"stage {stage}, batch {size}" for stage, _, size in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for preset in args.presets:
        config = yaml.safe_load((CONFIGS / f"{preset}.yaml").read_text())
        cells = []
        for _, stage, size in columns:
            values = [peak_memory(stage, config, size, checkpointing) / 2**30 for checkpointing in (False, True)]
            cells.append("{:.1f} ({:.1f})".format(*values))
        print(f"| {preset} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

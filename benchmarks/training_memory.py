"""Peak memory and hours of training of both stages for presets, computed on tensors without storage, or measured.

Every storage that two steps allocate in `FakeTensorMode` is counted while it is alive: parameters, gradients, Adam's
moments, averaged weights and activations in float32, with LPIPS, discriminator and R1 in stage one. Allocator slack,
CUDA's own context and workspaces are not in it. `--hours` also counts the operations of matrix products, convolutions
and attention, and divides those of all steps by what a GPU is taken to get done, `--teraflops`; discriminator and R1
are counted at every step, so stage one takes less. `--device cuda` takes the two steps on a GPU, in float32, and says
what its allocator held at most: all of the above and the workspaces of kernels, but not CUDA's own context.
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
from torch.utils.flop_counter import flop_registry

from brics_diffusers import BricsAutoencoder
from brics_diffusers.metrics.perceptual import load_lpips
from brics_diffusers.training_utils.adversary import build_discriminator
from brics_diffusers.training_utils.losses import DiscriminatorLoss, adversarial_loss, reconstruction_loss


CONFIGS = Path(__file__).parents[1] / "training" / "configs"
PRESETS = ("church-32x32x4", "church-32x32x8", "church-64x64x4", "ffhq-16x16x8", "ffhq-16x16x16")


class Cost(TorchDispatchMode):
    """
    Counts the bytes of all storages that are alive and remembers the largest sum; counts multiplications and additions
    of matrix products, convolutions and attention.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.operations = 0
        self.alive = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._see, result)
        if function._overloadpacket in flop_registry:
            self.operations += flop_registry[function._overloadpacket](*args, **(kwargs or {}), out_val=result)
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
    kind = config["train_autoencoder"].get("discriminator_type", "stylegan2")
    critic = DiscriminatorLoss(build_discriminator(kind, autoencoder, config.get("discriminator", {})))
    lpips_metric, device = load_lpips("vgg", pretrained=False), torch.get_default_device()
    if device.type != "cpu":  # fake tensors don't move
        lpips_metric.to(device)
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


def two_steps_cost(stage, config: dict, batch_size: int, checkpointing: bool = False) -> Cost:
    """Cost of two training steps; `stage` is `stage_one` or `stage_two`."""
    with FakeTensorMode(), Cost() as cost:
        stage(config, batch_size, checkpointing)
    return cost


def peak_memory(stage, config: dict, batch_size: int, checkpointing: bool, device: str) -> float:
    """Peak of two training steps in GiB: computed, unless the device is a GPU."""
    if device == "cpu":
        return two_steps_cost(stage, config, batch_size, checkpointing).peak / 2**30
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with torch.device(device):
        stage(config, batch_size, checkpointing)
    return torch.cuda.max_memory_allocated() / 2**30


def print_memory(presets: list[str], batch_sizes: dict, device: str) -> None:
    """Table of the peak memory by batch size; `batch_sizes` by stage."""
    columns = [(stage, size) for stage, sizes in batch_sizes.items() for size in sizes]
    how = "Computed" if device == "cpu" else f"Measured on {torch.cuda.get_device_name()}:"
    print(f"{how} peak memory in GiB, float32; in brackets with --gradient_checkpointing.\n")
    print("| preset | " + " | ".join(f"{STAGES[stage][0]}, batch {size}" for stage, size in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for preset in presets:
        config = yaml.safe_load((CONFIGS / f"{preset}.yaml").read_text())
        cells = []
        for stage, size in columns:
            values = [peak_memory(stage, config, size, checkpointing, device) for checkpointing in (False, True)]
            cells.append("{:.1f} ({:.1f})".format(*values))
        print(f"| {preset} | " + " | ".join(cells) + " |", flush=True)


def print_hours(presets: list[str], teraflops: float) -> None:
    """Table of the presets' own batch sizes and steps, what they need, and how long it takes."""
    print(f"Computed: peak memory in float32, and hours at {teraflops:g} x 10^12 operations a second.\n")
    columns = [f"{title}: {what}" for title, _ in STAGES.values() for what in ("batch", "steps", "GiB", "hours")]
    print("| preset | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for preset in presets:
        config = yaml.safe_load((CONFIGS / f"{preset}.yaml").read_text())
        cells = []
        for stage, (_, section) in STAGES.items():
            batch_size, steps = config[section]["train_batch_size"], config[section]["max_train_steps"]
            cost = two_steps_cost(stage, config, batch_size)
            hours = cost.operations / 2 * steps / (teraflops * 1e12) / 3600
            cells += [str(batch_size), f"{steps:,}", f"{cost.peak / 2**30:.1f}", f"{hours:.1f}"]
        print(f"| {preset} | " + " | ".join(cells) + " |", flush=True)


# Titles of the columns, and sections of the presets.
STAGES = {stage_one: ("stage one", "train_autoencoder"), stage_two: ("stage two", "train_key_codes")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="*", default=PRESETS)
    parser.add_argument("--stage_one_batch_sizes", nargs="*", type=int, default=[1, 4, 8])
    parser.add_argument("--stage_two_batch_sizes", nargs="*", type=int, default=[1, 8, 64])
    parser.add_argument("--hours", action="store_true", help="Memory and hours at the presets' own batch sizes.")
    parser.add_argument("--teraflops", type=float, default=10, help="10^12 operations that a GPU does in a second.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: measure.")
    args = parser.parse_args()
    if args.hours and args.device != "cpu":
        parser.error("--hours are computed; leave --device out")
    if args.hours:
        print_hours(args.presets, args.teraflops)
    else:
        print_memory(
            args.presets, {stage_one: args.stage_one_batch_sizes, stage_two: args.stage_two_batch_sizes}, args.device
        )


if __name__ == "__main__":
    main()

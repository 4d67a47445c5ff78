import pytest
import torch
import training_memory
from small_models import AUTOENCODER, UNET
from torch._subclasses.fake_tensor import FakeTensorMode

from brics_diffusers import BricsAutoencoder


def test_peak_is_of_what_is_alive_together():
    with FakeTensorMode(), training_memory.PeakMemory() as memory:
        a = torch.zeros(1000)
        b = a + 1
        a.add_(1)  # in place, and a view: no new storage
        view = b.view(10, 100)
        del a
        c = view * 2
        del b, view, c
    assert (memory.peak, memory.now) == (8000, 0)


def autoencoder_step(config, batch_size, checkpointing):
    """Stage one without LPIPS and discriminator, whose sizes are not those of a small model."""
    autoencoder = BricsAutoencoder(**config["autoencoder"])
    if checkpointing:
        autoencoder.enable_gradient_checkpointing()
    autoencoder(torch.rand(batch_size, 3, 32, 32)).sample.square().mean().backward()


@pytest.mark.parametrize("stage", [autoencoder_step, training_memory.stage_two])
def test_memory_grows_with_the_batch_and_falls_with_checkpointing(stage):
    config = {"autoencoder": AUTOENCODER, "unet": UNET}
    cases = ((1, False), (16, True), (16, False))
    small, saving, large = (training_memory.peak_memory(stage, config, *case) for case in cases)
    assert small < saving < large < 16 * small  # weights and Adam's moments don't grow

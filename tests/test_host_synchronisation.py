"""Nothing on a GPU makes the host wait: what is computed is traced with tensors that only claim to lie on one.

A copy between host and GPU waits unless it is asked not to, and so does reading a value of a GPU's tensor.
"""

import bench
import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from brics_diffusers import BricsAutoencoder, BricsDiscriminator, BricsKeyCodePipeline, CosineVariantScheduler
from brics_diffusers.pipelines.guidance import Guidance
from brics_diffusers.pipelines.sampling import SAMPLERS, with_scheduler
from brics_diffusers.training_utils.checkpoints import RunState
from brics_diffusers.training_utils.optimization import SkippedSteps, build_optimizer, step_if_finite


class Waits(TorchDispatchMode):
    """Notes the operators that would wait for a GPU."""

    def __init__(self, fake_mode: FakeTensorMode):
        super().__init__()
        self.fake_mode, self.found = fake_mode, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.name()
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_gpu = any(isinstance(tensor, FakeTensor) for tensor in given)
        if on_gpu and name == "aten::_local_scalar_dense":
            self.found.append(name)
            return 1
        if on_gpu or torch.device(kwargs.get("device") or "cpu").type == "cuda":
            with self.fake_mode:
                args, kwargs = tree_map_only(torch.Tensor, self.fake, (args, kwargs))
                result = function(*args, **kwargs)
        else:
            result = function(*args, **kwargs)
        devices = {leaf.device.type for leaf in [*given, *tree_leaves(result)] if isinstance(leaf, torch.Tensor)}
        if name in ("aten::_to_copy", "aten::copy_") and len(devices) == 2 and not kwargs.get("non_blocking"):
            self.found.append(name)
        return result

    def fake(self, tensor: torch.Tensor) -> FakeTensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake_mode.from_tensor(tensor)


@pytest.fixture
def fake_mode(monkeypatch):
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with mode:
            torch.empty(1, device="cuda").uniform_()
    except RuntimeError:
        if torch.__version__ >= "2.11":
            raise
        pytest.skip("torch before 2.11 asks for a driver even for what only claims to lie on a GPU")
    return mode


@pytest.fixture
def pipe(fake_mode):
    with fake_mode, torch.device("cuda"):
        autoencoder = BricsAutoencoder(**bench.TINY_AUTOENCODER).eval()
        channels, size, _ = autoencoder.key_code_shape
        unet = UNet2DModel(sample_size=size, in_channels=channels, out_channels=channels, **bench.TINY_UNET).eval()
    return BricsKeyCodePipeline(autoencoder, unet, CosineVariantScheduler())


def waits(fake_mode, function, *args) -> list[str]:
    with torch.no_grad(), Waits(fake_mode) as mode:
        function(*args)
    return mode.found


@pytest.mark.parametrize("sampler", SAMPLERS)
class TestLoop:
    def test_sampling(self, fake_mode, pipe, sampler):
        pipe = with_scheduler(pipe, *SAMPLERS[sampler])
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler.set_timesteps(3)
        with fake_mode, torch.device("cuda"):
            latents = torch.randn(2, *pipe.autoencoder.key_code_shape)
        arguments = (latents, pipe.scheduler.timesteps, None, 0.0, None, [])
        assert waits(fake_mode, pipe._denoise, *arguments) == []

    def test_inpainting(self, fake_mode, pipe, sampler):
        pipe = with_scheduler(pipe, *SAMPLERS[sampler])
        pipe.set_progress_bar_config(disable=True)
        with fake_mode, torch.device("cuda"):
            latents = torch.randn(2, *pipe.autoencoder.key_code_shape)
            renewed = torch.ones(2, 1, *latents.shape[2:], dtype=torch.bool)
        assert waits(fake_mode, pipe._renew, latents, 0.9, 3, 0.0, None, None, [], Guidance(), renewed) == []


def test_networks(fake_mode, pipe):
    with fake_mode, torch.device("cuda"):
        discriminator = BricsDiscriminator(sample_size=32)
        codes = torch.rand(2, *pipe.autoencoder.key_code_shape)
        images = torch.rand(2, 3, 32, 32)
    assert waits(fake_mode, pipe.autoencoder._decode, codes) == []
    assert waits(fake_mode, discriminator, images) == []


def test_waiting_is_noticed(fake_mode):
    with fake_mode, torch.device("cuda"):
        images = torch.rand(2)
    assert waits(fake_mode, lambda: images + torch.ones(2).to("cuda")) == ["aten::_to_copy"]
    assert waits(fake_mode, lambda: images + torch.ones(2).to("cuda", non_blocking=True)) == []


def test_steps_of_the_optimizer(fake_mode):
    with fake_mode, torch.device("cuda"):
        model, loss = torch.nn.Linear(2, 2), torch.zeros(())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(build_optimizer(model, 1e-3, 0.9, 0.99, 1e-8))
    skipped = SkippedSteps(RunState({}), limit=3, interval=10, output_dir="run")

    def step():
        skipped.state.global_step += 1
        skipped.add(step_if_finite(accelerator, [optimizer], 1.0, loss))

    assert waits(fake_mode, step) == [] and len(skipped.unread) == 1

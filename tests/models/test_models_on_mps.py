"""Apple's GPUs, where there is one: the whole package, for a start."""

import pytest
import torch

from brics_diffusers.training_utils.optimization import build_optimizer


pytestmark = pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs an Apple GPU (MPS)")


def test_decoding_and_a_training_step(autoencoder):
    codes = torch.rand(2, *autoencoder.key_code_shape)
    expected = autoencoder.decode(codes).sample
    autoencoder.to("mps")
    torch.testing.assert_close(autoencoder.decode(codes.to("mps")).sample.cpu(), expected, rtol=1e-3, atol=1e-3)
    optimizer = build_optimizer(autoencoder.train(), 1e-3, 0.9, 0.99, 1e-15)
    autoencoder(torch.zeros(2, *autoencoder.sample_shape, device="mps")).sample.square().mean().backward()
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in autoencoder.parameters())


def test_sampling(pipe):
    expected = pipe(2, num_inference_steps=3, generator=torch.manual_seed(0), output_type="np").images
    images = pipe.to("mps")(2, num_inference_steps=3, generator=torch.manual_seed(0), output_type="np").images
    assert abs(images - expected).max() < 0.02

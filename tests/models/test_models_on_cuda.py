"""Models, kernels and pipeline on a GPU against the same on the CPU in float32, in every precision."""

import copy

import pytest
import torch
from test_lookup_operator import TOLERANCES, make_case, run

from brics_diffusers.models.grids import lookup_triton
from brics_diffusers.models.grids.lookup_operator import retrieval_implementation


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DTYPES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def float32_convolutions():
    """No TF32: it has 10 bits, fewer than the tolerances of float32 ask for. Products of matrices have none anyway."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def on_gpu(grids, keys):
    return copy.deepcopy(grids).cuda(), keys.detach().cuda().requires_grad_()


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return ((result.detach().double().cpu() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("implementation", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(24))
def test_lookup_in_value_and_gradient(seed, dtype, implementation):
    if implementation == "triton":
        pytest.importorskip("triton")
    grids, keys = make_case(seed, torch.float32, dtype)
    size = (grids.num_groups, grids.num_features, len(keys), keys.shape[2] * keys.shape[3])
    upstream = torch.randn(size).to(dtype)
    expected = run("reference", grids, keys, upstream)
    results = run(implementation, *on_gpu(grids, keys), upstream.cuda())
    for result, exact, tolerance in zip(results, expected, TOLERANCES[dtype], strict=True):
        torch.testing.assert_close(result.cpu(), exact, rtol=tolerance, atol=tolerance)


def test_triton_is_chosen_and_has_not_failed():
    pytest.importorskip("triton")
    for dtype in DTYPES:
        for seed in (4, 5):  # a key and two keys
            assert retrieval_implementation(*on_gpu_tensors(seed, dtype)) == "triton"
    assert not lookup_triton._failed


def on_gpu_tensors(seed, dtype):
    grids, keys = on_gpu(*make_case(seed, torch.float32, dtype))
    return keys, grids.entries


def test_lookup_with_deterministic_gradients(monkeypatch):
    grids, keys = on_gpu(*make_case(4))
    upstream = torch.randn(grids.num_groups, grids.num_features, len(keys), keys.shape[2] * keys.shape[3]).cuda()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run(None, grids, keys, upstream)[2] for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES)
def test_autoencoder(autoencoder, dtype):
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    codes = autoencoder.encode(images).key_codes.detach()
    expected = autoencoder.decode(codes).sample.detach()
    model = autoencoder.to("cuda", dtype)
    assert relative_error(model.encode(images.to("cuda", dtype)).key_codes, codes) < DTYPES[dtype]
    assert relative_error(model.decode(codes.to("cuda", dtype)).sample, expected) < 2 * DTYPES[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_under_autocast(autoencoder, dtype):
    autoencoder.train().requires_grad_(True)
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    reference = copy.deepcopy(autoencoder)
    reference.register_to_config(key_noise_scale=0.0)
    autoencoder.register_to_config(key_noise_scale=0.0)
    (reference(images).sample - images).square().mean().backward()
    autoencoder.cuda()
    images = images.cuda()
    with torch.autocast("cuda", dtype):
        output = autoencoder(images).sample
    (1024 * (output.float() - images).square().mean()).backward()
    errors = [
        relative_error(weight.grad / 1024, exact.grad)
        for weight, exact in zip(autoencoder.parameters(), reference.parameters(), strict=True)
        if exact.grad is not None and exact.grad.norm() > 1e-6
    ]
    assert len(errors) > 20 and sorted(errors)[len(errors) // 2] < 10 * DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_pipeline(pipe, dtype):
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    arguments = {"num_inference_steps": 4, "output_type": "pt"}
    expected = pipe(2, latents=noise, generator=torch.Generator().manual_seed(1), **arguments).images
    pipe.to("cuda", dtype)
    images = pipe(2, latents=noise.cuda(), generator=torch.Generator().manual_seed(1), **arguments).images
    assert images.is_cuda and relative_error(images, expected) < 4 * DTYPES[dtype]

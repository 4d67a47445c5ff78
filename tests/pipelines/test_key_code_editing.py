"""Variations, interpolations and inpainting of images by the pipeline."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image

from brics_diffusers import CosineVariantScheduler
from brics_diffusers.pipelines.latents import equal_generators, key_codes_to_latents


SHAPE = (2, 3, 32, 32)
# Ancestral and deterministic, one step and several, noise levels by alpha-bar and by sigma, one and two calls a step.
SCHEDULERS = [
    "CosineVariantScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
]
FROM_THE_START_ONLY = ["PNDMScheduler", "LMSDiscreteScheduler"]
# These end with the noise of train step 0, of standard deviation 0.034.
ENDS_WITH_NOISE = ["DEISMultistepScheduler", "PNDMScheduler"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def use_scheduler(pipe, name, **options):
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)


@pytest.fixture
def images():
    return torch.rand(SHAPE, generator=seeded(5))


@pytest.fixture
def clean(pipe, images):
    """The images' latents, (2, 4, 8, 8)."""
    with torch.no_grad():
        return key_codes_to_latents(pipe.autoencoder.encode(images * 2 - 1).key_codes, 2.0)


@pytest.fixture
def masks():
    """(2, 1, 32, 32): a square that reaches by one pixel into a row of cells, and a single pixel."""
    masks = torch.zeros(2, 1, 32, 32)
    masks[0, :, 8:17, 4:16] = 1
    masks[1, :, 31, 0] = 1
    return masks


@pytest.fixture
def renewed():
    """The same in cells of 4 x 4 pixels, (2, 1, 8, 8)."""
    renewed = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    renewed[0, :, 2:5, 1:4] = True
    renewed[1, :, 7, 0] = True
    return renewed


def assert_clean(latents, clean, name):
    torch.testing.assert_close(latents, clean, rtol=0, atol=0.15 if name in ENDS_WITH_NOISE else 1e-3)


class PerfectDenoiser:
    """
    Stands in for the UNet's forward: the noise in latents whose clean ones are known. It keeps the noise of every
    call, which is standard normal if the latents have the noise level that belongs to the timestep.
    """

    def __init__(self, clean, alphas_cumprod):
        self.clean, self.noises, self.calls = clean, [], 0
        self.log_ratio = (alphas_cumprod / (1 - alphas_cumprod)).log().double().numpy()

    def __call__(self, sample, timestep):
        self.calls += 1
        # Solvers have timesteps between those of training.
        log_ratio = torch.tensor(np.interp(float(timestep), np.arange(len(self.log_ratio)), self.log_ratio))
        signal, noise = log_ratio.sigmoid().sqrt(), (-log_ratio).sigmoid().sqrt()
        self.noises.append(((sample - signal * self.clean) / noise).float())
        return UNet2DOutput(sample=self.noises[-1].to(sample.dtype))


@pytest.fixture
def perfect(pipe, clean, monkeypatch):
    denoiser = PerfectDenoiser(clean, CosineVariantScheduler().alphas_cumprod)
    monkeypatch.setattr(pipe.unet, "forward", denoiser)
    return denoiser


class TestPerfectDenoiser:
    @pytest.mark.parametrize("strength", [0.3, 1.0])
    @pytest.mark.parametrize("name", SCHEDULERS)
    def test_vary_gives_the_clean_code(self, pipe, images, clean, perfect, name, strength):
        use_scheduler(pipe, name)
        options = {"strength": strength, "num_inference_steps": 10, "output_type": "latent"}
        latents = pipe.vary(images, generator=seeded(), **options).images
        assert_clean(latents, clean, name)
        steps = round(10 * strength)
        assert perfect.calls == (2 * steps - 1 if pipe.scheduler.order == 2 else steps)
        assert all(0.85 < noise.std() < 1.15 for noise in perfect.noises)

    @pytest.mark.parametrize("strength", [0.3, 1.0])
    @pytest.mark.parametrize("name", SCHEDULERS)
    def test_inpaint_keeps_noise_levels(self, pipe, images, masks, renewed, clean, perfect, name, strength):
        use_scheduler(pipe, name)
        options = {"strength": strength, "num_inference_steps": 10, "output_type": "latent"}
        latents = pipe.inpaint(images, masks, generator=seeded(), **options).images
        assert_clean(latents, clean, name)
        known = ~renewed.expand_as(clean)
        assert torch.equal(latents[known], clean[known])
        # At the start of every step, the known region holds the noise drawn at the start, at the right level.
        for noise in perfect.noises[:: pipe.scheduler.order]:
            torch.testing.assert_close(noise[known], perfect.noises[0][known], rtol=0, atol=0.02)
        assert all(0.85 < noise.std() < 1.15 for noise in perfect.noises)

    @pytest.mark.parametrize("name", FROM_THE_START_ONLY)
    def test_schedulers_that_begin_at_their_first_step(self, pipe, images, masks, clean, perfect, name):
        use_scheduler(pipe, name)
        options = {"num_inference_steps": 10, "output_type": "latent"}
        for latents in (pipe.vary(images, 1.0, **options).images, pipe.inpaint(images, masks, **options).images):
            assert_clean(latents, clean, name)
        with pytest.raises(ValueError, match=f"{name} can't begin in the middle of its steps; use strength=1 or"):
            pipe.vary(images, 0.5)

    def test_karras_noise_levels(self, pipe, images, masks, clean, perfect):
        use_scheduler(pipe, "DPMSolverMultistepScheduler", use_karras_sigmas=True)
        latents = pipe.inpaint(images, masks, 0.5, 20, output_type="latent").images
        torch.testing.assert_close(latents, clean, rtol=0, atol=0.05)  # timesteps are rounded, noise levels not


class TestVary:
    @pytest.mark.parametrize("strength", [0, 0.09])
    def test_no_step_is_the_reconstruction(self, pipe, images, strength):
        pipe.unet.register_forward_hook(lambda *_: pytest.fail("the diffusion model takes no part"))
        result = pipe.vary(images, strength, num_inference_steps=10, output_type="pt").images
        torch.testing.assert_close(result, pipe.reconstruct(images, output_type="pt").images)

    @pytest.mark.parametrize("name", ["CosineVariantScheduler", "EulerDiscreteScheduler"])
    def test_full_strength_is_generation(self, pipe, images, name):
        use_scheduler(pipe, name)
        varied = pipe.vary(images, 1, 4, generator=seeded(), output_type="latent").images
        generated = pipe(2, 4, generator=seeded(), output_type="latent").images
        torch.testing.assert_close(varied, generated)

    @pytest.mark.parametrize("name", ["CosineVariantScheduler", "EulerAncestralDiscreteScheduler"])
    def test_batch_split_does_not_matter(self, pipe, images, name):
        use_scheduler(pipe, name)
        options = {"strength": 0.75, "num_inference_steps": 4, "output_type": "latent"}
        images = torch.cat([images, images.flip(2)])
        together = pipe.vary(images, generator=seeded(), **options).images
        generator = seeded()
        apart = [pipe.vary(part, generator=generator, **options).images for part in (images[:1], images[1:])]
        torch.testing.assert_close(together, torch.cat(apart), rtol=1e-3, atol=1e-3)
        assert (together[0] - together[1]).abs().max() > 0.1

    def test_steps_are_not_lost_to_rounding(self, pipe):
        for strength in (0.07, 0.29, 0.57, 0.58):
            timesteps = pipe.get_timesteps(100, strength)
            assert timesteps.tolist() == pipe.scheduler.timesteps[-round(100 * strength) :].tolist()

    def test_begins_at_the_first_of_equal_timesteps(self, pipe, images):
        use_scheduler(pipe, "DPMSolverMultistepScheduler", use_karras_sigmas=True)
        begun = []
        pipe.unet.register_forward_hook(lambda *_: begun.append(pipe.scheduler.begin_index))
        pipe.vary(images, 0.96, 50, output_type="latent")
        assert pipe.scheduler.timesteps[2] == pipe.scheduler.timesteps[3]
        assert begun == [2] * 48 and pipe.scheduler.step_index == 50

    def test_generation_after_it_begins_at_the_first_step(self, pipe, images):
        use_scheduler(pipe, "UniPCMultistepScheduler")
        options = {"num_inference_steps": 4, "output_type": "latent"}
        before = pipe(1, generator=seeded(), **options).images
        pipe.vary(images, 0.5, **options)
        torch.testing.assert_close(pipe(1, generator=seeded(), **options).images, before)

    def test_callback(self, pipe, images):
        steps = []

        def clear(pipeline, step, timestep, tensors):
            steps.append((step, int(timestep)))
            return {"latents": torch.zeros_like(tensors["latents"])}

        latents = pipe.vary(images, 0.5, 4, output_type="latent", callback_on_step_end=clear).images
        assert steps == [(0, 499), (1, 249)] and latents.abs().max() == 0

    def test_bfloat16(self, pipe, images):
        result = pipe.to(torch.bfloat16).vary(images, 0.5, 4, generator=seeded(), output_type="pt").images
        assert result.isfinite().all() and result.shape == SHAPE


class TestInterpolate:
    def test_no_step_mixes_key_codes(self, pipe, images, clean):
        latents = pipe.interpolate(*images, num_images=3, strength=0, output_type="latent").images
        torch.testing.assert_close(latents, torch.stack([clean[0], clean.mean(0), clean[1]]))
        result = pipe.interpolate(*images, num_images=2, strength=0, output_type="pt").images
        torch.testing.assert_close(result, pipe.reconstruct(images, output_type="pt").images)

    @pytest.mark.parametrize("name", ["CosineVariantScheduler", "EulerAncestralDiscreteScheduler"])
    def test_mixtures_are_varied_with_equal_noise(self, pipe, images, clean, name):
        use_scheduler(pipe, name)
        options = {"strength": 0.5, "num_inference_steps": 6, "output_type": "latent"}
        latents = pipe.interpolate(*images, num_images=3, generator=seeded(), **options).images
        varied = pipe.vary(images, generator=equal_generators(seeded(), 2), **options).images
        torch.testing.assert_close(latents[[0, 2]], varied, rtol=1e-3, atol=1e-3)
        alike = pipe.interpolate(images[0], images[0], num_images=3, **options).images
        torch.testing.assert_close(alike, alike[:1].expand_as(alike), rtol=1e-3, atol=1e-3)
        assert (latents[0] - latents[1]).abs().max() > 1e-2

    def test_generator_is_advanced(self, pipe, images):
        generator, options = seeded(), {"num_images": 2, "num_inference_steps": 4, "output_type": "latent"}
        first, second = (pipe.interpolate(*images, generator=generator, **options).images for _ in range(2))
        again = pipe.interpolate(*images, generator=seeded(), **options).images
        torch.testing.assert_close(first, again)
        assert (first - second).abs().max() > 1e-2


class TestInpaint:
    @pytest.mark.parametrize("strength", [0.5, 1.0])
    def test_known_codes_are_exact(self, pipe, images, masks, renewed, clean, strength):
        latents = pipe.inpaint(images, masks, strength, 4, generator=seeded(), output_type="latent").images
        known = ~renewed.expand_as(clean)
        assert torch.equal(latents[known], clean[known])
        assert (latents - clean)[~known].abs().min() > 1e-4

    def test_all_or_nothing(self, pipe, images):
        options = {"num_inference_steps": 4, "generator": seeded(), "output_type": "pt"}
        nothing = pipe.inpaint(images, torch.zeros(1, 1, 32, 32), **options).images
        torch.testing.assert_close(nothing, pipe.reconstruct(images, output_type="pt").images)
        options["generator"] = seeded()
        everything = pipe.inpaint(images, torch.ones(1, 1, 32, 32), **options).images
        torch.testing.assert_close(everything, pipe(2, 4, generator=seeded(), output_type="pt").images)

    def test_kinds_of_masks_agree(self, pipe, images, masks):
        options = {"num_inference_steps": 2, "output_type": "latent"}
        expected = pipe.inpaint(images, masks, generator=seeded(), **options).images
        array = masks[:, 0].numpy()
        pictures = [Image.fromarray(np.uint8(mask * 255)) for mask in array]
        kinds = [array, array.astype(bool), array[..., None], list(array), list(masks[:, 0]), masks.bool(), pictures]
        kinds.append([Image.fromarray(np.uint16(20000 + mask * 20000)) for mask in array])  # 20000: less than half
        for kind in [*kinds, [picture.convert("RGB") for picture in pictures]]:
            torch.testing.assert_close(pipe.inpaint(images, kind, generator=seeded(), **options).images, expected)
        assert masks.unique().tolist() == [0, 1]  # the caller's own are left alone

    def test_one_mask_for_all(self, pipe, images, masks):
        options = {"num_inference_steps": 2, "output_type": "latent"}
        picture = Image.fromarray(np.uint8(masks[0, 0].numpy() * 255))
        for mask in (picture, masks[:1], masks[0, 0], masks[0, 0].numpy()):
            one = pipe.inpaint(images, mask, generator=seeded(), **options).images
            each = pipe.inpaint(images, masks[[0, 0]], generator=seeded(), **options).images
            torch.testing.assert_close(one, each)

    def test_batch_split_does_not_matter(self, pipe, images, masks):
        options = {"num_inference_steps": 4, "output_type": "latent"}
        together = pipe.inpaint(images, masks, generator=seeded(), **options).images
        generator = seeded()
        apart = [pipe.inpaint(images[i], masks[i], generator=generator, **options).images for i in range(2)]
        torch.testing.assert_close(together, torch.cat(apart), rtol=1e-3, atol=1e-3)

    def test_bfloat16(self, pipe, images, masks, renewed):
        pipe.to(torch.bfloat16)
        options = {"generator": seeded(), "output_type": "latent"}
        latents = pipe.inpaint(images, masks, 0.5, 4, **options).images
        unchanged = pipe.vary(images, 0, 4, output_type="latent").images
        known = ~renewed.expand_as(latents)
        assert latents.dtype == torch.float32 and torch.equal(latents[known], unchanged[known])


@pytest.mark.parametrize("method", ["vary", "interpolate", "inpaint"])
def test_transparent_pictures_are_on_white(pipe, method):
    options = {"strength": 0, "output_type": "latent"}
    mask = [Image.new("L", (32, 32))] if method == "inpaint" else []
    on_white, transparent = (
        getattr(pipe, method)(*([image] * (2 if method == "interpolate" else 1)), *mask, **options).images
        for image in (Image.new("RGB", (32, 32), "white"), Image.new("RGBA", (32, 32)))
    )
    assert torch.equal(on_white, transparent)


@pytest.mark.parametrize("method", ["vary", "interpolate", "inpaint"])
def test_output_types(pipe, images, masks, method):
    arguments = {"vary": [images], "interpolate": list(images), "inpaint": [images, masks]}[method]
    options = {"strength": 0.5, "num_inference_steps": 2, **({"num_images": 2} if method == "interpolate" else {})}
    results = {
        kind: getattr(pipe, method)(*arguments, generator=seeded(), output_type=kind, **options).images
        for kind in ("pil", "np", "pt", "latent")
    }
    assert [image.size for image in results["pil"]] == [(32, 32)] * 2
    assert results["pt"].shape == SHAPE and results["latent"].shape == (2, 4, 8, 8)
    np.testing.assert_allclose(results["np"], results["pt"].permute(0, 2, 3, 1).numpy(), atol=1e-6)
    (images,) = getattr(pipe, method)(*arguments, generator=seeded(), output_type="pt", return_dict=False, **options)
    torch.testing.assert_close(images, results["pt"])


PICTURE, MASK = Image.new("RGB", (32, 32)), Image.new("L", (32, 32))


@pytest.mark.parametrize(
    ("method", "arguments", "options", "message"),
    [
        ("vary", [PICTURE], {"strength": 1.5}, "strength is 1.5; it must be from 0 .* to 1"),
        ("vary", [PICTURE], {"strength": float("nan")}, "strength is nan; it must be from 0"),
        ("vary", [PICTURE], {"num_inference_steps": 0}, "num_inference_steps is 0; it must be at least 1"),
        ("vary", [PICTURE], {"output_type": "jpeg"}, "output_type is 'jpeg'; it must be one of"),
        ("vary", [PICTURE], {"callback_on_step_end_tensor_inputs": ["noise"]}, "it may hold"),
        ("vary", [PICTURE], {"generator": [seeded()] * 2}, "2 generators were given for batch_size=1"),
        ("vary", [[]], {}, "images have sizes .*; give at least one"),
        ("vary", [PICTURE.resize((32, 36))], {}, "images: 36x32 pixels, but the diffusion model makes 32x32; crop or"),
        ("vary", [[PICTURE, PICTURE.resize((36, 32))]], {}, "images have sizes .*; give at least one, all of one"),
        ("vary", [[np.zeros((32, 32, 3)), np.zeros((36, 32, 3))]], {}, "images have sizes .*; give at least one"),
        ("vary", [torch.full(SHAPE, 2.0)], {}, r"images span \[2.0, 2.0\]; scale arrays and tensors"),
        ("interpolate", [PICTURE, PICTURE], {"num_images": 1}, "num_images is 1; it must be at least 2"),
        ("interpolate", [PICTURE, PICTURE], {"generator": [seeded()]}, "generator is a list, but all .* give one"),
        ("interpolate", [PICTURE, [PICTURE] * 2], {}, "image_b holds 2 images; give one"),
        (
            "interpolate",
            [PICTURE.resize((36, 36)), PICTURE],
            {},
            "image_a: 36x36 pixels, but the diffusion model makes",
        ),
        ("inpaint", [PICTURE, MASK], {"strength": -0.1}, "strength is -0.1"),
        ("inpaint", [PICTURE, MASK.resize((64, 64))], {}, r"shape \(1, 1, 64, 64\); give one mask or 1, .* 32x32"),
        ("inpaint", [PICTURE, [MASK] * 2], {}, r"masks have shape \(2, 1, 32, 32\); give one mask or 1"),
        ("inpaint", [PICTURE, torch.zeros(1, 3, 32, 32)], {}, "masks have shape .* of one channel"),
        ("inpaint", [PICTURE, torch.full((1, 1, 32, 32), 255.0)], {}, r"masks span \[255.0, 255.0\]; scale"),
    ],
)
def test_errors(pipe, method, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(pipe, method)(*arguments, **options)


def test_schedulers_that_add_no_noise(pipe, monkeypatch):
    use_scheduler(pipe, "DDIMScheduler")
    monkeypatch.delattr(diffusers.DDIMScheduler, "add_noise")
    options = {"num_inference_steps": 2}
    for method, arguments, strength in (
        ("vary", [PICTURE], 0.5),
        ("interpolate", [PICTURE] * 2, 0.5),
        ("inpaint", [PICTURE, MASK], 0.5),
        ("inpaint", [PICTURE, MASK], 1),
    ):
        with pytest.raises(ValueError, match="DDIMScheduler has no add_noise, which .*; use another scheduler, such"):
            getattr(pipe, method)(*arguments, strength=strength, **options)
        getattr(pipe, method)(*arguments, strength=0, **options)
    pipe.vary(PICTURE, strength=1, **options)

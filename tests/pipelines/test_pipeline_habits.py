"""What users of diffusers' other pipelines type: it works, or a sentence says what does."""

import inspect
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image

from brics_diffusers import BricsKeyCodePipeline
from brics_diffusers.pipelines.sampling import with_scheduler


PICTURE = Image.new("RGB", (32, 32))
METHODS = {
    "vary": [PICTURE],
    "interpolate": [PICTURE, PICTURE],
    "inpaint": [PICTURE, PICTURE.convert("L")],
    "reconstruct": [PICTURE],
    "__call__": [],
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class TestNames:
    @pytest.mark.parametrize(
        ("method", "name", "advice"),
        [
            ("__call__", "num_images_per_prompt", "its place is batch_size"),
            ("__call__", "num_images", "its place is batch_size"),
            ("__call__", "num_inference_step", "the nearest it has is num_inference_steps"),
            ("__call__", "heigth", "the nearest it has is height"),
            ("__call__", "generators", "the nearest it has is generator"),
            ("__call__", "seed", "its place is generator"),
            ("__call__", "prompt", "images are generated without texts, so leave it out"),
            ("__call__", "labels", "its place is class_labels"),
            ("vary", "cfg_scale", "its place is guidance_scale"),
            ("__call__", "xyz", "it has batch_size, num_inference_steps, eta, generator, latents, "),
            ("reconstruct", "image", "its place is images"),
            ("vary", "num_images_per_prompt", "its place is images"),
            ("interpolate", "num_images_per_prompt", "its place is num_images"),
            ("inpaint", "mask_image", "its place is masks"),
            ("inpaint", "strenght", "the nearest it has is strength"),
        ],
    )
    def test_unknown_arguments_are_named(self, pipe, method, name, advice):
        with pytest.raises(TypeError, match=f"{method} has no argument {name}; {advice}"):
            getattr(pipe, method)(**{name: 1})

    def test_a_prompt_in_the_place_of_the_number_of_images(self, pipe):
        with pytest.raises(ValueError, match="batch_size is 'a cat'; it must be at least 1: the number of images"):
            pipe("a cat")

    @pytest.mark.parametrize("method", METHODS)
    def test_signatures_stay(self, method):
        assert "output_type" in inspect.signature(getattr(BricsKeyCodePipeline, method)).parameters

    def test_the_autoencoder_is_the_vae(self, pipe):
        pipe.vae.enable_slicing()
        assert pipe.autoencoder.use_slicing and pipe.vae is pipe.autoencoder and "vae" not in pipe.components

    def test_latents_of_the_autoencoder_are_key_codes(self, pipe):
        sample = torch.rand(1, 3, 32, 32, generator=seeded()) * 2 - 1
        with torch.no_grad():
            encoded = pipe.vae.encode(sample)
            assert encoded.latents is encoded.key_codes and len(encoded.to_tuple()) == 1
            decoded = pipe.vae.decode(encoded.latents).sample
            torch.testing.assert_close(decoded, pipe.vae(sample).sample)

    def test_num_timesteps(self, pipe):
        assert pipe.num_timesteps == 0
        seen = []
        pipe(1, 3, output_type="latent", callback_on_step_end=lambda pipe, *_: seen.append(pipe.num_timesteps) or {})
        assert seen == [3] * 3
        pipe.vary(PICTURE, 0.5, 4, output_type="latent")
        assert pipe.num_timesteps == 2
        pipe.vary(PICTURE, 0, output_type="latent")
        assert pipe.num_timesteps == 0


class TestSizes:
    def test_other_sizes(self, pipe):
        assert pipe(1, 2, height=16, width=48).images[0].size == (48, 16)
        latents = torch.randn(1, 4, 8, 12, generator=seeded())
        assert pipe(1, 2, latents=latents, width=48, output_type="latent").images.shape == (1, 4, 8, 12)

    def test_the_default_is_that_of_training(self, pipe):
        options = {"num_inference_steps": 2, "output_type": "latent"}
        given = pipe(generator=seeded(), height=32, width=32, **options).images
        assert torch.equal(given, pipe(generator=seeded(), **options).images)

    @pytest.mark.parametrize("pixels", [0, -8, 36, 30, 64.0])
    def test_wrong_sizes(self, pipe, pixels):
        with pytest.raises(ValueError, match=f"height is {pixels}; give a multiple of 8, .*, or leave it out for 32"):
            pipe(1, 2, height=pixels)
        with pytest.raises(ValueError, match=r"latents has shape .*; expected \(1, 4, 8, 12\)"):
            pipe(1, 2, latents=torch.zeros(1, 4, 8, 8), width=48)


class TestSteps:
    def test_timesteps(self, pipe):
        visited = []
        options = {"timesteps": [900, 500, 20], "output_type": "latent", "generator": seeded()}
        pipe(callback_on_step_end=lambda _, index, timestep, tensors: visited.append(int(timestep)) or {}, **options)
        assert visited == [900, 500, 20] and pipe.num_timesteps == 3
        pipe(1, 2, output_type="latent")
        assert pipe.num_timesteps == 2  # custom ones are for one call

    def test_sigmas(self, pipe):
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        sigmas = [100.0, 3.0, 0.5, 0.0]
        images = pipe(sigmas=sigmas, generator=seeded(), output_type="latent").images
        assert images.isfinite().all() and pipe.scheduler.sigmas.tolist() == sigmas and pipe.num_timesteps == 3

    @pytest.mark.parametrize(
        ("scheduler", "options", "message"),
        [
            (DDIMScheduler, {"timesteps": [9, 3]}, "DDIMScheduler takes no custom timesteps; leave them out or"),
            (DPMSolverMultistepScheduler, {"sigmas": [9.0, 0.0]}, "MultistepScheduler takes no custom sigmas; leave"),
            (EulerDiscreteScheduler, {"sigmas": [9.0, 0.0], "timesteps": [9]}, "both given; give one of them"),
            (EulerDiscreteScheduler, {"timesteps": []}, r"timesteps is \[\]; give a list with at least one"),
            (EulerDiscreteScheduler, {"timesteps": 900}, "timesteps is 900; give a list with at least one"),
            (EulerDiscreteScheduler, {"timesteps": [10, 500]}, r"\[10, 500\]; give it in descending order"),
            (EulerDiscreteScheduler, {"sigmas": [10.0, 1.0]}, r"\[10.0, 1.0\]; end it with 0"),
            (DDIMScheduler, {"num_inference_steps": 2.5}, "num_inference_steps is 2.5; give a whole number"),
        ],
    )
    def test_errors(self, pipe, scheduler, options, message):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        with pytest.raises(ValueError, match=message):
            pipe(**options)


class TestSchedulers:
    @pytest.mark.parametrize(
        "name",
        [
            "FlowMatchEulerDiscreteScheduler",
            "FlowMatchHeunDiscreteScheduler",
            "EDMEulerScheduler",
            "EDMDPMSolverMultistepScheduler",
            "IPNDMScheduler",
            "CMStochasticIterativeScheduler",
            "CogVideoXDDIMScheduler",
            "CogVideoXDPMScheduler",
            "UnCLIPScheduler",
        ],
    )
    def test_those_that_cannot_work_are_refused_by_name(self, pipe, name):
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        with pytest.raises(ValueError, match=f"{name} does not denoise predictions of noise at the noise levels"):
            pipe(1, 2)
        with pytest.raises(ValueError, match=f"{name} "):
            pipe.inpaint(PICTURE, PICTURE.convert("L"), num_inference_steps=2)
        pipe.reconstruct(PICTURE, output_type="pt")  # it takes no part

    @pytest.mark.parametrize("name", ["DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"])
    def test_those_that_make_noise_are_refused(self, pipe, name):
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        with pytest.raises(ValueError, match=f"{name} goes from images to noise; give a scheduler that denoises"):
            pipe(1, 2)

    @pytest.mark.parametrize("name", [name for name in dir(diffusers) if name.endswith("Scheduler")])
    def test_what_is_accepted_denoises(self, pipe, monkeypatch, name):
        """With a model that knows the image all others end at it, up to what a last step leaves."""
        clean = torch.rand(1, 4, 8, 8, generator=seeded()) - 0.5
        levels = pipe.scheduler.alphas_cumprod.double()
        log_sigmas = ((1 - levels) / levels).log() / 2

        def noise(latents, timestep, *_, **__):
            low = int(timestep)
            log_sigma = torch.lerp(log_sigmas[low], log_sigmas[min(low + 1, 999)], float(timestep) - low)
            signal = (1 + (2 * log_sigma).exp()) ** -0.5
            return SimpleNamespace(sample=((latents - signal * clean) / (1 - signal**2) ** 0.5).float())

        monkeypatch.setattr(pipe.unet, "forward", noise)
        try:
            pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        except (TypeError, ValueError, AttributeError, NotImplementedError, ImportError):
            return  # diffusers itself does not make one of this config, or only with a package that is not here
        try:
            found = pipe(1, 20, output_type="latent", generator=seeded()).images
        except ValueError as error:
            assert name in str(error)
        else:
            assert (found - clean).square().mean() < 0.06**2

    def test_from_the_start(self, pipe):
        with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler does not denoise"):
            BricsKeyCodePipeline(pipe.autoencoder, pipe.unet, FlowMatchEulerDiscreteScheduler())

    @pytest.mark.parametrize("option", [{"use_flow_sigmas": True}, {"prediction_type": "flow_prediction"}])
    def test_options_for_flow_matching(self, pipe, option):
        with pytest.raises(ValueError, match="MultistepScheduler for flow matching does not denoise"):
            with_scheduler(pipe, DPMSolverMultistepScheduler, option)


class TestWrongTypes:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"generator": 0},
                r"generator is 0; give a torch.Generator, of a seed by torch.Generator\(\).manual_seed",
            ),
            ({"batch_size": True}, "batch_size is True; it must be at least 1"),
            ({"latents": np.zeros((1, 4, 8, 8))}, r"latents is a ndarray; give a tensor of shape \(1, 4, 8, 8\)"),
        ],
    )
    def test_arguments(self, pipe, options, message):
        with pytest.raises(ValueError, match=message):
            pipe(num_inference_steps=2, **options)

    def test_a_denoiser_put_in_later(self, pipe):
        small = {"num_attention_heads": 1, "attention_head_dim": 8, "in_channels": 4, "num_layers": 1}
        pipe.unet = DiTTransformer2DModel(**small, sample_size=8, patch_size=2, norm_num_groups=4)
        with pytest.raises(ValueError, match="unet is a DiTTransformer2DModel, which takes other arguments"):
            pipe(1, 2)


class TestImages:
    @pytest.mark.parametrize(
        ("images", "kind"),
        [
            ("a.png", "str"),
            (["a.png", "b.png"], "str"),
            ((PICTURE, PICTURE), "tuple"),
            ([(PICTURE,)], "tuple"),
            ({"image": PICTURE}, "dict"),
            (b"", "bytes"),
            (None, "NoneType"),
        ],
    )
    def test_what_is_no_image(self, pipe, tmp_path, images, kind):
        message = rf"holds a {kind}; give PIL images \(PIL.Image.open reads a file\), arrays or tensors, several"
        for call in (pipe.reconstruct, pipe.vary, lambda images: pipe.interpolate(PICTURE, images)):
            with pytest.raises(ValueError, match=message):
                call(images)
        with pytest.raises(ValueError, match=f"masks {message}"):
            pipe.inpaint(PICTURE, images)
        with pytest.raises(ValueError, match="holds a .*Path; give PIL images"):
            pipe.reconstruct(tmp_path / "a.png")

    def test_lists_still_work(self, pipe):
        array = np.zeros((1, 32, 32, 3), dtype=np.float32)
        assert torch.equal(*(pipe.reconstruct(images, output_type="pt").images for images in ([PICTURE], array)))


def test_bfloat16_keeps_key_codes_in_float32(pipe, monkeypatch):
    given = []
    decode = type(pipe.autoencoder).decode
    monkeypatch.setattr(
        pipe.autoencoder, "decode", lambda codes: given.append(codes) or decode(pipe.autoencoder, codes)
    )
    pipe.to(torch.bfloat16)
    pipe(1, 2, generator=seeded(), output_type="pt")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    images = pipe.reconstruct(noise, output_type="pt").images
    pipe.vary(noise, 0.5, 2, generator=seeded(), output_type="pt")
    assert len(given) == 3 and images.isfinite().all()
    for codes in given:
        assert codes.dtype == torch.float32 and not torch.equal(codes, codes.bfloat16().float())


def test_other_denoisers_are_refused_by_name(pipe):
    sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "patch_size": 2}
    denoiser = DiTTransformer2DModel(num_layers=1, num_attention_heads=1, attention_head_dim=8, **sizes)
    with pytest.raises(ValueError, match="unet is a DiTTransformer2DModel, which takes .*; give a UNet2DModel"):
        BricsKeyCodePipeline(pipe.autoencoder, denoiser, pipe.scheduler)

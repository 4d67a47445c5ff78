"""The pipeline: samples, reconstructions, saving and loading."""

import builtins
import doctest
import inspect
import json
import symtable

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    UNet2DModel,
)
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.utils import logging as diffusers_logging
from PIL import Image

from brics_diffusers import BricsAutoencoder, BricsKeyCodePipeline, CosineVariantScheduler
from brics_diffusers.data import read_image
from brics_diffusers.pipelines.pipeline_brics_key_code import key_codes_to_latents, latents_to_key_codes


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class TestCall:
    def test_output_types(self, pipe):
        images = {
            kind: pipe(2, 3, generator=seeded(), output_type=kind).images for kind in ("pil", "np", "pt", "latent")
        }
        assert [image.size for image in images["pil"]] == [(32, 32)] * 2
        assert images["np"].shape == (2, 32, 32, 3) and images["pt"].shape == (2, 3, 32, 32)
        assert images["pt"].min() >= 0 and images["pt"].max() <= 1
        assert np.abs(images["np"] - images["pt"].permute(0, 2, 3, 1).numpy()).max() < 1e-6
        # PIL rounds to 1/255.
        assert np.abs(np.stack([np.array(image) for image in images["pil"]]) / 255 - images["np"]).max() < 0.51 / 255
        decoded = pipe.autoencoder.decode(latents_to_key_codes(images["latent"], 2.0)).sample
        torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), images["pt"])

    def test_tuple(self, pipe):
        (images,) = pipe(1, 2, generator=seeded(), output_type="pt", return_dict=False)
        torch.testing.assert_close(images, pipe(1, 2, generator=seeded(), output_type="pt").images)

    @pytest.mark.parametrize(
        "scheduler",
        [CosineVariantScheduler, DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler],
    )
    def test_batch_split_does_not_matter(self, pipe, scheduler):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        options = {"num_inference_steps": 4, "output_type": "latent", "eta": 1.0}
        together = pipe(5, generator=seeded(), **options).images
        generator = seeded()
        apart = torch.cat([pipe(count, generator=generator, **options).images for count in (1, 3, 1)])
        # Only the order of sums in batched products differs; Euler's latents start a thousand times larger.
        torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-3)
        assert (together[0] - together[1]).abs().max() > 0.1

    def test_list_of_generators(self, pipe):
        options = {"num_inference_steps": 3, "output_type": "latent"}
        together = pipe(2, generator=[seeded(3), seeded(4)], **options).images
        alone = pipe(1, generator=[seeded(4)], **options).images
        torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-4)

    def test_latents_are_the_start(self, pipe):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)  # no noise on the way
        latents = torch.randn(2, 4, 8, 8, generator=seeded())
        options = {"num_inference_steps": 3, "output_type": "latent"}
        first, second = (pipe(2, latents=latents, **options).images for _ in range(2))
        torch.testing.assert_close(first, second)
        assert (first - pipe(2, latents=-latents, **options).images).abs().max() > 0.1

    def test_callback_sees_and_changes_latents(self, pipe):
        steps = []

        def clear(pipeline, step, timestep, tensors):
            steps.append((step, int(timestep), tuple(tensors["latents"].shape)))
            return {"latents": torch.zeros_like(tensors["latents"])}

        latents = pipe(1, 3, output_type="latent", callback_on_step_end=clear).images
        assert [step for step, _, _ in steps] == [0, 1, 2] and steps[0][2] == (1, 4, 8, 8)
        assert [timestep for _, timestep, _ in steps] == pipe.scheduler.timesteps.tolist()
        assert latents.abs().max() == 0

    @pytest.mark.parametrize("steps", [pytest.param(1000, marks=pytest.mark.slow), 250, 50])
    def test_step_counts(self, pipe, steps):
        calls = []
        pipe.unet.register_forward_hook(lambda *_: calls.append(1))
        images = pipe(1, steps, generator=seeded(), output_type="pt").images
        assert len(calls) == steps and images.isfinite().all()

    def test_bfloat16(self, pipe):
        images = pipe.to(torch.bfloat16)(2, 3, generator=seeded(), output_type="pt").images
        assert images.isfinite().all() and images.shape == (2, 3, 32, 32)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"output_type": "jpeg"}, "output_type is 'jpeg'; it must be one of"),
            ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
            ({"latents": torch.zeros(1, 4, 4, 4)}, r"latents has shape \(1, 4, 4, 4\); expected \(1, 4, 8, 8\)"),
            ({"batch_size": 2, "generator": [seeded()]}, "1 generators were given for batch_size=2"),
            ({"callback_on_step_end_tensor_inputs": ["noise"]}, "it may hold"),
        ],
    )
    def test_errors(self, pipe, options, message):
        with pytest.raises(ValueError, match=message):
            pipe(**options)


class GaussianDenoiser:
    """What a perfect diffusion model of data from N(0, 0.3 ** 2) says."""

    def __call__(self, sample, timestep):
        alpha_bar = CosineVariantScheduler().alphas_cumprod[int(timestep)].double()
        noise = (1 - alpha_bar).sqrt() / (0.09 * alpha_bar + 1 - alpha_bar) * sample.double()
        return UNet2DOutput(sample=noise.to(sample.dtype))


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, CosineVariantScheduler])
def test_half_precision_does_not_round_the_steps(pipe, monkeypatch, scheduler_class):
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)
    monkeypatch.setattr(pipe.unet, "forward", GaussianDenoiser())

    def spread():
        return pipe(16, 100, generator=seeded(), output_type="latent").images.std().item()

    exact = spread()
    pipe.to(torch.bfloat16)
    assert spread() == pytest.approx(exact, rel=0.003)


class TestReconstruct:
    def test_kinds_of_input_agree(self, pipe):
        pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 36, 3), dtype=np.uint8)
        tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
        expected = pipe.autoencoder(tensor * 2 - 1).sample / 2 + 0.5
        for images in ([Image.fromarray(image) for image in pixels], pixels / np.float32(255), tensor):
            result = pipe.reconstruct(images, output_type="pt").images
            torch.testing.assert_close(result, expected.clamp(0, 1), rtol=1e-4, atol=1e-4)
        (image,) = pipe.reconstruct(Image.fromarray(pixels[0]), return_dict=False)[0]
        assert image.size == (36, 32)

    def test_gray_image(self, pipe):
        assert pipe.reconstruct(Image.new("L", (32, 32), 99)).images[0].mode == "RGB"

    def test_pictures_of_other_modes_are_read_as_in_training(self, pipe, tmp_path):
        transparent = Image.new("RGBA", (32, 32), (9, 8, 7, 0))
        transparent.paste((200, 100, 50, 255), (0, 0, 16, 32))
        on_white = Image.new("RGB", (32, 32), "white")
        on_white.paste((200, 100, 50), (0, 0, 16, 32))
        levels = np.arange(32 * 32).reshape(32, 32) % 256
        gray = Image.fromarray(np.uint8(levels))
        deep = [Image.fromarray((levels * 257).astype(kind)) for kind in (np.uint16, np.int32)]
        for image, same in [(transparent, on_white), *((image, gray.convert("RGB")) for image in deep)]:
            expected = pipe.reconstruct(same, output_type="pt").images
            assert torch.equal(pipe.reconstruct(image, output_type="pt").images, expected)
            image.save(tmp_path / "image.png")
            assert np.array_equal(np.array(read_image(tmp_path / "image.png")), np.array(same))

    def test_pictures_are_turned_as_in_training(self, pipe, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 256, (32, 36, 3), dtype=np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 6  # stored a quarter turn counterclockwise
        Image.fromarray(np.rot90(pixels).copy()).save(tmp_path / "image.png", exif=exif)
        expected = pipe.reconstruct(Image.fromarray(pixels), output_type="pt").images
        with Image.open(tmp_path / "image.png") as image:
            for given in (image, [image], read_image(tmp_path / "image.png")):
                assert torch.equal(pipe.reconstruct(given, output_type="pt").images, expected)
            assert len(pipe.reconstruct([image, Image.fromarray(pixels)]).images) == 2  # of one size when upright
            assert image.size == (32, 36)  # the caller's image stays as it is

    def test_without_unet(self, pipe):
        pipe.unet.register_forward_hook(lambda *_: pytest.fail("the diffusion model takes no part"))
        pipe.reconstruct(Image.new("RGB", (32, 32)))

    def test_errors(self, pipe):
        with pytest.raises(ValueError, match="sample is 30x32; height and width must divide by 4"):
            pipe.reconstruct(Image.new("RGB", (32, 30)))
        with pytest.raises(ValueError, match="output_type is 'latent'"):
            pipe.reconstruct(Image.new("RGB", (32, 32)), output_type="latent")
        with pytest.raises(ValueError, match=r"mode F has values in \[2.0, 2.0\], expected \[0, 1.0\]; scale them"):
            pipe.reconstruct(Image.new("F", (32, 32), 2.0))


class TestSaving:
    def test_round_trip(self, pipe, tmp_path):
        pipe.save_pretrained(tmp_path)
        loaded = BricsKeyCodePipeline.from_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index["autoencoder"] == ["brics_diffusers", "BricsAutoencoder"]
        assert index["scheduler"] == ["brics_diffusers", "CosineVariantScheduler"]
        assert list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("*.bin"))
        options = {"num_inference_steps": 4, "output_type": "pt"}
        torch.testing.assert_close(
            loaded(2, generator=seeded(), **options).images, pipe(2, generator=seeded(), **options).images
        )

    def test_fresh_process(self, pipe, tmp_path, run_python):
        pipe.save_pretrained(tmp_path)
        code = (
            "import sys, torch, brics_diffusers, diffusers\n"
            "for loader in (diffusers.DiffusionPipeline, diffusers.BricsKeyCodePipeline):\n"
            "    pipe = loader.from_pretrained(sys.argv[1])\n"
            "    assert type(pipe) is brics_diffusers.BricsKeyCodePipeline, type(pipe)\n"
            "    latents = pipe(1, 2, generator=torch.Generator().manual_seed(0), output_type='latent').images\n"
            "    print(latents.double().sum().item())\n"
        )
        printed = [float(line) for line in run_python(code, str(tmp_path)).split()[-2:]]
        expected = pipe(1, 2, generator=seeded(), output_type="latent").images.double().sum().item()
        assert printed == pytest.approx([expected] * 2, abs=1e-3)

    def test_swap_after_loading(self, pipe, tmp_path):
        pipe.save_pretrained(tmp_path)
        pipe = DiffusionPipeline.from_pretrained(tmp_path)
        betas = pipe.scheduler.betas
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        assert torch.equal(pipe.scheduler.betas, betas)
        assert pipe(1, 20, generator=seeded(), output_type="pt").images.isfinite().all()


def test_latents_and_key_codes():
    key_codes = torch.tensor([0.0, 0.25, 1.0])
    for factor, latents in ((2.0, [-1.0, -0.5, 1.0]), (4.0, [-2.0, -1.0, 2.0])):
        torch.testing.assert_close(key_codes_to_latents(key_codes, factor), torch.tensor(latents))
        beyond = torch.tensor([latents[0] - 1, latents[1], latents[2] + 2])
        torch.testing.assert_close(latents_to_key_codes(beyond, factor), key_codes)


class TestScalingFactor:
    """The autoencoder's config says what the diffusion model's latents are."""

    def test_images_are_of_the_latents_that_it_says(self, pipe):
        pipe.autoencoder.register_to_config(scaling_factor=5.0)
        pipe.scheduler = CosineVariantScheduler.from_config(pipe.scheduler.config, clip_sample_range=2.5)
        images = {kind: pipe(2, 3, generator=seeded(), output_type=kind).images for kind in ("pt", "latent")}
        assert images["latent"].abs().max() > 1  # and no scheduler clamps them to [-1, 1]
        decoded = pipe.autoencoder.decode((images["latent"] / 5 + 0.5).clamp(0, 1)).sample
        torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), images["pt"])

    def test_images_that_are_changed_a_little_stay(self, pipe, tmp_path):
        pipe.autoencoder.register_to_config(scaling_factor=5.0)
        pipe.save_pretrained(tmp_path)
        pipe = BricsKeyCodePipeline.from_pretrained(tmp_path)
        assert pipe.vae.config.scaling_factor == 5.0
        image = torch.rand(1, 3, 32, 32, generator=seeded())
        same = pipe.vary(image, strength=0.0, output_type="pt").images
        torch.testing.assert_close(same, pipe.reconstruct(image, output_type="pt").images, rtol=0, atol=1e-4)

    def test_a_scheduler_with_other_bounds_is_named(self, pipe, caplog):
        parts = {name: pipe.components[name] for name in ("autoencoder", "unet")}
        diffusers_logging.enable_propagation()
        try:
            BricsKeyCodePipeline(scheduler=CosineVariantScheduler(), **parts)
            assert "clamps latents" not in caplog.text
            pipe.autoencoder.register_to_config(scaling_factor=5.0)
            for options in ({"clip_sample_range": 2.5}, {"clip_sample": False}):
                BricsKeyCodePipeline(scheduler=CosineVariantScheduler(**options), **parts)
            assert "clamps latents" not in caplog.text
            BricsKeyCodePipeline(scheduler=CosineVariantScheduler(), **parts)
        finally:
            diffusers_logging.disable_propagation()
        assert "clamps latents to [-1, 1], but key codes are scaled to [-2.5, 2.5]; give the" in caplog.text

    def test_models_of_before(self, pipe, tmp_path):
        """A saved config without a factor means 2, and a new model's none."""
        assert pipe.autoencoder.config.scaling_factor is None and pipe.autoencoder.scaling_factor == 2
        pipe.autoencoder.save_pretrained(tmp_path)
        assert BricsAutoencoder.from_pretrained(tmp_path).config.scaling_factor is None
        path = tmp_path / "config.json"
        config = json.loads(path.read_text())
        del config["scaling_factor"]
        path.write_text(json.dumps(config))
        assert BricsAutoencoder.from_pretrained(tmp_path).config.scaling_factor == 2

    def test_others_are_refused(self):
        with pytest.raises(ValueError, match="scaling_factor is 0; it must be above 0"):
            BricsAutoencoder(scaling_factor=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 3, "out_channels": 3}, "key codes have 4 channels; use a UNet with 4 for both"),
        ({"out_channels": 8}, "in_channels=4 and out_channels=8"),
        ({"sample_size": 16}, "sample_size=16, but key codes are 8x8"),
        ({"sample_size": None}, "sample_size=None, but key codes are 8x8"),
    ],
)
def test_unet_must_fit_the_autoencoder(autoencoder, unet, change, message):
    other = UNet2DModel.from_config({**unet.config, **change})
    with pytest.raises(ValueError, match=message):
        BricsKeyCodePipeline(autoencoder, other, CosineVariantScheduler())


@pytest.mark.parametrize("name", ["__call__", "reconstruct", "vary", "interpolate", "inpaint"])
def test_examples_define_what_they_use(name):
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(getattr(BricsKeyCodePipeline, name)))
    scope = symtable.symtable("".join(example.source for example in examples), name, "exec")
    unknown = [symbol.get_name() for symbol in scope.get_symbols() if not symbol.is_assigned() | symbol.is_imported()]
    assert examples and not set(unknown) - set(dir(builtins))

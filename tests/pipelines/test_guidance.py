"""Classes and guidance of the pipeline."""

import copy
import json

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, UNet2DModel
from PIL import Image
from small_models import UNET

from brics_diffusers import BricsKeyCodePipeline, CosineVariantScheduler
from brics_diffusers.hub.published_files import public_files
from brics_diffusers.hub.remote_code import write_remote_code
from brics_diffusers.pipelines.guidance import Guidance
from brics_diffusers.pipelines.sampling import sample_images_to_folder


NAMES = {0: "cat", 1: "dog, brown", 2: "bird"}
PICTURE = Image.new("RGB", (32, 32), (80, 120, 200))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def class_unet(seed: int) -> UNet2DModel:
    torch.manual_seed(seed)
    return UNet2DModel(sample_size=8, in_channels=4, out_channels=4, num_class_embeds=4, **UNET).eval()


@pytest.fixture
def class_pipe(autoencoder):
    pipeline = BricsKeyCodePipeline(autoencoder, class_unet(1), CosineVariantScheduler(), id2label=NAMES)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def guided_pipe(class_pipe):
    pipeline = BricsKeyCodePipeline(**class_pipe.components | {"guide": class_unet(2)}, id2label=NAMES)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipe, count=1, **options):
    options = {"num_inference_steps": 3, "generator": seeded(), "output_type": "latent"} | options
    return pipe(count, **options).images


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to rounding: sums of larger batches, or of weights elsewhere in memory, may have another order."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def count_calls(model, monkeypatch) -> list[int]:
    """Sizes of the batches that a model is called with."""
    sizes, forward = [], model.forward

    def counting(latents, *args, **kwargs):
        sizes.append(len(latents))
        return forward(latents, *args, **kwargs)

    monkeypatch.setattr(model, "forward", counting)
    return sizes


class TestLabels:
    def test_names_and_numbers(self, class_pipe):
        assert class_pipe.get_label_ids(["bird", "cat"]) == [2, 0] and class_pipe.get_label_ids("cat") == [0]
        assert class_pipe.labels == {"bird": 2, "cat": 0, "dog, brown": 1} and class_pipe.num_classes == 3
        by_name, by_number = (sample(class_pipe, 2, class_labels=label) for label in ("bird", 2))
        by_list = sample(class_pipe, 2, class_labels=["bird"] * 2)
        assert torch.equal(by_name, by_number) and torch.equal(by_name, by_list)
        assert not torch.equal(by_name, sample(class_pipe, 2, class_labels="cat"))

    def test_a_list_is_one_an_image(self, class_pipe):
        images = sample(class_pipe, class_labels=["cat", None, 2])
        assert len(images) == 3
        pairs = (("cat", 5), (None, 6), (2, 7))
        parts = [sample(class_pipe, 1, class_labels=label, generator=[seeded(seed)]) for label, seed in pairs]
        generators = [seeded(seed) for _, seed in pairs]
        whole = sample(class_pipe, 3, class_labels=["cat", None, 2], generator=generators)
        assert_same(whole, torch.cat(parts))

    def test_without_labels_images_are_of_no_class(self, class_pipe):
        assert torch.equal(sample(class_pipe), sample(class_pipe, class_labels=[None]))
        class_pipe.unet.class_embedding.weight.data[:3] += 1  # which those of the classes are not
        assert torch.equal(sample(class_pipe), sample(class_pipe, class_labels=None, guidance_scale=3.0))

    @pytest.mark.parametrize(
        ("count", "options", "message"),
        [
            (1, {"class_labels": "brid"}, "'brid' is no class of the model; the nearest is 'bird'"),
            (1, {"class_labels": "xyz"}, "'xyz' is no class of the model; give one of bird, cat, dog, brown"),
            (1, {"class_labels": 3}, "class_labels holds 3; give names, or numbers from 0 to 2, or None"),
            (1, {"class_labels": -1}, "class_labels holds -1; give"),
            (3, {"class_labels": [0, 1]}, "2 class_labels are given for 3 images; give one an image, or one"),
            (1, {"guidance_interval": (0.8, 0.2)}, r"guidance_interval is \(0.8, 0.2\); give two times"),
            (1, {"guidance_interval": (0, 1000)}, r"guidance_interval is \(0, 1000\); give two times"),
        ],
    )
    def test_faults(self, class_pipe, count, options, message):
        with pytest.raises(ValueError, match=message):
            sample(class_pipe, count, **options)

    def test_models_without_classes(self, pipe):
        with pytest.raises(
            ValueError, match="class_labels are given, but the model was trained without classes; leave"
        ):
            sample(pipe, class_labels=0)
        with pytest.raises(ValueError, match="guidance_scale is 2.0, but the model has neither classes nor a guide"):
            sample(pipe, guidance_scale=2.0)
        assert pipe.num_classes is None and pipe.labels == {}
        assert torch.equal(sample(pipe), sample(pipe, guidance_scale=1.0))

    def test_unconditional_samples_are_the_plain_loops(self, pipe):
        """To the bit: nothing of classes and guidance touches them."""
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        latents = torch.randn(2, 4, 8, 8, generator=seeded())
        found = sample(pipe, 2, latents=latents)
        pipe.scheduler.set_timesteps(3)
        with torch.no_grad():
            for timestep in pipe.scheduler.timesteps:
                latents = pipe.scheduler.step(pipe.unet(latents, timestep).sample, timestep, latents).prev_sample
        assert torch.equal(found, latents)

    @pytest.mark.parametrize("names", [{0: "a", 1: "b"}, {0: "a", 1: "b", 3: "c"}, {0: "a", 1: "b", 2: "a"}])
    def test_names_must_be_the_models(self, autoencoder, names):
        with pytest.raises(ValueError, match=r"id2label names \d classes, but unet has num_class_embeds=4; number"):
            BricsKeyCodePipeline(autoencoder, class_unet(1), CosineVariantScheduler(), id2label=names)

    def test_a_guide_must_fit(self, autoencoder, unet):
        with pytest.raises(ValueError, match="guide has num_class_embeds=4, but unet has num_class_embeds=None; use"):
            BricsKeyCodePipeline(autoencoder, unet, CosineVariantScheduler(), guide=class_unet(1))


class TestGuidance:
    def test_prediction(self, class_pipe, guided_pipe):
        """One call for both halves is what the formula says, call by call."""
        latents, timestep = torch.randn(2, 4, 8, 8, generator=seeded()), torch.tensor(600)
        labels, none = torch.tensor([0, 2]), torch.tensor([3, 3])
        with torch.no_grad():
            strong, weak = (class_pipe.unet(latents, timestep, label).sample for label in (labels, none))
            found = class_pipe._predict(latents, timestep, Guidance(labels, 2.5), True)
            torch.testing.assert_close(found, weak + 2.5 * (strong - weak), rtol=1e-4, atol=1e-5)
            weak = guided_pipe.guide(latents, timestep, labels).sample
            found = guided_pipe._predict(latents, timestep, Guidance(labels, 2.5), True)
            torch.testing.assert_close(found, weak + 2.5 * (strong - weak), rtol=1e-4, atol=1e-5)

    def test_a_guide_without_classes(self, class_pipe, unet, monkeypatch, tmp_path):
        """It is asked without them, also after loading, and guides images of no class too."""
        guided = BricsKeyCodePipeline(**class_pipe.components | {"guide": unet}, id2label=NAMES)
        guided.save_pretrained(tmp_path)
        guided = BricsKeyCodePipeline.from_pretrained(tmp_path)
        latents, timestep = torch.randn(2, 4, 8, 8, generator=seeded()), torch.tensor(600)
        labels = torch.tensor([0, 3])
        with torch.no_grad():
            strong, weak = class_pipe.unet(latents, timestep, labels).sample, unet(latents, timestep).sample
            found = guided._predict(latents, timestep, Guidance(labels, 2.5), True)
        torch.testing.assert_close(found, weak + 2.5 * (strong - weak), rtol=1e-4, atol=1e-5)
        sizes = count_calls(guided.guide, monkeypatch)
        sample(guided, 2, class_labels=["cat", None], guidance_scale=2.0)
        assert sizes == [2, 2, 2]

    def test_one_call_a_step(self, class_pipe, monkeypatch):
        sizes = count_calls(class_pipe.unet, monkeypatch)
        sample(class_pipe, 2, class_labels="cat", guidance_scale=2.0)
        assert sizes == [4, 4, 4]
        sizes.clear()
        sample(class_pipe, 2, class_labels="cat", guidance_scale=1.0)
        sample(class_pipe, 2, class_labels=None, guidance_scale=2.0)
        assert sizes == [2] * 6

    def test_interval(self, class_pipe, monkeypatch):
        sizes = count_calls(class_pipe.unet, monkeypatch)
        options = {"class_labels": "cat", "guidance_scale": 2.0, "num_inference_steps": 4}
        class_pipe.scheduler.set_timesteps(4)
        times = class_pipe.scheduler.timesteps / 999
        sample(class_pipe, guidance_interval=(0.3, 0.8), **options)
        assert sizes == [2 if 0.3 <= time <= 0.8 else 1 for time in times] and set(sizes) == {1, 2}
        sizes.clear()
        sample(
            class_pipe,
            guidance_interval=(1, 1),
            num_inference_steps=None,
            timesteps=[999, 500],
            **{name: value for name, value in options.items() if name != "num_inference_steps"},
        )
        assert sizes == [2, 1]

    def test_a_guide_needs_no_classes(self, pipe, monkeypatch):
        guide = copy.deepcopy(pipe.unet)
        guided = BricsKeyCodePipeline(**pipe.components | {"guide": guide})
        guided.set_progress_bar_config(disable=True)
        sizes = count_calls(guide, monkeypatch)
        # Away from itself is nowhere.
        assert_same(sample(guided, guidance_scale=3.0), sample(pipe))
        assert sizes == [1, 1, 1]
        assert torch.equal(sample(guided), sample(pipe)) and len(sizes) == 3  # 1 is the default
        guide.conv_out.bias.data += 0.1
        assert not torch.allclose(sample(guided, guidance_scale=3.0), sample(pipe), atol=1e-3)

    def test_a_guide_is_given_the_class(self, guided_pipe, class_pipe):
        options = {"class_labels": "cat", "guidance_scale": 2.0}
        assert not torch.allclose(sample(guided_pipe, **options), sample(class_pipe, **options), atol=1e-4)
        zero = sample(guided_pipe, class_labels="cat", guidance_scale=0.0)
        class_pipe.unet = guided_pipe.guide
        assert_same(zero, sample(class_pipe, class_labels="cat", guidance_scale=1.0))

    @pytest.mark.parametrize("kind", ["class_pipe", "guided_pipe"])
    def test_splits_of_a_batch(self, kind, request):
        pipe = request.getfixturevalue(kind)
        options = {"guidance_scale": 2.0, "guidance_interval": (0.2, 0.9)}
        labels, generator = ["cat", "bird", None, "cat"], seeded()
        whole = sample(pipe, 4, class_labels=labels, **options)
        parts = [sample(pipe, 2, class_labels=labels[i : i + 2], generator=generator, **options) for i in (0, 2)]
        assert_same(whole, torch.cat(parts))

    @pytest.mark.parametrize("method", ["vary", "interpolate", "inpaint"])
    def test_methods_that_begin_with_images(self, class_pipe, method):
        images = {"interpolate": [PICTURE, PICTURE], "inpaint": [PICTURE, Image.new("L", (32, 32), 255)]}
        images = images.get(method, [PICTURE])

        def call(**options):
            options |= {"strength": 0.8, "num_inference_steps": 5, "output_type": "latent"}
            return getattr(class_pipe, method)(*images, generator=seeded(), **options).images

        cat = call(class_labels="cat")
        assert not torch.equal(cat, call()) and not torch.equal(cat, call(class_labels="cat", guidance_scale=3.0))
        assert torch.equal(call(class_labels="cat", guidance_scale=3.0, guidance_interval=(0.99, 1.0)), cat)
        with pytest.raises(ValueError, match="'brid' is no class of the model"):
            call(class_labels="brid")


class TestSaving:
    def test_labels_guide_and_defaults_are_kept(self, class_pipe, guided_pipe, tmp_path):
        options = {"class_labels": ["cat", "bird"], "output_type": "latent"}
        defaults = {"default_guidance_scale": 2.0, "default_guidance_interval": (0.1, 0.9)}
        saved = BricsKeyCodePipeline(
            **guided_pipe.components, id2label=NAMES, default_num_inference_steps=4, **defaults
        )
        saved.save_pretrained(tmp_path)
        for loaded in (BricsKeyCodePipeline, DiffusionPipeline):
            pipe = loaded.from_pretrained(tmp_path)
            pipe.set_progress_bar_config(disable=True)
            assert pipe.get_label_ids("dog, brown") == [1]
            expected = guided_pipe(
                **options, num_inference_steps=4, guidance_scale=2.0, guidance_interval=(0.1, 0.9), generator=seeded()
            )
            assert_same(pipe(**options, generator=seeded()).images, expected.images)
            assert pipe.num_timesteps == 4
        pipe = BricsKeyCodePipeline.from_pretrained(tmp_path, guide=None)
        expected = sample(class_pipe, class_labels="cat", guidance_scale=2.0, guidance_interval=(0.1, 0.9))
        assert_same(sample(pipe, class_labels="cat"), expected)

    def test_pipelines_of_earlier_versions(self, pipe, tmp_path):
        pipe.save_pretrained(tmp_path)
        path = tmp_path / "model_index.json"
        index = json.loads(path.read_text())
        new = (
            "guide",
            "id2label",
            "default_guidance_scale",
            "default_guidance_interval",
            "default_num_inference_steps",
        )
        path.write_text(json.dumps({name: value for name, value in index.items() if name not in new}))
        loaded = BricsKeyCodePipeline.from_pretrained(tmp_path)
        assert loaded.guide is None
        assert_same(sample(loaded), sample(pipe))

    def test_remote_code_keeps_labels_and_guide(self, guided_pipe, tmp_path):
        guided_pipe.save_pretrained(tmp_path / "pipe")
        assert any(name.startswith("guide/") for name in public_files(tmp_path / "pipe"))
        write_remote_code(tmp_path / "pipe", tmp_path / "code")
        operator = torch.ops.brics_diffusers.lookup.default
        loaded = DiffusionPipeline.from_pretrained(tmp_path / "code", trust_remote_code=True)
        assert torch.ops.brics_diffusers.lookup.default is operator  # code of its own leaves the package's alone
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is not BricsKeyCodePipeline and loaded.labels == guided_pipe.labels
        options = {"class_labels": "bird", "guidance_scale": 2.0}
        assert_same(sample(loaded, **options), sample(guided_pipe, **options))

    def test_another_solver(self, class_pipe):
        class_pipe.scheduler = DPMSolverMultistepScheduler.from_config(class_pipe.scheduler.config)
        images = sample(class_pipe, class_labels="cat", guidance_scale=2.0, guidance_interval=(0.2, 0.8))
        assert images.isfinite().all()


class TestDefaultClasses:
    WEIGHTS = [1, 0, 3]

    @pytest.fixture
    def weighted_pipe(self, class_pipe):
        pipeline = BricsKeyCodePipeline(**class_pipe.components, id2label=NAMES, default_class_weights=self.WEIGHTS)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def test_drawn_by_their_weights(self, weighted_pipe):
        generators = [seeded(number) for number in range(2000)]
        drawn = weighted_pipe.draw_classes(2000, generators)
        assert drawn.count(1) == 0 and 0.7 < drawn.count(2) / 2000 < 0.8  # 0.75, with a deviation of 0.01
        assert set(weighted_pipe.draw_classes(60, None)) == {0, 2}

    def test_calls_without_classes_draw_them(self, weighted_pipe, monkeypatch):
        monkeypatch.setattr(weighted_pipe, "draw_classes", lambda count, generator: [2, 0])
        assert_same(sample(weighted_pipe, 2), sample(weighted_pipe, 2, class_labels=["bird", "cat"]))
        assert not torch.allclose(sample(weighted_pipe, 2), sample(weighted_pipe, 2, class_labels=[None, None]))

    def test_splits_of_a_batch_draw_alike(self, weighted_pipe):
        generator = seeded(3)
        whole = sample(weighted_pipe, 5, generator=seeded(3))
        assert_same(torch.cat([sample(weighted_pipe, count, generator=generator) for count in (2, 3)]), whole)

    def test_kept_by_saving_and_recorded_with_samples(self, weighted_pipe, tmp_path):
        weighted_pipe.save_pretrained(tmp_path / "pipe")
        loaded = BricsKeyCodePipeline.from_pretrained(tmp_path / "pipe")
        assert loaded.config.default_class_weights == self.WEIGHTS
        loaded.register_to_config(default_guidance_scale=2.0)
        sample_images_to_folder(loaded, tmp_path / "samples", 2, num_inference_steps=2, progress=False)
        settings = json.loads((tmp_path / "samples/samples.json").read_text())
        assert settings["class_labels"] == {"0": 1.0, "1": 0.0, "2": 3.0} and settings["guidance_scale"] == 2

    @pytest.mark.parametrize("weights", [[1, 2], [1, -1, 1], [0, 0, 0], [1, 1, float("inf")]])
    def test_others_are_refused(self, class_pipe, weights):
        with pytest.raises(ValueError, match="num_class_embeds=4; give one number for each class"):
            BricsKeyCodePipeline(**class_pipe.components, default_class_weights=weights)

    def test_unconditional_pipelines_have_none(self, pipe):
        with pytest.raises(ValueError, match="num_class_embeds=None"):
            BricsKeyCodePipeline(**pipe.components, default_class_weights=[1])
        assert pipe.draw_classes(2, None) is None

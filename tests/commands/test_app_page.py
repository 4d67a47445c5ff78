"""What the page in the browser computes, without a browser."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from PIL import Image
from small_models import UNET

from brics_diffusers import BricsKeyCodePipeline, CosineVariantScheduler
from brics_diffusers.commands.app_page import MAX_SEED, USUAL_STEPS, build_app, interpolate, reconstruct, sample
from brics_diffusers.data.images import center_crop_resize
from brics_diffusers.pipelines.sampling import SAMPLERS


SWAPPED = {
    "own": lambda config: None,
    "DDIM": DDIMScheduler.from_config,
    "DPM-Solver++": lambda config: DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True),
    "SDE-DPM-Solver++": lambda config: DPMSolverMultistepScheduler.from_config(
        config, use_karras_sigmas=True, algorithm_type="sde-dpmsolver++"
    ),
}


def arrays(images):
    return np.stack([np.array(image) for image in images])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def swap(pipe, sampler):
    """As a user does it."""
    pipe.scheduler = SWAPPED[sampler](pipe.scheduler.config) or pipe.scheduler


@pytest.fixture
def files(image_folder):
    return [str(path) for path in sorted(image_folder.glob("0*.png"))[:2]]


@pytest.fixture
def squares(files):
    return [center_crop_resize(Image.open(file), 32) for file in files]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_are_those_of_the_pipeline(pipe, sampler):
    made = arrays(sample(pipe, 5, 4, sampler, 3))
    other_seed, other_steps = sample(pipe, 6, 4, sampler, 3), sample(pipe, 5, 5, sampler, 3)
    swap(pipe, sampler)
    assert (made == arrays(pipe(3, 4, generator=seeded(5)).images)).all()
    assert (made != arrays(other_seed)).any() and (made != arrays(other_steps)).any()


def test_samplers_differ(pipe):
    made = {sampler: arrays(sample(pipe, 0, 4, sampler, 1)).tobytes() for sampler in SAMPLERS}
    assert len(set(made.values())) == len(SAMPLERS) == 4 and {*USUAL_STEPS, "own"} == SAMPLERS.keys()


def test_requests_leave_the_pipeline_as_it_is(pipe, files):
    scheduler, timesteps = pipe.scheduler, pipe.scheduler.timesteps.clone()
    first = arrays(sample(pipe, 0, 4, "own", 2))
    sample(pipe, 0, 3, "DPM-Solver++", 1)
    interpolate(pipe, 1, 7, "DDIM", *files)
    assert pipe.scheduler is scheduler and (scheduler.timesteps == timesteps).all()
    assert scheduler.num_inference_steps is None and pipe.config.scheduler[1] == "CosineVariantScheduler"
    assert (arrays(sample(pipe, 0, 4, "own", 2)) == first).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_reconstructions_and_variations(pipe, files, squares, sampler):
    square, reconstruction = reconstruct(pipe, 5, 4, sampler, files[0])
    _, variation = reconstruct(pipe, 5, 4, sampler, files[0], 0.5)
    swap(pipe, sampler)
    assert (arrays([square]) == arrays(squares[:1])).all() and square.size == (32, 32)
    assert (arrays([reconstruction]) == arrays(pipe.reconstruct(squares[0]).images)).all()
    assert (arrays([variation]) == arrays(pipe.vary(squares[0], 0.5, 4, generator=seeded(5)).images)).all()
    assert (arrays([variation]) != arrays([reconstruction])).any()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_interpolations(pipe, files, squares, sampler):
    made = arrays(interpolate(pipe, 5, 6, sampler, *files, 3, 0.5))
    swap(pipe, sampler)
    assert made.shape == (5, 32, 32, 3)
    assert (made == arrays(pipe.interpolate(*squares, 5, 0.5, 6, generator=seeded(5)).images)).all()
    assert (made[0] != made[-1]).any()


def test_wrong_arguments(pipe, files, image_folder):
    for seed in (None, -1, 1.5, float("nan"), MAX_SEED + 1):
        with pytest.raises(ValueError, match=f"the seed is {seed}; it must be a whole number from 0 to"):
            sample(pipe, seed, 4, "own")
    sample(pipe, float(MAX_SEED), 1, "own")
    for steps in (None, 0, 2.5, 1001, "4"):
        with pytest.raises(
            ValueError, match=f"the number of steps is {steps}; it must be a whole number from 1 to 1000"
        ):
            reconstruct(pipe, 0, steps, "own", files[0])
    for count in (None, 0, 1.5, 17):
        with pytest.raises(
            ValueError, match=f"the number of images is {count}; it must be a whole number from 1 to 16"
        ):
            sample(pipe, 0, 4, "own", count)
    for count in (None, 0, 1.5, 15):
        with pytest.raises(ValueError, match=f"images between is {count}; it must be a whole number from 1 to 14"):
            interpolate(pipe, 0, 4, "own", *files, count)
    for strength in (None, -0.1, 2, float("nan"), "1"):
        for call, images in ((reconstruct, files[:1]), (interpolate, [*files, 6])):
            with pytest.raises(ValueError, match=f"the strength is {strength}; it must be a number from 0 to 1"):
                call(pipe, 0, 4, "own", *images, strength)
    assert len(sample(pipe, 0.0, 2.0, "own", 1.0)) == 1  # whole numbers of JSON
    with pytest.raises(ValueError, match="the sampler is 'Euler'; it must be one of 'DPM-Solver"):
        sample(pipe, 0, 4, "Euler")
    with pytest.raises(ValueError, match="the image is missing; choose a file for it"):
        reconstruct(pipe, 0, 4, "own", None)
    with pytest.raises(ValueError, match="the second image is missing"):
        interpolate(pipe, 0, 4, "own", files[0], None)
    with pytest.raises(ValueError, match="not readable as an image"):
        reconstruct(pipe, 0, 4, "own", str(image_folder / "broken.png"))


def test_handlers_of_the_page(pipe, files):
    gradio = pytest.importorskip("gradio", reason="the page needs gradio")
    handlers = {function.api_name: function.fn for function in build_app(pipe).fns.values()}
    steps = []
    made = handlers["interpolate"](lambda done, **_: steps.append(done), 5, 6, "DDIM", *files, 1, 0.5)
    assert (arrays(made) == arrays(interpolate(pipe, 5, 6, "DDIM", *files, 1, 0.5))).all()
    assert steps == [(1, 3), (2, 3), (3, 3)]  # what the bar of the page shows
    with pytest.raises(gradio.Error) as error:
        handlers["sample"](gradio.Progress(), -1, 6, "DDIM", 1)
    assert error.value.message == f"The seed is -1; it must be a whole number from 0 to {MAX_SEED}."


def test_whole_numbers_of_the_page(pipe):
    gradio = pytest.importorskip("gradio", reason="the page needs gradio")
    sliders = [block for block in build_app(pipe).blocks.values() if isinstance(block, gradio.Slider)]
    asked = {
        slider.label: slider.preprocess(0.6) if slider.maximum == 1 else slider.preprocess(2.6) for slider in sliders
    }
    assert asked == {"Steps": 3, "Images": 3, "Strength": 0.6, "Images between": 3}
    assert {type(value) for label, value in asked.items() if label != "Strength"} == {int}


def test_pipelines_of_other_classes(unet):
    pytest.importorskip("gradio", reason="the page needs gradio")
    with pytest.raises(ValueError, match="the model is a DDPMPipeline; the page needs a BricsKeyCodePipeline"):
        build_app(DDPMPipeline(unet, DDPMScheduler()))


def test_a_class_is_chosen(autoencoder):
    torch.manual_seed(1)
    unet = UNet2DModel(sample_size=8, in_channels=4, out_channels=4, num_class_embeds=3, **UNET).eval()
    scheduler = DDIMScheduler.from_config(CosineVariantScheduler().config)
    config = {"id2label": {0: "cat", 1: "dog"}, "default_num_inference_steps": 7}
    pipe = BricsKeyCodePipeline(autoencoder, unet, scheduler, **config)
    made = arrays(sample(pipe, 5, 4, "own", 2, "dog"))
    assert (made == arrays(pipe(2, 4, class_labels="dog", generator=seeded(5)).images)).all()
    assert (made != arrays(sample(pipe, 5, 4, "own", 2))).any()
    parts = {part.elem_id: part for part in build_app(pipe).blocks.values()}
    assert [name for name, _ in parts["class"].choices] == ["any", "cat", "dog"]
    assert parts["sampler"].value == "own" and parts["steps"].value == 7

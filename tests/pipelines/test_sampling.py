"""Samples into a folder: the same however they are shared out, going on, and choice of schedulers."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from PIL import Image
from safetensors.torch import load_file
from small_models import UNET

from brics_diffusers import BricsKeyCodePipeline
from brics_diffusers.data import load_collection
from brics_diffusers.pipelines.sampling import (
    load_pipeline,
    load_samples,
    read_sample_settings,
    sample_generator,
    sample_images_to_folder,
    sample_is_complete,
    sample_path,
    sampling_settings,
    with_scheduler,
)


STEPS = {"num_inference_steps": 3}


def pixels(folder, count):
    return np.stack([np.array(Image.open(sample_path(folder, index))) for index in range(count)]).astype(int)


def test_processes_and_batch_sizes_do_not_matter(pipe, tmp_path):
    sample_images_to_folder(pipe, tmp_path / "one", 7, batch_size=4, **STEPS)
    for rank in (2, 0, 1):  # in any order
        sample_images_to_folder(
            pipe, tmp_path / "three", 7, 2, process_index=rank, num_processes=3, progress=False, **STEPS
        )
    one, three = pixels(tmp_path / "one", 7), pixels(tmp_path / "three", 7)
    # Sums of batched products have another order, which may tip the rounding to 8 bits.
    assert np.abs(one - three).max() <= 1
    assert len({image.tobytes() for image in one}) == 7
    assert [path.name for path in sorted((tmp_path / "one").iterdir())][-2:] == ["0000006.png", "samples.json"]


@pytest.mark.parametrize("labels", [None, ["dog", "cat"]])
def test_nor_with_classes_and_guidance(pipe, unet, tmp_path, labels):
    """Classes that are drawn follow from a sample's own noise too."""
    torch.manual_seed(1)
    of_classes = UNet2DModel(sample_size=8, in_channels=4, out_channels=4, num_class_embeds=3, **UNET).eval()
    options = {"id2label": {0: "cat", 1: "dog"}, "default_class_weights": [1, 3], "default_guidance_scale": 3.0}
    guided = BricsKeyCodePipeline(pipe.autoencoder, of_classes, pipe.scheduler, guide=unet, **options)
    options = {"class_labels": labels, "progress": False, **STEPS}
    sample_images_to_folder(guided, tmp_path / "one", 5, batch_size=5, **options)
    for rank in (1, 0):
        sample_images_to_folder(guided, tmp_path / "two", 5, 2, process_index=rank, num_processes=2, **options)
    sample_images_to_folder(guided, tmp_path / "unguided", 5, guidance_scale=1.0, **options)
    one, two, unguided = (pixels(tmp_path / name, 5) for name in ("one", "two", "unguided"))
    assert np.abs(one - two).max() <= 2 < np.abs(one - unguided).max()


def test_one_image_is_that_of_its_generator(pipe, tmp_path):
    sample_images_to_folder(pipe, tmp_path, 3, batch_size=1, seed=5, progress=False, **STEPS)
    image = pipe(1, generator=[sample_generator(5, 2)], **STEPS).images[0]
    assert (np.array(image) == pixels(tmp_path, 3)[2]).all()


def test_pipelines_of_diffusers(unet, tmp_path):
    unet.register_to_config(sample_size=16, in_channels=3, out_channels=3)
    unet.conv_in, unet.conv_out = torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.Conv2d(16, 3, 3, padding=1)
    pipe = DDPMPipeline(unet, DDPMScheduler())
    for name, size in (("a", 1), ("b", 3)):
        sample_images_to_folder(pipe, tmp_path / name, 3, size, progress=False, **STEPS)
    a, b = pixels(tmp_path / "a", 3), pixels(tmp_path / "b", 3)
    assert a.shape == (3, 16, 16, 3) and np.abs(a - b).max() <= 1
    assert read_sample_settings(tmp_path / "a")["pipeline"] == "DDPMPipeline"


def test_seeds_have_no_noise_in_common():
    draws = {
        tuple(torch.randn(2, generator=sample_generator(seed, index)).tolist())
        for seed in range(8)
        for index in range(8)
    }
    assert len(draws) == 64


def test_goes_on_after_an_interruption(pipe, tmp_path, monkeypatch):
    sample_images_to_folder(pipe, tmp_path / "whole", 6, batch_size=2, progress=False, **STEPS)
    folder, calls, original = tmp_path / "parts", [], BricsKeyCodePipeline.__call__

    def interrupted(self, **options):
        if calls:
            raise KeyboardInterrupt
        calls.append(options["batch_size"])
        return original(self, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(BricsKeyCodePipeline, "__call__", interrupted)
        sample_images_to_folder(pipe, folder, 6, batch_size=2, progress=False, **STEPS)
    assert [sample_is_complete(folder, index) for index in range(6)] == [True, True] + [False] * 4
    data = sample_path(folder, 1).read_bytes()
    sample_path(folder, 1).write_bytes(data[:-5])  # as after a power cut
    (folder / ".0000002.png.killed").write_bytes(data[:9])
    kept = sample_path(folder, 0).stat().st_mtime_ns

    made = []
    monkeypatch.setattr(
        BricsKeyCodePipeline, "__call__", lambda self, **options: made.append(options) or original(self, **options)
    )
    sample_images_to_folder(pipe, folder, 6, batch_size=2, progress=False, **STEPS)
    assert sum(options["batch_size"] for options in made) == 5
    assert sample_path(folder, 0).stat().st_mtime_ns == kept
    assert np.abs(pixels(folder, 6) - pixels(tmp_path / "whole", 6)).max() <= 1
    assert len(load_collection(folder)) == 6  # the rest of the killed process is hidden
    made.clear()
    sample_images_to_folder(pipe, folder, 7, batch_size=2, progress=False, **STEPS)
    assert [options["batch_size"] for options in made] == [1]


def test_samples_made_otherwise_are_not_mixed(pipe, tmp_path):
    sample_images_to_folder(pipe, tmp_path, 1, progress=False, **STEPS)
    settings = read_sample_settings(tmp_path)
    assert settings == json.loads(json.dumps(sampling_settings(pipe, 3, 0)))
    assert settings["scheduler"] == "CosineVariantScheduler" and settings["num_inference_steps"] == 3
    with pytest.raises(ValueError, match=r"made otherwise \(different: num_inference_steps, seed\)"):
        sample_images_to_folder(pipe, tmp_path, 1, num_inference_steps=2, seed=1)
    pipe.unet.conv_out.bias.data += 1
    with pytest.raises(ValueError, match=r"different: weights\)"):
        sample_images_to_folder(pipe, tmp_path, 1, **STEPS)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="different: weights, scheduler"):
        sample_images_to_folder(pipe, tmp_path, 1, **STEPS)


def test_settings_are_json(pipe, tmp_path):
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    sample_images_to_folder(pipe, tmp_path, 1, progress=False, **STEPS)
    manifest = tmp_path / "samples.json"
    assert json.loads(manifest.read_text(), parse_constant=pytest.fail) == read_sample_settings(tmp_path)
    assert read_sample_settings(tmp_path)["scheduler_config"]["lambda_min_clipped"] == "-inf"
    # As it was written earlier.
    text = manifest.read_text().replace('"-inf"', "-Infinity").replace('"solver_order"', '"tau": 1.0, "solver_order"')
    manifest.write_text(text)
    sample_images_to_folder(pipe, tmp_path, 2, progress=False, **STEPS)  # the same settings
    assert read_sample_settings(tmp_path)["scheduler_config"]["lambda_min_clipped"] == "-inf"


def test_a_run_without_samples_binds_nothing(pipe, tmp_path):
    with pytest.raises(ValueError):  # more steps than the scheduler was trained with
        sample_images_to_folder(pipe, tmp_path, 1, num_inference_steps=10**6, progress=False)
    sample_images_to_folder(pipe, tmp_path, 1, progress=False, **STEPS)
    assert read_sample_settings(tmp_path)["num_inference_steps"] == 3


def test_only_samples_are_loaded(pipe, tmp_path):
    sample_images_to_folder(pipe, tmp_path, 3, progress=False, **STEPS)
    for name in ("train", "test"):  # which would be splits of the folder
        (tmp_path / name).mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / name / "0.png")
    paths = [row["image"]["path"] for row in load_samples(tmp_path, 2)]
    assert paths == [str(sample_path(tmp_path, index)) for index in range(2)]
    assert load_samples(tmp_path, 2).features == load_collection(tmp_path).features


def test_wrong_schedulers(pipe):
    with pytest.raises(ValueError, match="Scheduler has no argument use_karras_sigma; its .*sigmas"):
        with_scheduler(pipe, DPMSolverMultistepScheduler, {"use_karras_sigma": True})
    with pytest.raises(ValueError, match="Scheduler does not denoise predictions of noise .*; give"):
        with_scheduler(pipe, FlowMatchEulerDiscreteScheduler)


def test_folder_of_other_images_is_left_alone(pipe, tmp_path):
    (tmp_path / "train/summer").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "train/summer/holiday.jpg")
    with pytest.raises(ValueError, match="holds images that are not samples"):
        sample_images_to_folder(pipe, tmp_path, 1, **STEPS)
    assert read_sample_settings(tmp_path) is None


@pytest.mark.parametrize("wrong", [{"num_images": 0}, {"batch_size": 0}, {"num_inference_steps": 0}, {"seed": -1}])
def test_numbers_out_of_range(pipe, tmp_path, wrong):
    with pytest.raises(ValueError, match="the first three must be at least 1, seed at least 0"):
        sample_images_to_folder(pipe, tmp_path / "new", **({"num_images": 1} | wrong))
    assert not (tmp_path / "new").exists()


def test_pipelines_and_schedulers(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = load_pipeline(tmp_path / "pipe")
    assert sampling_settings(loaded, 3, 0) == sampling_settings(pipe, 3, 0)
    solver = "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}
    loaded = load_pipeline(tmp_path / "pipe", *solver)
    assert isinstance(loaded.scheduler, DPMSolverMultistepScheduler) and loaded.scheduler.config.use_karras_sigmas
    loaded.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved/scheduler/scheduler_config.json").read_text())
    del config["gamma_schedule"]  # an argument of the scheduler before, without which `guidance-search` saves this one
    (tmp_path / "saved/scheduler/scheduler_config.json").write_text(json.dumps(config))
    assert sampling_settings(load_pipeline(tmp_path / "saved", *solver), 3, 0) == sampling_settings(loaded, 3, 0)
    loaded = load_pipeline(tmp_path / "pipe", scheduler_options={"timestep_spacing": "leading"})
    assert sampling_settings(loaded, 3, 0)["scheduler_config"]["timestep_spacing"] == "leading"
    for name in ("NoScheduler", "UNet2DModel"):
        with pytest.raises(ValueError, match=f"{name} is no scheduler of diffusers"):
            load_pipeline(tmp_path / "pipe", name)
    for name in (tmp_path, tmp_path / "missing", "missing"):
        with pytest.raises(FileNotFoundError, match="holds no model_index.json"):
            load_pipeline(name)


def test_pickles_are_not_read(pipe, unet, tmp_path):
    pipe.save_pretrained(tmp_path / "brics")
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    for name in ("brics", "ddpm"):
        weights = tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(weights), weights.with_suffix(".bin"))  # one that diffusers reads
        weights.unlink()
        with pytest.raises(OSError, match="/unet\\); only safetensors are read, as a pickle can run any code"):
            load_pipeline(tmp_path / name)


def test_schedulers_of_their_own(pipe):
    own, other = with_scheduler(pipe), with_scheduler(pipe, DDIMScheduler, {"timestep_spacing": "trailing"})
    assert type(own.scheduler) is type(pipe.scheduler) and own.scheduler is not pipe.scheduler
    assert isinstance(other.scheduler, DDIMScheduler) and other.scheduler.config.timestep_spacing == "trailing"
    assert other.unet is pipe.unet and other.config.scheduler == ("diffusers", "DDIMScheduler")
    assert pipe.config.scheduler == ("brics_diffusers", "CosineVariantScheduler")
    torch.testing.assert_close(other.scheduler.alphas_cumprod, pipe.scheduler.alphas_cumprod)

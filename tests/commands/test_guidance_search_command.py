"""`brics-diffusers guidance-search`: what it tries and saves, and what it refuses."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from small_models import UNET

from brics_diffusers import BricsKeyCodePipeline, CosineVariantScheduler
from brics_diffusers.commands import guidance_search, main
from brics_diffusers.pipelines.sampling import sample_generator
from brics_diffusers.training_utils.checkpoints import RunState
from brics_diffusers.training_utils.post_hoc_ema import SNAPSHOTS, PowerEMA, load_average
from brics_diffusers.training_utils.pretrained import load_key_code_pipeline
from brics_diffusers.training_utils.record import _weights_digest


@pytest.fixture
def class_pipe_folder(autoencoder, tmp_path):
    torch.manual_seed(1)
    unet = UNet2DModel(sample_size=8, in_channels=4, out_channels=4, num_class_embeds=3, **UNET)
    pipe = BricsKeyCodePipeline(autoencoder, unet, CosineVariantScheduler(), id2label={0: "cat", 1: "dog"})
    pipe.save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.fixture
def flags(image_folder, tmp_path):
    words = ["--dataset_name", image_folder, "--num_samples", 3, "--num_inference_steps", 4, "--metric", "kid"]
    words += ["--feature_extractor", "random-conv", "--features_cache_dir", tmp_path / "cache"]
    return [*words, "--guidance_scales", 1, 3, "--guidance_intervals", "0:1", "0.4:1"]


def test_the_smallest_value_becomes_the_default(class_pipe_folder, flags, run_command, tmp_path):
    words = [class_pipe_folder, *flags, "--class_labels", "all", "--save"]
    result, text, folder = run_command("guidance-search", *words)
    tried = [(row["guidance_scale"], row["from"], row["to"]) for row in result["values"]]
    assert tried == [(1, 0, 1), (3, 0, 1), (3, 0.4, 1)]  # without guidance, intervals are all one
    values = [row["kid_random_conv"] for row in result["values"]]
    assert result["best"]["kid_random_conv"] == min(values) and len(set(values)) == 3
    assert (folder / "samples-3-0.4-1/0000002.png").is_file()
    pipe = BricsKeyCodePipeline.from_pretrained(class_pipe_folder)
    assert pipe.config.default_guidance_scale == result["best"]["guidance_scale"]
    assert list(pipe.config.default_guidance_interval) == [result["best"]["from"], result["best"]["to"]]
    assert pipe.class_names == ["cat", "dog"] and "which the pipeline now has" in text
    index = json.loads((class_pipe_folder / "model_index.json").read_text())
    assert index["_class_name"] == "BricsKeyCodePipeline"
    assert pipe.config.default_num_inference_steps == 4 and isinstance(pipe.scheduler, CosineVariantScheduler)


def test_a_solver_is_saved_and_the_pipeline_can_still_be_trained(class_pipe_folder, flags, run_command, caplog):
    pipe = BricsKeyCodePipeline.from_pretrained(class_pipe_folder)
    pipe.autoencoder.register_to_config(scaling_factor=4.4)
    before = pipe.scheduler = CosineVariantScheduler(clip_sample_range=2.2)
    pipe.save_pretrained(class_pipe_folder)
    words = [class_pipe_folder, *flags[: flags.index("--guidance_scales")], "--guidance_scales", 2, "--save"]
    words += ["--guidance_intervals", "0:1", "--scheduler", "DPMSolverMultistepScheduler"]
    words += ["--scheduler_options", '{"use_karras_sigmas": true, "algorithm_type": "sde-dpmsolver++"}']
    run_command("guidance-search", *words, "--class_labels", "all")
    diffusers_logging.enable_propagation()
    try:
        pipe = BricsKeyCodePipeline.from_pretrained(class_pipe_folder)
    finally:
        diffusers_logging.disable_propagation()
    # What only the scheduler of training knows is left out.
    assert "ignored" not in caplog.text and "Expected types" not in caplog.text
    assert isinstance(pipe.scheduler, DPMSolverMultistepScheduler)
    assert pipe.scheduler.config.use_karras_sigmas and pipe.scheduler.config.algorithm_type == "sde-dpmsolver++"
    torch.testing.assert_close(pipe.scheduler.alphas_cumprod, before.alphas_cumprod)
    assert pipe.scheduler.config.prediction_type == before.config.prediction_type
    trained = load_key_code_pipeline(class_pipe_folder).scheduler
    assert torch.equal(trained.alphas_cumprod, pipe.scheduler.alphas_cumprod) and hasattr(trained, "get_velocity")
    for scheduler in (trained, CosineVariantScheduler.from_config(pipe.scheduler.config)):
        assert scheduler.config.clip_sample and scheduler.config.clip_sample_range == 2.2
    expected = sampled_image(BricsKeyCodePipeline.from_pretrained(class_pipe_folder), before)
    assert torch.equal(sampled_image(pipe), expected)


def sampled_image(pipe, scheduler=None) -> torch.Tensor:
    if scheduler is not None:
        options = {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"}
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe(class_labels="cat", generator=torch.Generator().manual_seed(0), output_type="pt").images


def test_a_guide_without_classes(pipe, flags, run_command, tmp_path):
    torch.manual_seed(2)
    narrow = UNET | {"block_out_channels": (8, 16), "attention_head_dim": 8}
    pipe.register_modules(guide=UNet2DModel(sample_size=8, in_channels=4, out_channels=4, **narrow))
    pipe.save_pretrained(tmp_path / "pipe")
    result, _, folder = run_command("guidance-search", tmp_path / "pipe", *flags, "--guidance_intervals", "0:1")
    assert [row["guidance_scale"] for row in result["values"]] == [1, 3]
    guided, plain = (np.array(Image.open(folder / f"samples-{scale}-0-1/0000000.png")) for scale in (3, 1))
    assert (guided != plain).any()
    pipe.register_modules(guide=None)
    expected = pipe(1, 4, generator=[sample_generator(0, 0)], output_type="pil").images[0]
    assert np.abs(plain.astype(int) - np.array(expected)).max() <= 2  # scale 1 is the pipeline without its guide


def test_a_guide_from_another_pipeline(pipe, flags, run_command, tmp_path):
    pipe.unet.half()
    pipe.save_pretrained(tmp_path / "pipe")
    pipe.unet.float()
    torch.manual_seed(2)
    narrow = UNET | {"block_out_channels": (8, 16), "attention_head_dim": 8}
    guide = UNet2DModel(sample_size=8, in_channels=4, out_channels=4, **narrow)
    other = BricsKeyCodePipeline(pipe.autoencoder, guide, pipe.scheduler)
    other.save_pretrained(tmp_path / "other")
    words = [tmp_path / "pipe", *flags[: flags.index("--guidance_scales")], "--guidance_intervals", "0:1", "--save"]
    words += ["--guide", tmp_path / "other", "--guidance_scales"]
    (tmp_path / "pipe/training_summary.json").write_text('{"steps": 4, "weights": "of before"}')
    result, text, folder = run_command("guidance-search", *words, 3, 4)
    assert result["guide"] == str(tmp_path / "other") and f"guided by `{tmp_path / 'other'}`" in text
    summary = json.loads((tmp_path / "pipe/training_summary.json").read_text())
    assert summary["guide"] == str(tmp_path / "other") and summary["weights"] == _weights_digest(tmp_path / "pipe")
    loaded = BricsKeyCodePipeline.from_pretrained(tmp_path / "pipe")
    saved = load_file(tmp_path / "pipe/guide/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[name], value.half()) for name, value in guide.state_dict().items())
    scale = loaded.config.default_guidance_scale
    assert scale == result["best"]["guidance_scale"] > 1
    loaded.set_progress_bar_config(disable=True)
    expected = loaded(generator=[sample_generator(0, 0)], output_type="pil").images[0]
    made = np.array(Image.open(folder / f"samples-{scale:g}-0-1/0000000.png"))
    assert np.abs(made.astype(int) - np.array(expected)).max() <= 8  # guided by weights before they were halved
    loaded.register_modules(guide=None)
    unguided = loaded(generator=[sample_generator(0, 0)], output_type="pil").images[0]
    assert np.abs(made.astype(int) - np.array(unguided)).max() > 8


def test_a_guide_that_is_no_better_changes_nothing(pipe, flags, run_command, tmp_path, monkeypatch):
    pipe.register_modules(guide=copy.deepcopy(pipe.unet))
    pipe.save_pretrained(tmp_path / "pipe")
    torch.nn.init.normal_(pipe.unet.conv_out.weight)
    pipe.register_modules(guide=None)
    pipe.save_pretrained(tmp_path / "other")
    values = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(
        guidance_search, "generation_metrics", lambda *_: {"metrics": {"kid_random_conv": next(values)}}
    )
    words = [tmp_path / "pipe", *flags, "--guide", tmp_path / "other", "--save"]
    assert run_command("guidance-search", *words)[0]["best"]["guidance_scale"] == 1
    loaded = BricsKeyCodePipeline.from_pretrained(tmp_path / "pipe")
    assert torch.equal(loaded.guide.conv_out.weight, loaded.unet.conv_out.weight)  # as before


def test_a_guide_of_another_type_of_numbers_fits(pipe, flags, run_command, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    for part in (pipe.autoencoder, pipe.unet):
        torch.nn.Module.to(part, torch.bfloat16)
    torch.nn.init.zeros_(pipe.autoencoder.grids.entries)  # which key codes do not depend on
    pipe.save_pretrained(tmp_path / "other")
    words = [tmp_path / "pipe", *flags[: flags.index("--guidance_scales")], "--guide", tmp_path / "other"]
    result = run_command("guidance-search", *words, "--guidance_scales", 1)[0]
    assert result["guide"] == str(tmp_path / "other")


def test_a_guide_without_classes_fits_a_pipeline_with_them(class_pipe_folder, flags, run_command, tmp_path):
    pipe = BricsKeyCodePipeline.from_pretrained(class_pipe_folder)
    unet = UNet2DModel(sample_size=8, in_channels=4, out_channels=4, **UNET)
    BricsKeyCodePipeline(pipe.autoencoder, unet, pipe.scheduler).save_pretrained(tmp_path / "other")
    words = [class_pipe_folder, *flags[: flags.index("--guidance_scales")], "--guide", tmp_path / "other", "--save"]
    run_command("guidance-search", *words, "--guidance_scales", 2, "--guidance_intervals", "0:1")
    assert BricsKeyCodePipeline.from_pretrained(class_pipe_folder).guide.config.num_class_embeds is None


def test_a_guide_that_is_no_pipeline_of_brics(pipe, unet, flags, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "other")
    words = [tmp_path / "pipe", *flags, "--guide", tmp_path / "other", "--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit, match="other is a DDPMPipeline; --guide needs two pipelines of BRICS"):
        main([*map(str, ["guidance-search", *words])])


@pytest.mark.parametrize(
    "name", ["classes", "classes without names", "encoder", "scaling_factor", "prediction_type", "noise schedule"]
)
def test_a_guide_of_something_else_is_refused(name, pipe, unet, flags, tmp_path):
    id2label = {}
    if "classes" in name:
        unet = UNet2DModel(sample_size=8, in_channels=4, out_channels=4, num_class_embeds=3, **UNET)
        id2label = {"id2label": {0: "dog", 1: "cat"}} if name == "classes" else {}
        pipe = BricsKeyCodePipeline(pipe.autoencoder, unet, pipe.scheduler, id2label={0: "cat", 1: "dog"})
    pipe.save_pretrained(tmp_path / "pipe")
    scheduler = {"prediction_type": "v_prediction"} if name == "prediction_type" else {}
    if name == "noise schedule":
        scheduler = {"gamma_schedule": "cosine"}
    if name == "encoder":
        torch.nn.init.normal_(pipe.autoencoder.encoder.conv_out.weight)
    if name == "scaling_factor":
        pipe.autoencoder.register_to_config(scaling_factor=3.0)
        scheduler |= {"clip_sample_range": 1.5}
    other = BricsKeyCodePipeline(pipe.autoencoder, unet, CosineVariantScheduler(**scheduler), **id2label)
    other.save_pretrained(tmp_path / "other")
    words = [tmp_path / "pipe", *flags, "--guide", tmp_path / "other", "--output_dir", tmp_path / "out"]
    with pytest.raises(
        SystemExit,
        match=f"has another {name.removesuffix(' without names')} than .*; train it on the same autoencoder",
    ):
        main([*map(str, ["guidance-search", *words])])


def test_averages_of_some_lengths(pipe, flags, run_command, tmp_path):
    pipe.unet.half()
    pipe.save_pretrained(tmp_path / "pipe")
    before = UNet2DModel.from_pretrained(tmp_path / "pipe/unet").state_dict()
    (tmp_path / "pipe/training_summary.json").write_text('{"steps": 4}')
    old_metrics = "<!-- begin metrics -->\n| kid | 1 |\n<!-- end metrics -->"
    (tmp_path / "pipe/README.md").write_text(f"---\nlicense: mit\n---\nOwn words.\n\n{old_metrics}\n")
    accelerator = SimpleNamespace(
        is_main_process=True, register_save_state_pre_hook=id, register_load_state_pre_hook=id
    )
    power_ema = PowerEMA(accelerator, pipe.unet.float(), tmp_path / "pipe", every=2)
    torch.manual_seed(0)
    for step in range(1, 5):
        for weight in pipe.unet.parameters():
            weight.data += 0.1 * torch.randn_like(weight)
        power_ema.step(RunState({}, global_step=step), last=step == 4)
    words = [tmp_path / "pipe", *flags[: flags.index("--guidance_scales")], "--guidance_scales", 1]
    words += ["--ema_lengths", 0.05, 0.15, "--save"]
    result, text, folder = run_command("guidance-search", *words)
    assert [row["ema_length"] for row in result["values"]] == [0.05, 0.15]
    assert result["values"][0]["profile_error"] < 1e-6 < result["values"][1]["profile_error"] < 0.3
    values = [row["kid_random_conv"] for row in result["values"]]
    assert values[0] != values[1] and result["best"]["kid_random_conv"] == min(values)
    assert (folder / "samples-1-0-1-ema-0.15/0000002.png").is_file()
    length = result["best"]["ema_length"]
    assert f"an average of length {length:g} with guidance_scale 1" in text
    load_average(pipe.unet, tmp_path / "pipe" / SNAPSHOTS, length)
    saved = UNet2DModel.from_pretrained(tmp_path / "pipe/unet", torch_dtype=torch.float16)
    for name, weight in pipe.unet.state_dict().items():
        assert torch.equal(saved.state_dict()[name], weight.half())
    assert any(not torch.equal(before[name], weight) for name, weight in saved.float().state_dict().items())
    with safe_open(next((tmp_path / "pipe/unet").glob("*.safetensors")), "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
    summary = json.loads((tmp_path / "pipe/training_summary.json").read_text())
    assert summary["ema_length"] == length and summary["steps"] == 4 and len(summary["weights"]) == 64
    card = (tmp_path / "pipe/README.md").read_text()
    assert "Own words." in card and "license: mit" in card and "| kid | 1 |" not in card  # that of other weights


def test_averages_that_there_are_not(saved_pipe, flags, tmp_path):
    words = [
        "guidance-search",
        saved_pipe,
        *flags,
        "--output_dir",
        tmp_path / "out",
        "--guidance_scales",
        1,
        "--ema_lengths",
    ]
    with pytest.raises(SystemExit, match="the length of an average is 0.5; give one above 0 and at most 0.28"):
        main([*map(str, [*words, 0.1, 0.5])])
    with pytest.raises(SystemExit, match="ema_snapshots has no snapshots of averages; train with --ema_snapshot_st"):
        main([*map(str, [*words, 0.1])])


def test_what_the_pipeline_has_not(pipe, flags, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    words = ["guidance-search", tmp_path / "pipe", *flags, "--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit, match="pipe has neither classes nor a guide; give --guide, or"):
        main([*map(str, words)])
    (tmp_path / "pipe" / SNAPSHOTS).mkdir()
    (tmp_path / "pipe" / SNAPSHOTS / "00000003.safetensors").touch()
    (tmp_path / "pipe/training_summary.json").write_text('{"steps": 4}')
    with pytest.raises(SystemExit, match="end at step 3 and the training at step 4; train with"):
        main([*map(str, [*words, "--guidance_scales", 1, "--ema_lengths", 0.1])])
    assert not (tmp_path / "out/samples-1-0-1").exists()


def test_a_pipeline_without_classes_and_guide(saved_pipe, flags, tmp_path):
    with pytest.raises(SystemExit, match="has neither classes nor a guide"):
        main([*map(str, ["guidance-search", saved_pipe, *flags, "--output_dir", tmp_path / "out"])])


def test_faults(flags, capsys, tmp_path):
    with pytest.raises(SystemExit, match="--save needs a pipeline's folder to write into, and user/model is none"):
        main([*map(str, ["guidance-search", "user/model", *flags, "--save", "--output_dir", tmp_path / "out"])])
    with pytest.raises(SystemExit):
        main(["guidance-search", "x", "--dataset_name", "y", "--guidance_intervals", "0.8:0.2"])
    assert "must be two times in [0, 1] such as 0.2:0.8, not 0.8:0.2" in capsys.readouterr().err

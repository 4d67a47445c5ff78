import json

import pytest
import torch
from diffusers import UNet2DModel
from small_models import UNET

from brics_diffusers import BricsKeyCodePipeline, CosineVariantScheduler
from brics_diffusers.commands import main


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


def test_a_pipeline_without_classes_and_guide(saved_pipe, flags, tmp_path):
    with pytest.raises(SystemExit, match="has neither classes nor a guide"):
        main([*map(str, ["guidance-search", saved_pipe, *flags, "--output_dir", tmp_path / "out"])])


def test_faults(flags, capsys, tmp_path):
    with pytest.raises(SystemExit, match="--save needs a pipeline's folder to write into, and user/model is none"):
        main([*map(str, ["guidance-search", "user/model", *flags, "--save", "--output_dir", tmp_path / "out"])])
    with pytest.raises(SystemExit):
        main(["guidance-search", "x", "--dataset_name", "y", "--guidance_intervals", "0.8:0.2"])
    assert "must be two times in [0, 1] such as 0.2:0.8, not 0.8:0.2" in capsys.readouterr().err

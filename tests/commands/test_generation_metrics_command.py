"""`brics-diffusers generation-metrics`: samples and reports, by class too, and what it refuses."""

import ast
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from launching import launch_subcommand
from PIL import Image
from small_models import ROOT, UNET
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from brics_diffusers import BricsKeyCodePipeline, CosineVariantScheduler
from brics_diffusers.commands import main
from brics_diffusers.hub.card import make_card
from brics_diffusers.metrics import feature_extractors
from brics_diffusers.metrics.generation import INCEPTION, NEIGHBOURS, SPLITS
from brics_diffusers.pipelines.sampling import sample_path
from brics_diffusers.utils.locks import locked_folder


@pytest.fixture
def flags(saved_pipe, image_folder, tmp_path):
    """A run on a small pipeline, without the output folder."""
    words = ["generation-metrics", "--generated", saved_pipe, "--dataset_name", image_folder, "--num_samples", 6]
    words += ["--num_inference_steps", 2, "--feature_extractor", "random-conv", "--metrics", "fid", "precision-recall"]
    return [str(word) for word in [*words, "--features_cache_dir", tmp_path / "cache", "--batch_size", 4]]


def pixels(folder):
    return np.stack([np.array(Image.open(sample_path(folder, index))) for index in range(6)]).astype(int)


def test_a_second_command_in_a_folder_of_samples_is_refused(flags, tmp_path):
    message = "generation-metrics: process .* is at work in .*samples; wait for its end, or name another --samples_dir"
    with locked_folder(tmp_path / "out/samples"), pytest.raises(SystemExit, match=message):
        main([*flags, "--output_dir", str(tmp_path / "out")])
    assert list((tmp_path / "out/samples").iterdir()) == []


@pytest.mark.slow
def test_two_processes_give_the_report_of_one(flags, pipe, image_folder, tmp_path):
    one, two, real = tmp_path / "one", tmp_path / "two", tmp_path / "real"
    shutil.copytree(image_folder, real)
    samples = pipe(4, num_inference_steps=2, generator=torch.Generator().manual_seed(1)).images
    for index, image in enumerate(samples):  # so that some of the generated images lie within their neighbourhoods
        image.save(real / f"sample-{index}.png")
    flags += ["--dataset_name", str(real)]
    main([*flags, "--output_dir", str(one)])
    launch_subcommand(*flags, "--output_dir", two, "--batch_size", 2, processes=2)
    assert np.abs(pixels(one / "samples") - pixels(two / "samples")).max() <= 1  # rounding to 8 bits
    first, second = (json.loads((folder / "generation-metrics.json").read_text()) for folder in (one, two))
    assert first["metrics"]["fid_random_conv"] == pytest.approx(second["metrics"]["fid_random_conv"], rel=1e-2)
    for name in ("precision_random_conv", "recall_random_conv"):
        assert 0 < first["metrics"][name] == second["metrics"][name] <= 1
    assert first["metrics"]["recall_random_conv"] < 1  # of real images far from what weights at random make
    assert not first["extractors"]["fid"]["real_features_cached"]
    assert second["extractors"]["fid"]["real_features_cached"]

    assert set(first["metrics"]) == {f"{name}_random_conv" for name in ("fid", "precision", "recall", "f1")}
    assert first["metrics"]["fid_random_conv"] > 0
    assert first["input1"]["num_images"] == 6 and first["input1"]["sampling"]["num_inference_steps"] == 2
    assert first["input1"]["sampling"]["scheduler"] == "CosineVariantScheduler"
    assert first["input2"]["num_images"] == 28 and first["input2"]["num_unreadable"] == 1
    assert first["machine"]["torch-fidelity"].startswith("0.4")
    text = (one / "generation-metrics.md").read_text()
    assert "| FID (random-conv) |" in text and "| input1 | generated |" in text and "2 steps, seed 0, float32" in text
    assert Image.open(one / "generation-metrics-generated.png").width == 6 * 34 + 2
    assert Image.open(one / "generation-metrics-real.png").height == 4 * 34 + 2


def test_help_says_what_is_computed(capsys):
    with pytest.raises(SystemExit):
        main(["generation-metrics", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    inception, vgg = (FEATURE_EXTRACTORS_REGISTRY[name] for name in (INCEPTION, "vgg16"))
    features = inception.get_default_feature_layer_for_metric("fid")
    assert vgg.get_default_feature_layer_for_metric("prc") == "fc2_relu"
    size, clip_size = inception.INPUT_IMAGE_SIZE, feature_extractors.CLIP_SIZE
    for words in (
        "`input1` is the generated images (--num_samples)",
        "`input2` is the real ones (all of the split, or --max_images)",
        "to use of a folder. Default: 50000.",
        f"{features} features of {INCEPTION} (images resized to {size} x {size}, bilinear as in TensorFlow 1)",
        f"{INCEPTION}'s logits without bias, of the generated images, shuffled, in {SPLITS} splits",
        "4096 features of vgg16 after the ReLU of fc2 (images resized to 224 x 224, as for FID)",
        f"512 image embeddings of CLIP ViT-B/32 (float32, not normalised), images resized to {clip_size} x",
        "d = 1280 means over the pixels of efficientnet-lite2's last features (images resized to 128 x 128, bicubic",
        f"share of input2 within input1's; {NEIGHBOURS} neighbours.",
    ):
        assert words in text


def test_folder_of_images(flags, image_folder, tmp_path):
    generated = tmp_path / "generated"
    generated.mkdir()
    for path in sorted(image_folder.glob("[0-9]*.png"))[:5]:
        Image.open(path).crop((4, 0, 36, 32)).save(generated / path.name)
    (generated / "broken.png").write_text("no image")
    main([*flags, "--generated", str(generated), "--output_dir", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out/generation-metrics.json").read_text())
    assert result["metrics"]["precision_random_conv"] == 1  # they are real ones
    assert result["input1"]["num_images"] == 5 and result["input1"]["num_unreadable"] == 1
    assert result["input1"]["sampling"] is None and not (tmp_path / "out/samples").exists()
    assert "Precision: share of input1" in (tmp_path / "out/generation-metrics.md").read_text()
    main([*flags, "--generated", str(generated), "--output_dir", str(tmp_path / "out"), "--metrics", "fid"])
    assert "Precision" not in (tmp_path / "out/generation-metrics.md").read_text()


def test_kid(flags, tmp_path):
    main([*flags, "--metrics", "kid", "--kid_extractor", "random-conv", "--output_dir", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out/generation-metrics.json").read_text())
    assert set(result["metrics"]) == {"kid_random_conv"} and result["extractors"]["kid"]["name"] == "random-conv"
    assert "| KID x 1,000 (random-conv) |" in (tmp_path / "out/generation-metrics.md").read_text()


@pytest.fixture
def class_flags(autoencoder, image_folder, tmp_path):
    """A pipeline with the classes cat, dog and owl, and images of cats and dogs."""
    torch.manual_seed(1)
    unet = UNet2DModel(sample_size=8, in_channels=4, out_channels=4, num_class_embeds=4, **UNET)
    names = {0: "cat", 1: "dog", 2: "owl"}
    BricsKeyCodePipeline(autoencoder, unet, CosineVariantScheduler(), id2label=names).save_pretrained(
        tmp_path / "by-class"
    )
    for index in range(24):
        folder = tmp_path / "real" / ("cat" if index < 14 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(image_folder / f"{index:02d}.png", folder)
    words = [
        "generation-metrics",
        "--generated",
        tmp_path / "by-class",
        "--dataset_name",
        tmp_path / "real",
        "--by_class",
    ]
    words += ["--num_inference_steps", 2, "--metrics", "kid", "--kid_extractor", "random-conv", "--num_samples", 24]
    return [*map(str, [*words, "--features_cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "out"])]


def test_by_class(class_flags, tmp_path):
    main([*class_flags, "--class_labels", "cat", "cat", "1", "2"])  # in turn: half cats
    result = json.loads((tmp_path / "out/generation-metrics.json").read_text())
    counts = {name: (found["generated"], found["real"]) for name, found in result["by_class"].items()}
    assert counts == {"cat": (12, 14), "dog": (6, 10), "owl": (6, 0)}
    assert [found["too_few"] for found in result["by_class"].values()] == [False, True, True]
    assert set(result["by_class"]["cat"]["metrics"]) == {"kid_random_conv"} == set(result["metrics"])
    text = (tmp_path / "out/generation-metrics.md").read_text()
    assert "| class | generated | real | KID x 1,000 (random-conv) | remark |" in text
    assert "| owl | 6 | 0 |  | too few |" in text and "fewer than 10 images of a kind" in text
    shutil.copytree(tmp_path / "out", tmp_path / "by-class/reports")
    card = make_card(tmp_path / "by-class")
    value = result["by_class"]["cat"]["metrics"]["kid_random_conv"]
    assert f"\n| cat | 12 | 14 | kid_random_conv {value:.4g} |\n| dog | 6 | 10 | too few |\n" in card


def test_classes_are_drawn_as_in_training(class_flags, tmp_path):
    index = json.loads((tmp_path / "by-class/model_index.json").read_text())
    (tmp_path / "by-class/model_index.json").write_text(json.dumps(index | {"default_class_weights": [0, 1, 0]}))
    main(class_flags)
    found = json.loads((tmp_path / "out/generation-metrics.json").read_text())["by_class"]
    assert found["dog"]["generated"] == 24 and found["dog"]["metrics"] and "owl" not in found


def test_what_by_class_needs(class_flags, saved_pipe, image_folder, tmp_path):
    for changes, message in (
        ([], "--by_class needs samples of known classes; give --class_labels all, or training, or names"),
        (
            ["--generated", str(saved_pipe)],
            "--by_class needs a pipeline with classes, and .* is none; leave",
        ),
        (["--generated", str(image_folder)], "--by_class needs a pipeline with classes, and .* is none; leave it"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([*class_flags, *changes])
    assert not list(tmp_path.glob("out/samples/*.png"))


def test_errors_come_before_the_samples(flags, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(feature_extractors, "is_offline_mode", lambda: True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    flags += ["--output_dir", str(tmp_path / "out")]
    for changes, message in (
        (["--feature_extractor", "inception-v3-compat"], "could not load weights-inception-2015-12-05-6726825d.pth"),
        (["--metrics", "clip-fid"], "could not load clip-vit-b-32"),
        (["--feature_extractor", "resnet"], "'resnet' is no feature extractor"),
        (["--num_samples", "3"], "precision-recall needs at least 4 images of each kind, got 3 generated and 25 real"),
        (["--dataset_name", str(tmp_path / "empty")], "is empty; expected images"),
        (["--generated", str(tmp_path / "missing")], "holds no model_index.json"),
        (["--generated", str(tmp_path / "empty")], "is empty; expected images"),
        (["--scheduler", "NoScheduler"], "NoScheduler is no scheduler of diffusers"),
        (
            ["--features_cache_dir", str(tmp_path / "file")],
            "--features_cache_dir .*file is no folder that can be made",
        ),
        (["--samples_dir", str(tmp_path / "file")], "--samples_dir .*file is no folder that can be made or written"),
    ):
        with pytest.raises(SystemExit, match=f"brics-diffusers generation-metrics: .*{message}"):
            main(flags + changes)
    assert not list(tmp_path.glob("out/samples/*.png"))


def test_without_the_packages_for_metrics(flags, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(
        SystemExit, match=r"torch-fidelity is not installed; run: pip install 'brics-diffusers\[metrics\]'"
    ):
        main([*flags, "--feature_extractor", "vgg16", "--output_dir", str(tmp_path / "out")])
    for path in (ROOT / "brics_diffusers").rglob("*.py"):  # --help must work without them
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"torch_fidelity", "matplotlib"}, path

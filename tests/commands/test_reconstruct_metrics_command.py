"""`brics-diffusers reconstruct-metrics`: its report, on several processes too, and what it refuses."""

import json

import pytest
import torch
from launching import launch_subcommand
from PIL import Image

from brics_diffusers.commands import main, reconstruct_metrics
from brics_diffusers.metrics.efficientnet import EFFICIENTNETS, efficientnet_is_installed
from brics_diffusers.metrics.perceptual import load_lpips


@pytest.mark.parametrize("protocol", ["standard", "paper"])
def test_report(run_command, model_folder, image_folder, monkeypatch, protocol):
    random_lpips = load_lpips("alex", pretrained=False)
    monkeypatch.setattr(reconstruct_metrics, "load_perceptual_network", lambda *_, **__: random_lpips)
    flags = [model_folder, "--dataset_name", image_folder, "--dataset_split", "train", "--protocol", protocol]
    name = f"reconstruct-metrics-{protocol}"
    results = [run_command("reconstruct-metrics", *flags, "--batch_size", size, report=name) for size in (5, 25)]
    (result, text, folder), other = results[0], results[1][0]
    assert result["images"] == 24 and result["unreadable"] == [str(image_folder / "broken.png")]
    assert "24 images" in text and "1 file was unreadable and skipped" in text and result["description"] in text
    assert "not measured" not in text and result["feature_distances"] is None
    assert "rFID and KID were not computed: `--feature_extractor` chooses their features." in text
    assert f"Autoencoder `{model_folder}`." in text and "central square, Lanczos to 32 x 32, [-1, 1]." in text
    assert "\nLPIPS is that of the network alex.\n" in text
    assert ("The seed of the perturbation is 0." in text) == (protocol == "paper")
    for metric in ("lpips", "ssim", "psnr"):
        assert result["metrics"][metric]["images"] == 24 and result["metrics"][metric]["two_std"] > 0
        for value in ("mean", "two_std"):
            expected = pytest.approx(other["metrics"][metric][value], rel=1e-5, abs=1e-5)
            assert result["metrics"][metric][value] == expected
    assert Image.open(folder / f"{name}-images.png").width > 8 * 32


@pytest.mark.slow
def test_number_of_processes_does_not_matter(run_command, model_folder, image_folder, tmp_path):
    flags = [model_folder, "--dataset_name", image_folder, "--dataset_split", "train", "--protocol", "paper"]
    flags += ["--no_lpips", "--feature_extractor", "random-conv", "--num_reference_images", 13]
    one, text, _ = run_command("reconstruct-metrics", *flags, report="reconstruct-metrics-paper")
    assert "\nA perceptual distance was not measured: `--no_perceptual` left it out.\n" in text
    output = tmp_path / "two"
    done = launch_subcommand("reconstruct-metrics", *flags, "--output_dir", output, "--batch_size", 3, processes=2)
    two = json.loads((output / "reconstruct-metrics-paper.json").read_text())
    assert done.stdout.count("# Reconstruction") == 1
    assert (two["num_processes"], two["images"], two["unreadable"]) == (2, 24, one["unreadable"])
    # Batches of other sizes have other kernels. SSIM, of about 0.03 an image, cancels in the mean: it has an absolute
    # tolerance, 50 times the 1e-7 that was seen on three kinds of kernels. Noise of another seed changes it by 4e-5.
    for metric in ("ssim", "psnr"):
        for value in ("mean", "two_std"):
            expected = pytest.approx(one["metrics"][metric][value], rel=1e-5, abs=5e-6)
            assert two["metrics"][metric][value] == expected
    one, two = one["feature_distances"], two["feature_distances"]
    assert list(one["metrics"]) == ["rfid_random_conv", "kid_random_conv", "kid_random_conv_originals"]
    # The sums' order, and rounding to 8 bits of reconstructions from other batches.
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-3) and one["metrics"]["rfid_random_conv"] > 0
    assert one["reference_images"] == two["reference_images"] == 13 - len(one["reference_unreadable"])
    assert one["reference_unreadable"] == two["reference_unreadable"]


def test_learned_features(run_command, model_folder, image_folder, tmp_path):
    if not all(map(efficientnet_is_installed, EFFICIENTNETS)):
        pytest.skip("the extra learned-features is not installed")
    flags = [model_folder, "--dataset_name", image_folder, "--dataset_split", "train", "--max_images", "8"]
    flags += ["--perceptual_network", "efficientnet-lite0", "--feature_extractor", "efficientnet-lite2"]
    result, text, _ = run_command("reconstruct-metrics", *flags, report="reconstruct-metrics-standard")
    assert set(result["metrics"]) == {"perceptual_efficientnet_lite0", "psnr", "ssim"}
    assert 0 < result["metrics"]["perceptual_efficientnet_lite0"]["mean"] < 4
    assert "LPIPS was not measured: its place has a distance by features of efficientnet-lite0." in text
    found = result["feature_distances"]
    assert found["extractor"]["name"] == "efficientnet-lite2" and found["reference_images"] == 24
    metrics = found["metrics"]
    assert metrics["rfid_efficientnet_lite2"] > 0
    assert metrics["kid_efficientnet_lite2"] > metrics["kid_efficientnet_lite2_originals"]
    assert "| rFID (efficientnet-lite2) | KID x 1,000 (efficientnet-lite2) | the real images' own KID |" in text
    assert "rFID compares 8 images with their reconstructions. Of fewer than 3,000 images a Fréchet" in text
    assert "with 24 random images of `train` (seed 0).\n1 more of those were unreadable" in text
    assert "as the split is the same: KID is then too low." in text


class TestErrors:
    def message(self, *arguments) -> str:
        with pytest.raises(SystemExit) as error:
            main(["reconstruct-metrics", *map(str, arguments)])
        return str(error.value)

    def test_empty_folder(self, model_folder, tmp_path):
        message = self.message(model_folder, "--dataset_name", tmp_path, "--no_lpips")
        assert message.startswith("brics-diffusers reconstruct-metrics: folder") and "is empty" in message

    def test_no_such_model(self, image_folder):
        assert "nowhere provides no config.json" in self.message("nowhere", "--dataset_name", image_folder)

    def test_no_such_split(self, model_folder, image_folder):
        message = self.message(model_folder, "--dataset_name", image_folder, "--no_lpips")
        assert "no split 'validation'; available splits: train" in message

    @pytest.mark.parametrize(
        ("names", "expected"),
        [
            (["a.png"], "1 readable images (skipped 0 unreadable files); a standard deviation needs at least 2"),
            (["broken.png"], "0 readable images (skipped 1 unreadable file: "),
        ],
    )
    def test_too_few_images(self, model_folder, tmp_path, names, expected):
        Image.new("RGB", (64, 48), "red").save(tmp_path / "a.png")
        if names == ["broken.png"]:
            (tmp_path / "a.png").rename(tmp_path / "a.jpg.txt")
            (tmp_path / "broken.png").write_text("not an image")
        flags = ["--dataset_name", tmp_path, "--dataset_split", "train", "--no_lpips"]
        assert expected in self.message(model_folder, *flags)

    def test_missing_weights_of_lpips(self, model_folder, image_folder, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.hub, "download_url_to_file", pytest.fail)  # HF_HUB_OFFLINE is set
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        message = self.message(model_folder, "--dataset_name", image_folder, "--dataset_split", "train")
        assert "alexnet-owt-7be5be79.pth, which could not be downloaded (HF_HUB_OFFLINE is set)" in message
        assert message.endswith("or leave it out: --no_perceptual.") and "--perceptual_weight" not in message

    def test_no_such_reference_split_or_features(self, model_folder, image_folder):
        flags = [model_folder, "--dataset_name", image_folder, "--dataset_split", "train", "--no_lpips"]
        message = self.message(*flags, "--feature_extractor", "random-conv", "--reference_split", "test")
        assert "no split 'test'; available splits: train" in message
        assert "'resnet' is no feature extractor" in self.message(*flags, "--feature_extractor", "resnet")

    def test_no_such_device(self, model_folder, image_folder):
        message = self.message(model_folder, "--dataset_name", image_folder, "--device", "cuda:99")
        assert "--device cuda:99 can't be used" in message

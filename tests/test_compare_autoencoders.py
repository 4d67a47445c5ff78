import json
import shutil

import compare_autoencoders
import pytest
import torch
from comparison_report import model_costs
from PIL import Image
from small_models import AUTOENCODER

from brics_diffusers.cost import autoencoder_cost
from brics_diffusers.perceptual import load_lpips


PEER = compare_autoencoders.SMALL_PEER | {"block_out_channels": (8, 8, 16), "sample_size": 32}
SMALL = {
    "train_batch_size": 2,
    "BricsAutoencoder": AUTOENCODER,
    "AutoencoderKL": PEER,
    "VQModel": PEER | {"num_vq_embeddings": 16, "vq_embed_dim": 4},
}


@pytest.fixture
def compare(monkeypatch, image_folder, tmp_path):
    """Runs the comparison of small models, with no weights of LPIPS at hand, and returns its report."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(compare_autoencoders.PRESETS, "noto-emoji-64", SMALL)
    flags = ["--dataset_name", str(image_folder), "--max_train_steps", "4", "--validation_steps", "2"]

    def run(name, *more):
        output_dir = tmp_path / name
        compare_autoencoders.main([*flags, "--output_dir", str(output_dir), *more])
        return json.loads(next(output_dir.glob("*.json")).read_text())

    yield run
    torch.set_flush_denormal(False)


def values(result):
    """Everything in the curves but the time."""
    return {
        name: [{key: value for key, value in point.items() if key != "seconds"} for point in run["curve"]]
        for name, run in result["runs"].items()
    }


class TestRuns:
    def test_report_and_other_settings(self, compare, tmp_path):
        result = compare("run")
        assert [row["model"] for row in result["table"]] == ["BricsAutoencoder", "AutoencoderKL", "VQModel"]
        assert result["table"][0]["time"] == 1
        for row in result["table"]:
            held_out = result["runs"][row["model"]]["curve"][-1]["psnr"]
            assert 0 < row["PSNR, training images"] < 60 and row["PSNR, training images"] != held_out
        for run in result["runs"].values():
            assert [point["step"] for point in run["curve"]] == [2, 4]
            assert all(0 < point["psnr"] < 60 and point["images"] == 2 for point in run["curve"])
        picture = Image.open(tmp_path / "run/comparison-reconstructions.png")
        assert picture.size == (2 * 34 + 2, 4 * 34 + 2)  # two held-out images and three reconstructions of each
        text = (tmp_path / "run/comparison.md").read_text()
        assert "| BricsAutoencoder |" in text and "LPIPS |" not in text
        assert "\nLPIPS was not measured: torch's cache has no `vgg16-397923af.pth`" in text
        with pytest.raises(
            ValueError, match="was trained with max_train_steps 4, not 6; give the same flags as before"
        ):
            compare("run", "--max_train_steps", "6")

    def test_unreadable_images_are_counted(self, compare, image_folder, tmp_path):
        folder = tmp_path / "images"
        for split in ("train", "validation"):
            shutil.copytree(image_folder, folder / split)  # with a file that is no image
        flags = ("--dataset_name", str(folder), "--train_batch_size", "40")
        for _ in range(2):  # the second time the runs are complete
            result = compare("run", *flags, "--max_train_steps", "2", "--validation_steps", "2")
            assert len(result["unreadable"]) == 2 and "unreadable" in (tmp_path / "run/comparison.md").read_text()

    def test_lpips_is_measured_where_its_weights_are(self, compare, monkeypatch, tmp_path):
        monkeypatch.setattr(compare_autoencoders, "lpips_is_cached", lambda: True)
        monkeypatch.setattr(compare_autoencoders, "load_lpips", lambda: load_lpips("alex", pretrained=False))
        result = compare("run", "--max_train_steps", "2")
        assert all(run["curve"][-1]["lpips"] > 0 for run in result["runs"].values())
        text = (tmp_path / "run/comparison.md").read_text()
        assert "| LPIPS |" in text and "not measured" not in text

    def test_an_interrupted_comparison_ends_alike(self, compare, monkeypatch):
        whole = compare("whole")
        validate = compare_autoencoders.Run.validate

        def interrupted(run, dataset, step, lpips_metric):
            if step == 4 and run.folder.name == "AutoencoderKL":
                raise KeyboardInterrupt
            validate(run, dataset, step, lpips_metric)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(compare_autoencoders.Run, "validate", interrupted)
            compare("resumed")
        assert values(compare("resumed")) == values(whole)

    def test_all_see_the_same_images(self, compare, monkeypatch):
        seen, reconstruct = {}, compare_autoencoders.reconstruct

        def record(model, images):
            seen.setdefault(type(model).__name__, []).append(images)
            return reconstruct(model, images)

        monkeypatch.setattr(compare_autoencoders, "reconstruct", record)
        compare("run")
        batches = [torch.stack(images) for images in seen.values()]
        assert len(batches) == 3 and batches[0].shape == (4, 2, 3, 32, 32)
        assert all(torch.equal(batches[0], other) for other in batches[1:])

    def test_sweep(self, compare, monkeypatch):
        monkeypatch.setattr(compare_autoencoders, "SWEEP", (1e-2, 1e-3))
        result = compare("run", "--sweep", "--peer_channels", "8", "16", "16")
        names = ["AutoencoderKL 0.01", "AutoencoderKL 0.001", "VQModel 0.01", "VQModel 0.001"]
        assert list(result["runs"]) == names
        assert [run["learning_rate"] for run in result["runs"].values()] == [1e-2, 1e-3] * 2
        assert "(8, 16, 16)" in result["runs"]["VQModel 0.01"]["model"]

    def test_ablations(self, compare, monkeypatch, tmp_path):
        ablations = {"BricsAutoencoder": (2e-3, {}), "wide": (1e-3, {"decoder_block_out_channels": (24, 8)})}
        monkeypatch.setattr(compare_autoencoders, "ABLATIONS", ablations)
        result = compare("run", "--ablate", "--no-show_images")
        assert list(result["runs"]) == ["BricsAutoencoder", "wide", "AutoencoderKL"]
        assert result["runs"]["wide"]["learning_rate"] == 1e-3
        decoders = [row["MLPs and decoder M"] for row in result["table"]]
        assert decoders[1] > decoders[0]
        assert Image.open(tmp_path / "run/ablation-reconstructions.png").height == 3 * 34 + 2  # no row of images
        assert list(compare("some", "--ablate", "wide", "--max_train_steps", "2")["runs"]) == ["wide", "AutoencoderKL"]


class TestModels:
    @pytest.mark.parametrize("config", compare_autoencoders.PRESETS)
    def test_peers_decode_at_least_as_expensively_and_with_latents_as_large(self, config):
        costs, latents = {}, {}
        for name, model_class in compare_autoencoders.CLASSES.items():
            model = model_class(**compare_autoencoders.PRESETS[config][name])
            costs[name] = model_costs(model)
            with torch.no_grad():
                code = model.encode(torch.zeros(1, 3, model.config.sample_size, model.config.sample_size))
            latents[name] = code.latent_dist.mean if name == "AutoencoderKL" else code[0]
            parameters = sum(value for key, value in costs[name].items() if key.endswith(" M"))
            assert parameters == pytest.approx(model.num_parameters() / 1e6)
        cost = {name: costs[name]["decoder G"] for name in costs}
        expected = autoencoder_cost(compare_autoencoders.PRESETS[config]["BricsAutoencoder"])
        expected = expected["mlp"]["multiply_adds"] + expected["decoder"]["multiply_adds"]
        assert cost["BricsAutoencoder"] == pytest.approx(expected)
        assert cost["BricsAutoencoder"] <= cost["AutoencoderKL"] == pytest.approx(cost["VQModel"])
        assert len({latent.shape for latent in latents.values()}) == 1

    def test_regularizers(self):
        images = torch.rand(2, 3, 32, 32) * 2 - 1
        models = {name: compare_autoencoders.CLASSES[name](**SMALL[name]) for name in compare_autoencoders.CLASSES}
        parts = {name: compare_autoencoders.reconstruct(model, images)[1] for name, model in models.items()}
        posterior = models["AutoencoderKL"].encode(images).latent_dist
        variance, mean = posterior.var, posterior.mean
        kl = 0.5 * (mean.square() + variance - 1 - variance.log()).sum() / 2
        assert parts["AutoencoderKL"].item() == pytest.approx(1e-6 * kl.item(), rel=1e-5)
        encoded = models["VQModel"].encode(images).latents
        codes = models["VQModel"].quantize.embedding.weight
        nearest = torch.cdist(encoded.permute(0, 2, 3, 1).reshape(-1, 4), codes).min(dim=1).values
        assert parts["VQModel"].item() == pytest.approx(1.25 * nearest.square().mean().item() / 4, rel=1e-4)
        assert parts["BricsAutoencoder"] == 0

"""The comparison of autoencoders with tiny models: runs, going on, noise curves, and its report."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import autoencoder_models
import compare_autoencoders
import pytest
import torch
from autoencoder_models import CLASSES, DEFAULT_MODELS, PRESETS, RELATIVE_NOISE, VARIANTS, NoisyAutoencoderKL
from autoencoder_report import NOISES, model_costs, noise_curve, seconds_until, table_row
from comparison import spread
from diffusers import VQModel
from diffusers.training_utils import EMAModel
from PIL import Image
from small_models import AUTOENCODER

from brics_diffusers import BricsAutoencoder
from brics_diffusers.analysis.cost import autoencoder_cost
from brics_diffusers.data import evaluation_loader, load_collection
from brics_diffusers.metrics.perceptual import load_lpips
from brics_diffusers.metrics.reconstruction import image_metrics


PEER = autoencoder_models.SMALL_PEER | {"block_out_channels": (8, 8, 16), "sample_size": 32}
SMALL = {
    "train_batch_size": 2,
    "max_train_steps": 4,
    "BricsAutoencoder": AUTOENCODER,
    "AutoencoderKL": PEER,
    "VQModel": PEER | {"num_vq_embeddings": 16, "vq_embed_dim": 4},
}
NOISY = "AutoencoderKL, shortcut, noise"
MODELS = ("BRICS", NOISY, "VQModel")
SHORTER = "BRICS, two thirds of the steps"


@pytest.fixture(scope="module")
def compare(image_folder, tmp_path_factory):
    """Runs the comparison of small models, with no weights of LPIPS at hand, and returns its report."""

    def run(folder, *more, models=MODELS, seeds=(0,)):
        flags = ["--dataset_name", image_folder, "--output_dir", folder, "--validation_steps", 2]
        flags += ["--models", *models, "--seeds", *seeds, *more]
        compare_autoencoders.main(list(map(str, flags)))
        torch.set_flush_denormal(False)
        reports = list(folder.glob("*.json"))
        return json.loads(reports[0].read_text()) if reports else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch")))
        patch.setitem(PRESETS, "noto-emoji-64", SMALL)
        patch.setattr("autoencoder_report.DECODING_ROUNDS", 1)
        yield run


@pytest.fixture(scope="module")
def finished(compare, tmp_path_factory):
    """The folder of a comparison of two seeds, and its report."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, compare(folder, models=(*MODELS, SHORTER), seeds=(0, 1))


@pytest.fixture
def images():
    return torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def make_model(class_name: str, **changes):
    torch.manual_seed(0)
    return CLASSES[class_name](**autoencoder_models.Variant(class_name).arguments(SMALL) | changes)


def values(result):
    """Everything in the curves but the time."""
    return {
        name: [{key: value for key, value in point.items() if key != "seconds"} for point in run["curve"]]
        for name, run in result["runs"].items()
    }


class TestRuns:
    def test_report(self, finished):
        folder, result = finished
        rows = {row["model"]: row for row in result["table"]}
        assert tuple(rows) == (*MODELS, SHORTER)
        assert rows["BRICS"]["training time"] == "1.00 ± 0.00"
        goals = [result["runs"][f"BRICS-{seed}"]["curve"][-1]["psnr"] for seed in (0, 1)]
        assert rows["BRICS"]["decoding time"] == 1
        assert [row["latent"] for row in rows.values()] == ["8 x 8 x 4", "8 x 8 x 4", "8 x 8 of 16 codes", "8 x 8 x 4"]
        assert [row["steps"] for row in rows.values()] == [4, 4, 4, 3]
        names = ["BRICS", "AutoencoderKL-shortcut-noise", "VQModel", "BRICS-two-thirds-of-the-steps"]
        assert list(result["runs"]) == [f"{name}-{seed}" for name in names for seed in (0, 1)]
        for name, row in zip(names, rows.values(), strict=True):
            runs = [result["runs"][f"{name}-{seed}"] for seed in (0, 1)]
            last = [run["curve"][-1]["psnr"] for run in runs]
            assert last[0] != last[1] and row["PSNR"] == spread(last, 2)
            assert row["PSNR, training images"] != row["PSNR"]
            assert row["PSNR, latents with 5% noise"] == spread([run["noise"]["psnr"][3] for run in runs], 2)
            for run in runs:
                assert [point["step"] for point in run["curve"]] == [2, row["steps"]]
                assert all(0 < point["psnr"] < 60 and point["images"] == 2 for point in run["curve"])
                # Without noise it is the last validation again, in batches of the same size.
                assert run["noise"]["psnr"][0] == pytest.approx(run["curve"][-1]["psnr"], abs=1e-3)
                assert run["noise"]["deviation"] > 0
                assert (run["noise"]["training_noise"] is None) == ("BRICS" not in name)
            reached = sum(max(p["psnr"] for p in run["curve"]) >= goal for run, goal in zip(runs, goals, strict=True))
            text = {0: "never", 1: "with 1 of 2 seeds"}.get(reached, " ± ")
            assert text in row["time until the first's PSNR"]
        text = (folder / "comparison.md").read_text()
        assert f"| {SHORTER} |" in text and "seeds 0, 1," in text and "LPIPS |" not in text
        assert "\nThe perceptual distance of vgg was not measured: its weights are not there.\n" in text
        assert "| BRICS | Adam | 0.012 | {'encoder': 0.002} | 0.99 | 0.02 |" in text
        assert "\nRows of the picture, first seed: images; BRICS; AutoencoderKL, shortcut, noise; VQModel" in text
        picture = Image.open(folder / "comparison-reconstructions.png")
        assert picture.size == (2 * 34 + 2, 5 * 34 + 2)  # two held-out images and four reconstructions of each
        assert Image.open(folder / "comparison-curves.png").width > 1000

    def test_models_are_saved_with_averaged_weights(self, finished, image_folder):
        folder, result = finished
        classes = {
            "BRICS-0": BricsAutoencoder,
            "AutoencoderKL-shortcut-noise-0": NoisyAutoencoderKL,
            "VQModel-0": VQModel,
        }
        assert {path.name for path in (folder / "models").iterdir()} == result["runs"].keys()
        dataset = load_collection(image_folder).train_test_split(test_size=2, seed=0)["test"]
        batch = next(iter(evaluation_loader(dataset, 32, 2)))["pixel_values"]
        for name, model_class in classes.items():
            model = model_class.from_pretrained(folder / "models" / name).eval()
            with torch.no_grad():
                psnr = image_metrics(model(batch).sample, batch)["psnr"].mean().item()
            assert psnr == pytest.approx(result["runs"][name]["curve"][-1]["psnr"], abs=1e-3)

    def test_changed_settings_are_refused(self, compare, finished, monkeypatch):
        changes = {
            "max_train_steps 4, not 6": ["--max_train_steps", 6],
            "validation_steps 2, not 4": ["--validation_steps", 4],
            "train_batch_size 2, not 3": ["--train_batch_size", 3],
            "mse_weight 20.0, not 1.0": ["--mse_weight", 1],
            "num_validation_images 256, not 2": ["--num_validation_images", 2],
            "collection ": ["--max_train_samples", 20],
        }
        for message, flags in changes.items():
            with pytest.raises(ValueError, match=f"was trained with {message}.*; give the same flags as before"):
                compare(finished[0], *flags)
        for change in ({"learning_rate": 1e-3}, {"warmup": 0.5}, {"adam_beta2": 0.9}, {"part_learning_rates": {}}):
            with (
                monkeypatch.context() as patch,
                pytest.raises(ValueError, match=f"BRICS-0 was .* with {next(iter(change))} "),
            ):
                patch.setitem(VARIANTS, "BRICS", dataclasses.replace(VARIANTS["BRICS"], **change))
                compare(finished[0])

    def test_the_work_can_be_shared(self, compare, finished, monkeypatch, tmp_path):
        for model in ("BRICS", "VQModel"):
            assert compare(tmp_path, "--no-report", models=(model,)) is None
        monkeypatch.setattr(compare_autoencoders.Run, "train", pytest.fail)
        found, whole = values(compare(tmp_path, models=("BRICS", "VQModel"))), values(finished[1])
        assert found == {name: whole[name] for name in ("BRICS-0", "VQModel-0")}

    def test_unreadable_images_are_counted(self, compare, image_folder, tmp_path):
        folder = tmp_path / "images"
        for split in ("train", "validation"):
            shutil.copytree(image_folder, folder / split)  # with a file that is no image
        flags = ("--dataset_name", folder, "--train_batch_size", 40, "--max_train_steps", 2)
        for _ in range(2):  # the second time the runs are complete
            result = compare(tmp_path / "run", *flags, "--no-show_images", models=("BRICS",))
            assert len(result["unreadable"]) == 2
            assert "(skipped 2 unreadable files: " in (tmp_path / "run/comparison.md").read_text()
            assert result["runs"]["BRICS-0"]["curve"][-1]["images"] == 24
        assert Image.open(tmp_path / "run/comparison-reconstructions.png").height == 34 + 2  # no row of images

    def test_lpips_is_measured_where_its_weights_are(self, compare, monkeypatch, tmp_path):
        monkeypatch.setattr(compare_autoencoders, "perceptual_is_cached", lambda network: network == "vgg")
        monkeypatch.setattr(compare_autoencoders, "load_perceptual_network", lambda _: load_lpips("alex", False))
        flags = ("--max_train_steps", 2, "--dataloader_num_workers", 1)
        result = compare(tmp_path / "run", *flags, models=("BRICS", "VQModel"))
        assert all(run["curve"][-1]["lpips"] > 0 for run in result["runs"].values())
        text = (tmp_path / "run/comparison.md").read_text()
        assert "| LPIPS |" in text and "The perceptual distance is that of vgg.\n" in text
        weighted = compare(tmp_path / "weighted", *flags, "--perceptual_weight", 2, models=("BRICS",))
        assert "loss 20 MSE + 2 perceptual (vgg) and" in (tmp_path / "weighted/comparison.md").read_text()
        one, other = (found["runs"]["BRICS-0"]["curve"][-1]["psnr"] for found in (result, weighted))
        assert one != other
        for message, *more in (
            ("perceptual_weight 2.0, not 1.0", "--perceptual_weight", 1),
            ("measured_network vgg, not alex", "--perceptual_weight", 2, "--perceptual_network", "alex"),
        ):
            monkeypatch.setattr(compare_autoencoders, "perceptual_is_cached", lambda _: True)
            with pytest.raises(ValueError, match=f"was trained with {message}"):
                compare(tmp_path / "weighted", *flags, *more, models=("BRICS",))

    def test_states_of_before_are_known(self, compare, tmp_path):
        """Their settings have LPIPS' names, and do not say what was measured."""
        before = values(compare(tmp_path, "--max_train_steps", 2, models=("BRICS",)))
        path = tmp_path / "runs/BRICS-0/state/state.pt"
        state = torch.load(path, weights_only=True)
        state["settings"]["lpips_weight"] = state["settings"].pop("perceptual_weight")
        del state["settings"]["measured_network"]
        torch.save(state, path)
        assert values(compare(tmp_path, "--max_train_steps", 2, models=("BRICS",))) == before

    def test_an_interrupted_comparison_ends_alike(self, compare, finished, monkeypatch, tmp_path):
        validate = compare_autoencoders.Run.validate
        for folder in ("AutoencoderKL-shortcut-noise-0", "BRICS-1"):

            def interrupted(run, dataset, step, perceptual, folder=folder):
                if step == 4 and run.folder.name == folder:
                    raise KeyboardInterrupt
                validate(run, dataset, step, perceptual)

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(compare_autoencoders.Run, "validate", interrupted)
                compare(tmp_path, seeds=(0, 1))
        found, whole = values(compare(tmp_path, seeds=(0, 1))), values(finished[1])
        assert found == {name: whole[name] for name in found} and len(found) == 6

    def test_a_finished_run_has_its_weights(self, compare, monkeypatch, tmp_path):
        def killed(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(VQModel, "save_pretrained", killed)
            compare(tmp_path / "run", "--no-report", models=("VQModel",))
        compare(tmp_path / "run", "--no-report", models=("VQModel",))
        assert (tmp_path / "run/models/VQModel-0/config.json").is_file()

    def test_all_see_the_same_images(self, compare, monkeypatch, tmp_path):
        seen, reconstruct = {}, compare_autoencoders.reconstruct

        def record(model, images):
            seen.setdefault(type(model).__name__, []).append(images)
            return reconstruct(model, images)

        monkeypatch.setattr(compare_autoencoders, "reconstruct", record)
        compare(tmp_path, "--no-report", seeds=(0, 1))
        batches = [torch.stack(images) for images in seen.values()]
        assert len(batches) == 3 and batches[0].shape == (2 * 4, 2, 3, 32, 32)
        assert all(torch.equal(batches[0], other) for other in batches[1:])
        assert not torch.equal(*batches[0].chunk(2))  # of the two seeds

    def test_search(self, compare, monkeypatch, tmp_path):
        search_variants = autoencoder_models.search_variants

        def first_and_last(names):
            trials = list(search_variants(["BRICS", "VQModel"]).items())
            return dict([trials[0], trials[-1]])

        monkeypatch.setattr(compare_autoencoders, "search_variants", first_and_last)
        result = compare(tmp_path / "run", "--search")
        names = ["BRICS: learning_rate 0.006, adam_beta2 0.99", "VQModel: learning_rate 0.004, warmup 0.1"]
        assert [row["model"] for row in result["table"]] == names
        first, last = result["runs"].values()
        assert (first["learning_rate"], first["part_learning_rates"]) == (6e-3, {"encoder": 1e-3})
        assert (last["learning_rate"], last["part_learning_rates"], last["warmup"]) == (4e-3, {}, 0.1)
        assert (tmp_path / "run/search.md").is_file()


class TestModels:
    @pytest.mark.parametrize("config", PRESETS)
    def test_peers_decode_more_expensively_and_with_latents_as_large(self, config):
        costs, latents = {}, {}
        for name in CLASSES:
            model = autoencoder_models.Variant(name).build(PRESETS[config])
            costs[name] = model_costs(model)
            size = model.config.sample_size
            with torch.no_grad():
                latents[name] = autoencoder_models.encode(model, torch.zeros(1, 3, size, size))
            parameters = sum(value for key, value in costs[name].items() if key.endswith(" M"))
            assert parameters == pytest.approx(model.num_parameters() / 1e6)
        cost = {name: costs[name]["decoder G"] for name in costs}
        expected = autoencoder_cost(PRESETS[config]["BricsAutoencoder"])
        expected = expected["mlp"]["multiply_adds"] + expected["decoder"]["multiply_adds"]
        assert cost["BricsAutoencoder"] == pytest.approx(expected)
        assert cost["BricsAutoencoder"] < 0.9 * cost["AutoencoderKL"]
        assert cost["AutoencoderKL"] == pytest.approx(cost["VQModel"]) == pytest.approx(cost["NoisyAutoencoderKL"])
        assert len({latent.shape for latent in latents.values()}) == 1

    def test_variants(self):
        assert DEFAULT_MODELS[:2] == ["AutoencoderKL", "BRICS"] and "VQModel" in DEFAULT_MODELS
        for variant in VARIANTS.values():
            for name, preset in PRESETS.items():
                if name == "fluent-emoji-128" and "decoder_block_out_channels" in variant.changes:
                    continue  # which has three blocks there
                with torch.device("meta"):
                    model = variant.build(preset)
                assert variant.part_learning_rates.keys() <= dict(model.named_children()).keys()
                assert variant.changes.items() <= dict(model.config).items()
        assert VARIANTS[NOISY].changes == {"relative_noise": RELATIVE_NOISE}

    def test_every_class_is_searched_as_much(self):
        trials = autoencoder_models.search_variants(DEFAULT_MODELS[:3])
        of_class = {}
        for name, variant in trials.items():
            of_class.setdefault(name.partition(":")[0], []).append(variant)
        assert list(of_class) == ["AutoencoderKL", "BRICS", "AutoencoderKL, shortcut"]
        peers = [
            [(variant.learning_rate, variant.adam_beta2, variant.warmup) for variant in of_class[name]]
            for name in ("AutoencoderKL", "AutoencoderKL, shortcut")
        ]
        assert peers[0] == peers[1] and len(set(peers[0])) == 10
        for variant, (rate, *others) in zip(of_class["BRICS"], peers[0], strict=True):
            assert variant.part_learning_rates == pytest.approx({"encoder": rate})
            assert variant.learning_rate == pytest.approx(6 * rate)
            assert [variant.adam_beta2, variant.warmup] == others

    def test_what_a_variant_is_named_for_is_searched_too(self):
        name = "BRICS, decoder's learning rate 24e-3"
        for variant in autoencoder_models.search_variants([name]).values():
            encoder = variant.part_learning_rates["encoder"]
            assert variant.part_learning_rates == pytest.approx({"encoder": encoder, "decoder": 12 * encoder})
            assert variant.learning_rate == pytest.approx(6 * encoder)

    def test_regularizers(self, images):
        models = {name: make_model(name) for name in CLASSES}
        parts = {name: autoencoder_models.reconstruct(model, images)[1] for name, model in models.items()}
        for name in ("AutoencoderKL", "NoisyAutoencoderKL"):
            posterior = models[name].encode(images).latent_dist
            variance, mean = posterior.var, posterior.mean
            kl = 0.5 * (mean.square() + variance - 1 - variance.log()).sum() / len(images)
            assert parts[name].item() == pytest.approx(1e-6 * kl.item(), rel=1e-5)
        encoded = models["VQModel"].encode(images).latents
        codes = models["VQModel"].quantize.embedding.weight
        nearest = torch.cdist(encoded.permute(0, 2, 3, 1).reshape(-1, 4), codes).min(dim=1).values
        assert parts["VQModel"].item() == pytest.approx(1.25 * nearest.square().mean().item() / 4, rel=1e-4)
        assert parts["BricsAutoencoder"] == 0

    @pytest.mark.parametrize("name", CLASSES)
    @torch.no_grad()
    def test_exact_latents_make_the_models_own_reconstruction(self, name, images):
        model = make_model(name).eval()
        sample = autoencoder_models.decode(model, autoencoder_models.encode(model, images))
        torch.testing.assert_close(sample, model(images).sample, rtol=1e-4, atol=1e-5)

    def test_latent_deviation(self):
        noise = torch.randn(64, 2, 16, 16, generator=torch.Generator().manual_seed(0))
        scale, offset = torch.tensor([3.0, 1.0]).view(1, 2, 1, 1), torch.tensor([5.0, -50.0]).view(1, 2, 1, 1)
        # Where a channel lies is none of its deviation. 16,384 draws a channel: 1% is two standard errors.
        assert autoencoder_models.latent_deviation(scale * noise + offset).item() == pytest.approx(5**0.5, rel=0.02)


def as_run(model, batch_size=4):
    """A stand-in for a run, with what a noise curve needs of it."""
    ema = EMAModel(model.parameters())
    return SimpleNamespace(model=model, ema=ema, args=SimpleNamespace(train_batch_size=batch_size))


class TestReport:
    @pytest.mark.parametrize("name", ["BricsAutoencoder", "NoisyAutoencoderKL", "VQModel"])
    def test_noise_curve(self, name, image_folder):
        model, dataset = make_model(name), load_collection(image_folder)
        if name == "BricsAutoencoder":
            torch.nn.init.normal_(model.grids.entries)  # as large as after training, so that codes matter
        curve, other = (noise_curve(as_run(model, batch_size), dataset) for batch_size in (4, 7))
        model.eval()
        batch = next(iter(evaluation_loader(dataset, 32, 25)))["pixel_values"]
        with torch.no_grad():
            plain = image_metrics(model(batch).sample, batch)["psnr"].mean().item()
            latents = autoencoder_models.encode(model, batch)
        assert len(curve["psnr"]) == len(NOISES) and NOISES[0] == 0
        assert curve["psnr"][0] == pytest.approx(plain, abs=1e-3)
        assert curve["deviation"] == pytest.approx(autoencoder_models.latent_deviation(latents).item(), rel=1e-4)
        assert len(set(curve["psnr"])) > 1  # noise reaches the images
        # An image's noise does not depend on its batch. A codebook's choice may turn on rounding.
        assert other["psnr"] == pytest.approx(curve["psnr"], abs=0.05 if name == "VQModel" else 1e-3)
        expected = model.key_noise_scale / curve["deviation"] if name == "BricsAutoencoder" else None
        assert curve["training_noise"] == expected

    def test_seconds_until(self):
        points = [(10.0, 15.0), (20.0, 19.0), (30.0, 18.0), (40.0, 22.0)]
        run = SimpleNamespace(curve=[{"seconds": seconds, "psnr": psnr} for seconds, psnr in points])
        assert seconds_until(run, 14) == seconds_until(run, 15) == 10
        assert seconds_until(run, 16) == pytest.approx(12.5)
        assert seconds_until(run, 19) == 20
        assert seconds_until(run, 20) == pytest.approx(35)
        assert seconds_until(run, 22.1) is None

    @pytest.mark.parametrize(
        ("psnr", "expected"), [((20, 20), "0.75 ± 0.35"), ((20, 9), "with 1 of 2 seeds"), ((9, 9), "never")]
    )
    def test_time_until_the_firsts_psnr(self, monkeypatch, psnr, expected):
        monkeypatch.setattr("autoencoder_report.training_psnr", lambda run, dataset: 10.0)

        def run(name, seconds, last):
            curve = [{"seconds": seconds, "psnr": last, "ssim": 0.5}]
            return SimpleNamespace(model=model, name=name, seconds=seconds, curve=curve, last_step=1)

        model = make_model("BricsAutoencoder")
        reference = [run("first", 10.0, 10.0), run("first", 20.0, 10.0)]
        others = [run("other", 10.0, psnr[0]), run("other", 10.0, psnr[1])]
        noise = [{"psnr": [10.0] * len(NOISES)}] * 2
        row = table_row("other", others, reference, {"first": 2.0, "other": 3.0}, noise, None)
        assert row["time until the first's PSNR"] == expected
        assert row["training time"] == "0.75 ± 0.35" and row["decoding time"] == 1.5

    def test_spread(self):
        assert spread([1.0, 2.0, 3.0], 2) == "2.00 ± 1.00" and spread([1.25], 1) == "1.2"

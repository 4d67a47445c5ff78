"""The comparison of losses with tiny models: which flags make which run, its report, and going on."""

import json
import subprocess
import time

import compare_losses
import pytest
import torch
import train_autoencoder
import yaml
from launching import CONFIG, environment, train_here
from PIL import Image

from brics_diffusers.data import evaluation_loader
from brics_diffusers.metrics.feature_distances import kernel_distance, reconstruction_features
from brics_diffusers.metrics.feature_extractors import load_feature_extractor
from brics_diffusers.metrics.perceptual import perceptual_is_cached
from brics_diffusers.models.loading import load_autoencoder
from brics_diffusers.training_utils.run import load_splits


STEPS = 8
NAMES = ["mse", "mse + perceptual + gan"]


@pytest.fixture(scope="module")
def flags(tmp_path_factory, image_folder):
    """Command line for models of milliseconds, with features of random weights and no perceptual network in losses."""
    config = tmp_path_factory.mktemp("config") / "tiny.yaml"
    config.write_text(yaml.safe_dump({name: CONFIG[name] for name in ("autoencoder", "discriminator")}))
    words = ["--config", config, "--dataset_name", image_folder, "--seeds", 0, "--max_train_steps", STEPS]
    words += ["--extractor", "random-conv", "--num_reference_images", 12, "--num_curve_images", 6]
    words += ["--num_kid_images", 20, "--train_batch_size", 2, "--perceptual_weight", 0]
    return [*map(str, words)]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def folder(flags, tmp_path_factory):
    """A finished comparison, whose training is done in this process."""

    def train(run):
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "settings.json").write_text(json.dumps(run.settings))
        train_here(train_autoencoder.main, *run.words, f"--output_dir={run.folder}")

    folder = tmp_path_factory.mktemp("losses")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_losses.Run, "train", train)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        compare_losses.main([*flags, "--variants", *NAMES, "--output_dir", str(folder)])
    torch.set_flush_denormal(False)
    return folder


class TestFlags:
    def build(self, *words, variant=NAMES[1]):
        args = compare_losses.parse_args(["--dataset_name", "x", "--output_dir", "y", *map(str, words)])
        return compare_losses.Run(args, variant, 3)

    def test_of_a_config_by_name(self):
        flags = self.build().flags
        assert (flags.max_train_steps, flags.discriminator_start_step, flags.gan_start_step) == (7000, 1750, 3500)
        assert (flags.gan_warmup_steps, flags.validation_steps, flags.seed) == (350, 875, 3)
        assert (flags.perceptual_network, flags.perceptual_weight) == ("efficientnet-lite0", 10)  # not the config's 0
        assert flags.adversarial_weight == 0.1 and flags.save_validation_weights and flags.random_flip
        assert flags.discriminator_type == "patch" and flags.discriminator == compare_losses.DISCRIMINATOR

    def test_a_config_with_a_discriminator_keeps_it(self, flags):
        flags = self.build("--config", flags[1]).flags
        assert flags.discriminator_type == "stylegan2" and flags.discriminator == CONFIG["discriminator"]

    @pytest.mark.parametrize(
        ("variant", "changed"),
        [
            ("mse", {"perceptual_weight": 0, "adversarial_weight": 0}),
            ("mse + perceptual", {"adversarial_weight": 0}),
            ("no head start", {"discriminator_start_step": 60}),
            ("no lazy R1 correction", {"lazy_r1_correction": False}),
            ("adaptive weight", {"adaptive_gan_weight": True}),
            ("augmentation", {"augmentation": "color,translation"}),
            ("no momentum", {"adam_beta1_gan": 0}),
        ],
    )
    def test_one_change_each(self, variant, changed):
        words = ["--max_train_steps", 100, "--gan_start_step", 60, "--adversarial_weight", 0.3]
        words += ["--set", "discriminator.max_channels=64"]
        full, other = (vars(self.build(*words, variant=name).flags) for name in (NAMES[1], variant))
        assert full["adversarial_weight"] == 0.3 and full["discriminator"]["max_channels"] == 64
        assert {name for name in full if full[name] != other[name]} == changed.keys() | {"output_dir"}
        assert {name: other[name] for name in changed} == changed

    def test_own_variants(self, capsys):
        words = ["--add_variant", "Weak, small", "adversarial_weight=0.02", "discriminator.max_channels=64"]
        run = self.build(*words, variant="Weak, small")
        assert run.folder.name == "weak-small-3" and run.flags.adversarial_weight == 0.02
        assert run.flags.discriminator == {"base_channels": 32, "max_channels": 64}
        args = compare_losses.parse_args(["--dataset_name", "x", *words])
        assert args.variants == [*compare_losses.DEFAULT_VARIANTS, "Weak, small"]
        for wrong in (["--add_variant", "weak", "0.02"], ["--variants", "weak"], ["--config", "none"]):
            with pytest.raises(SystemExit):
                compare_losses.parse_args(["--dataset_name", "x", *wrong])
        assert "one of church-32x32x4" in capsys.readouterr().err

    def test_unknown_ones_are_training_s_to_refuse(self, capsys):
        with pytest.raises(SystemExit):
            self.build("--gan_begin", 3)
        assert "--gan_begin" in capsys.readouterr().err

    def test_the_judge_is_in_no_loss(self):
        words = ["--extractor", "efficientnet-lite0"]
        with pytest.raises(ValueError, match="efficientnet-lite0 is the network of a loss; give an --extractor "):
            self.build(*words)
        assert self.build(*words, variant="mse").flags.perceptual_network == "efficientnet-lite0"  # of no weight

    def test_what_changes_nothing_is_no_setting(self):
        words = (["--gan_start_step", 50, "--set", "discriminator.max_channels=64"], ["--adversarial_weight", 0.3])
        runs = [self.build(*some, variant="mse").settings for some in words]
        assert runs[0] == runs[1] != self.build("--mse_weight", 10, variant="mse").settings


class TestReport:
    def test_measures(self, folder):
        result = json.loads((folder / "losses.json").read_text())
        assert list(result["runs"]) == ["mse-0", "mse-perceptual-gan-0"]
        names = ["psnr", "ssim", "rfid_random_conv"]
        if perceptual_is_cached("efficientnet-lite0"):
            names.insert(2, "perceptual_efficientnet_lite0")
        for run in result["runs"].values():
            assert run["images"] == {"held_out": 2, "rfid": 12, "curve": 6, "kid": 19}  # one of 20 is unreadable
            assert [point["step"] for point in run["curve"]] == list(range(1, STEPS + 1))
            assert all(list(point) == ["step", *names] for point in run["curve"])
            last, kid = run["last"], "kid_random_conv"
            assert last[f"{kid}_above_originals"] == pytest.approx(last[kid] - last[f"{kid}_originals"])
            assert last["psnr"] == run["curve"][-1]["psnr"] and last["rfid_random_conv"] > 0
        seconds = result["training_seconds"]
        assert 1 < seconds[NAMES[1]] / seconds["mse"] < 20
        assert result["means"]["mse"] == result["runs"]["mse-0"]["last"]

    def test_kid_from_originals(self, folder, flags):
        args = compare_losses.parse_args([*flags, "--output_dir", str(folder)])
        run = compare_losses.Run(args, NAMES[1], 0)
        model = load_autoencoder(str(run.folder / f"autoencoder-{STEPS}")).eval()
        loader = evaluation_loader(load_splits(run.flags)[1], model.config.sample_size, 2)
        extractor = load_feature_extractor("random-conv", "cpu")
        originals, made = reconstruction_features(model, loader, extractor, progress=False)
        found = json.loads((run.folder / "measures.json").read_text())["last"]["kid_random_conv_from_originals"]
        assert found == pytest.approx(1000 * kernel_distance(made, originals, paired=True), rel=1e-3)

    def test_the_adversarial_loss_matters_from_its_start_on(self, folder):
        curves = [run["curve"] for run in json.loads((folder / "losses.json").read_text())["runs"].values()]
        same = [one["psnr"] == other["psnr"] for one, other in zip(*curves, strict=True)]
        # The discriminator learns from step 2 on and counts from step 4 on, counted from 0.
        assert same == [True] * 4 + [False] * 4

    def test_text_and_pictures(self, folder):
        text = (folder / "losses.md").read_text()
        assert "| mse + perceptual + gan | 20 MSE + 0.1 adversarial from step 4 (full weight after 1 more" in text
        assert "12 images of the training split" in text and "training time |" in text
        assert "images, mse, mse + perceptual + gan" in text and "![curves](losses-curves.png)" in text
        picture = Image.open(folder / "losses-reconstructions.png")
        assert picture.size == (2 * 66 + 2, 3 * 66 + 2)  # two held-out images, enlarged, and two reconstructions each
        assert (folder / "losses-curves.png").stat().st_size > 0

    def test_again_without_training_or_measuring(self, folder, flags, monkeypatch):
        def fail(*_):
            raise AssertionError("done already")

        monkeypatch.setattr(compare_losses.Run, "train", fail)
        monkeypatch.setattr("loss_report._measure", fail)
        for path in folder.glob("losses*"):
            path.unlink()
        words = [*flags, "--variants", *NAMES, "--output_dir", str(folder), "--no-show_images"]
        compare_losses.main([*words, "--no-report"])
        assert not list(folder.glob("losses*"))
        compare_losses.main(words)
        assert "Rows of the picture" not in (folder / "losses.md").read_text()
        assert not (folder / "losses-reconstructions.png").exists()
        with pytest.raises(AssertionError):  # another number of images is measured anew
            compare_losses.main([*words, "--num_curve_images", "5"])

    def test_other_settings_are_refused(self, folder, flags):
        words = [*flags, "--variants", *NAMES, "--output_dir", str(folder)]
        with pytest.raises(ValueError, match="gan-0 was trained with adversarial_weight 0.1, not 0.2; give the same"):
            compare_losses.main([*words, "--adversarial_weight", "0.2"])


class TestInterruption:
    @pytest.mark.slow
    def test_it_goes_on_and_ends_alike(self, folder, flags, tmp_path, monkeypatch):
        words = [*flags, "--variants", NAMES[1], "--output_dir", str(tmp_path), "--no-report"]
        run = tmp_path / "runs/mse-perceptual-gan-0"

        class Interrupted(subprocess.Popen):
            asked = False

            def wait(self, timeout=None):
                if not self.asked:
                    self.asked = True
                    while not list(run.glob("checkpoint-*")):
                        assert self.poll() is None
                        time.sleep(0.01)
                    raise KeyboardInterrupt
                return super().wait(timeout)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(subprocess, "Popen", Interrupted)
            compare_losses.main(words)
        compare_losses.main(words)
        file = "autoencoder/diffusion_pytorch_model.safetensors"
        assert (run / file).read_bytes() == (folder / "runs/mse-perceptual-gan-0" / file).read_bytes()

    @pytest.mark.slow
    def test_a_failure_names_the_log(self, flags, tmp_path):
        words = [*flags, "--variants", "mse", "--output_dir", str(tmp_path), "--pretrained_autoencoder_name_or_path"]
        with pytest.raises(RuntimeError, match="mse-0 ended early .*none.*; see .*train.log, and run the command aga"):
            compare_losses.main([*words, str(tmp_path / "none")])

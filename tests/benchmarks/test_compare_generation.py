"""The comparison of latents with tiny models: what is trained on, its report, and going on."""

import itertools
import json
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import compare_decoders
import compare_generation
import generation_models
import generation_report
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from autoencoder_models import CLASSES, SMALL_PEER, encode, folder_name, latent_deviation, psnr_with_noise
from compare_generation import Run
from comparison import spread
from diffusers import UNet2DModel
from generation_models import LatentSpace, build_scheduler, denoise, load_saved_autoencoder, starting_noise
from launching import CONFIG, environment
from PIL import Image
from safetensors.torch import load_file
from small_models import AUTOENCODER, ROOT

from brics_diffusers.data import evaluation_loader, load_collection
from brics_diffusers.metrics.feature_extractors import load_feature_extractor
from brics_diffusers.metrics.reconstruction import image_batches, reconstruction_metrics


PEER = SMALL_PEER | {"block_out_channels": (8, 8, 16), "sample_size": 32}
MODELS = {
    "BRICS": ("BricsAutoencoder", AUTOENCODER),
    "AutoencoderKL": ("AutoencoderKL", PEER),
    "VQModel": ("VQModel", PEER | {"num_vq_embeddings": 16, "vq_embed_dim": 4}),
}
KID = "kid_random_conv"


@pytest.fixture(scope="module")
def autoencoders(tmp_path_factory):
    """A folder with saved autoencoders of random weights, of two seeds."""
    folder = tmp_path_factory.mktemp("autoencoders")
    for seed, (name, (class_name, arguments)) in itertools.product((0, 1), MODELS.items()):
        torch.manual_seed(seed)
        model = CLASSES[class_name](**arguments)
        if class_name == "BricsAutoencoder":
            torch.nn.init.normal_(model.grids.entries)  # as large as after training, so that codes matter
        model.save_pretrained(folder / folder_name(name, seed))
    return folder


@pytest.fixture(scope="module")
def flags(autoencoders, image_folder):
    """Command line for models of milliseconds, with features of random weights."""
    training = {"train_batch_size": 2, "learning_rate": 1e-3, "lr_warmup_steps": 1, "random_flip": True}
    config = {"unet": CONFIG["unet"], "scheduler": {"prediction_type": "v_prediction"}, "train_key_codes": training}
    (autoencoders / "tiny.yaml").write_text(yaml.safe_dump(config))
    words = ["--autoencoders", autoencoders, "--config", autoencoders / "tiny.yaml", "--dataset_name", image_folder]
    words += ["--seeds", 0, "--max_train_steps", 6, "--validation_steps", 4, "--checkpointing_steps", 3]
    words += ["--num_samples", 5, "--num_inference_steps", 3, "--extractor", "random-conv"]
    return [*map(str, words)]


def run(flags, folder, *more, models=tuple(MODELS)):
    """Runs the comparison and returns its report, if it has written one."""
    AcceleratorState._reset_state(reset_partial_state=True)  # which keeps the precision of the first in a process
    try:
        compare_generation.main([*flags, "--output_dir", str(folder), "--models", *models, *map(str, more)])
    finally:
        torch.set_flush_denormal(False)
    path = folder / "generation.json"
    return json.loads(path.read_text()) if path.exists() else None


@pytest.fixture(scope="module")
def folder(flags, tmp_path_factory):
    """A finished comparison."""
    folder = tmp_path_factory.mktemp("generation")
    run(flags, folder, "--schedules", "b", "a", "--seeds", 0, 1)
    return folder


@pytest.fixture(scope="module")
def result(folder):
    return json.loads((folder / "generation.json").read_text())


def values(result):
    """Curves and last measures of all runs, without the time."""
    points = {name: [*run["curve"], run["last"]] for name, run in result["runs"].items()}
    return {
        name: [{key: value for key, value in point.items() if not key.endswith("seconds")} for point in of_run]
        for name, of_run in points.items()
    }


@pytest.mark.slow
def test_compiled_unets_learn_the_same(flags, tmp_path, monkeypatch):
    """Without inductor, which needs a C++ compiler."""
    compiled = []

    def compile(module, compiler=torch.compile):
        compiled.append(module)
        return compiler(module, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile)
    more = "--max_train_steps", 2, "--validation_steps", 2
    plain, other = (
        run(flags, tmp_path / name, *more, *words, models=["BRICS"])
        for name, words in (("plain", []), ("compiled", ["--compile"]))
    )
    assert len(compiled) == 1
    points = [list(result["runs"].values())[0]["curve"][0][KID] for result in (plain, other)]
    assert points[1] == pytest.approx(points[0], rel=0.02)


def make_space(autoencoders, name, image_folder, **tensors):
    autoencoder = load_saved_autoencoder(autoencoders / folder_name(name, 0))
    batch = next(iter(evaluation_loader(load_collection(image_folder), 32, 24)))["pixel_values"]
    latents = encode(autoencoder, batch)
    space = LatentSpace(autoencoder, latents.std().item(), None, None, None, None, name)
    space.latents = space.encode(batch)
    return space, batch, latents


class TestLatentSpaces:
    @pytest.mark.parametrize("name", MODELS)
    @torch.no_grad()
    def test_there_and_back(self, autoencoders, image_folder, name):
        space, batch, latents = make_space(autoencoders, name, image_folder)
        assert space.latents.std().item() == pytest.approx(1, rel=1e-4)
        if name == "BRICS":
            torch.testing.assert_close(space.latents, (latents - 0.5) / space.deviation)
            assert space.latents.abs().max() <= space.bound == 0.5 / space.deviation
        else:
            assert space.bound is None
        own = space.autoencoder(batch).sample
        torch.testing.assert_close(space.decode(space.latents), own, rtol=1e-3, atol=1e-4)

    def test_kept_ones(self, autoencoders, folder, image_folder):
        files = sorted((folder / "latents").iterdir())
        expected = [f"{name}-{seed}" for name in ("AutoencoderKL", "BRICS", "VQModel") for seed in (0, 1)]
        assert [path.name.rpartition("-")[0] for path in files] == expected
        kept = generation_models.safetensors.torch.load_file(files[2])
        # 25 files, one of them unreadable; two are held out.
        assert len(kept["latents"]) + 2 * len(kept["held_out"]) == 2 * 24
        half = len(kept["latents"]) // 2
        assert not torch.equal(kept["latents"][:half], kept["latents"][half:])  # mirror images
        assert len(kept["reconstruction_features"]) == half

    def test_missing_and_unknown_autoencoders(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="config.json does not exist; train this autoencoder with compare"):
            load_saved_autoencoder(tmp_path / "BRICS-0")
        (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
        with pytest.raises(ValueError, match="of class AutoencoderTiny; give a model of BricsAutoencoder, "):
            load_saved_autoencoder(tmp_path)


class TestSampling:
    @pytest.mark.parametrize("schedule", ["b", "a"])
    @pytest.mark.parametrize(("bound", "solver_clamps"), [(1.0, True), (2.0, False), (None, False)])
    def test_only_latents_with_bounds_are_clamped(self, schedule, bound, solver_clamps):
        config = {"prediction_type": "sample"}  # the network says where sampling ends
        scheduler = build_scheduler(config, schedule, bound)
        assert scheduler.config.clip_sample == (bound is not None)
        assert bound is None or scheduler.config.clip_sample_range == bound
        assert scheduler.config.gamma_schedule == {"b": "cosine_variant", "a": "cosine"}[schedule]
        latents = denoise(lambda x, *_, **__: (torch.full_like(x, 3.0),), scheduler, torch.randn(2, 4, 8, 8), 4)
        expected = torch.full_like(latents, 1.0 if solver_clamps else 3.0)
        torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-3)

    def test_noise_of_a_sample_is_that_of_its_number(self):
        few, many = (starting_noise((4, 8, 8), count) for count in (3, 5))
        assert torch.equal(few, many[:3]) and not torch.equal(many[0], many[1])


class TestTraining:
    def test_the_same_for_all(self, flags, tmp_path, monkeypatch):
        seen, current = {}, []
        training_loss, take_steps = compare_generation.train_key_codes.training_loss, Run._take_steps

        def record(unet, scheduler, latents, noise, timesteps, snr_gamma):
            distances = [(current[0].space.latents - one).abs().sum(dim=(1, 2, 3)) for one in latents]
            rows = torch.stack(distances).argmin(dim=1)
            weights = torch.cat([parameter.detach().flatten() for parameter in unet.parameters()])
            calls = seen.setdefault((current[0].name, scheduler.config.gamma_schedule, snr_gamma), [])
            calls.append((noise, timesteps, rows) if calls else (noise, timesteps, rows, weights))
            return training_loss(unet, scheduler, latents, noise, timesteps, snr_gamma)

        def remember(run, *given):
            current[:] = [run]
            take_steps(run, *given)

        monkeypatch.setattr(compare_generation.train_key_codes, "training_loss", record)
        monkeypatch.setattr(Run, "_take_steps", remember)
        run(flags, tmp_path, "--no-report", "--schedules", "b", "a", models=("BRICS", "AutoencoderKL"))
        settings = [("cosine_variant", None), ("cosine", 5.0)]
        assert list(seen) == [(name, *others) for others in settings for name in ("BRICS", "AutoencoderKL")]
        first, *others = seen.values()
        assert len(first) == 6
        for other in others:
            for one, two in zip(first, other, strict=True):
                assert all(map(torch.equal, one, two))

    def test_what_has_no_bounds_is_learned_without_a_clamp(self, result):
        for name, of_run in result["runs"].items():
            clamps = [of_run["scheduler"][key] for key in ("clip_sample", "thresholding")]
            assert clamps == [name.startswith("BRICS"), False]

    @pytest.mark.parametrize(
        ("message", "more"),
        [
            ("max_train_steps 6, not 7", ["--max_train_steps", 7]),
            ("train_batch_size 2, not 3", ["--train_batch_size", 3]),
            ("num_samples 5, not 6", ["--num_samples", 6]),
            ("unet ", ["--set", "unet.layers_per_block=2"]),
            ("num_reference_images 3000, not 9", ["--num_reference_images", 9]),
        ],
    )
    def test_changed_settings_are_refused(self, folder, flags, message, more):
        with pytest.raises(ValueError, match=f"BRICS-b-0 was trained with {message}.*; give the same flags as before"):
            run(flags, folder, "--no-report", *more, models=("BRICS",))

    def test_sixteen_bits(self, flags, tmp_path):
        more = ("--max_train_steps", 2, "--mixed_precision", "bf16")
        found = run(flags, tmp_path / "bf16", *more, models=("BRICS",))["means"]["BRICS, b"]
        plain = run(flags, tmp_path / "no", *more[:2], models=("BRICS",))["means"]["BRICS, b"]
        assert found[KID] == pytest.approx(plain[KID], rel=0.1) and found["nearest_code"] != plain["nearest_code"]
        with pytest.raises(ValueError, match="trained with mixed_precision bf16, not no"):
            run(flags, tmp_path / "bf16", *more[:2], models=("BRICS",))
        path = tmp_path / "no/runs/BRICS-b-0/state/progress.json"
        progress = json.loads(path.read_text())
        del progress["settings"]["mixed_precision"]  # as it was written earlier
        path.write_text(json.dumps(progress))
        assert run(flags, tmp_path / "no", *more[:2], models=("BRICS",))["means"]["BRICS, b"] == plain

    def test_too_few_samples_are_refused_before_training(self, flags, tmp_path):
        with pytest.raises(ValueError, match="precision-recall needs at least 4 images of each kind, got 3 generated"):
            run(flags, tmp_path, "--num_samples", 3)
        assert not (tmp_path / "runs").exists()


class TestReport:
    def test_measures(self, result):
        assert list(result["runs"]) == [
            f"{name}-{schedule}-{seed}" for seed in (0, 1) for schedule in ("b", "a") for name in MODELS
        ]
        assert result["images"] == {"references": 22, "held_out": 2, "latents": 44}
        for of_run in result["runs"].values():
            assert [point["step"] for point in of_run["curve"]] == [4, 6]
            last = of_run["last"]
            assert last[KID] == of_run["curve"][-1][KID] != of_run["curve"][0][KID]
            assert last[KID] != last[f"{KID}_from_reconstructions"]
            assert 0 <= last["precision_random_conv"] <= 1 and last["fid_random_conv"] > 0
            assert min(last[key] for key in ("seconds", "denoising_seconds", "nearest_code", "encoded_again")) > 0
        for name, of_spaces in result["autoencoders"].items():
            assert list(of_spaces) == [f"{name}-0", f"{name}-1"]
            for of_space in of_spaces.values():
                shares = of_space["variance_shares"]
                assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1)
                assert len(shares) == 4
                assert 0 < of_space["nearest_code"] < 3 and of_space["encoded_again"] >= 0
                values = [of_space[f"{KID}_of_{which}reconstructions"] for which in ("", "training_")]
                assert len({*values, result[f"{KID}_held_out"]}) == 3
        assert set(result["autoencoders"]) == set(MODELS)
        by_seed = [result["runs"][f"VQModel-a-{seed}"]["last"][KID] for seed in (0, 1)]
        assert by_seed[0] != by_seed[1] and result["means"]["VQModel, a"][KID] == pytest.approx(sum(by_seed) / 2)
        rows = {(row["latents of"], row["schedule"]): row for row in result["table"]}
        assert len(rows) == 6 and rows["VQModel", "a"]["KID (random-conv)"] == spread(by_seed, 0)

    def test_text_and_pictures(self, folder):
        text = (folder / "generation.md").read_text()
        assert "6 steps of 2\nlatents out of 44, v_prediction" in text and "| VQModel | a |" in text
        assert "exploratory" not in text and "UNets 0, 1; autoencoders of the same seeds. Mean" in text
        assert "seed 0: BRICS (b), BRICS (a), AutoencoderKL (b), " in text
        assert Image.open(folder / "generation-samples.png").size == (5 * 34 + 2, 6 * 34 + 2)
        assert Image.open(folder / "generation-curves.png").width > 1000
        assert Image.open(folder / "generation-nearest.png").height > 3 * 96

    def test_again_without_training(self, flags, folder, result, monkeypatch):
        monkeypatch.setattr(Run, "train", pytest.fail)
        monkeypatch.setattr(generation_models, "_encode_all", pytest.fail)
        for path in folder.glob("generation*"):
            path.unlink()
        assert run(flags, folder, "--no-report") is None
        again = run(flags, folder, "--no-show_images", "--autoencoder_seed", 0)
        assert list(again["runs"]) == [f"{name}-b-0" for name in MODELS]
        assert values(again) == {name: of_run for name, of_run in values(result).items() if name.endswith("-b-0")}
        text = (folder / "generation.md").read_text()
        assert "One seed: exploratory" in text and "autoencoders of seed 0." in text
        assert "nearest training images" not in text
        assert not (folder / "generation-nearest.png").exists()

    def test_another_extractor_judges_the_same_samples(self, flags, folder, tmp_path, monkeypatch):
        class Twin(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.network = load_feature_extractor("random-conv")
                self.description = self.network.description | {"name": "twin"}

            def forward(self, images):
                return self.network(images)

        load = {"random-conv": load_feature_extractor, "twin": lambda name, device: Twin()}
        monkeypatch.setattr(
            compare_generation, "load_feature_extractor", lambda name, device: load[name](name, device)
        )
        monkeypatch.setattr(Run, "train", pytest.fail)
        shutil.copytree(folder, tmp_path / "copy")
        again = run(flags, tmp_path / "copy", "--more_extractors", "twin", "--no-show_images", models=["BRICS"])
        last, row = again["runs"]["BRICS-b-0"]["last"], again["table"][0]
        for metric in ("kid", "fid", "precision", "recall"):
            assert last[f"{metric}_twin"] == pytest.approx(last[f"{metric}_random_conv"], rel=1e-4, abs=1e-6)
        assert row["KID (twin)"] == row["KID (random-conv)"] and row["recall (twin)"] == row["recall (random-conv)"]
        assert "features of random-conv and twin, from 22" in (tmp_path / "copy/generation.md").read_text()

    def test_a_perfect_autoencoder_is_at_nothing(self, monkeypatch):
        """Of training images; held-out ones are other images, whatever the autoencoder does."""
        monkeypatch.setattr(generation_report, "code_errors", lambda *_: {})
        extractor = load_feature_extractor("random-conv")
        references, others = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
        for moved, perfect in ((0.0, True), (1.0, False)):
            space = SimpleNamespace(deviation=1.0, latents=others[:, :, None, None], held_out=None)
            space.held_out_reconstruction_features = others
            space.reconstruction_features = references + moved
            found = generation_report.measure_space(space, references, extractor)
            assert (abs(found[f"{KID}_of_training_reconstructions"]) < 1e-3) == perfect
            assert abs(found[f"{KID}_of_reconstructions"]) > 1

    @pytest.mark.parametrize("channels", (1, 3))
    def test_variance_shares(self, channels):
        """Of channels that are one up to a factor a direction has all, of independent ones each has its own."""
        latents = torch.randn(50, channels, 8, 8, generator=torch.Generator().manual_seed(0))
        powers = torch.arange(1.0, channels + 1)
        shares = generation_report.variance_shares(latents * powers.sqrt()[:, None, None] + 5)
        assert shares == pytest.approx((powers.flip(0) / powers.sum()).tolist(), abs=0.02)
        alike = generation_report.variance_shares(latents[:, :1] * powers[:, None, None])
        assert alike == pytest.approx([1.0] + [0.0] * (channels - 1), abs=1e-6) and min(alike) >= 0

    @torch.no_grad()
    def test_code_errors(self, autoencoders, image_folder):
        space, batch, _ = make_space(autoencoders, "AutoencoderKL", image_folder)
        deviation = space.latents.var(dim=(0, 2, 3)).mean().sqrt().item()
        found = generation_report.code_errors(space, space.latents)
        assert found["nearest_code"] == 0
        again = space.encode(space.decode(space.latents).clamp(-1, 1)) - space.latents
        expected = again.square().mean(dim=(1, 2, 3)).sqrt().mean().item() / deviation
        assert found["encoded_again"] == pytest.approx(expected, rel=1e-3) and expected > 0
        # A constant shift that is small beside the distances between codes: every code stays its own nearest.
        shifted = generation_report.code_errors(space, space.latents + 0.01)
        assert shifted["nearest_code"] == pytest.approx(0.01 / deviation, rel=1e-3)

    @pytest.mark.parametrize("name", ("AutoencoderKL", "BRICS"))
    def test_psnr_with_errors(self, name, autoencoders, image_folder):
        space, _, latents = make_space(autoencoders, name, image_folder)
        images = load_collection(image_folder)
        loader = evaluation_loader(images, 32, 24)
        expected = reconstruction_metrics(space.autoencoder, loader, progress=False)["psnr"].mean().item()
        none, some = generation_report.psnr_with_errors(space, images, 32, [0.0, 0.5])
        assert none == pytest.approx(expected, abs=1e-3)
        (batch, rows), *_ = image_batches(loader, progress=False)
        noise = 0.5 * latent_deviation(latents).item()  # of the autoencoder's own latents, before they are scaled
        assert some == pytest.approx(psnr_with_noise(space.autoencoder, [(latents, batch, rows)], noise), abs=1e-3)

    def test_codes_with_bounds_are_clipped_first(self, autoencoders, image_folder):
        space, *_ = make_space(autoencoders, "BRICS", image_folder)
        outside = torch.full_like(space.latents, 2 * space.bound)
        found, expected = (generation_report.code_errors(space, codes) for codes in (outside, outside / 2))
        assert found == expected


class TestInterruption:
    @pytest.mark.slow
    def test_it_goes_on_and_ends_alike(self, flags, result, tmp_path, monkeypatch):
        """Within a step, before and after a validation, and before the averaged weights of the end are there."""

        def stop(*_, **__):
            raise KeyboardInterrupt

        steps = [
            (compare_generation, "denoise", 3),
            (compare_generation.train_key_codes, "training_loss", 3),
            (compare_generation, "kernel_distance", 3),
            (Run, "_save", 3),
            (UNet2DModel, "save_pretrained", 4),
        ]
        for owner, name, step in steps:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(owner, name, stop)
                run(flags, tmp_path, "--no-report", models=("BRICS",))
            assert json.loads((tmp_path / "runs/BRICS-b-0/state/progress.json").read_text())["step"] == step
        found = run(flags, tmp_path, models=("BRICS",))
        assert values(found)["BRICS-b-0"] == values(result)["BRICS-b-0"]

    @pytest.mark.slow
    def test_a_killed_process_ends_at_the_same_table(self, flags, tmp_path):
        def table(folder):
            """Its cells but for the last two, which are seconds."""
            lines = (folder / "generation.md").read_text().splitlines()
            return [line.split("|")[:-3] for line in lines if line.startswith("| BRICS |")]

        whole, broken = tmp_path / "whole", tmp_path / "broken"
        run(flags, whole, models=("BRICS",))
        words = [sys.executable, str(ROOT / "benchmarks/compare_generation.py"), *flags]
        process = subprocess.Popen([*words, "--output_dir", str(broken), "--models", "BRICS"], env=environment())
        progress = broken / "runs/BRICS-b-0/state/progress.json"
        while not progress.exists():
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
        process.wait()
        assert json.loads(progress.read_text())["step"] < 6 and not (broken / "generation.md").exists()
        expected = json.loads((whole / "generation.json").read_text())
        assert values(run(flags, broken, models=("BRICS",))) == values(expected)
        assert table(broken) == table(whole) != []

    def test_the_work_can_be_shared(self, flags, result, folder, tmp_path):
        for name in ("VQModel", "AutoencoderKL"):
            assert run(flags, tmp_path, "--no-report", models=(name,)) is None
        found = values(run(flags, tmp_path, models=("AutoencoderKL", "VQModel")))
        assert found == {name: values(result)[name] for name in ("AutoencoderKL-b-0", "VQModel-b-0")}
        unet = "runs/VQModel-b-0/unet/diffusion_pytorch_model.safetensors"
        assert (tmp_path / unet).read_bytes() == (folder / unet).read_bytes()


@pytest.mark.slow
def test_finetuned_decoders(autoencoders, folder, result, image_folder, tmp_path):
    words = ["--autoencoders", autoencoders, "--generation", folder, "--dataset_name", image_folder, "--seeds", 0]
    words += ["--noise", 0.1, "--max_train_steps", 2, "--extractor", "random-conv", "--output_dir", tmp_path]
    compare_decoders.main(list(map(str, words)))
    found = json.loads((tmp_path / "decoders.json").read_text())
    before, after = (found["runs"][name]["0"] for name in ("as trained", "0.1"))
    # The key codes of the comparison's samples, decoded as they were.
    assert before[f"{KID}_samples"] == pytest.approx(result["runs"]["BRICS-b-0"]["curve"][-1][KID], rel=1e-3)
    assert after.keys() == before.keys() and all(after[key] != before[key] for key in after)
    weights = {
        path: load_file(path / "diffusion_pytorch_model.safetensors")
        for path in (autoencoders / "BRICS-0", tmp_path / "runs/BRICS-0-0.1/autoencoder")
    }
    old, new = weights.values()
    changed = {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert changed and not any(name.startswith("encoder") for name in changed)
    log = (tmp_path / "runs/BRICS-0-0.1/train.log").read_text()
    compare_decoders.main(list(map(str, words)))  # finished runs are not trained again
    assert (tmp_path / "runs/BRICS-0-0.1/train.log").read_text() == log
    assert json.loads((tmp_path / "decoders.json").read_text())["runs"] == found["runs"]
    with pytest.raises(ValueError, match="was trained with words .*; give the same flags as before"):
        compare_decoders.main(list(map(str, [*words, "--learning_rate", 1e-3])))

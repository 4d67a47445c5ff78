"""Flags that users of diffusers' training scripts type."""

import argparse
import importlib.machinery
import json
import shutil
import sys
from types import ModuleType, SimpleNamespace

import accelerate
import pytest
import torch
import train_autoencoder
import train_key_codes
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from launching import assert_same_movement, movement, train_here
from packaging.version import parse as parse_version
from safetensors.torch import load_file

from brics_diffusers import BricsAutoencoder, BricsKeyCodePipeline
from brics_diffusers.training_utils import processes, run
from brics_diffusers.training_utils.arguments import MAX_TRAIN_STEPS
from brics_diffusers.training_utils.checkpoints import list_checkpoints
from brics_diffusers.training_utils.curves import read_curves
from brics_diffusers.training_utils.optimization import build_lr_scheduler, build_optimizer, scale_learning_rates
from brics_diffusers.training_utils.pretrained import build_autoencoder, check_key_codes


@pytest.fixture
def flags(image_folder, write_config, tmp_path):
    """The flags of a short run of stage one."""
    flags = ["--config", write_config(), "--dataset_name", image_folder, "--output_dir", tmp_path / "run"]
    return [*flags, "--num_validation_images", 0, "--adversarial_weight", 0, "--max_train_steps", 1]


@pytest.fixture
def refusal(capsys):
    """The sentence with which flags of stage one, or of the other script, are refused."""

    def sentence(*words, script=train_autoencoder):
        with pytest.raises(SystemExit):
            script.parse_args(["--dataset_name", "x", *map(str, words)])
        return capsys.readouterr().err.splitlines()[-1]

    return sentence


def parse(*words, script=train_autoencoder):
    return script.parse_args(["--dataset_name", "x", *map(str, words)])


class TestResolution:
    def test_a_new_autoencoder(self, write_config, refusal):
        config = ["--config", write_config()]  # 32 x 32, feature blocks of 16 x 16
        args = parse(*config, "--resolution", 64)
        assert (args.autoencoder["sample_size"], args.autoencoder["feature_size"]) == (64, 32)
        assert build_autoencoder(args).key_code_shape[1:] == (16, 16)
        args = parse("--resolution", 128)  # of the class's defaults, 256 and 64
        assert (args.autoencoder["sample_size"], args.autoencoder["feature_size"]) == (128, 32)
        message = "--resolution is 33; an autoencoder with sample_size 32 and feature_size 16 can be made for"
        assert message in refusal(*config, "--resolution", 33)
        message = "--set autoencoder.sample_size=32 is not --resolution 64; give one of them"
        assert message in refusal(*config, "--resolution", 64, "--set", "autoencoder.sample_size=32")
        changed = parse(*config, "--resolution", 64, "--set", "autoencoder.feature_size=64")
        assert changed.autoencoder["feature_size"] == 64

    def test_a_pretrained_autoencoder(self, stage_one):
        args = parse("--pretrained_autoencoder_name_or_path", stage_one[0], "--resolution", 64)
        autoencoder = build_autoencoder(args)
        assert (autoencoder.config.sample_size, autoencoder.config.feature_size) == (64, 32)
        trained = BricsAutoencoder.from_pretrained(stage_one[0] / "autoencoder")
        assert torch.equal(autoencoder.grids.entries, trained.grids.entries)

    def test_a_whole_run(self, flags, tmp_path):
        train_here(train_autoencoder.main, *flags, "--resolution", 16)
        config = BricsAutoencoder.load_config(tmp_path / "run/autoencoder")
        assert (config["sample_size"], config["feature_size"]) == (16, 8)

    def test_stage_two_takes_that_of_the_autoencoder(self, stage_one):
        words = ["--autoencoder_name_or_path", stage_one[0], "--set", "unet.block_out_channels=[32]"]
        words += ["unet.down_block_types=[DownBlock2D]", "unet.up_block_types=[UpBlock2D]", "--resolution"]
        train_key_codes.load_models(parse(*words, 32, script=train_key_codes))
        message = "--resolution is 64, but the autoencoder's images are of 32 x 32; give 32, or name an autoencoder"
        with pytest.raises(ValueError, match=message):
            train_key_codes.load_models(parse(*words, 64, script=train_key_codes))


class TestPretrainedPipeline:
    def test_training_goes_on(self, stage_one, stage_two, image_folder, write_config, tmp_path):
        flags = ["--config", write_config(), "--dataset_name", image_folder, "--output_dir", tmp_path / "run"]
        flags += ["--max_train_steps", 1, "--num_validation_images", 0, "--pretrained_model_name_or_path"]
        printed = train_here(train_key_codes.main, *flags, stage_two[0], "--learning_rate", 0, "--scaling_factor", 5)
        assert "--scaling_factor is for new models; the pretrained one keeps its own, 2" in printed
        for name in ("autoencoder", "unet"):
            (path,) = (stage_two[0] / name).glob("*.safetensors")
            after = load_file(tmp_path / "run" / name / path.name)
            assert all(torch.equal(value, after[key]) for key, value in load_file(path).items())
        pipe = BricsKeyCodePipeline.from_pretrained(tmp_path / "run")
        before = BricsKeyCodePipeline.from_pretrained(stage_two[0])
        assert pipe.scheduler.config == before.scheduler.config
        assert pipe.autoencoder.config.scaling_factor == before.autoencoder.config.scaling_factor == 2
        summary = json.loads((tmp_path / "run/training_summary.json").read_text())
        assert summary["autoencoder_training"]["steps"] == 4  # as the pipeline's summary says

    def test_another_autoencoder_must_fit(self, pipe):
        other = argparse.Namespace(key_code_shape=(9, 8, 8))
        with pytest.raises(ValueError, match="UNet is for key codes of 4 channels, the autoencoder's have 9; name"):
            check_key_codes(other, pipe.unet)

    def test_other_pipelines_and_changes(self, stage_one, refusal):
        words = ["--pretrained_model_name_or_path", stage_one[0]]
        with pytest.raises(FileNotFoundError, match="holds no model_index.json"):
            train_key_codes.load_models(parse(*words, script=train_key_codes))
        sentence = refusal(*words, "--set", "unet.dropout=0.1", script=train_key_codes)
        assert "a pretrained pipeline keeps its own, so leave it out" in sentence


def test_learning_rates_are_scaled():
    args = parse("--scale_lr", "--train_batch_size", 4, "--gradient_accumulation_steps", 2, "--learning_rate", 0.5)
    scale_learning_rates(args, num_processes=3)
    assert (args.learning_rate, args.encoder_learning_rate) == (12, None)
    rates = ("--encoder_learning_rate", 0.25, "--decoder_learning_rate", 0.5)
    args = parse("--scale_lr", "--train_batch_size", 4, *rates)
    scale_learning_rates(args, num_processes=1)
    assert (args.learning_rate, args.encoder_learning_rate, args.decoder_learning_rate) == (8e-3, 1, 2)


def test_what_is_negative_is_refused(refusal):
    for flag in ("--seed", "--lr_warmup_steps"):
        assert f"argument {flag}: must be" in refusal(f"{flag}=-1")


class TestEpochs:
    def test_the_command_line_beats_the_file(self, write_config, refusal):
        file = ["--config", write_config()]  # which has max_train_steps
        assert (parse(*file).max_train_steps, parse().max_train_steps) == (4, MAX_TRAIN_STEPS)
        args = parse(*file, "--num_train_epochs", 2)
        assert (args.max_train_steps, args.num_train_epochs) == (None, 2)
        file = ["--config", write_config({"train_autoencoder": {"max_train_steps": None, "num_train_epochs": 3}})]
        assert (parse(*file).max_train_steps, parse(*file).num_train_epochs) == (None, 3)
        args = parse(*file, "--max_train_steps", 7)
        assert (args.max_train_steps, args.num_train_epochs) == (7, None)
        both = "--max_train_steps and --num_train_epochs both say how long to train; give one of them"
        assert both in refusal("--max_train_steps", 7, "--num_train_epochs", 2)
        assert both in refusal("--config", write_config({"train_autoencoder": {"num_train_epochs": 3}}))

    def test_a_whole_run(self, flags, tmp_path):
        printed = train_here(train_autoencoder.main, *flags[:-2], "--num_train_epochs", 2, "--train_batch_size", 8)
        config = json.loads((tmp_path / "run/training_config.json").read_text())
        assert config["max_train_steps"] == 7 and "2 epochs of 25 are 7 steps" in printed  # 50 images in sevens of 8
        assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-7"]


class Recorder(GeneralTracker):
    """A tracker of accelerate's that keeps what it is given."""

    name = "recorder"
    requires_logging_directory = False
    kept = []

    def __init__(self, project, **kwargs):
        super().__init__()
        self.kept.append(project)

    tracker = property(lambda self: self)

    def store_init_configuration(self, values):
        self.kept.append(values["learning_rate"])

    def log(self, values, step=None, **kwargs):
        self.kept.extend(values)

    def log_images(self, values, step=None, **kwargs):
        self.kept.extend((name, len(images), images[0].width > 32) for name, images in values.items())


class TestTrackers:
    @pytest.mark.skipif(parse_version(accelerate.__version__) < parse_version("1.15"), reason="takes no new trackers")
    def test_images_and_curves_go_to_all(self, flags, tmp_path, monkeypatch):
        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
        flags += ["--report_to", "recorder", "--logging_dir", "curves", "--num_validation_images", 2]
        train_here(train_autoencoder.main, *flags, "--learning_rate", 0.5, "--tracker_project_name", "emoji")
        assert Recorder.kept[:2] == ["emoji", 0.5] and {"train/mse", "validation/psnr"} < set(Recorder.kept)
        assert ("validation", 1, True) in Recorder.kept
        assert (tmp_path / "run/curves/tensorboard").is_dir() and not (tmp_path / "run/logs").exists()
        assert "train/mse" in read_curves(tmp_path / "run")[0]

    def test_names(self, refusal, monkeypatch):
        assert parse().report_to == parse("--report_to", "none").report_to == []
        monkeypatch.setattr(
            "brics_diffusers.training_utils.arguments.get_available_trackers", lambda: ["tensorboard", "wandb"]
        )
        for names in ("all", "wandb", "wandb,tensorboard"):
            assert parse("--report_to", names).report_to == ["wandb"]
        assert "mlflow needs its package; install it" in refusal("--report_to", "wandb,mlflow")
        assert "'wanda' is no tracker; give all, none, or some of aim" in refusal("--report_to", "wanda")


def test_tf32(flags):
    assert not torch.backends.cuda.matmul.allow_tf32
    try:
        train_here(train_autoencoder.main, *flags, "--allow_tf32")
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.slow
def test_compiled_networks_learn_the_same(image_folder, write_config, tmp_path, monkeypatch):
    """With R1, whose double backward compiled code does not know; without inductor, which needs a C++ compiler."""

    def accelerator(**options):
        backend = {"inductor": "aot_eager", None: None}[options["dynamo_backend"]]
        return Accelerator(**options | {"dynamo_backend": backend})

    monkeypatch.setattr(run, "Accelerator", accelerator)
    config = write_config({"autoencoder": {"regularization": "none"}})
    flags = ["--config", config, "--dataset_name", image_folder, "--max_train_steps", 2, "--num_validation_images", 0]
    flags += ["--adam_epsilon", 1.0, "--discriminator_adam_epsilon", 1.0, "--learning_rate", 0.1]
    flags += ["--checkpointing_steps", 1, "--gradient_penalty_interval", 1]
    for name in ("plain", "compile"):
        more = ["--output_dir", tmp_path / name] + ["--compile"] * (name == "compile")
        train_here(train_autoencoder.main, *flags, *more)
    moves = [movement(tmp_path / name, 1, 2, ("model", "model_1")) for name in ("plain", "compile")]
    assert_same_movement(*moves)


def test_a_checkpoint_by_its_name(stage_one, flags, tmp_path, monkeypatch):
    shutil.copytree(stage_one[0], tmp_path / "run")
    flags = [*flags[:-4], "--max_train_steps", 3, "--resume_from_checkpoint"]
    printed = train_here(train_autoencoder.main, *flags, "checkpoint-2")
    assert f"Resumed from {tmp_path / 'run/checkpoint-2'}" in printed
    message = "checkpoint-9 is not a checkpoint folder; .* a name in .*run, which has checkpoint-2, checkpoint-3"
    with pytest.raises(FileNotFoundError, match=message):
        train_here(train_autoencoder.main, *flags, "checkpoint-9")
    for other in (("--decoder_learning_rate", 0.1), ("--optimizer", "muon")):
        with pytest.raises(ValueError, match="other groups of parameters; give --encoder_learning_rate or --dec"):
            train_here(train_autoencoder.main, *flags, "checkpoint-2", *other)


class TestPiecewiseConstant:
    @pytest.mark.parametrize(("warmup", "rates"), [(0, [4, 4, 2, 2, 1, 1]), (2, [0, 2, 2, 2, 1, 1])])
    def test_rates(self, warmup, rates):
        words = ["--lr_scheduler", "piecewise_constant", "--lr_step_rules", "1:2,0.5:4,0.25"]
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 4.0)
        scheduler, seen = build_lr_scheduler(parse(*words, "--lr_warmup_steps", warmup), optimizer), []
        for _ in rates:
            seen.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        assert seen == rates

    def test_rules_are_needed_and_for_nothing_else(self, refusal):
        piecewise = ["--lr_scheduler", "piecewise_constant"]
        assert "needs --lr_step_rules, for instance 1:1000" in refusal(*piecewise)
        assert "--lr_step_rules are for --lr_scheduler piecewise_constant, not constant" in refusal(
            "--lr_step_rules", "1:2,0.5"
        )
        for rules in ("1", "1:2", "1:2,x", "1:4,0.5:2,0.1", "1:0,2", "-1:2,1", "1:2:3,4", "nan:2,1"):
            assert "must be factors of the learning rate with the" in refusal(*piecewise, f"--lr_step_rules={rules}")
        assert "invalid choice: 'cosine_restarts'" in refusal("--lr_scheduler", "cosine_restarts")


def test_workers(monkeypatch):
    assert processes.default_num_workers(torch.device("cpu"), 1) == 0
    monkeypatch.setattr(processes.os, "sched_getaffinity", lambda _: range(16))
    monkeypatch.setattr(processes.shutil, "disk_usage", lambda _: argparse.Namespace(free=2**34))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert [processes.default_num_workers(torch.device("cuda"), count) for count in (1, 4, 16)] == [8, 3, 0]
    monkeypatch.setattr(processes.shutil, "disk_usage", lambda _: argparse.Namespace(free=2**26))  # as in Docker
    assert processes.default_num_workers(torch.device("cuda"), 1) == 0


class TestAdamIn8Bits:
    FLAGS = ("--autoencoder_name_or_path", "x", "--use_8bit_adam")

    def test_refusals(self, refusal, monkeypatch):
        assert "--use_8bit_adam is for stage two" in refusal("--use_8bit_adam")
        message = "--use_8bit_adam is for Adam, not --optimizer muon; give one of them"
        assert message in refusal(*self.FLAGS, "--optimizer", "muon", script=train_key_codes)
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        message = "--use_8bit_adam needs bitsandbytes, which is not installed: pip install bitsandbytes"
        assert message in refusal(*self.FLAGS, script=train_key_codes)

    def test_it_is_used(self, monkeypatch):
        class Adam8bit(torch.optim.Adam):
            pass

        package = ModuleType("bitsandbytes")
        package.__spec__ = importlib.machinery.ModuleSpec("bitsandbytes", None)
        package.optim = SimpleNamespace(Adam8bit=Adam8bit)
        monkeypatch.setitem(sys.modules, "bitsandbytes", package)
        args = parse(*self.FLAGS, script=train_key_codes)
        optimizer = build_optimizer(torch.nn.Linear(2, 2), 1e-3, 0.9, 0.99, 1e-8, use_8bit_adam=args.use_8bit_adam)
        assert type(optimizer) is Adam8bit and optimizer.defaults["lr"] == 1e-3

"""Runs that are killed, stopped or short of disk space."""

import multiprocessing
import shutil
import signal
import socket
import subprocess
import time

import psutil
import pytest
import torch
import train_autoencoder
import train_key_codes
from launching import assert_same_movement, command, environment, launch, movement, train_here
from safetensors.torch import load_file

from brics_diffusers import BricsAutoencoder
from brics_diffusers.training_utils.checkpoints import checkpoint_step, list_checkpoints


SCRIPTS = {"one": "train_autoencoder.py", "two": "train_key_codes.py"}
MAINS = {"one": train_autoencoder.main, "two": train_key_codes.main}


def start(script, *flags, processes=1, launcher=True):
    """A run in a process group of its own."""
    words = command(script, *flags, processes=processes, launcher=launcher)
    return subprocess.Popen(words, env=environment(), start_new_session=True, stderr=subprocess.PIPE, text=True)


def send(run, number):
    """Sends a signal to every process of a run, as a cluster's scheduler does."""
    for process in [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]:
        process.send_signal(number)


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.stderr.read()[-4000:]
        time.sleep(0.001)


@pytest.fixture
def flags_of(stage_one, image_folder, write_config):
    """The flags of a run of either stage that saves every fourth step."""

    def flags(stage, output_dir, *more):
        result = ["--config", write_config(), "--dataset_name", image_folder, "--output_dir", output_dir]
        result += ["--checkpointing_steps", 4, "--max_train_steps", 16, "--num_validation_images", 2]
        result += ["--validation_steps", 5, "--lr_scheduler", "cosine", "--dataloader_num_workers", 1]
        result += ["--train_batch_size", 2, "--gradient_accumulation_steps", 2]
        if stage == "one":
            result += ["--gan_start_step", 1, "--random_flip"]
        else:
            result += ["--autoencoder_name_or_path", stage_one[0]]
        return [*result, *more]

    return flags


def finish(stage, processes, *flags) -> str:
    """A whole run, in this process if it is for one; what it printed."""
    if processes == 1:
        return train_here(MAINS[stage], *flags)
    return launch(SCRIPTS[stage], *flags, processes=processes).stderr


def content(path):
    """All tensors and numbers of a checkpoint but those of the clock."""
    files = {file.name: load_file(file) for file in path.glob("*.safetensors")}
    pickles = [*path.glob("*.bin"), *path.glob("custom_checkpoint_*.pkl")]
    return files | {file.name: torch.load(file, weights_only=False) for file in pickles}


def assert_same(a, b, name=""):
    assert type(a) is type(b), name
    if isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key in a:
            assert_same(a[key], b[key], f"{name}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), name
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{name}/{index}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), name
    else:
        assert a == b, name


@pytest.mark.parametrize(
    ("stage", "processes"),
    [
        ("one", 1),
        pytest.param("one", 2, marks=pytest.mark.slow),
        pytest.param("two", 1, marks=pytest.mark.slow),
        pytest.param("two", 2, marks=pytest.mark.slow),
    ],
)
def test_run_killed_while_saving_and_resumed_ends_the_same(flags_of, tmp_path, stage, processes):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(stage, processes, *flags_of(stage, whole, "--checkpoints_total_limit", 1))
    assert [path.name for path in list_checkpoints(whole)] == ["checkpoint-16"]

    run = start(SCRIPTS[stage], *flags_of(stage, broken), processes=processes, launcher=processes > 1)
    wait_for(broken / ".partial-checkpoint-8", run)
    send(run, signal.SIGKILL)
    run.communicate()
    assert 4 <= checkpoint_step(list_checkpoints(broken)[-1]) < 16

    flags = flags_of(stage, broken, "--resume_from_checkpoint", "latest")
    printed = finish(stage, processes, *flags)
    assert "Resumed from" in printed and "The run can't end" not in printed
    assert not list(broken.glob(".*"))  # nothing half written is left
    assert_same(content(whole / "checkpoint-16"), content(broken / "checkpoint-16"))


def test_without_a_checkpoint_latest_starts_afresh_and_none_is_overwritten(flags_of, tmp_path):
    flags = flags_of("one", tmp_path, "--max_train_steps", 2)
    printed = train_here(train_autoencoder.main, *flags, "--resume_from_checkpoint", "latest")
    assert f"No checkpoint in {tmp_path}: starting afresh" in printed
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(FileExistsError, match="has checkpoints of an earlier run; go on with --resume_from"):
        train_here(train_autoencoder.main, *flags)
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


def test_reports_are_set_aside_when_a_run_goes_on_and_not_when_it_only_ends_again(flags_of, tmp_path):
    def end(steps):
        flags = flags_of("one", tmp_path, "--max_train_steps", steps, "--resume_from_checkpoint", "latest")
        return train_here(train_autoencoder.main, *flags)

    report = tmp_path / "reports/reconstruct-metrics-paper.json"
    text = '{"protocol": "paper", "images": 1, "dataset_name": "a", "split": "b", "metrics": {}}'
    end(2)
    report.parent.mkdir()
    report.write_text(text)
    end(2)
    assert report.read_text() == text
    assert "reports/reconstruct-metrics-paper.json: of earlier weights" in end(3) and not report.exists()
    assert (tmp_path / "superseded-reports" / report.relative_to(tmp_path)).read_text() == text


def test_sigterm_saves_and_exits_cleanly(flags_of, tmp_path):
    def train():
        torch.set_num_threads(1)  # those of the process that this one is forked from are not there
        (tmp_path / "printed").write_text(train_here(train_autoencoder.main, *flags))

    flags = flags_of("one", tmp_path, "--checkpointing_steps", 7, "--max_train_steps", 100_000)
    run = multiprocessing.get_context("fork").Process(target=train)
    run.start()
    while not (tmp_path / "checkpoint-7").exists():
        assert run.is_alive()
        time.sleep(0.01)
    send(run, signal.SIGTERM)
    run.join(60)
    errors = (tmp_path / "printed").read_text()
    assert run.exitcode == 0 and "Stopped by SIGTERM" in errors
    last = list_checkpoints(tmp_path)[-1]
    assert errors.rindex(f"Saved {last}") < errors.index("Stopped by SIGTERM")
    assert content(last)["model.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_to_the_launcher_alone(flags_of, tmp_path, processes):
    flags = flags_of("one", tmp_path, "--checkpointing_steps", 7, "--max_train_steps", 100_000)
    run = start(SCRIPTS["one"], *flags, processes=processes)
    wait_for(tmp_path / "checkpoint-7", run)
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=90)  # until the training processes have closed their end too
    assert "Stopped by SIGTERM" in errors
    last = list_checkpoints(tmp_path)[-1]
    assert f"Saved {last}" in errors and len(list(last.glob("random_states_*.pkl"))) == processes


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_two_machines(flags_of, tmp_path, shared):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    runs = []
    for rank, name in enumerate(("a", "a" if shared else "b")):
        words = command(SCRIPTS["one"], *flags_of("one", tmp_path / name, "--max_train_steps", 2), processes=2)
        for flag, value in (("--num_machines", "2"), ("--main_process_port", str(port))):
            words[words.index(flag) + 1] = value
        where = ["--machine_rank", str(rank), "--main_process_ip", "127.0.0.1"]
        words[words.index("--num_machines") : words.index("--num_machines")] = where
        runs.append(subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True))
    errors = [run.communicate(timeout=200)[1] for run in runs]
    if shared:
        assert [run.returncode for run in runs] == [0, 0], errors
        assert len(list((tmp_path / "a/checkpoint-2").glob("random_states_*.pkl"))) == 2
    else:
        assert all(run.returncode != 0 for run in runs)
        assert (
            "b of process 1 is not that of process 0; name one with --output_dir that all machines share" in errors[1]
        )


def test_other_settings_are_named(stage_one, flags_of, tmp_path):
    output_dir = tmp_path / "run"
    shutil.copytree(stage_one[0], output_dir)
    flags = flags_of("one", output_dir, "--max_train_steps", 6, "--learning_rate", 1e-4, "--checkpointing_steps", 1)
    flags += ["--resume_from_checkpoint", "latest", "--lr_scheduler", "constant"]
    printed = train_here(train_autoencoder.main, *flags)
    message = printed[printed.index("The run can't end as it would have without the break: ") :].splitlines()[0]
    assert "train_batch_size was 4 and is 2" in message and "random_flip was False and is True" in message
    assert "gradient_accumulation_steps was 1 and is 2" in message and "seed" not in message
    optimizer = content(output_dir / "checkpoint-6")["optimizer.bin"]
    assert [group["lr"] for group in optimizer["param_groups"]] == [1e-4]
    # 16 images in four steps of four, then two steps of two times two.
    assert content(output_dir / "checkpoint-6")["custom_checkpoint_3.pkl"]["images_seen"] == 24


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer_1.bin", "random_states_0.pkl"])
def test_damaged_checkpoint_is_named_with_the_others(flags_of, tmp_path, name):
    train_here(MAINS["one"], *flags_of("one", tmp_path, "--max_train_steps", 8))
    weights = tmp_path / "checkpoint-8" / name
    weights.write_bytes(weights.read_bytes()[:100])
    flags = flags_of("one", tmp_path, "--max_train_steps", 12)
    message = "checkpoint-8 can't be read .*; resume from another checkpoint, of checkpoint-4"
    with pytest.raises(OSError, match=message):
        train_here(MAINS["one"], *flags, "--resume_from_checkpoint", "latest")
    train_here(MAINS["one"], *flags, "--resume_from_checkpoint", tmp_path / "checkpoint-4")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-8", "checkpoint-12"]
    assert (tmp_path / "superseded-checkpoint-8").is_dir()


def test_other_accumulation_starts_with_a_whole_step(flags_of, tmp_path, monkeypatch):
    flags = flags_of("one", tmp_path, "--num_validation_images", 0)
    train_here(train_autoencoder.main, *flags, "--gradient_accumulation_steps", 1, "--max_train_steps", 3)
    batches, step = [], train_autoencoder.Trainer.step
    monkeypatch.setattr(train_autoencoder.Trainer, "step", lambda *args: batches.append(args[2]) or step(*args))
    flags += ["--resume_from_checkpoint", "latest", "--max_train_steps", 5, "--ema_half_life_images", 100]
    train_here(train_autoencoder.main, *flags)
    assert batches == [3, 3, 4, 4]  # two batches for each step
    ema = content(tmp_path / "checkpoint-5")["custom_checkpoint_0.pkl"]
    assert ema["decay"] == 0.5 ** (4 / 100)


def test_resuming_twice_from_an_older_checkpoint(flags_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = flags_of("one", "run", "--max_train_steps", 3, "--checkpointing_steps", 1, "--num_validation_images", 0)
    train_here(train_autoencoder.main, *flags)
    flags += ["--checkpoints_total_limit", 2, "--max_train_steps", 2, "--adam_beta2", 0.9, "--gan_start_step", 0]
    flags += ["--adam_beta1_gan", 0]
    for resumed in (tmp_path / "run/checkpoint-1", "run/checkpoint-1"):  # whichever way it is spelled
        printed = train_here(train_autoencoder.main, *flags, "--resume_from_checkpoint", resumed)
        assert [path.name for path in list_checkpoints("run")] == ["checkpoint-1", "checkpoint-2"]
        assert "adam_beta2 was 0.99 and is 0.9" in printed
    superseded = {path.name for path in (tmp_path / "run").glob("superseded-*")}
    assert superseded == {f"superseded-checkpoint-{name}" for name in ("2", "3", "2-1")}
    # The discriminator's has StyleGAN2's correction for a penalty at every 16th step.
    for name, beta2 in (("optimizer.bin", 0.9), ("optimizer_1.bin", 0.9 ** (16 / 17))):
        betas = [group["betas"] for group in content(tmp_path / "run/checkpoint-2")[name]["param_groups"]]
        assert betas == [(0, pytest.approx(beta2))]


@pytest.mark.parametrize("lpips_weight", [0, 5])
def test_a_checkpoint_of_an_earlier_version(flags_of, tmp_path, lpips_weight):
    """Of before other perceptual networks than LPIPS', the encoder's shortcut and the correction for lazy R1."""
    flags = flags_of("one", tmp_path, "--max_train_steps", 2, "--checkpointing_steps", 1, "--lr_scheduler", "constant")
    flags += ["--set", "autoencoder.encoder_shortcut=false", "--no-lazy_r1_correction"]
    train_here(train_autoencoder.main, *flags, "--best_metric", "psnr")
    path = tmp_path / "checkpoint-1/custom_checkpoint_3.pkl"
    state = torch.load(path, weights_only=False)
    settings = state["settings"]
    assert (settings["perceptual_weight"], settings["perceptual_network"]) == (0, "vgg")
    names = ["adaptive_gan_weight", "augmentation", "discriminator_learning_rate", "discriminator_start_step"]
    for name in (*names, "lazy_r1_correction", "perceptual_weight", "perceptual_network"):
        del settings[name]
    del state["best_perceptual"]
    torch.save(state | {"settings": settings | {"lpips_weight": lpips_weight, "lpips_network": "vgg"}}, path)
    # Settings by their names of today; the correction is none that the earlier version could have said.
    for flag, expected in (
        ("--no-lazy_r1_correction", []),
        ("--lazy_r1_correction", ["lazy_r1_correction was False"]),
    ):
        expected = expected if lpips_weight == 0 else ["perceptual_weight was 5 and is 0.0", *expected]
        printed = train_here(
            train_autoencoder.main, *flags, flag, "--resume_from_checkpoint", tmp_path / "checkpoint-1"
        )
        assert "Resumed from" in printed and ("The run can't end" in printed) == bool(expected)
        assert all(text in printed for text in expected)
        assert content(tmp_path / "checkpoint-2")["custom_checkpoint_3.pkl"]["settings"]["perceptual_weight"] == 0


@pytest.fixture
def small_disk(request, tmp_path, stage):
    """A file system with room for one checkpoint of a stage, but not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    run = request.getfixturevalue(f"stage_{stage}")[0]
    options = f"size={sum(file.stat().st_size for file in (run / 'checkpoint-4').iterdir()) * 8 // 5}"
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    if mount.returncode != 0:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("stage", ["one", pytest.param("two", marks=pytest.mark.slow)])
def test_full_disk_loses_nothing(flags_of, small_disk, stage, tmp_path):
    flags = flags_of(stage, small_disk / "run", "--max_train_steps", 20, "--num_validation_images", 0)
    flags += ["--key_codes_dir", tmp_path / "key_codes"] if stage == "two" else []
    with pytest.raises(OSError, match="could not be written .*; make room and resume") as error:
        train_here(MAINS[stage], *flags)
    checkpoints = list_checkpoints(small_disk / "run")
    assert checkpoints and f"resume from {checkpoints[-1]}" in str(error.value)
    before = content(checkpoints[-1])
    assert before["model.safetensors"] and not list((small_disk / "run").glob(".partial*"))


def test_stops_when_nothing_is_finite(flags_of, tmp_path):
    flags = flags_of("one", tmp_path, "--learning_rate", 1e38, "--max_nonfinite_steps", 3)
    message = "not finite in 3 steps in a row, up to step 4; .* the start, as no checkpoint is known to be good"
    with pytest.raises(FloatingPointError, match=message):
        train_here(train_autoencoder.main, *flags)


def test_weights_that_are_not_finite_are_not_saved(flags_of, tmp_path):
    flags = flags_of("one", tmp_path, "--learning_rate", 1e38, "--checkpointing_steps", 1)
    with pytest.raises(
        FloatingPointError, match="a weight is not finite at step .* no checkpoint is known to be good"
    ):
        train_here(train_autoencoder.main, *flags)
    assert not list_checkpoints(tmp_path)


class TestDecoderOnly:
    @pytest.fixture(scope="class", params=[1, pytest.param(2, marks=pytest.mark.slow)])
    def tuned(self, request, tmp_path_factory, image_folder, write_config, stage_one):
        output_dir = tmp_path_factory.mktemp("tuned")
        flags = ["--config", write_config(), "--dataset_name", image_folder, "--output_dir", output_dir]
        flags += ["--pretrained_autoencoder_name_or_path", stage_one[0], "--train_decoder_only"]
        flags += ["--key_noise_scale", 0.1, "--max_train_steps", 3]
        finish("one", request.param, *flags)
        return [BricsAutoencoder.from_pretrained(path / "autoencoder").eval() for path in (stage_one[0], output_dir)]

    def test_encoder_stays(self, tuned):
        before, after = tuned
        assert_same(dict(before.encoder.state_dict()), dict(after.encoder.state_dict()))
        images = torch.rand(2, 3, 32, 32) * 2 - 1
        assert torch.equal(before.encode(images).key_codes, after.encode(images).key_codes)

    @pytest.mark.parametrize("part", ["grids", "mlp", "decoder"])
    def test_the_rest_moves(self, tuned, part):
        before, after = (getattr(model, part).state_dict() for model in tuned)
        assert any(not torch.equal(before[name], after[name]) for name in before)

    def test_noise_scale_is_used(self, tuned):
        assert tuned[1].key_noise_scale == 0.1


@pytest.mark.slow
def test_accumulation_on_two_processes_equals_one_large_batch(image_folder, write_config, tmp_path):
    config = write_config({"autoencoder": {"regularization": "none"}})
    moves = []
    for processes, batch_size, accumulation, *more in ((1, 8, 1), (2, 2, 2, "--gradient_checkpointing")):
        output_dir = tmp_path / str(processes)
        # A large epsilon makes Adam's step proportional to the gradient, see test_train_autoencoder.py.
        flags = ["--adam_epsilon", 1.0, "--discriminator_adam_epsilon", 1.0, "--learning_rate", 0.1]
        flags += ["--train_batch_size", batch_size, "--gradient_accumulation_steps", accumulation]
        flags += ["--lr_scheduler", "cosine", "--max_train_steps", 4, "--checkpointing_steps", 1]
        flags += ["--config", config, "--dataset_name", image_folder, "--output_dir", output_dir]
        launch(SCRIPTS["one"], *flags, "--num_validation_images", 0, *more, processes=processes)
        moves.append(movement(output_dir, 1, 3, ("model", "model_1")))
    assert_same_movement(*moves)

"""Runs that are killed, stopped or short of disk space."""

import signal
import subprocess
import time

import psutil
import pytest
import torch
from launching import command, environment, launch
from safetensors.torch import load_file

from brics_diffusers import BricsAutoencoder
from brics_diffusers.checkpoints import checkpoint_step, list_checkpoints


SCRIPTS = {"one": "train_autoencoder.py", "two": "train_key_codes.py"}


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
        time.sleep(0.005)


@pytest.fixture
def flags_of(stage_one, image_folder, write_config):
    """The flags of a run of either stage that saves every fourth step."""

    def flags(stage, output_dir, *more):
        result = ["--config", write_config(), "--dataset_name", image_folder, "--output_dir", output_dir]
        result += ["--checkpointing_steps", 4, "--max_train_steps", 24, "--num_validation_images", 0]
        result += ["--lr_scheduler", "cosine", "--dataloader_num_workers", 1]
        if stage == "one":
            result += ["--gan_start_step", 1, "--random_flip"]
        else:
            result += ["--autoencoder_name_or_path", stage_one[0]]
        return [*result, *more]

    return flags


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
def test_killed_and_resumed_run_ends_the_same(flags_of, tmp_path, stage, processes):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    launch(SCRIPTS[stage], *flags_of(stage, whole, "--checkpoints_total_limit", 1), processes=processes)
    assert [path.name for path in list_checkpoints(whole)] == ["checkpoint-24"]

    run = start(SCRIPTS[stage], *flags_of(stage, broken), processes=processes)
    wait_for(broken / "checkpoint-4", run)
    send(run, signal.SIGKILL)
    run.communicate()
    assert 4 <= checkpoint_step(list_checkpoints(broken)[-1]) < 24

    flags = flags_of(stage, broken, "--resume_from_checkpoint", "latest")
    done = launch(SCRIPTS[stage], *flags, processes=processes)
    assert "Resumed from" in done.stderr
    assert_same(content(whole / "checkpoint-24"), content(broken / "checkpoint-24"))


def test_without_a_checkpoint_latest_starts_afresh_and_none_is_overwritten(flags_of, tmp_path):
    flags = flags_of("one", tmp_path, "--max_train_steps", 2)
    done = launch(SCRIPTS["one"], *flags, "--resume_from_checkpoint", "latest")
    assert f"No checkpoint in {tmp_path}: starting afresh" in done.stderr
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    done = launch(SCRIPTS["one"], *flags, check=False)
    assert done.returncode != 0 and "has checkpoints of an earlier run; go on with --resume_from" in done.stderr
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


def test_sigterm_saves_and_exits_cleanly(flags_of, tmp_path):
    flags = flags_of("one", tmp_path, "--checkpointing_steps", 7, "--max_train_steps", 100_000)
    run = start(SCRIPTS["one"], *flags, launcher=False)
    wait_for(tmp_path / "checkpoint-7", run)
    send(run, signal.SIGTERM)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 0 and "Stopped by SIGTERM" in errors
    last = list_checkpoints(tmp_path)[-1]
    assert errors.rindex(f"Saved {last}") < errors.index("Stopped by SIGTERM")
    assert content(last)["model.safetensors"]


@pytest.mark.slow
def test_sigterm_to_two_processes(flags_of, tmp_path):
    flags = flags_of("one", tmp_path, "--checkpointing_steps", 7, "--max_train_steps", 100_000)
    run = start(SCRIPTS["one"], *flags, processes=2)
    wait_for(tmp_path / "checkpoint-7", run)
    send(run, signal.SIGTERM)
    run.communicate(timeout=90)
    last = list_checkpoints(tmp_path)[-1]
    assert checkpoint_step(last) % 10 == 0  # where the processes compare notes
    assert len(list(last.glob("random_states_*.pkl"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer_1.bin", "random_states_0.pkl"])
def test_damaged_checkpoint_is_named_with_the_others(flags_of, tmp_path, name):
    launch(SCRIPTS["one"], *flags_of("one", tmp_path, "--max_train_steps", 8))
    weights = tmp_path / "checkpoint-8" / name
    weights.write_bytes(weights.read_bytes()[:100])
    flags = flags_of("one", tmp_path, "--max_train_steps", 12)
    done = launch(SCRIPTS["one"], *flags, "--resume_from_checkpoint", "latest", check=False)
    assert done.returncode != 0 and "checkpoint-8 can't be read" in done.stderr
    assert "resume from another checkpoint, of checkpoint-4" in done.stderr
    launch(SCRIPTS["one"], *flags, "--resume_from_checkpoint", tmp_path / "checkpoint-4")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-8", "checkpoint-12"]
    assert (tmp_path / "superseded-checkpoint-8").is_dir()


@pytest.fixture
def small_disk(tmp_path, stage_one):
    """A file system with room for one checkpoint, but not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    files = [file.stat().st_size for file in (stage_one[0] / "checkpoint-4").iterdir()]
    options = f"size={sum(files) * 8 // 5}"
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    if mount.returncode != 0:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk_loses_nothing(flags_of, small_disk):
    flags = flags_of("one", small_disk / "run", "--max_train_steps", 20)
    done = launch(SCRIPTS["one"], *flags, check=False)
    assert done.returncode != 0 and "could not be written" in done.stderr and "make room and resume" in done.stderr
    checkpoints = list_checkpoints(small_disk / "run")
    assert checkpoints and f"resume from {checkpoints[-1]}" in done.stderr
    before = content(checkpoints[-1])
    assert before["model.safetensors"] and not list((small_disk / "run").glob(".partial*"))


def test_stops_when_nothing_is_finite(flags_of, tmp_path):
    flags = flags_of("one", tmp_path, "--learning_rate", 1e38, "--max_nonfinite_steps", 3)
    done = launch(SCRIPTS["one"], *flags, check=False)
    assert done.returncode != 0 and "not finite in 3 steps in a row, up to step 4" in done.stderr
    assert "resume from the start, as no checkpoint is known to be good" in done.stderr


class TestDecoderOnly:
    @pytest.fixture(scope="class")
    def tuned(self, tmp_path_factory, image_folder, write_config, stage_one):
        output_dir = tmp_path_factory.mktemp("tuned")
        flags = ["--config", write_config(), "--dataset_name", image_folder, "--output_dir", output_dir]
        flags += ["--pretrained_autoencoder_name_or_path", stage_one[0], "--train_decoder_only"]
        launch(SCRIPTS["one"], *flags, "--key_noise_scale", 0.1, "--max_train_steps", 3)
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
    weights = []
    for processes, batch_size, accumulation in ((1, 8, 1), (2, 2, 2)):
        output_dir = tmp_path / str(processes)
        # A large epsilon makes Adam's step proportional to the gradient, see test_train_autoencoder.py.
        flags = ["--adam_epsilon", 1.0, "--discriminator_adam_epsilon", 1.0, "--learning_rate", 0.1]
        flags += ["--train_batch_size", batch_size, "--gradient_accumulation_steps", accumulation]
        flags += ["--lr_scheduler", "cosine", "--max_train_steps", 3, "--num_validation_images", 0]
        flags += ["--config", config, "--dataset_name", image_folder, "--output_dir", output_dir]
        launch(SCRIPTS["one"], *flags, processes=processes)
        checkpoint = content(output_dir / "checkpoint-3")
        weights.append({name: checkpoint[name] for name in ("model.safetensors", "model_1.safetensors")})
    for name in weights[0]:
        for key, value in weights[0][name].items():
            torch.testing.assert_close(value, weights[1][name][key], rtol=1e-3, atol=1e-5, msg=lambda m, k=key: k + m)

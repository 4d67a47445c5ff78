"""What users do to a repository between pushes: with the real client, against a server on loopback."""

import json
import subprocess
import sys

import pytest
from hub_server import Problem, Repository
from PIL import Image
from small_models import ROOT

from brics_diffusers.hub.published_files import export


COMMANDS = """
import contextlib, io, json, sys
from brics_diffusers.commands import main

for line in sys.stdin:
    failure = None
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main(json.loads(line))
        except SystemExit as error:
            failure = str(error)
    print(json.dumps(failure), flush=True)
"""
SHARDS = "unet/diffusion_pytorch_model-00001-of-00002.safetensors"
INDEX = "unet/diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture(scope="module")
def worker(hub, tmp_path_factory):
    """A process that calls the command `brics-diffusers` with one line after the other; it starts once."""
    environment = hub.client_environment(tmp_path_factory.mktemp("hf-home"))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", COMMANDS], cwd=ROOT, env=environment, **pipes) as process:
        yield process


@pytest.fixture
def brics(worker):
    """Calls a subcommand; returns the sentence that it fails with, or `None`."""

    def run(*words) -> str | None:
        worker.stdin.write(json.dumps([str(word) for word in words]) + "\n")
        worker.stdin.flush()
        return json.loads(worker.stdout.readline())

    return run


@pytest.fixture
def folder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.fixture
def repository(hub):
    """One that is new; its `name` is `model-N`."""
    name = f"model-{len(hub.repositories)}"
    hub.repositories[f"user/{name}"] = repository = Repository(private=False)
    repository.name = name
    yield repository
    hub.before = lambda name, found: None


@pytest.fixture
def push(brics, folder, repository):
    return lambda *flags: brics("card", folder, "--push_to_hub", "--hub_model_id", repository.name, *flags)


def edit(repository: Repository, files: dict[str, str], branch: str = "main") -> None:
    """What somebody commits on the website."""
    changed = {name: text.encode() for name, text in files.items()}
    repository.commit(branch, repository.files(branch) | changed, "edited")


def text(repository: Repository, branch: str = "main") -> str:
    return repository.files(branch)["README.md"].decode()


class TestCard:
    def test_which_edits_stay(self, folder, repository, push):
        assert push() is None
        fresh, here = text(repository), folder / "README.md"
        assert not here.exists()
        mine, theirs = fresh + "Mine.\n", fresh + "Theirs.\n"
        here.write_text(mine)
        repository.commit("main", {}, "all deleted")
        assert push() is None and text(repository) == mine  # none is there
        edit(repository, {"README.md": theirs})
        assert push() is None and text(repository) == theirs and here.read_text() == mine

    def test_edits_that_are_not_pushed_are_told(self, folder, tmp_path, caplog):
        export(folder, tmp_path / "there")
        (folder / "README.md").write_text((tmp_path / "there/README.md").read_text())
        export(folder, tmp_path / "there")
        assert not caplog.messages
        (folder / "README.md").write_text((tmp_path / "there/README.md").read_text() + "Mine.\n")
        export(folder, tmp_path / "there")
        assert "another text" in caplog.text and "Mine" not in (tmp_path / "there/README.md").read_text()

    @pytest.mark.parametrize("cached", [False, True])
    def test_one_that_cannot_be_read_is_not_replaced(self, hub, folder, repository, push, cached):
        if cached:
            assert push() is None and push() is None  # the second reads what the first has committed
        edit(repository, {"README.md": "Theirs.\n"})
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

        def fail(name, found):
            if name == "resolve" and found["path"] == "README.md":
                raise Problem(500, "Internal Error")

        hub.before = fail
        message, commits = push(), len(repository.commits)
        assert f"the push to user/{repository.name} at {hub.endpoint} failed (Server error '500" in message
        assert message.endswith("; push again.")
        assert text(repository) == "Theirs.\n" and len(repository.commits) == commits
        assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        hub.before = lambda name, found: None
        assert push() is None and text(repository).count("Theirs.\n\n<!-- begin about -->") == 1

    def test_an_edit_while_a_push_is_prepared_is_no_loss(self, hub, folder, repository, push):
        assert push() is None
        (folder / "training_config.json").write_text("{}")

        def edit_once(name, found):
            if name == "preupload":
                hub.before = lambda name, found: None
                edit(repository, {"README.md": text(repository) + "Theirs.\n"})

        hub.before = edit_once
        message = push()
        assert "A commit has happened since" in message and message.endswith("; push again.") and "\n" not in message
        assert text(repository).endswith("Theirs.\n") and "training_config.json" not in repository.files()
        assert push() is None
        assert text(repository).endswith("Theirs.\n") and "training_config.json" in repository.files()

    def test_a_byte_order_mark(self, repository, push):
        edit(repository, {"README.md": "\ufeff---\nlicense: mit\n---\n\n# Faces\n"})
        assert push() is None
        assert text(repository).startswith("---\nlicense: mit\n")  # other keys in any order: huggingface_hub's matter
        assert "\nlibrary_name: diffusers\n" in text(repository)
        assert text(repository).count("license:") == 1 and text(repository).count("---\n") == 2

    def test_of_the_revision_with_code(self, brics, folder, repository, push, tmp_path):
        def push_code():
            words = ["--output_dir", tmp_path / "code", "--push_to_hub", "--hub_model_id", repository.name]
            return brics("remote-code", folder, *words)

        assert push() is None and push_code() is None
        assert text(repository, "remote-code") == text(repository)
        edit(repository, {"README.md": text(repository) + "Theirs.\n", "notes.txt": ""}, "remote-code")
        assert push_code() is None
        assert text(repository, "remote-code") == text(repository) + "Theirs.\n"
        assert {"pipeline.py", "notes.txt"} < set(repository.files("remote-code"))
        assert "pipeline.py" not in repository.files()


class TestFiles:
    def test_what_the_run_no_longer_has_is_removed(self, folder, repository, push):
        Image.new("RGB", (8, 8)).save(folder / "samples.png")
        (folder / "reports").mkdir()
        report = {"protocol": "paper", "images": 1, "dataset_name": "a", "split": "b", "metrics": {}}
        (folder / "reports/reconstruct-metrics-paper.json").write_text(json.dumps(report))
        edit(repository, {"curve.png": "theirs", "reports/mine.json": "{}", "curves.png": "of an earlier run"})
        assert push() is None
        published = {"samples.png", "reports/reconstruct-metrics-paper.json"}
        assert published < set(repository.files()) and "samples.png" in text(repository)
        for name in published:
            (folder / name).unlink()
        assert push() is None
        assert not published & set(repository.files()) and "samples.png" not in text(repository)
        assert {"curve.png", "reports/mine.json"} < set(repository.files()) and "curves.png" not in repository.files()

    def test_of_the_users_in_folders_of_models_stay(self, repository, push):
        theirs = {"unet/NOTES.md", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/shapes.json", "vae/a.json"}
        edit(repository, dict.fromkeys({*theirs, SHARDS, INDEX}, "{}"))
        assert push() is None
        assert theirs < set(repository.files()) and not {SHARDS, INDEX} & set(repository.files())

    def test_pictures_of_the_card(self, folder, repository, push):
        for name in ("one.png", "two.png"):
            Image.new("RGB", (8, 8)).save(folder / name)
        shown = {"README.md": "# Faces\n\n![One](one.png) ![Curves](./curves.png)\n", "curves.png": "theirs"}
        edit(repository, shown)
        assert push() is None
        assert "one.png" in repository.files() and "two.png" not in repository.files()
        assert "curves.png" in repository.files()  # it is shown

"""Both ways to and from the Hub, with the real client, against a server on loopback.

The client reads its settings when it is imported, so it works in processes of its own: one with this package and one
without it, each once on line and once off line.
"""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from diffusers import UNet2DModel
from small_models import AUTOENCODER, ROOT, UNET

from brics_diffusers import BricsAutoencoder, BricsKeyCodePipeline, CosineVariantScheduler


MODEL_FILES = {
    "README.md",
    "model_index.json",
    "autoencoder/config.json",
    "autoencoder/diffusion_pytorch_model.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "guide/config.json",
    "guide/diffusion_pytorch_model.safetensors",
    "scheduler/scheduler_config.json",
}
CODE_FILES = {"pipeline.py", "autoencoder/autoencoder_brics.py", "scheduler/scheduling_cosine_variant.py"}
NOT_PUBLIC = ("checkpoint-4/optimizer.bin", "key_codes/codes-0.npy", "logs/events", "unet/optimizer.pt", "secret.txt")

SAMPLE = """
import os, sys
import numpy as np, torch

def sample(pipe):
    pipe.set_progress_bar_config(disable=True)
    options = {"class_labels": ["dog", "cat"], "guidance_scale": 2.0}  # away from the guide
    return pipe(2, 3, generator=torch.Generator().manual_seed(0), output_type="np", **options).images
"""
# What a process without the package sees.
HIDE_PACKAGE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "brics_diffusers":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden())
"""
PUSH = """
import json, os, sys
from huggingface_hub import HfApi
from brics_diffusers.commands import main
from brics_diffusers.hub.push import open_repository

def refused(token, name, private=False):
    os.environ["HF_TOKEN"] = token
    try:
        open_repository(name, private)
    except (OSError, ValueError) as error:
        return str(error)
    finally:
        os.environ["HF_TOKEN"] = "hf_writer"

folder, code, result = sys.argv[1:]
card = ["card", folder, "--push_to_hub", "--hub_model_id", "model"]
main(card + ["--hub_license", "apache-2.0"])
attempts = [("", "x"), ("hf_wrong", "x"), ("hf_reader", "x"), ("hf_reader", "model"), ("hf_writer", "other/x"),
            ("hf_writer", "a b"), ("hf_writer", "model", True)]
json.dump([refused(*attempt) for attempt in attempts], open(result, "w"))

HfApi().create_repo("bare")
HfApi().upload_folder(repo_id="user/bare", folder_path=folder + "/autoencoder")
main(["remote-code", folder, "--output_dir", code, *card[2:]])
"""
LOAD = """
import brics_diffusers, diffusers
from brics_diffusers.models.loading import load_autoencoder

for index, cls in enumerate((brics_diffusers.BricsKeyCodePipeline, diffusers.DiffusionPipeline)):
    pipe = cls.from_pretrained("user/model")
    assert type(pipe) is brics_diffusers.BricsKeyCodePipeline
    np.save(f"{sys.argv[-1]}-{index}.npy", sample(pipe))
for name in ("user/model", "user/bare"):  # in the folder `autoencoder`, and by itself
    load_autoencoder(name)
"""
LOAD_CODE = """
import os, diffusers, huggingface_hub

load, options = diffusers.DiffusionPipeline.from_pretrained, {"trust_remote_code": True}
if not huggingface_hub.constants.HF_HUB_OFFLINE:
    try:
        load("user/model", revision="remote-code")
    except ValueError as error:
        print(error)
    # No code has come, so none was executed.
    assert not os.path.exists(os.environ["HF_HOME"] + "/modules/diffusers_modules")
    pipe = load("user/model", revision="remote-code", **options)
    np.save(sys.argv[-1] + "-0.npy", sample(pipe))
    print(pipe.reconstruct(torch.zeros(1, 3, 32, 32), output_type="np").images.shape)
    solver = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert torch.equal(solver.betas, pipe.scheduler.betas)
folder = huggingface_hub.snapshot_download("user/model", revision="remote-code")
np.save(sys.argv[-1] + "-1.npy", sample(load(folder, **options)))
assert not [name for name in sys.modules if name.startswith("brics_diffusers")]
"""
LOAD_PICKLES = """
from brics_diffusers import BricsAutoencoder, BricsKeyCodePipeline
from brics_diffusers.pipelines.sampling import load_pipeline

for name in ("whole", "bare"):
    HfApi().create_repo(f"{name}-pickled")
    HfApi().upload_folder(repo_id=f"user/{name}-pickled", folder_path=f"{os.path.dirname(code)}/{name}")
loads = [BricsKeyCodePipeline.from_pretrained, load_pipeline, BricsAutoencoder.from_pretrained]
for load, name in zip(loads * 2, ["user/whole-pickled"] * 2 + ["user/bare-pickled"] + ["user/missing"] * 3):
    try:
        load(name)
    except (OSError, ValueError) as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0])
"""


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    """Runs Python code in a process whose Hub is the server, with a cache of its own; returns what it prints."""
    home = tmp_path_factory.mktemp("hf-home")

    def run(code: str, *arguments, **variables) -> str:
        words = [sys.executable, "-c", code, *map(str, arguments)]
        environment = hub.client_environment(home) | variables
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved pipeline with classes and a guide, in a folder with what a run leaves besides, and its samples."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    autoencoder = BricsAutoencoder(**AUTOENCODER)
    torch.nn.init.normal_(autoencoder.grids.entries)
    options = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_class_embeds": 3} | UNET
    unet, guide = UNet2DModel(**options), UNet2DModel(**options)
    parts = {"autoencoder": autoencoder, "unet": unet, "scheduler": CosineVariantScheduler(), "guide": guide}
    BricsKeyCodePipeline(**parts, id2label={0: "cat", 1: "dog"}).save_pretrained(folder)
    pipe = BricsKeyCodePipeline.from_pretrained(folder)
    pipe.save_pretrained(folder)  # now the configs say where the models come from
    for name in NOT_PUBLIC:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("private")
    pipe.set_progress_bar_config(disable=True)
    options = {"class_labels": ["dog", "cat"], "guidance_scale": 2.0}
    return folder, pipe(2, 3, generator=torch.Generator().manual_seed(0), output_type="np", **options).images


@pytest.fixture(scope="module")
def online(client, saved, tmp_path_factory):
    """After pushes and loads by a process with the package: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("online")
    for name in MODEL_FILES - {"README.md"}:
        (folder / "whole" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "whole" / name).write_bytes((saved[0] / name).read_bytes())
    weights = folder / "whole/unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    (folder / "bare").mkdir()
    (folder / "bare/config.json").write_bytes((saved[0] / "autoencoder/config.json").read_bytes())
    (folder / "bare/model.pt").write_bytes(b"pickle")
    return folder, client(PUSH + SAMPLE + LOAD + LOAD_PICKLES, saved[0], folder / "code", folder / "result")


@pytest.fixture(scope="module")
def pushed(hub, online):
    """The files of the push to `main`, by path."""
    return hub.repositories["user/model"].files()


class TestPush:
    def test_files(self, hub, pushed, online):
        repository = hub.repositories["user/model"]
        assert set(pushed) == MODEL_FILES and set(repository.files("remote-code")) == MODEL_FILES | CODE_FILES
        assert repository.messages[1:] == ["Push by brics-diffusers", "Push by brics-diffusers remote-code"]
        assert f"{hub.endpoint}/user/model/commit/{repository.branches['main']}" in online[1]
        assert "HTTP Request" not in online[1]

    def test_nothing_says_where_files_lie(self, hub, pushed, saved):
        folder = str(saved[0]).encode()
        assert any(folder in path.read_bytes() for path in saved[0].rglob("*.json"))  # but here it does
        contents = [*pushed.values(), *hub.repositories["user/model"].files("remote-code").values()]
        assert not any(folder in content for content in contents)

    def test_card(self, pushed):
        front, text = pushed["README.md"].decode().split("---\n")[1:]
        assert yaml.safe_load(front) == {
            "license": "apache-2.0",
            "library_name": "diffusers",
            "pipeline_tag": "unconditional-image-generation",
            "tags": ["brics", "arxiv:2305.18601", "diffusers:BricsKeyCodePipeline"],
        }
        assert 'BricsKeyCodePipeline.from_pretrained("user/model")' in text

    def test_refusals(self, hub, online):
        *refusals, public = json.loads((online[0] / "result").read_text())
        faults = ["no token found", "Invalid user token", *["403 Forbidden"] * 3, "a b"]
        for message, fault in zip(refusals, faults, strict=True):
            assert fault in message and f"at {hub.endpoint} can't take a push" in message and "\n" not in message
            assert "log in with `hf auth login` and a token that may write there" in message
        assert public.startswith("user/model is public; make it private on its page")
        names = {"user/model", "user/bare", "user/whole-pickled", "user/bare-pickled"}
        assert set(hub.repositories) == names  # nothing came of the refused ones


@pytest.fixture(scope="module")
def without_package(online, client, tmp_path_factory):
    """Loads what is on the Hub, in a process that has no such package; a folder with its samples, and the output."""
    folder = tmp_path_factory.mktemp("without-package")
    return folder, client(HIDE_PACKAGE + SAMPLE + LOAD_CODE, folder / "online")


class TestLoad:
    def test_with_the_package(self, online, saved):
        for index in (0, 1):
            assert np.array_equal(np.load(f"{online[0]}/result-{index}.npy"), saved[1])

    @pytest.mark.slow
    def test_with_the_package_offline(self, hub, online, saved, client, tmp_path):
        calls = len(hub.calls)
        client(SAMPLE + LOAD, tmp_path / "result", HF_HUB_OFFLINE="1")
        for index in (0, 1):
            assert np.array_equal(np.load(tmp_path / f"result-{index}.npy"), saved[1])
        assert len(hub.calls) == calls

    def test_without_the_package(self, without_package, saved):
        folder, printed = without_package
        assert "Pass `trust_remote_code=True`" in printed and "(1, 32, 32, 3)" in printed
        assert "Expected types" not in printed and "might require" not in printed  # nothing that diffusers frowns at
        for index in (0, 1):
            assert np.array_equal(np.load(f"{folder}/online-{index}.npy"), saved[1])

    @pytest.mark.slow
    def test_without_the_package_offline(self, hub, without_package, saved, client):
        calls, (folder, _) = len(hub.calls), without_package
        client(HIDE_PACKAGE + SAMPLE + LOAD_CODE, folder / "offline", HF_HUB_OFFLINE="1")
        assert len(hub.calls) == calls
        assert np.array_equal(np.load(folder / "offline-1.npy"), saved[1])

    def test_pickles(self, hub, online):
        lines = [line for line in online[1].splitlines() if re.match(r"\w+Error: ", line)]
        refused = ["user/whole-pickled", "user/whole-pickled", "user/bare-pickled"]
        for line, name in zip(lines[:3], refused, strict=True):
            assert line.startswith(f"OSError: {name} can't be loaded") and "; only safetensors are read, as a" in line
        assert len(lines) == 6 and not any("safetensors" in line for line in lines[3:])  # those that don't exist
        resolved = [call for call in hub.calls if "-pickled/resolve/" in call]
        assert resolved and not any(call.endswith((".bin", ".pt")) for call in resolved)  # none was even downloaded

"""README, pages and notebook: Python blocks run on small models, command lines fit the parsers that they are for."""

import argparse
import importlib
import json
import re
import shlex
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import train_autoencoder
import train_key_codes
from accelerate.commands.launch import launch_command_parser
from diffusers import UNet2DModel
from PIL import Image
from small_models import AUTOENCODER, ROOT, UNET

from brics_diffusers import BricsAutoencoder, BricsKeyCodePipeline, CosineVariantScheduler, commands


NOTEBOOK = "docs/notebooks/quickstart.ipynb"
PAGES = [
    *("README.md", "CONTRIBUTING.md", NOTEBOOK),
    *("model_cards/brics-noto-emoji-64/README.md", "model_cards/brics-fluent-emoji-128/README.md"),
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
]
FENCE = re.compile(r"^(?:<!-- not run: (?P<reason>.+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
SPAN = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")  # a line may end within
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
FLAG = re.compile(r"(?<![\w-])--([a-z][\w-]*)")
VARIABLE = re.compile(r"[A-Z_]+=\S*")


@dataclass
class Block:
    """A fenced block, or a cell of the notebook."""

    language: str
    text: str
    line: int  # of the page, at which the text begins
    reason: str | None = None  # for not running it


def read(page: str) -> tuple[str, list[Block]]:
    """Prose and blocks of a page."""
    text = (ROOT / page).read_text()
    if page == NOTEBOOK:
        return read_notebook(text)
    blocks = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("text"))
        blocks.append(Block(match["language"], match["text"], line, match["reason"]))
    return FENCE.sub("", text), blocks


def read_notebook(text: str) -> tuple[str, list[Block]]:
    prose, blocks = [], []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            prose.append(source)
        elif source.startswith("!"):
            blocks.append(Block("bash", source[1:], 0))
        elif not source.startswith("%"):  # changes the folder
            blocks.append(Block("python", source, 0))
    return "\n".join(prose), blocks


def command_lines(page: str) -> list[str]:
    """Those of blocks, and those between backticks in the prose."""
    prose, blocks = read(page)
    lines = []
    for block in blocks:
        if block.language == "bash":
            lines += block.text.replace("\\\n", " ").splitlines()
    for span in SPAN.findall(prose):
        words = VARIABLE.sub("", span).split()
        if len(words) > 1 and words[0] in PROGRAMS and span != "accelerate launch":
            lines.append(" ".join(span.split()))
    return [line for line in lines if line.split("#")[0].strip()]


class Parsed(Exception):
    """A command line was right; nothing of it is done."""


def parse_only(monkeypatch, main, *arguments) -> None:
    """Calls a program's `main` up to the end of its parsing."""
    real = argparse.ArgumentParser.parse_args

    def parse_args(self, *args, **kwargs):
        real(self, *args, **kwargs)
        raise Parsed

    with monkeypatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        main(*arguments)


def check_script(monkeypatch, path: str, words: list[str]) -> None:
    """A script of `training/`, `benchmarks/` or the root, and its flags."""
    assert (ROOT / path).is_file()
    module, elided = importlib.import_module(Path(path).stem), "..." in words
    words = [word for word in words if word != "..."]
    if path.startswith("training/") and elided:  # what the dots stand for
        words = ["--dataset_name=x", *(["--autoencoder_name_or_path=y"] * path.endswith("key_codes.py")), *words]
    if not hasattr(module, "parse_args"):
        monkeypatch.setattr(sys, "argv", [path, *words])
        return parse_only(monkeypatch, module.main)
    extra = getattr(module.parse_args(words), "extra", [])  # flags that are passed on to training
    if "compare_guidance" in path:
        train_key_codes.parse_args(["--dataset_name=x", "--autoencoder_name_or_path=x", *extra])
    else:
        train_autoencoder.parse_args(["--dataset_name=x", *extra])


def check_subcommand(monkeypatch, words: list[str]) -> None:
    if len(words) == 1:  # named in a sentence
        words = [*words, "--help"]
        with pytest.raises(SystemExit, match="^0$"):
            commands.main(words)
    else:
        parse_only(monkeypatch, commands.main, words)


def check_accelerate(monkeypatch, words: list[str]) -> None:
    assert words[0] == "launch"
    args = launch_command_parser().parse_args(words[1:])
    if args.module:
        assert args.training_script == "brics_diffusers.commands"
        return check_subcommand(monkeypatch, args.training_script_args)
    check_script(monkeypatch, args.training_script, args.training_script_args)


def check_python(monkeypatch, words: list[str]) -> None:
    if words[0] == "-c":
        exec(words[1], {})
    elif words[:2] == ["-m", "pytest"]:
        assert (ROOT / words[2]).is_file()
    else:
        check_script(monkeypatch, words[0], words[1:])


def check_make(monkeypatch, words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(words) <= set(targets)


def check_npm(monkeypatch, words: list[str]) -> None:
    assert words[0] == "pack" and all(re.fullmatch(r"(@\w+/)?[\w-]+@[\d.]+", word) for word in words[1:])


def check_pip(monkeypatch, words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[:2] == ["install", "-e"] and words[2].startswith(".")
    assert set(words[2].strip(".[]").split(",")) <= {"", *extras}


PROGRAMS = {
    "accelerate": check_accelerate,
    "brics-diffusers": check_subcommand,
    "python": check_python,
    ".venv/bin/python": check_python,
    "make": check_make,
    "npm": check_npm,
    "pip": check_pip,
    "bash": lambda monkeypatch, words: (ROOT / words[0]).resolve(strict=True),
    "tensorboard": lambda monkeypatch, words: None,
}


@pytest.mark.parametrize("page", PAGES)
def test_command_lines(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for line in command_lines(page):
        words = shlex.split(line, comments=True)
        while VARIABLE.fullmatch(words[0]):
            words.pop(0)
        try:
            PROGRAMS[words[0]](monkeypatch, words[1:])
        except (Exception, SystemExit, pytest.fail.Exception) as error:
            pytest.fail(f"{page}: {line}\n{error!r} {capsys.readouterr().err[-500:]}", pytrace=False)


@pytest.mark.parametrize(
    "line", ["accelerate launch training/train_autoencoder.py --gann_start_step 2 ...", "make tea"]
)
def test_wrong_command_lines_fail(line, monkeypatch):
    program, *words = line.split()
    with pytest.raises((SystemExit, AssertionError)):
        PROGRAMS[program](monkeypatch, words)


@pytest.fixture(scope="module")
def known_flags():
    """Flags in the sources of all programs, and accelerate's."""
    folders = [ROOT / name for name in ("brics_diffusers", "training", "benchmarks")]
    sources = [ROOT / "demo.py", *(path for folder in folders for path in folder.rglob("*.py"))]
    names = {name for path in sources for name in re.findall(r'"--([\w-]+)"', path.read_text())}
    return names | {"help"} | {name.lstrip("-") for name in launch_command_parser()._option_string_actions}


@pytest.mark.parametrize("page", PAGES)
def test_flags_in_sentences(page, known_flags):
    spans = " ".join(SPAN.findall(read(page)[0]))
    assert {name.removeprefix("no-") for name in FLAG.findall(spans)} <= known_flags


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with small models and images of the names that are used on the pages."""
    folder = tmp_path_factory.mktemp("workplace")
    torch.manual_seed(0)
    autoencoder = BricsAutoencoder(**AUTOENCODER)
    unet = UNet2DModel(sample_size=8, in_channels=4, out_channels=4, **UNET)
    pipe = BricsKeyCodePipeline(autoencoder, unet, CosineVariantScheduler())
    for name in ("runs/pipeline", "runs/guide", "runs/notebook/pipeline", "user/model"):
        pipe.save_pretrained(folder / name)
    names = ("cat", "dog", "Activities", "Animals & Nature", "Flags", "Food & Drink", "Smileys & Emotion")
    classes = UNet2DModel(sample_size=8, in_channels=4, out_channels=4, num_class_embeds=len(names) + 1, **UNET)
    pipe = BricsKeyCodePipeline(autoencoder, classes, CosineVariantScheduler(), id2label=dict(enumerate(names)))
    pipe.register_to_config(default_num_inference_steps=3)
    for name in ("model_cards/brics-noto-emoji-64", "model_cards/brics-fluent-emoji-128", "runs/by-class"):
        pipe.save_pretrained(folder / name)
    autoencoder.save_pretrained(folder / "runs/autoencoder/autoencoder")
    (folder / "path/to/images").mkdir(parents=True)
    for index, name in enumerate(("image.png", "other.png", "path/to/images/1.png", "path/to/images/2.png")):
        Image.new("RGB", (32, 32), (60 * index, 80, 120)).save(folder / name)
    return folder


def python_blocks(page: str) -> list[Block]:
    return [block for block in read(page)[1] if block.language == "python"]


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)])
def test_python_blocks(page, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    if page == NOTEBOOK:
        pytest.importorskip("skimage", reason="the notebook takes its photographs from scikit-image")
        monkeypatch.setattr("demo.CROPS", {"train": 1, "validation": 2})
    names = {}
    for block in python_blocks(page):
        if block.reason is None:
            text = re.sub(r"num_inference_steps=\d+", "num_inference_steps=5", block.text)
            exec(compile("\n" * block.line + text, ROOT / page, "exec"), names)  # errors name the page's line


NOT_RUN = [(page, block) for page in PAGES for block in python_blocks(page) if block.reason is not None]


@pytest.mark.parametrize(("page", "block"), NOT_RUN, ids=[f"{page}:{block.line}" for page, block in NOT_RUN])
def test_blocks_that_are_not_run(page, block):
    compile(block.text, page, "exec")
    pytest.skip(block.reason)


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    links = [link for link in LINK.findall(read(page)[0]) if not link.startswith("http")]
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []


def test_notebook_is_saved_without_outputs():
    notebook = json.loads((ROOT / NOTEBOOK).read_text())
    assert notebook["nbformat"] == 4
    for cell in notebook["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)


def test_figure_is_what_its_script_draws(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs/assets")
    figure = importlib.import_module("draw_method").draw()
    assert (ROOT / "docs/assets/method.svg").read_text() == figure

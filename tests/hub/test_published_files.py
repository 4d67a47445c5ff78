"""Which files of a folder are published: those of the model, and the pictures that its card names."""

import pytest
from PIL import Image
from small_models import ROOT

from brics_diffusers.hub.card import read_card, read_facts
from brics_diffusers.hub.published_files import model_folders, named_pictures, public_files


@pytest.mark.parametrize(
    "card",
    [
        "![A](a.png)",
        "![A]( <a.png> )",
        '![A](./a.png "a title")',
        "[![A](a.png)](https://example.org)",
        "[A](b/../a.png)",
        "![A](a.png?raw=true)",
        "![A][a]\n\n[a]: a.png",
        '<a href="x"><img width="3" src="a.png"></a>',
        "<IMG SRC = 'a.png'>",
    ],
)
def test_a_card_names_a_picture(card):
    assert named_pictures(card) == {"a.png"}


@pytest.mark.parametrize("name", ["brics-noto-emoji-64", "brics-fluent-emoji-128"])
def test_the_shipped_cards(name):
    model = ROOT / "model_cards" / name
    shown = named_pictures(read_card(model))
    assert {"vary.png", "interpolate.png", "inpaint.png", "nearest-neighbours.png", "curves.png"} < shown
    assert shown < set(public_files(model))


def test_links_publish_pictures_of_the_folder_alone(pipe, tmp_path):
    folder = tmp_path / "folder"
    pipe.save_pretrained(folder)
    before = set(public_files(folder))
    for name in ("a b.png", "in.png", "more/in.png", "../outside.png"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    (folder / "outside-too.png").symlink_to("../outside.png")
    (folder / "optimizer.bin").write_bytes(b"private")
    names = [
        "a%20b.png",
        "more/in.png",
        "../outside.png",
        "../folder/in.png",
        "outside-too.png",
        str(folder / "in.png"),
        "optimizer.bin",
    ]
    names += ["missing.png", "unet", "https://example.org/d.png"]
    (folder / "README.md").write_text("\n\n".join(f"![A]({name})" for name in names))
    assert set(public_files(folder)) == before | {"a b.png", "more/in.png"}


def test_a_part_that_the_index_has_not(pipe, tmp_path):
    pipe.register_modules(guide=pipe.unet)
    pipe.save_pretrained(tmp_path)
    assert "guide" in model_folders(tmp_path) and "guide" in read_facts(tmp_path)["parameters"]
    pipe.register_modules(guide=None)
    pipe.save_pretrained(tmp_path)  # which leaves the folder of the guide before
    assert (tmp_path / "guide").is_dir() and model_folders(tmp_path) == ["autoencoder", "scheduler", "unet"]
    assert list(read_facts(tmp_path)["parameters"]) == ["autoencoder", "unet"]

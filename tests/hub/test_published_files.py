import pytest
from PIL import Image
from small_models import ROOT

from brics_diffusers.hub.card import read_card
from brics_diffusers.hub.published_files import linked_pictures, public_files


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
def test_link(card):
    assert linked_pictures(card) == ["a.png"]


def test_names_of_pictures():
    assert linked_pictures("![A](my%20a.PNG) ![B](<b c.webp>) ![C](d/e.svg) ![C](d/e.svg)") == [
        "b c.webp",
        "d/e.svg",
        "my a.PNG",
    ]


def test_no_pictures():
    card = "![A](../a.png) ![B](/b.png) [C](c.bin) ![D](https://example.org/d) `e.png` [F](f/../../f.png) []() <img>"
    assert linked_pictures(card) == []


def test_the_shipped_card():
    model = ROOT / "model_cards/brics-noto-emoji-64"
    shown = linked_pictures(read_card(model / "README.md"))
    assert {"vary.png", "interpolate.png", "inpaint.png", "nearest-neighbours.png", "curves.png"} < set(shown)
    assert set(shown) < set(public_files(model))


def test_links_publish_pictures_of_the_folder_alone(pipe, tmp_path):
    folder = tmp_path / "folder"
    pipe.save_pretrained(folder)
    before = set(public_files(folder))
    for name in ("in.png", "more/in.png", "../outside.png"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    (folder / "outside-too.png").symlink_to("../outside.png")
    (folder / "optimizer.bin").write_bytes(b"private")
    names = ["in.png", "more/in.png", "../outside.png", "outside-too.png", str(folder / "in.png"), "optimizer.bin"]
    names += ["missing.png", "unet"]
    (folder / "README.md").write_text("\n\n".join(f"![A]({name})" for name in names))
    assert set(public_files(folder)) == before | {"README.md", "in.png", "more/in.png"}

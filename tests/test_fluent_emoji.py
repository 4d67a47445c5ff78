"""The script that makes the collection of 3-D emoji, on packages of a few pictures."""

import io
import json
import tarfile

import fluent_emoji
import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image


EMOJI = [
    {"name": "HASH KEY", "unified": "0023-FE0F-20E3", "non_qualified": "0023-20E3", "category": "Symbols"},
    {"name": "GRINNING FACE", "unified": "1F600", "non_qualified": None, "category": "Smileys & Emotion"},
    {"name": "HELD OUT", "unified": "1F401", "non_qualified": None, "category": "Objects"},
    {"name": "KEPT APART", "unified": "1F40C", "non_qualified": None, "category": "Objects"},
    {
        **{"name": "FATHER CHRISTMAS", "unified": "1F385", "non_qualified": None, "category": "People & Body"},
        "skin_variations": {"1F3FB": {"unified": "1F385-1F3FB", "non_qualified": None}},
    },
]


def add(package: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    package.addfile(info, io.BytesIO(content))


@pytest.fixture
def packages(tmp_path):
    """Pictures of 256 x 256 whose left half is transparent, one of a code twice and one of an unknown code."""
    pixels = np.zeros((256, 256, 4), np.uint8)
    pixels[:, 128:] = (200, 40, 90, 255)
    picture = io.BytesIO()
    Image.fromarray(pixels).save(picture, "WEBP", lossless=True)
    paths = tmp_path / "pictures.tgz", tmp_path / "emoji.tgz"
    with tarfile.open(paths[0], "w:gz") as package:
        for name in ("23-20e3", "0023-20e3", "1f600", "1f385", "1f385-1f3fb", "1f401", "1f40c", "e50a"):
            add(package, f"package/assets/{name}.webp", picture.getvalue())
        add(package, "package/README.md", b"none")
    with tarfile.open(paths[1], "w:gz") as package:
        add(package, "package/emoji.json", json.dumps(EMOJI).encode())
    return paths


def test_it_makes_a_collection(packages, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["fluent_emoji.py", *map(str, packages), str(tmp_path / "made")])
    fluent_emoji.main()
    found = {}
    for split in ("train", "validation", "test"):
        for row in load_dataset(str(tmp_path / "made"), split=split, cache_dir=tmp_path / "cache"):
            found[row["code"]] = split, row["name"], row["category"]
            pixels = np.asarray(row["image"].convert("RGB"))
            assert pixels.shape == (128, 128, 3)
            assert (pixels[:, :60] == 255).all() and (pixels[:, 68:] == (200, 40, 90)).all()
    assert found.keys() == {"0023-20e3", "1f600", "1f385", "1f385-1f3fb", "1f401", "1f40c"}
    assert found.pop("1f401")[0] == "validation" and found.pop("1f40c")[0] == "test"
    assert {split for split, *_ in found.values()} == {"train"}
    assert found["1f385"] == found["1f385-1f3fb"] and found["1f385"][1:] == ("father christmas", "People & Body")


def test_splits_follow_from_the_code_of_the_emoji_that_varies():
    known = fluent_emoji.emoji_by_code(EMOJI)
    assert known["0023-FE0F-20E3"] is known["0023-20E3"] and known["1F385"] is known["1F385-1F3FB"]
    # SHA-1 modulo 20, by sha1sum and bc: 5, 0 and 1.
    assert [known[code]["split"] for code in ("1F600", "1F401", "1F40C")] == ["train", "validation", "test"]
    many = [{"name": "X", "unified": f"{code:X}", "non_qualified": None, "category": "Y"} for code in range(2000)]
    splits = [row["split"] for row in fluent_emoji.emoji_by_code(many).values()]
    assert 60 < splits.count("validation") < 140 and 60 < splits.count("test") < 140

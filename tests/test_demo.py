"""Which folders the demo clears and which it leaves alone."""

import pytest


pytest.importorskip("skimage", reason="the demo takes its photographs from scikit-image")
from demo import MARKER, PARTS, claim_folder, main


@pytest.fixture
def folder(tmp_path):
    """A folder with pictures, in a folder of the name that the demo uses."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").touch()
    return tmp_path


def test_folders_of_others_are_left_alone(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["demo.py", "--output_dir", str(folder)])
    with pytest.raises(SystemExit):
        main()
    assert f"{folder} has no {MARKER}, the mark of a folder that a demo may clear; name" in capsys.readouterr().err
    assert [path.name for path in folder.rglob("*")] == ["photos", "holiday.jpg"]
    with pytest.raises(ValueError, match="holiday.jpg has no"):
        claim_folder(folder / "photos" / "holiday.jpg")


def test_an_earlier_demo_gives_way(folder):
    (folder / MARKER).touch()
    (folder / "samples.png").touch()
    claim_folder(folder)
    assert {path.name for path in folder.iterdir()} == {MARKER, "samples.png"}


def test_new_and_empty_folders(tmp_path):
    for folder in (tmp_path, tmp_path / "new" / "deep"):
        claim_folder(folder)
        for name in PARTS:
            (folder / name).mkdir()
        claim_folder(folder)
        assert (folder / MARKER).is_file() and not any((folder / name).exists() for name in PARTS)

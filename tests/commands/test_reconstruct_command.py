"""`brics-diffusers reconstruct`: files, their names, and the picture."""

import numpy as np
import pytest
import torch
from PIL import Image

from brics_diffusers import BricsAutoencoder
from brics_diffusers.commands import main
from brics_diffusers.commands.reconstruct import file_stem


@pytest.fixture
def flags(model_folder, image_folder, tmp_path):
    words = ["reconstruct", model_folder, "--dataset_name", image_folder, "--max_images", 5, "--batch_size", 2]
    return [*map(str, words), "--output_dir", str(tmp_path / "out")]


def test_files_and_picture(flags, model_folder, image_folder, tmp_path, capsys):
    main(flags)
    printed, folder = capsys.readouterr(), tmp_path / "out" / "reconstructions"
    assert printed.out.startswith("5 reconstructions in ") and "Reconstructing" in printed.err
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"{row:07d}-{row:02d}.png" for row in range(5)]
    pixels = torch.from_numpy(np.array(Image.open(image_folder / "03.png").crop((4, 0, 36, 32))))
    sample = pixels.permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = BricsAutoencoder.from_pretrained(model_folder)(sample).sample.clamp(-1, 1) * 127.5 + 127.5
    written = torch.from_numpy(np.array(Image.open(folder / names[3])))
    assert (written.permute(2, 0, 1) - expected[0]).abs().max() < 0.51
    picture = Image.open(tmp_path / "out" / "side-by-side.png")
    assert picture.size == (5 * 34 + 2, 2 * 34 + 2)
    for top, image in ((2, pixels), (36, written)):  # rounded down once more
        assert np.abs(np.array(picture.crop((104, top, 136, top + 32))).astype(int) - image.numpy()).max() <= 1


def test_results_of_two_runs_do_not_mix(flags, tmp_path):
    (tmp_path / "out" / "reconstructions").mkdir(parents=True)
    (tmp_path / "out" / "reconstructions" / "old.png").touch()
    with pytest.raises(
        SystemExit, match="reconstruct: .* holds files, and results of two runs would mix; delete it or"
    ):
        main(flags)


def test_nothing_readable(flags, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_text("no image")
    with pytest.raises(SystemExit, match="brics-diffusers reconstruct: "):
        main([*flags, "--dataset_name", str(tmp_path / "images")])


@pytest.mark.parametrize(
    ("image", "stem"),
    [
        ({"path": "/images/a b.jpeg"}, "-a b"),
        ({"path": "zip://cats/b.png::c.zip", "bytes": None}, "-b"),
        ({"path": None, "bytes": b""}, ""),
        ({"path": "x" * 99 + ".png"}, "-" + "x" * 50),
    ],
)
def test_names(image, stem):
    assert file_stem(image) == stem

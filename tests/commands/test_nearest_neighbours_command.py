"""`brics-diffusers nearest-neighbours`: neighbours of samples, copies, and what it refuses."""

import json
import shutil

import pytest
from PIL import Image

from brics_diffusers.commands import main
from brics_diffusers.metrics import nearest_neighbours
from brics_diffusers.metrics.perceptual import load_lpips


@pytest.fixture
def flags(saved_pipe, image_folder, tmp_path):
    words = ["nearest-neighbours", "--generated", saved_pipe, "--dataset_name", image_folder, "--num_samples", 2]
    words += ["--num_inference_steps", 2, "--num_neighbours", 3, "--output_dir", tmp_path / "out"]
    return [str(word) for word in words]


def test_samples_of_a_pipeline_by_lpips(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(nearest_neighbours, "load_lpips", lambda network, remedy: load_lpips(network, False))
    main([*flags, "--distance", "lpips-squeeze", "--batch_size", "7"])
    result = json.loads((tmp_path / "out/nearest-neighbours.json").read_text())
    assert result["distance"]["definition"] == "LPIPS 0.1, squeeze, backbone weights: random"
    assert result["generated"]["sampling"]["num_inference_steps"] == 2
    assert result["training"]["num_images"] == 24 and result["training"]["num_unreadable"] == 1
    for query in result["queries"]:
        distances = [found["distance"] for found in query["neighbours"]]
        assert len(distances) == 3 and 0 < distances[0] <= distances[1] <= distances[2]
        assert all(found["image"].endswith(f"{found['index']:02d}.png") for found in query["neighbours"])
    assert Image.open(tmp_path / "out/nearest-neighbours-grid.png").size == (4 + 4 * 100 + 16, 20 + 2 * 116)


def test_copies_are_found(flags, tmp_path, image_folder):
    generated = tmp_path / "generated"
    generated.mkdir()
    for name in ("07.png", "20.png"):
        Image.open(image_folder / name).crop((4, 0, 36, 32)).save(generated / name)
    (generated / "broken.png").write_text("no image")
    main([*flags, "--generated", str(generated), "--distance", "pixels", "--num_samples", "9"])
    result = json.loads((tmp_path / "out/nearest-neighbours.json").read_text())
    assert [query["neighbours"][0]["index"] for query in result["queries"]] == [7, 20]
    assert [query["neighbours"][0]["distance"] for query in result["queries"]] == [0, 0]
    assert [query["image"] for query in result["queries"]] == [str(generated / name) for name in ("07.png", "20.png")]
    assert result["generated"]["num_images"] == 2 and result["generated"]["num_unreadable"] == 1
    assert result["near_copies"] == 1 and all(query["near_copy"] for query in result["queries"])
    text = (tmp_path / "out/nearest-neighbours.md").read_text()
    assert "| 1 | yes | 20 (0) |" in text and "100.0% of 2 generated images are near copies" in text


def test_held_out_images_are_a_measure(flags, tmp_path, image_folder):
    """One of two is a copy; the other, all black, is far from everything."""
    generated = tmp_path / "generated"
    for split, names in (("train", [f"{number:02d}.png" for number in range(12)]), ("validation", ["07.png"])):
        (tmp_path / "images" / split).mkdir(parents=True)
        for name in names:
            Image.open(image_folder / name).convert("RGB").save(tmp_path / "images" / split / name)
    Image.new("RGB", (32, 32)).save(tmp_path / "images/validation/black.png")
    shutil.copytree(tmp_path / "images/train", generated)
    words = ["--dataset_name", str(tmp_path / "images"), "--generated", str(generated), "--distance", "pixels"]
    main([*flags, *words, "--num_samples", "9", "--held_out_split", "validation"])
    result = json.loads((tmp_path / "out/nearest-neighbours.json").read_text())
    assert result["held_out"] == {"split": "validation", "num_images": 2, "near_copies": 0.5}
    assert "Of 2 images of the split validation, 50.0% are." in (tmp_path / "out/nearest-neighbours.md").read_text()


def test_errors(flags, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for changes, message in (
        ([], "LPIPS needs vgg16-397923af.pth, .*HF_HUB_OFFLINE.*hub/checkpoints/, or choose another distance"),
        (["--distance", "ssim"], "'ssim' is no distance"),
        (["--distance", "pixels", "--num_neighbours", "99"], "99 neighbours are wanted of 24 training images"),
    ):
        with pytest.raises(SystemExit, match=f"brics-diffusers nearest-neighbours: .*{message}"):
            main(flags + changes)

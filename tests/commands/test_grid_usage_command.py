"""`brics-diffusers grid-usage`: its report, and models and images that it can't use."""

import pytest
from diffusers import VQModel
from PIL import Image
from small_models import AUTOENCODER

from brics_diffusers.commands import main


def test_report(run_command, model_folder, image_folder, tmp_path):
    VQModel(block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=7).save_pretrained(tmp_path / "vq")
    flags = [model_folder, "--dataset_name", image_folder, "--vq_model", tmp_path / "vq", "--batch_size", 7]
    result, text, folder = run_command("grid-usage", *flags)
    usage = result["grids"]
    assert len(usage["groups_and_levels"]) == 4 * AUTOENCODER["num_levels"] and 0 < usage["total"]["used"] < 1
    assert result["codebook"]["mean_hits"] == 24 * 32 * 32 / 7
    # Every pixel of the feature block reads one cell, which has at most eight corners.
    coarsest = usage["levels"][0]
    assert 0 < coarsest["mean_hits"] * coarsest["entries"] <= 24 * 4 * 16 * 16 * 8
    header = "| group | level 0 | level 1 | level 2 | level 3 |\n| --- | --- | --- | --- | --- |\n"
    shares = [row["used"] for row in usage["groups_and_levels"]]
    rows = [f"| {group} | {' | '.join(f'{share:.4g}' for share in shares[4 * group :][:4])} |" for group in range(4)]
    assert header + "\n".join(rows) in text and len(set(shares)) > 4
    for row in [*usage["groups_and_levels"], result["codebook"]]:
        assert sum(row["histogram"]) == pytest.approx(row["used"] * row["entries"])
    assert f"Autoencoder `{model_folder}`. 24 images" in text and f"VQ codebook of `{tmp_path / 'vq'}`" in text
    assert "Counted by entry" in text and "1 file was unreadable" in text
    assert Image.open(folder / "grid-usage-plot.png").width > 600


def test_a_pickled_vq_model_is_not_read(model_folder, image_folder, tmp_path):
    VQModel(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "vq", safe_serialization=False)
    flags = ["--dataset_name", str(image_folder), "--vq_model", str(tmp_path / "vq")]
    with pytest.raises(SystemExit, match="grid-usage: .*vq can't be loaded .*only safetensors are read"):
        main(["grid-usage", str(model_folder), *flags])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("grey", "--vq_model .*grey takes images of 1 channels, the autoencoder of 3; name one"),
        ("model", "model/config.json is that of a BricsAutoencoder, but a VQModel is needed"),
        ("empty", "empty provides no config.json .*; name the folder of a saved VQModel"),
        ("nosuch", "nosuch provides no config.json .*; name the folder of a saved VQModel, or one on"),
    ],
)
def test_unusable_vq_models(autoencoder, image_folder, tmp_path, monkeypatch, name, message):
    VQModel(1, 1, block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "grey")
    autoencoder.save_pretrained(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("brics_diffusers.commands.grid_usage.collection_entry_hits", pytest.fail)  # comes after
    flags = [str(tmp_path / "model"), "--dataset_name", str(image_folder), "--vq_model", str(tmp_path / name)]
    with pytest.raises(SystemExit, match=message):
        main(["grid-usage", *flags])


def test_without_readable_images(model_folder, tmp_path):
    (tmp_path / "broken.png").write_text("not an image")
    with pytest.raises(SystemExit, match="grid-usage: 0 readable images .skipped 1 unreadable file: .*broken.png"):
        main(["grid-usage", str(model_folder), "--dataset_name", str(tmp_path)])

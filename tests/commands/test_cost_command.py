import pytest
import yaml
from launching import CONFIG
from PIL import Image

from brics_diffusers.commands import main


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def test_report(run_command, config_file):
    result, text, folder = run_command("cost", config_file, "--decoder_types", "style", "vqgan")
    assert [(row["config"], row["decoder type"]) for row in result["parts"]] == [
        ("small", "style"),
        ("small", "vqgan"),
    ]
    assert [row["batch"] for row in result["memory"]] == [1, 2]
    for row in result["retrieval"]:
        assert row["lookup G, formula"] == pytest.approx(row["lookup G, counted"])
        assert row["MLPs G, formula"] == pytest.approx(row["MLPs G, counted"])
    assert "VQGAN f16" in text and "Retrieval of small" in text
    assert Image.open(folder / "cost-decoders.png").width > 600


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("unet: {}", "has no section `autoencoder`"),
        ("a: [", "is not valid YAML"),
        (None, "is neither a preset nor a YAML file .*No such file.*presets are church-64x64x4, church-32x32x4,"),
    ],
)
def test_unusable_configs(tmp_path, content, message):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match=message):
        main(["cost", str(path)])

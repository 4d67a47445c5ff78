"""`brics-diffusers cost`: its report, and configs that it can't use."""

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
    assert "VQGAN f16" in text and "Retrieval of small (32 x 32 pixels)" in text
    assert {row["image"] for row in result["parts"] + result["memory"] + result["peers"]} == {"32 x 32"}
    assert "256" not in text
    assert Image.open(folder / "cost-decoders.png").width > 600


def test_configs_of_several_sizes(run_command, tmp_path, monkeypatch):
    for name, size in (("one", 24), ("two", 32)):
        changes = {"sample_size": size, "feature_size": size // 2, "decoder_layers_per_block": 2}
        section = CONFIG["autoencoder"] | changes
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"autoencoder": section}))
    drawn = []
    monkeypatch.setattr(
        "brics_diffusers.commands.cost.cost_plot", lambda *bars: drawn.append(bars) or Image.new("L", (1, 1))
    )
    result, _, _ = run_command("cost", *tmp_path.glob("*.yaml"))  # each with its own decoder only
    sizes = {row["config"]: row["image"] for row in result["parts"]}
    assert sizes == {"one": "24 x 24", "two": "32 x 32"}
    found = sorted((row["image"], row["decoder"]) for row in result["peers"])  # 24 does not divide by 16
    eighths = ["LDM KL-f8", "LDM VQ-f8"]
    assert found == [("24 x 24", name) for name in eighths] + [("32 x 32", name) for name in [*eighths, "VQGAN f16"]]
    ((parameters, _, image),) = drawn
    assert image == sizes[result["varied"]] and list(parameters) == [
        f"{result['varied']}, style",
        *(row["decoder"] for row in result["peers"] if row["image"] == image),
    ]


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

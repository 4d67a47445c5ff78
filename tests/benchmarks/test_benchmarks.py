"""All benchmarks with tiny models: the numbers are there and the report is written."""

import json

import bench
import pytest
import torch
from retrieval import grid_sample_lookup
from timing import log_slope, peak_bytes

from brics_diffusers.models.grids.feature_grids import FeatureGrids
from brics_diffusers.models.grids.lookup_operator import retrieve


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speed")
    bench.main(["--tiny", "--device", "cpu", "--output_dir", str(folder)])
    return json.loads((folder / "speed.json").read_text()) | {"folder": folder}


def test_report_is_written(report):
    text = (report["folder"] / "speed.md").read_text()
    for title in bench.TITLES.values():
        assert f"## {title}\n" in text
    assert (report["folder"] / "speed-growth.png").stat().st_size > 0
    assert report["machine"]["device"] in text


def test_retrieval(report):
    found = report["parts"]["retrieval"]
    # Features alone are read or written three times: 4 groups of 64 features at 64 x 64 pixels.
    assert found["batch 1"]["MB that must move"] > 3 * 4 * 4 * 64 * 64**2 / 1e6
    candidates = ("grid_sample", "corners only", "lattice only", "copy of its bytes")
    assert {f"{name} / retrieve" for name in candidates} < set(found["batch 1"])
    assert 0 < found["memory"]["MB for each further image"] < found["memory"]["MB at batch 1"]


@pytest.mark.parametrize("grid_type", ["tiled", "hash"])
def test_grid_sample_is_the_same_lookup(grid_type):
    grids = FeatureGrids(2, num_levels=4, max_resolution=12, max_entries=500, grid_type=grid_type)
    torch.nn.init.normal_(grids.entries)
    arguments = torch.rand(3, 2, 8, 6), grids.entries, grids.resolutions, grids.level_entries, grid_type
    torch.testing.assert_close(grid_sample_lookup(*arguments), retrieve(*arguments), atol=1e-5, rtol=0)


def test_decoding(report):
    for size in (1, 2):
        rows = report["parts"]["decoding"][f"batch {size}"]
        assert rows["BRICS"]["ours / it"] == 1
        for row in rows.values():
            assert row["images_per_second"] == pytest.approx(size / row["seconds"])
            assert row["peak_mb"] > 0 and row["ours / it"] > 0
        assert set(rows) >= {"BRICS", "VQ", "VQ, run as ours is"}
    text = bench.decoding.describe(report["parts"]["decoding"])
    assert "run as ours is (channels-last" in text
    # Images as small as these are decoded together; either way is at hand.
    assert rows["BRICS, whole batch"]["peak_mb"] == pytest.approx(rows["BRICS"]["peak_mb"], rel=0.05)


@pytest.mark.parametrize("layer", bench.convolutions.LAYERS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_ways_to_convolve_agree(layer, batch_size):
    layers = bench.TINY["convolutions"]["layers"]
    ways = bench.convolutions.make_ways(layer, batch_size, torch.device("cpu"), torch.float64, layers)
    expected = ways.pop("one image at a time")()
    assert expected.shape == (batch_size, 4, 12, 12)
    assert len(ways) == (1 if batch_size == 1 else 2) + (layer == "up-convolution")
    for way in ways.values():
        torch.testing.assert_close(way(), expected)


def test_convolutions(report):
    rows = report["parts"]["convolutions"]["rows"]
    assert [(row["layer"], row["batch"]) for row in rows] == [
        (layer, batch) for layer in bench.convolutions.LAYERS for batch in (1, 4)
    ]
    assert all(value > 0 for row in rows for value in list(row.values())[1:])


def test_sampling_without_a_pipeline(report):
    found = report["parts"]["sampling"]
    assert [row["sampler"] for row in found["samplers"]] == ["DPM-Solver++", "DDIM", "ancestral"] * 2
    assert [row["steps"] for row in found["samplers"]] == [2, 3, 4] * 2
    assert [row["dtype"] for row in found["samplers"]] == ["float32"] * 3 + ["bfloat16"] * 3
    for row in found["samplers"]:
        assert row["seconds an image"] > 0 and row["Fréchet distance (random-conv)"] is None
        assert row["host synchronisation"] == "not applicable"
    assert found["samplers"][-1]["its time / the last one's"] == 1
    assert "quality was not measured" in (report["folder"] / "speed.md").read_text()


def test_sampling_with_a_pipeline(pipe, image_folder, tmp_path):
    pipe.save_pretrained(tmp_path / "pipeline")
    options = bench.TINY["sampling"] | {"pipeline": str(tmp_path / "pipeline"), "dataset_name": str(image_folder)}
    found = bench.sampling.measure(**options, num_images=4)
    # Quality is that of one dtype.
    assert [row["Fréchet distance (random-conv)"] is None for row in found["samplers"]] == [True] * 3 + [False] * 3
    assert all(row["Fréchet distance (random-conv)"] > 0 for row in found["samplers"][3:])
    assert "Fréchet distance of 4 samples" in bench.sampling.describe(found)


def test_training(report):
    found = report["parts"]["training"]
    assert set(found["images_per_second"]) == {"BRICS", "VQModel", "stage two"}
    assert all(value > 0 for value in found["images_per_second"].values())
    assert 0 < found["data_share"] < 1 and 0 < found["optimizer_share"] < 1
    assert len(found["adam"]) == 4 and all(row["fused"] > 0 and row["foreach"] > 0 for row in found["adam"])


def test_growth(report):
    found = report["parts"]["growth"]
    assert list(found) == ["batch", "resolution", "levels", "groups", "T"]
    for axis in found.values():
        assert all(row[part]["seconds"] > 0 for row in axis["rows"] for part in ("lookup", "decode"))
        assert len(axis["slopes"]) == 4
    assert found["T"]["slopes"]["lookup memory"] == pytest.approx(0, abs=0.2)
    # Of one image or two, the peak is in the lookup, most of whose memory all images share; of four or more it is in
    # the style decoder, which needs as much for each.
    assert found["batch"]["slopes"]["decode memory"] == pytest.approx(1, abs=0.2)
    assert found["resolution"]["slopes"]["lookup memory"] == pytest.approx(1, abs=0.2)


@pytest.mark.slow
def test_memory_of_the_paper_preset():
    grids = bench.retrieval.FeatureGrids(4, min_resolution=16)
    one, two = (bench.retrieval.peak_of_step(grids, batch_size) for batch_size in (1, 2))
    assert one < 91e6 and two - one < 35e6


def test_slope_and_peak():
    assert log_slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)

    def step():
        first = torch.zeros(1000)
        second = first + 1
        del first
        return second * 2

    assert peak_bytes(step, torch.device("cpu")) == pytest.approx(8000, rel=0.01)  # and scalars


def test_parts_do_not_replace_the_whole_report():
    whole = bench.parse_args(["--device", "cpu"]).output_dir
    assert whole == bench.EMOJI.parents[1] / "benchmarks/results/cpu"
    assert bench.parse_args(["--parts", "growth"]).output_dir != whole


def test_the_emoji_model_is_what_is_sampled_from():
    assert (bench.parse_args([]).pipeline / "model_index.json").is_file()
    assert bench.parse_args(["--tiny"]).pipeline is None

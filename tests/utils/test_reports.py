"""Reports in JSON and Markdown, and the folder that they are written into."""

import json
import sys

import pytest
from PIL import Image

from brics_diffusers.utils.reports import machine, make_output_folder, markdown_table, write_report


def test_report(tmp_path):
    rows = [{"model": "a", "PSNR": 25.123456, "steps": 20000}, {"model": "b", "PSNR": None, "steps": 12345.6}]
    table = markdown_table(rows)
    assert table == "| model | PSNR | steps |\n| --- | --- | --- |\n| a | 25.12 | 20000 |\n| b |  | 12346 |\n"
    write_report(tmp_path / "new", "name", {"rows": rows}, table, {"picture": Image.new("RGB", (2, 2))})
    assert json.loads((tmp_path / "new/name.json").read_text())["rows"] == rows
    assert (tmp_path / "new/name.md").read_text().endswith("\n![picture](name-picture.png)\n")
    assert Image.open(tmp_path / "new/name-picture.png").size == (2, 2)


def test_figures_that_are_not_finite(tmp_path):
    result = {
        "fid": float("nan"),
        "rows": [{"psnr": float("inf")}, (1.5, -float("inf"))],
        "kept": [0, True, None, "nan"],
    }
    write_report(tmp_path, "name", result, "")
    written = json.loads((tmp_path / "name.json").read_text(), parse_constant=pytest.fail)
    assert written == {"fid": None, "rows": [{"psnr": None}, [1.5, None]], "kept": [0, True, None, "nan"]}


def test_machine_names_the_device():
    facts = machine()
    assert "cores" in facts["device"] and facts["torch"] and facts["command"]


def test_command_line_can_be_run_again(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/brics-diffusers", "grid-usage", "my model"])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert machine()["command"] == "brics-diffusers grid-usage 'my model'"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert machine()["command"] == "OMP_NUM_THREADS=3 brics-diffusers grid-usage 'my model'"


class TestOutputFolder:
    def test_is_made_and_left_empty(self, tmp_path):
        for _ in range(2):
            assert make_output_folder(tmp_path / "a/b") == tmp_path / "a/b"
        assert not list((tmp_path / "a/b").iterdir())

    def test_that_can_not_be_written(self, tmp_path):
        (tmp_path / "file.png").touch()
        for path in (tmp_path / "file.png", tmp_path / "file.png/below", "/proc/nowhere"):
            with pytest.raises(OSError, match=f"^--cache_dir {path} is no folder that can be made .*; name another"):
                make_output_folder(path, "--cache_dir")

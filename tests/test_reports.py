import json

import pytest
from PIL import Image

from brics_diffusers.reports import machine, markdown_table, write_report


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

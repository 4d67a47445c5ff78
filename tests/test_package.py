"""What the package's files say to installers and type checkers."""

import tomllib
from importlib import resources

from small_models import ROOT


def test_type_hints_are_for_others_too():
    assert (resources.files("brics_diffusers") / "py.typed").is_file()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "py.typed" in settings["package-data"]["brics_diffusers"]  # in wheels too

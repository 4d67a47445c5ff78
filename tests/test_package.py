"""What the package's files say to installers and type checkers."""

import os
import shutil
import subprocess
import sys
import tomllib
from importlib import resources

import pytest
from small_models import ROOT


def test_type_hints_are_for_others_too():
    assert (resources.files("brics_diffusers") / "py.typed").is_file()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "py.typed" in settings["package-data"]["brics_diffusers"]  # in wheels too


@pytest.mark.slow
def test_a_wheel_works_in_a_clean_folder(tmp_path):
    """Built of a copy, and installed without what it needs, which this environment has."""
    source, site, elsewhere = tmp_path / "source", tmp_path / "site", tmp_path / "elsewhere"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "brics_diffusers", source / "brics_diffusers", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True, capture_output=True)

    written = {path.relative_to(source) for path in (source / "brics_diffusers").rglob("*") if path.is_file()}
    assert written <= {path.relative_to(site) for path in site.rglob("*")}  # the card's template and py.typed too
    elsewhere.mkdir()
    code = "import brics_diffusers as b, brics_diffusers.commands as c; print(b.__file__); c.main(['card', '-h'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=elsewhere, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().startswith(str(site)) and b"usage:" in done.stdout

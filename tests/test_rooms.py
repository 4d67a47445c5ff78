"""The folders of the package: imports point one way only."""

import ast
from pathlib import Path

import brics_diffusers


PACKAGE = Path(brics_diffusers.__file__).parent
# Each may import from those before it.
ROOMS = (
    *("utils", "data", "models", "schedulers", "pipelines", "metrics"),
    *("analysis", "hub", "training_utils", "commands"),
)


def imported_rooms(path: Path):
    """Folders of the package from which a module imports."""
    folders = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = folders[: len(folders) - node.level + 1]
            yield (*above, *(node.module or "").split("."))[0]


def test_imports_point_downwards():
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()} == set(ROOMS)
    upwards = [
        f"{path.relative_to(PACKAGE)} imports from {other}"
        for place, room in enumerate(ROOMS)
        for path in (PACKAGE / room).rglob("*.py")
        for other in imported_rooms(path)
        if other not in ROOMS[: place + 1]
    ]
    assert not upwards


def test_argparse_parses_in_two_rooms_only():
    parsing = {
        path.relative_to(PACKAGE).parts[0]
        for path in PACKAGE.rglob("*.py")
        if any(word in path.read_text() for word in ("ArgumentParser", "add_argument"))
    }
    assert parsing == {"training_utils", "commands"}

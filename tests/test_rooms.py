"""The folders of the package: imports point one way only, and in no circle; only some modules define flags."""

import ast
import graphlib
import importlib.util
from pathlib import Path

import brics_diffusers


PACKAGE = Path(brics_diffusers.__file__).parent
# Each may import from those before it; the package itself, `__init__.py`, imports models, schedulers and pipelines.
ROOMS = (
    *("utils", "data", "models", "schedulers", "pipelines", "__init__.py", "metrics"),
    *("analysis", "hub", "training_utils", "commands"),
)
DEFINE_FLAGS = {"commands", "training_utils/arguments.py", "training_utils/class_arguments.py"}


def module_file(name: str) -> Path | None:
    """File of a module of the package, by its dotted name; `None` for any other name."""
    if name.split(".")[0] != PACKAGE.name:
        return None
    path = PACKAGE.parent.joinpath(*name.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def imported_files(path: Path):
    """Files of the package from which a module imports, wherever in it and in whichever way."""
    package = ".".join(path.relative_to(PACKAGE.parent).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from filter(None, (module_file(alias.name) for alias in node.names))
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            # A name may be that of a module.
            files = (module_file(f"{source}.{alias.name}") or module_file(source) for alias in node.names)
            yield from filter(None, files)


def test_imports_point_downwards():
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert rooms | {"__init__.py"} == set(ROOMS)
    upwards = [
        f"{path.relative_to(PACKAGE)} imports from {other.relative_to(PACKAGE)}"
        for place, room in enumerate(ROOMS)
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] == room
        for other in imported_files(path)
        if other.relative_to(PACKAGE).parts[0] not in ROOMS[: place + 1]
    ]
    assert not upwards


def test_imports_run_in_no_circle():
    imports = {path: set(imported_files(path)) for path in PACKAGE.rglob("*.py")}
    assert sum(map(len, imports.values())) > len(imports)
    graphlib.TopologicalSorter(imports).prepare()  # raises an error that names a circle


def test_flags_are_defined_in_some_modules_only():
    words = "ArgumentParser", "add_argument", "ArgumentTypeError"
    files = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")]
    defining = [path for path in files if any(word in (PACKAGE / path).read_text() for word in words)]
    found = {path.parts[0] if path.parts[0] == "commands" else path.as_posix() for path in defining}
    assert found == DEFINE_FLAGS

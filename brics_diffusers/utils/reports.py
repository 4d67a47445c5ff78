"""Results on disk: JSON for programs, Markdown tables and plots for people, with the machine they come from."""

import json
import math
import os
import platform
import shlex
import sys
import tempfile
from pathlib import Path

import diffusers
import torch


def machine(device: str | torch.device = "cpu") -> dict[str, str]:
    """
    What a measurement ran on, to be written beside it: `"device"` (its name, and the number of cores and threads of a
    CPU), `"python"`, `"torch"`, `"diffusers"` (versions) and `"command"`, the process's command line behind
    `OMP_NUM_THREADS=...` where that is set: sums, and so results, depend on the number of threads.
    """
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "command": _command_line(),
    }


def _command_line() -> str:
    threads = os.environ.get("OMP_NUM_THREADS")
    variables = "" if threads is None else f"OMP_NUM_THREADS={shlex.quote(threads)} "
    return variables + shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def markdown_table(rows: list[dict]) -> str:
    """
    A Markdown table of dictionaries, all with the keys of the first, which become the header. Floats are written with
    four significant digits.
    """
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([_cell(row[name]) for name in names] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _cell(value) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def make_output_folder(path: str | os.PathLike, flag: str = "--output_dir") -> Path:
    """
    Makes the folder that results go to, called `flag` on the command line, and tries to write into it, to be called
    before the work; an `OSError` if it can't be made or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(
            f"{flag} {path} is no folder that can be made or written to ({error.strerror}); name another folder."
        ) from error
    return folder


def write_report(output_dir: str | os.PathLike, name: str, result: dict, text: str, figures: dict | None = None):
    """
    Writes `<name>.json`, `<name>.md` and `<name>-<figure>.png`: all figures and how they were made; tables, and the
    sentences that say what is in them; and plots (matplotlib) and pictures (PIL) by name. A figure that is not finite,
    for which JSON has no number, is written as `null`.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(_finite(result), indent=2, allow_nan=False) + "\n")
    for key, figure in (figures or {}).items():
        path = folder / f"{name}-{key}.png"
        if hasattr(figure, "savefig"):
            figure.savefig(path, dpi=120, bbox_inches="tight")
        else:
            figure.save(path)
        text += f"\n![{key}]({path.name})\n"
    (folder / f"{name}.md").write_text(text)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

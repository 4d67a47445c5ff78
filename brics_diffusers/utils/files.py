"""Files on disk: written whole or not at all, names that are still free, the cache folder, checksums of weights."""

import contextlib
import hashlib
import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/brics_diffusers`, by default in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "brics_diffusers"


def weights_digest(modules: dict[str, torch.nn.Module]) -> str:
    """SHA-256 of the classes, names, shapes and bytes of all parameters and buffers of some modules."""
    digest = hashlib.sha256()
    for name, module in sorted(modules.items()):
        digest.update(f"{name} {type(module).__qualname__}".encode())
        for key, value in module.state_dict().items():
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def free_path(path: Path) -> Path:
    """The path, or if something is there, the first with a number after its name where nothing is."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(1))
    return next(candidate for candidate in itertools.chain([path], numbered) if not candidate.exists())


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """
    A binary file, beside the one at `path`, that takes its name and its place when the context ends, complete, or not
    at all.
    """
    path = Path(path)
    # Hidden, so that what a killed process leaves behind is not taken for an image.
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".partial-{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise

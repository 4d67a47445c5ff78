"""Autoencoders from wherever they were saved: their own folder, a training run, a pipeline or the Hub."""

import contextlib
from pathlib import Path

from ..utils.safe_loading import load_class_safely
from .autoencoder_brics import BricsAutoencoder


def load_autoencoder(name_or_path: str, **changes) -> BricsAutoencoder:
    """
    A saved autoencoder, or the one in the `autoencoder` folder of a run or of a pipeline, here or on the Hub;
    `changes` replace values of its config. A `FileNotFoundError` if there is none, a `ValueError` for a model of
    another class.
    """
    if not Path(name_or_path).is_dir() or Path(name_or_path, "autoencoder").is_dir():
        with contextlib.suppress(FileNotFoundError):  # it may lie at the top of a repository
            return load_class_safely(BricsAutoencoder, name_or_path, subfolder="autoencoder", **changes)
    return load_class_safely(BricsAutoencoder, name_or_path, **changes)

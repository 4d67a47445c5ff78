"""Autoencoders from wherever they were saved: their own folder, a training run, a pipeline or the Hub."""

from pathlib import Path

from ..utils.safe_loading import check_local, load_class_safely
from .autoencoder_brics import BricsAutoencoder


def load_autoencoder(name_or_path: str, **changes) -> BricsAutoencoder:
    r"""
    A saved autoencoder, or the one in the `autoencoder` folder of a run or of a pipeline, here or on the Hub.

    Args:
        name_or_path (`str`): A folder, or a name on the Hub.
        changes: Values that replace those of the saved config.

    Returns:
        `BricsAutoencoder`.

    Raises:
        `FileNotFoundError`: If a folder does not exist, or holds no autoencoder.
        `ValueError`: If what is there is a model of another class.
    """
    check_local(name_or_path, "a saved autoencoder, a run")
    if Path(name_or_path).is_dir():
        subfolder = "autoencoder" if (Path(name_or_path) / "autoencoder").is_dir() else None
        if subfolder is None and not (Path(name_or_path) / "config.json").is_file():
            raise FileNotFoundError(
                f"{name_or_path} holds neither config.json nor a folder `autoencoder`; name a saved autoencoder, a "
                "run of training or a pipeline."
            )
        return load_class_safely(BricsAutoencoder, name_or_path, subfolder=subfolder, **changes)
    try:
        return load_class_safely(BricsAutoencoder, name_or_path, subfolder="autoencoder", **changes)
    except OSError as error:
        if "config.json" not in str(error):
            raise
    return load_class_safely(BricsAutoencoder, name_or_path, **changes)

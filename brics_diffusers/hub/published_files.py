"""The files of a run or a saved pipeline that are published, and a copy of them for a push or another folder."""

import json
import logging
import os
import posixpath
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

from .absolute_paths import cut_absolute_paths
from .card import (
    CARD,
    CURVES,
    GENERATED,
    METRIC_REPORTS,
    PICTURES,
    make_card,
    metric_files,
    own_name,
    read_card,
    read_json,
    title,
)


logger = logging.getLogger(__name__)

# Of a run's own folder, besides metrics and the folders of models. Checkpoints, key codes and logs are not among them.
RUN_FILES = ("model_index.json", "training_config.json", "training_summary.json", *PICTURES, CURVES)
MODEL_SUFFIXES = (".json", ".safetensors")
PICTURE_SUFFIXES = (".avif", ".gif", ".jpeg", ".jpg", ".png", ".svg", ".webp")
# What diffusers saves without a variant: the weights, or their shards and the index of these.
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")


def _components(folder: str | os.PathLike) -> dict[str, list]:
    """Library and class of a pipeline's components by name, as its index says, but for those that it has not."""
    index = read_json(Path(folder) / "model_index.json")
    return {name: entry for name, entry in index.items() if isinstance(entry, list) and any(entry)}


def model_folders(folder: str | os.PathLike) -> list[str]:
    """Names of the folders in a run's or a pipeline's folder that hold the published models and schedulers."""
    names = _components(folder) or ["autoencoder"]
    return [name for name in names if Path(folder, name).is_dir()]


def named_pictures(card: str) -> set[str]:
    """Paths of pictures that a card names where Markdown or HTML has links; none that lead out of its folder."""
    paths = {posixpath.normpath(unquote(word)) for word in re.split(r"""[\s()<>\[\]"'?#]+""", card)}
    return {path for path in paths if path.lower().endswith(PICTURE_SUFFIXES) and not path.startswith(("/", "../"))}


def public_files(folder: str | os.PathLike, card: str | None = None) -> list[str]:
    """
    Paths, within a run's or pipeline's folder, of what may be published besides the card: index, models, schedulers,
    code that the index names, configuration, metrics, pictures of the run and those that the card shows; no
    checkpoints, optimizer states, key codes or logs.
    """
    folder = Path(folder)
    paths = [folder / name for name in RUN_FILES] + metric_files(folder)
    for name, (library, *_) in _components(folder).items():
        paths.append(folder / ("pipeline.py" if name == "_class_name" else f"{name}/{library}.py"))
    for name in model_folders(folder):
        paths += [path for path in (folder / name).iterdir() if path.suffix in MODEL_SUFFIXES]
    pictures = (folder / name for name in named_pictures((read_card(folder) if card is None else card) or ""))
    paths += [path for path in pictures if path.resolve().is_relative_to(folder.resolve())]
    return sorted({path.relative_to(folder).as_posix() for path in paths if path.is_file()})


def stale_patterns(folder: str | os.PathLike, card: str) -> list[str]:
    """
    Patterns of what an earlier push may have left where this folder goes: files that every run names alike, unless the
    card shows them, and weights that diffusers would read in place of the new ones.
    """
    reports = [f"{parent}{name}" for parent in ("", "reports/") for name in METRIC_REPORTS]
    weights = [f"{name}/diffusion_pytorch_{file}" for name in model_folders(folder) for file in WEIGHTS]
    return sorted({*RUN_FILES, *reports, *weights} - named_pictures(card))


def export(
    folder: str | os.PathLike,
    target: str | os.PathLike,
    license_name: str | None = None,
    name: str | None = None,
) -> Path:
    """
    Copies what is published into another folder, made if need be; returns the card there. A card that is there keeps
    its edits, else that of the run does. What an earlier export has left is removed, see [`stale_patterns`]; other
    files stay. `name`, the model's in the card, is by default that of the other folder; for the rest see
    [`make_card`].
    """
    folder, target = Path(folder), Path(target)
    if folder.resolve() == target.resolve():
        raise ValueError(f"{folder} would be copied onto itself; name another folder.")
    name = name or target.resolve().name
    existing, own = read_card(target), read_card(folder)
    if own is not None:
        own = own.replace(f"\n# {title(own_name(folder))}\n", f"\n# {title(name)}\n", 1)
        if existing is not None and _own_text(existing) != _own_text(own):
            logger.warning("%s has a card with another text than that in %s, and keeps its own.", name, folder)
    card = make_card(folder, own if existing is None else existing, name, license_name)
    for pattern in stale_patterns(folder, card):
        for path in target.glob(pattern):
            path.unlink()
    for file in public_files(folder, card):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        if file.endswith(".json"):
            content = cut_absolute_paths(json.loads((folder / file).read_text()))
            (target / file).write_text(json.dumps(content, indent=2) + "\n")
        else:
            shutil.copyfile(folder / file, target / file)
    (target / CARD).write_text(card, encoding="utf-8")
    return target / CARD


def _own_text(card: str) -> str:
    """What users wrote into a card."""
    return GENERATED.sub("", re.sub(r"\A\s*---\n.*?\n---\n", "", card, flags=re.DOTALL)).strip()

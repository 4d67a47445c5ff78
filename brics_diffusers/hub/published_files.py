"""What of a run or a saved pipeline is published: an allow-list, and what it replaces where it goes.

Whatever is published has a list beside it, `published_files.json`. The next push or export removes what is on this
list and no longer in the run; files of others stay, but for weights that would be read in place of the new ones.
"""

import json
import os
import posixpath
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from .card import CARD, CURVES, PICTURES, metric_files, read_card, without_folders


# Of a run's own folder, besides metrics and the folders of models. Checkpoints, key codes and logs are not among them.
RUN_FILES = ("training_config.json", "training_summary.json", *PICTURES, CURVES)
MODEL_SUFFIXES = (".json", ".safetensors")
PICTURE_SUFFIXES = (".avif", ".gif", ".jpeg", ".jpg", ".png", ".svg", ".webp")
LIST = "published_files.json"
# Markdown's ways to name a picture, inline and by reference, and that of HTML.
LINK = re.compile(
    r"""(?:\]\(\s*|^\s*\[[^\]\n]+\]:\s*)(?:<([^>\n]+)>|([^\s)]+))|<img\b[^>]*?\ssrc\s*=\s*["']([^"']+)["']""",
    re.MULTILINE | re.IGNORECASE,
)
# What diffusers saves without a variant: the weights, or their shards and the index of these.
WEIGHTS = re.compile(r"([^/]+)/diffusion_pytorch_model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


class Place(NamedTuple):
    """Where something is published to, as it is before: its files, its card, and what was published there earlier."""

    files: list[str]
    card: str | None
    listed: list[str]


def model_folders(folder: str | os.PathLike) -> list[str]:
    """Names of the folders in a run's or a pipeline's folder that hold the published models and schedulers."""
    index = Path(folder) / "model_index.json"
    if index.is_file():
        names = [name for name, entry in json.loads(index.read_text()).items() if isinstance(entry, list)]
        return [name for name in names if (index.parent / name).is_dir()]
    return ["autoencoder"] if (index.parent / "autoencoder").is_dir() else []


def linked_pictures(card: str) -> list[str]:
    """Relative paths of the pictures that a card shows or links to; none that lead out of its folder."""
    links = (unquote(re.split("[?#]", next(filter(None, match)))[0]) for match in LINK.findall(card))
    paths = {posixpath.normpath(link) for link in links if link.lower().endswith(PICTURE_SUFFIXES)}
    return sorted(path for path in paths if not path.startswith(("/", "../")))


def public_files(folder: str | os.PathLike, card: str | None = None) -> list[str]:
    r"""
    Files of a run or a saved pipeline that may be published.

    Args:
        folder (`str`): Folder of the run or pipeline.
        card (`str`, *optional*): The card that is published; by default the one in the folder.

    Returns:
        `list[str]`: Paths within it: index, models, schedulers, card, configuration, metrics, pictures of the run and
        those that the card links to; no checkpoints, optimizer states, key codes or logs.
    """
    folder = Path(folder)
    card = read_card(folder / CARD) if card is None else card
    paths = [folder / name for name in (CARD, "model_index.json", *RUN_FILES)] + metric_files(folder)
    for name in model_folders(folder):
        paths += [path for path in sorted((folder / name).iterdir()) if path.suffix in MODEL_SUFFIXES]
    root = folder.resolve()
    linked = [folder / name for name in linked_pictures(card or "")]
    paths += [path for path in linked if path not in paths and path.resolve().is_relative_to(root)]
    return [path.relative_to(folder).as_posix() for path in paths if path.is_file()]


def public_contents(folder: str | os.PathLike, card: str | None) -> dict[str, Path | bytes]:
    """What is published of a folder with this card or none, by path: JSON has no folders of this machine."""
    folder = Path(folder)
    contents = {name: folder / name for name in public_files(folder, card) if name != CARD}
    for name, path in contents.items():
        if path.suffix == ".json":
            contents[name] = json_bytes(without_folders(json.loads(path.read_text())))
    return contents | ({} if card is None else {CARD: card.encode()})


def json_bytes(value) -> bytes:
    """Bytes of a JSON file."""
    return (json.dumps(value, indent=2) + "\n").encode()


def with_list(contents: dict[str, Path | bytes]) -> dict[str, Path | bytes]:
    """The same with the list of these files."""
    return contents | {LIST: json_bytes(sorted(contents))}


def read_list(path: Path) -> list[str]:
    """What `published_files.json` names; a `ValueError` if that is no list."""
    try:
        names = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError:
        names = None
    if not isinstance(names, list):
        raise ValueError(f"{LIST} of an earlier push or export is not a list in JSON; restore it, or delete it there.")
    return names


def stale_files(place: Place, contents: dict[str, Path | bytes]) -> list[str]:
    """
    What has to go when contents are published: what was published earlier and is no longer, unless the card shows it,
    and weights that diffusers would read in place of the new ones.
    """
    card = contents[CARD].decode() if CARD in contents else place.card or ""
    kept = {*contents, *linked_pictures(card)}
    models = {name.partition("/")[0] for name in contents if WEIGHTS.fullmatch(name)}
    weights = {name for name in place.files if (match := WEIGHTS.fullmatch(name)) and match[1] in models}
    return [name for name in place.files if name not in kept and (name in place.listed or name in weights)]


def folder_as_place(folder: str | os.PathLike) -> Place:
    """A folder to write to, which need not exist."""
    folder = Path(folder)
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return Place(files, read_card(folder / CARD), read_list(folder / LIST) if LIST in files else [])


def write_contents(folder: str | os.PathLike, place: Place, contents: dict[str, Path | bytes]) -> None:
    """Writes contents and their list into a folder, and removes what they make stale; `place` is the folder before."""
    folder = Path(folder)
    for name in stale_files(place, contents):
        (folder / name).unlink()
    for name, content in with_list(contents).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())

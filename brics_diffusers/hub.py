"""What goes to the Hub, and how: an allow-list of a run's files, in one commit, with the user's edits of the card."""

import argparse
import json
import logging
import os
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import EntryNotFoundError

from .model_card import CARD, CURVES, PICTURES, make_card, metric_files, read_facts, without_folders


logger = logging.getLogger(__name__)

# Of a run's own folder, besides metrics and the folders of models. Checkpoints, key codes and logs are not among them.
RUN_FILES = ("training_config.json", "training_summary.json", *PICTURES, CURVES)
MODEL_SUFFIXES = (".json", ".safetensors")


def add_hub_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for pushing, with the names that diffusers' training scripts have."""
    add = parser.add_argument
    add(
        "--push_to_hub",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="Push the result to the Hub, with the login of `hf auth login`.",
    )
    add("--hub_model_id", help="Repository, `user/name` or `name`; default: the name of the folder.")
    add(
        "--hub_private_repo",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="Make the repository private if it does not exist.",
    )


def add_license_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--hub_license`, for what makes a card."""
    parser.add_argument(
        "--hub_license",
        help="License of the weights for a card that names none, such as apache-2.0 or cc-by-4.0; default: unknown.",
    )


def model_folders(folder: str | os.PathLike) -> list[str]:
    """Names of the folders in a run's or a pipeline's folder that hold the published models and schedulers."""
    index = Path(folder) / "model_index.json"
    if index.is_file():
        names = [name for name, entry in json.loads(index.read_text()).items() if isinstance(entry, list)]
        return [name for name in names if (index.parent / name).is_dir()]
    return ["autoencoder"] if (index.parent / "autoencoder").is_dir() else []


def public_files(folder: str | os.PathLike) -> list[str]:
    r"""
    Files of a run or a saved pipeline that may be published.

    Args:
        folder (`str`): Folder of the run or pipeline.

    Returns:
        `list[str]`: Paths within it: index, models, schedulers, card, configuration, pictures and metrics; no
        checkpoints, optimizer states, key codes or logs.
    """
    folder = Path(folder)
    paths = [folder / name for name in (CARD, "model_index.json", *RUN_FILES)] + metric_files(folder)
    for name in model_folders(folder):
        paths += [path for path in sorted((folder / name).iterdir()) if path.suffix in MODEL_SUFFIXES]
    return [path.relative_to(folder).as_posix() for path in paths if path.is_file()]


def _content(path: Path) -> Path | bytes:
    """What is published of a file: of JSON, no folders of this machine."""
    if path.suffix != ".json":
        return path
    return (json.dumps(without_folders(json.loads(path.read_text())), indent=2) + "\n").encode()


def open_repository(name: str, private: bool) -> str:
    r"""
    Makes sure, before any work is done, that a repository is there and that this machine's login may write to it.

    Args:
        name (`str`): `user/name`, or `name` for one of the user's own.
        private (`bool`): Make it private if it does not exist, and refuse one that is public.

    Returns:
        `str`: The repository's `user/name`.

    Raises:
        `OSError`: If it can't be written to.
        `ValueError`: If it is public and must not be.
    """
    api = HfApi()
    try:
        api.whoami()
        repo_id = api.create_repo(name, private=private or None, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)
        is_private = api.model_info(repo_id).private
    except Exception as error:  # of the network, of the login or of the name
        raise OSError(
            f"{name} at {constants.ENDPOINT} can't take a push ({first_line(error)}); log in with `hf auth login` and "
            "a token that may write there, or leave --push_to_hub out."
        ) from error
    if private and not is_private:
        raise ValueError(f"{repo_id} is public; make it private on its page, or leave --hub_private_repo out.")
    return repo_id


def first_line(error: Exception) -> str:
    """What an error says, as part of a sentence."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def fetch_card(repo_id: str) -> str | None:
    """The card that a repository has, or `None`."""
    try:
        path = HfApi().hf_hub_download(repo_id, CARD)
    except EntryNotFoundError:
        return None
    return Path(path).read_text(encoding="utf-8")


def _merge_card(folder: Path, repo_id: str, license_name: str | None) -> None:
    """Writes the card from the run into the repository's card, or if it has none, into that of the folder."""
    path, on_the_hub = folder / CARD, fetch_card(repo_id)
    here = path.read_text(encoding="utf-8") if path.is_file() else None
    text = make_card(folder, here if on_the_hub is None else on_the_hub, repo_id, license_name)
    fresh = make_card(folder, None, repo_id, license_name)
    if None not in (here, on_the_hub) and make_card(folder, here, repo_id, license_name) not in (text, fresh):
        kept = path.with_name(f"local-{CARD}")
        kept.write_text(here, encoding="utf-8")
        logger.warning("The card of %s has other edits than the one here, which is kept as %s.", repo_id, kept)
    path.write_text(text, encoding="utf-8")


def push(
    folder: str | os.PathLike, repo_id: str, license_name: str | None = None, message: str = "Push by brics-diffusers"
) -> str:
    r"""
    Pushes a run or a pipeline in one commit: its [`public_files`], with the card renewed.

    Args:
        folder (`str`): Folder of the run or pipeline.
        repo_id (`str`): A repository that exists.
        license_name (`str`, *optional*): License of the weights for a card that names none.
        message (`str`): Message of the commit.

    Returns:
        `str`: Address of the commit.
    """
    folder = Path(folder)
    _merge_card(folder, repo_id, license_name)
    return commit_folder(folder, repo_id, public_files(folder), message)


def export(folder: str | os.PathLike, target: str | os.PathLike, license_name: str | None = None) -> Path:
    r"""
    Makes another folder hold what a push would publish, the card renewed: a card that is there keeps its edits, and
    otherwise the run's card is the first. Published files of an earlier export that the run lacks are removed; other
    files stay.

    Args:
        folder (`str`): Folder of the run or pipeline.
        target (`str`): The other folder, made if it does not exist; its name is the model's in the card.
        license_name (`str`, *optional*): License of the weights for a card that names none.

    Returns:
        `Path`: The card.

    Raises:
        `FileNotFoundError`: If the folder holds no model.
        `ValueError`: If both folders are one.
    """
    folder, target = Path(folder), Path(target)
    read_facts(folder)
    if folder.resolve() == target.resolve():
        raise ValueError(f"{folder} would be copied onto itself; name another folder.")
    names = [name for name in public_files(folder) if name != CARD]
    for name in public_files(target):
        if name not in (*names, CARD):
            (target / name).unlink()
    for name in names:
        path, content = target / name, _content(folder / name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    card, name = None, target.resolve().name
    if (target / CARD).is_file():
        card = (target / CARD).read_text(encoding="utf-8")
    elif (folder / CARD).is_file():
        card = (folder / CARD).read_text(encoding="utf-8")
        card = card.replace(f"\n# {folder.resolve().name}\n", f"\n# {name}\n", 1)
    (target / CARD).write_text(make_card(target, card, name, license_name), encoding="utf-8")
    return target / CARD


def commit_folder(
    folder: str | os.PathLike, repo_id: str, files: list[str], message: str, branch: str = "main"
) -> str:
    r"""
    Commits files of a folder to a branch, and removes what models of an earlier commit leave behind.

    Args:
        folder (`str`): The folder.
        repo_id (`str`): A repository that exists.
        files (`list[str]`): Paths within the folder.
        message (`str`): Message of the commit.
        branch (`str`, defaults to `"main"`): Made if it does not exist.

    Returns:
        `str`: Address of the commit.
    """
    api = HfApi()
    if branch != "main":
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    # The index of an earlier push's shards would be read in place of the new weights.
    models = tuple(f"{name}/" for name in model_folders(folder))
    stale = [name for name in api.list_repo_files(repo_id, revision=branch) if name.startswith(models)]
    operations = [CommitOperationDelete(name) for name in stale if name not in files]
    operations += [CommitOperationAdd(name, _content(Path(folder, name))) for name in files]
    commit = api.create_commit(repo_id, operations, commit_message=message, revision=branch)
    return commit.commit_url

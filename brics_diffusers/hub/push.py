"""To the Hub or into a folder: what may be published of a run, in one commit, with the user's edits of the card."""

import logging
import os
from http import HTTPStatus
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from ..utils.files import free_path
from .card import CARD, make_card, read_card, retitled
from .published_files import (
    LIST,
    Place,
    folder_as_place,
    public_contents,
    read_list,
    stale_files,
    with_list,
    write_contents,
)


logger = logging.getLogger(__name__)


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


def fetch_place(repo_id: str, branch: str) -> tuple[str, Place]:
    r"""
    A branch as it is now.

    Args:
        repo_id (`str`): A repository that exists.
        branch (`str`): Made from `main` if it does not exist.

    Returns:
        `tuple[str, Place]`: Its commit, and what that holds.

    Raises:
        `OSError`: If it can't be read.
    """
    api = HfApi()
    try:
        if branch != "main":
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        commit = api.model_info(repo_id, revision=branch).sha
        files = api.list_repo_files(repo_id, revision=commit)
        # What the cache holds of a commit never is out of date.
        paths = {
            name: Path(api.hf_hub_download(repo_id, name, revision=commit)) for name in (CARD, LIST) if name in files
        }
    except Exception as error:  # of the network, whatever it is
        reason = first_line(error.__cause__ or error)
        raise OSError(
            f"what {repo_id} holds at {constants.ENDPOINT} can't be read ({reason}), and a push could overwrite it; "
            "nothing was pushed, try again."
        ) from error
    card = read_card(paths[CARD]) if CARD in paths else None
    return commit, Place(files, card, read_list(paths[LIST]) if LIST in paths else [])


def renewed_card(folder: Path, place: Place, name: str, license_name: str | None = None) -> str:
    """The card of a place that a folder goes to renewed, or if it has none that of the folder."""
    existing, here = place.card, read_card(folder / CARD)
    if existing is None and here is not None:
        existing = retitled(here, folder, name)
    return make_card(folder, existing, name, license_name)


def _write_card(folder: Path, card: str, name: str, license_name: str | None) -> None:
    """Replaces the folder's card; edits that are not in the new one stay in a copy."""
    path, here = folder / CARD, read_card(folder / CARD)
    if here is not None:
        renewed = make_card(folder, retitled(here, folder, name), name, license_name)
        if renewed not in (card, make_card(folder, None, name, license_name)):
            kept = free_path(folder / f"local-{CARD}")
            kept.write_text(here, encoding="utf-8")
            logger.warning("The card of %s has other edits than the one here, which is kept as %s.", name, kept)
    path.write_text(card, encoding="utf-8")


def push(
    folder: str | os.PathLike,
    repo_id: str,
    license_name: str | None = None,
    message: str = "Push by brics-diffusers",
    branch: str = "main",
    code: list[str] | None = None,
) -> str:
    r"""
    Pushes a run or a pipeline in one commit: its [`public_files`], with the card renewed. A card that is there keeps
    its edits, and is then the folder's own. Files of an earlier push that are no more are removed; others stay.

    Args:
        folder (`str`): Folder of the run or pipeline.
        repo_id (`str`): A repository that exists.
        license_name (`str`, *optional*): License of the weights for a card that names none.
        message (`str`): Message of the commit.
        branch (`str`, defaults to `"main"`): Made if it does not exist.
        code (`list[str]`, *optional*): More files, those that [`~remote_code.write_remote_code`] made.

    Returns:
        `str`: Address of the commit.

    Raises:
        `OSError`: If the branch can't be read, or has changed by the time of the commit; nothing is committed then.
    """
    folder = Path(folder)
    parent, place = fetch_place(repo_id, branch)
    card = renewed_card(folder, place, repo_id, license_name)
    contents = public_contents(folder, card) | {name: folder / name for name in code or []}
    operations = [CommitOperationDelete(name) for name in stale_files(place, contents)]
    operations += [CommitOperationAdd(name, content) for name, content in with_list(contents).items()]
    try:
        commit = HfApi().create_commit(
            repo_id, operations, commit_message=message, revision=branch, parent_commit=parent
        )
    except HfHubHTTPError as error:
        if error.response.status_code != HTTPStatus.PRECONDITION_FAILED:
            raise
        raise OSError(
            f"{repo_id} has changed since this push read it; nothing was pushed, push again to keep that change."
        ) from error
    _write_card(folder, card, repo_id, license_name)
    return commit.commit_url


def export(folder: str | os.PathLike, target: str | os.PathLike, license_name: str | None = None) -> Path:
    r"""
    Makes another folder hold what a push would publish, by the same rules: a card that is there keeps its edits, files
    of an earlier export that are no more are removed, others stay.

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
    if folder.resolve() == target.resolve():
        raise ValueError(f"{folder} would be copied onto itself; name another folder.")
    place = folder_as_place(target)
    card = renewed_card(folder, place, target.resolve().name, license_name)
    write_contents(target, place, public_contents(folder, card))
    return target / CARD

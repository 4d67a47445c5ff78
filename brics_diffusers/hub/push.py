"""Pushes to the Hub: whether a repository can take one, and one commit with what is published of a run."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, constants

from ..utils.errors import first_line
from .card import CARD
from .published_files import export, stale_patterns


def open_repository(name: str, private: bool) -> str:
    """
    Makes sure, before any work is done, that a repository, `user/name` or `name`, is there and that this machine's
    login may write to it; returns its `user/name`. One that does not exist is made, private if asked to; one that is
    public and must not be is a `ValueError`, one that can't be written to an `OSError`.
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


def push(
    folder: str | os.PathLike,
    repo_id: str,
    license_name: str | None = None,
    message: str = "Push by brics-diffusers",
    branch: str = "main",
) -> str:
    """
    Pushes a run or a pipeline in one commit, whose address is returned: what [`~published_files.export`] makes of it.
    A card that is there keeps its edits. Another branch is made from `main` if it does not exist. An `OSError` if the
    branch can't be read or written to, or changes while it is written to.
    """
    api = HfApi()
    # Beside the weights, as other file systems may be too small for them.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as copy:
        with _explained(repo_id):
            if branch != "main":
                api.create_branch(repo_id, branch=branch, exist_ok=True)
            commit = api.model_info(repo_id, revision=branch).sha
            if api.file_exists(repo_id, CARD, revision=commit):
                shutil.copyfile(api.hf_hub_download(repo_id, CARD, revision=commit), Path(copy, CARD))
        card = export(folder, copy, license_name, name=repo_id)
        with _explained(repo_id):
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=copy,
                delete_patterns=stale_patterns(folder, card.read_text(encoding="utf-8")),
                commit_message=message,
                revision=branch,
                parent_commit=commit,  # so that an edit in the meantime is not overwritten
            ).commit_url


@contextlib.contextmanager
def _explained(repo_id: str):
    """Gives errors of the network, whatever they are, a sentence of their own."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise OSError(f"the push to {repo_id} at {constants.ENDPOINT} failed ({reason}); push again.") from error

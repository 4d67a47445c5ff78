"""Folders that one program writes into at a time."""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout


logger = logging.getLogger(__name__)

LOCK = ".lock"


@contextlib.contextmanager
def locked_folder(
    folder: str | os.PathLike, flag: str = "--output_dir", is_main_process: bool = True
) -> Iterator[None]:
    """
    Keeps other programs that call this out of a folder, made if need be, within the context; a `BlockingIOError`, on
    every process, if one is at work in it. The lock is the operating system's: that of a process that is killed is
    gone with it. Call on every process; the main one holds the lock for all of them.
    """
    with contextlib.ExitStack() as stack:
        fault = None
        if is_main_process:
            try:
                stack.enter_context(_lock(Path(folder), flag))
            except OSError as error:
                fault = error
        (fault,) = broadcast_object_list([fault])
        if fault is not None:
            raise fault
        yield


@contextlib.contextmanager
def _lock(folder: Path, flag: str) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(
            f"{_holder(path)} is at work in {folder}; wait for its end, or name another {flag}."
        ) from None
    except OSError as error:  # a file system without locks
        logger.warning("%s can't be locked (%s); see to it that nothing else writes into it.", folder, error)
    else:
        with contextlib.suppress(OSError):  # on Windows, nobody can write into a file that is locked
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    try:
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):
                path.unlink()  # before its release, so that none can be taken on a file that is gone
            lock.release()


def _holder(path: Path) -> str:
    """Who has taken a lock, as far as its file tells."""
    with contextlib.suppress(OSError):
        if text := path.read_text().strip():
            return text
    return "another process"

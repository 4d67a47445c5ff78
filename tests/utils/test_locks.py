"""Folders for one process at a time."""

import multiprocessing
import os
import time

import filelock
import pytest

from brics_diffusers.utils.locks import LOCK, locked_folder


def _hold(folder, pipe, worker):
    with locked_folder(folder):
        started = os.fork() if worker else None
        if started != 0:  # the worker itself says nothing
            pipe.send(started)
        time.sleep(600)


def hold(folder, worker=False):
    """A process that holds the folder, and the number of one that it has started."""
    context = multiprocessing.get_context("fork")
    pipe, end = context.Pipe()
    process = context.Process(target=_hold, args=(folder, end, worker))
    process.start()
    end.close()  # that a process which ends early is not waited for
    return process, pipe.recv()


def test_one_process_at_a_time_until_it_is_killed(tmp_path):
    holder, _ = hold(tmp_path / "new")
    message = f"process {holder.pid} on .* is at work in .*new; wait for its end, or name another --samples_dir"
    with pytest.raises(BlockingIOError, match=message), locked_folder(tmp_path / "new", "--samples_dir"):
        pass
    with locked_folder(tmp_path / "other"):
        pass
    holder.kill()
    holder.join()
    with locked_folder(tmp_path / "new"):
        assert (tmp_path / "new" / LOCK).read_text().startswith(f"process {os.getpid()} ")
    assert list(tmp_path.glob("*/*")) == []  # nothing is left


def test_a_worker_that_is_left_behind_holds_nothing(tmp_path):
    holder, worker = hold(tmp_path, worker=True)
    holder.kill()
    holder.join()
    try:
        with locked_folder(tmp_path):
            os.kill(worker, 0)  # it is still there
    finally:
        os.kill(worker, 9)


def test_errors_free_the_folder_and_other_processes_take_none(tmp_path):
    with pytest.raises(ZeroDivisionError), locked_folder(tmp_path):
        1 / 0  # noqa: B018
    with locked_folder(tmp_path), locked_folder(tmp_path, is_main_process=False):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def acquire(self):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with locked_folder(tmp_path):
        assert "can't be locked ([Errno 38] Function not implemented); see to it" in caplog.text

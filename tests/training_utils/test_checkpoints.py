"""Folders that appear whole or not at all, and what is cleaned up after a kill."""

import itertools
import multiprocessing
import os
import time

import pytest

from brics_diffusers.training_utils.checkpoints import appearing_folder, clean_up, list_checkpoints


def save_forever(folder) -> None:
    for number in itertools.count():
        with appearing_folder(folder / f"checkpoint-{number}") as checkpoint:
            for name in "abcd":
                (checkpoint / name).write_bytes(bytes([number % 256]) * 100_000)


class TestAppearingFolder:
    def test_replaces_what_was_there(self, tmp_path):
        for text in ("first", "second"):
            with appearing_folder(tmp_path / "folder") as folder:
                (folder / "file").write_text(text)
                assert not (tmp_path / "folder" / "file").exists() or text == "second"
            assert (tmp_path / "folder" / "file").read_text() == text
        assert os.listdir(tmp_path) == ["folder"]

    def test_error_leaves_what_was_there(self, tmp_path):
        with appearing_folder(tmp_path / "folder") as folder:
            (folder / "file").write_text("first")
        with pytest.raises(RuntimeError, match="broken"), appearing_folder(tmp_path / "folder") as folder:
            (folder / "file").write_text("second")
            raise RuntimeError("broken")
        assert (tmp_path / "folder" / "file").read_text() == "first"
        assert os.listdir(tmp_path) == ["folder"]

    @pytest.mark.parametrize("delay", [0.0, 0.02, 0.05, 0.1])
    def test_kill_at_any_moment(self, tmp_path, delay):
        process = multiprocessing.get_context("fork").Process(target=save_forever, args=(tmp_path,))
        process.start()
        while not list_checkpoints(tmp_path):
            assert process.is_alive()
            time.sleep(0.005)
        time.sleep(delay)
        process.kill()
        process.join()
        checkpoints = list_checkpoints(tmp_path)
        assert [path.name for path in checkpoints] == [f"checkpoint-{i}" for i in range(len(checkpoints))]
        for number, path in enumerate(checkpoints):
            for name in "abcd":
                assert (path / name).read_bytes() == bytes([number % 256]) * 100_000


class TestCleanUp:
    @pytest.mark.parametrize("kind", ["partial", "removed"])
    def test_what_is_not_whole_goes(self, tmp_path, kind):
        (tmp_path / "checkpoint-4").mkdir()
        (tmp_path / f".{kind}-checkpoint-8").mkdir()
        clean_up(tmp_path)
        assert os.listdir(tmp_path) == ["checkpoint-4"]

    def test_what_was_being_replaced_comes_back(self, tmp_path):
        (tmp_path / ".old-folder").mkdir()
        (tmp_path / ".old-folder" / "file").write_text("first")
        (tmp_path / ".partial-folder").mkdir()
        clean_up(tmp_path)
        assert (tmp_path / "folder" / "file").read_text() == "first" and os.listdir(tmp_path) == ["folder"]

    def test_what_has_been_replaced_goes(self, tmp_path):
        for name, text in ((".old-folder", "first"), ("folder", "second")):
            (tmp_path / name).mkdir()
            (tmp_path / name / "file").write_text(text)
        clean_up(tmp_path)
        assert (tmp_path / "folder" / "file").read_text() == "second" and os.listdir(tmp_path) == ["folder"]


def test_list_checkpoints(tmp_path):
    for name in ("checkpoint-20", "checkpoint-3", ".partial-checkpoint-40", "checkpoint-x", "logs"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-99").write_text("a file")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-20"]

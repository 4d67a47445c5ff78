"""Digests of weights, files that appear whole, and the cache's folder."""

import pytest
import torch

from brics_diffusers.utils.files import atomic_write, default_cache_dir, weights_digest


def test_digest_follows_the_weights():
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    before = weights_digest({"a": module})
    assert before == weights_digest({"a": module}) != weights_digest({"b": module})
    module[1].running_mean[0] += 1e-6  # a buffer
    changed = weights_digest({"a": module})
    assert changed != before
    assert weights_digest({"a": module.to(torch.bfloat16)}) != changed


def test_files_appear_complete_or_not_at_all(tmp_path):
    path = tmp_path / "file.bin"
    with pytest.raises(OSError, match="disk full"), atomic_write(path) as file:
        file.write(b"half")
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []
    with atomic_write(path) as file:
        file.write(b"whole")
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [b"whole"]


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "brics_diffusers"

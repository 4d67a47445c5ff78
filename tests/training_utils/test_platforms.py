"""What other systems lack, as far as that can be tried on this one."""

import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from small_models import ROOT

from brics_diffusers.data.images import only_the_parent_terminates
from brics_diffusers.training_utils import processes


# Modules that are not on Windows, for this package's own code alone, and functions that are on Linux only.
WITHOUT = """
import builtins, os, signal, torch
everything = builtins.__import__
def import_here(name, globals=None, *args, **kwargs):
    ours = (globals or {}).get("__name__", "").startswith(("brics_diffusers", "train_"))
    if ours and name in ("resource", "fcntl", "pwd", "grp", "termios"):
        raise ImportError(name)
    return everything(name, globals, *args, **kwargs)
builtins.__import__ = import_here
for module, name in ((signal, "sigwaitinfo"), (signal, "pthread_sigmask"), (os, "sched_getaffinity")):
    delattr(module, name)
import train_autoencoder, train_key_codes
import brics_diffusers.commands, importlib
for name in brics_diffusers.commands.COMMANDS:
    importlib.import_module(f"brics_diffusers.commands.{name}")
from brics_diffusers.training_utils.processes import default_num_workers, peak_memory
assert peak_memory(torch.device("cpu")) is None and default_num_workers(torch.device("cpu"), 1) == 0
"""


@pytest.mark.slow
def test_imports_need_nothing_that_windows_and_macos_lack():
    words = [sys.executable, "-c", WITHOUT]
    done = subprocess.run(words, cwd=ROOT / "training", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_workers_on_systems_without_sigwaitinfo(monkeypatch):
    monkeypatch.delattr(signal, "sigwaitinfo")
    before = threading.active_count(), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    only_the_parent_terminates(0)
    assert (threading.active_count(), signal.pthread_sigmask(signal.SIG_BLOCK, ())) == before


def test_peak_memory_is_in_mib_on_linux_and_macos(monkeypatch):
    memory = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda _: SimpleNamespace(ru_maxrss=3 * 2**20))
    monkeypatch.setattr(processes, "resource", memory)
    for platform, expected in (("linux", 3 * 2**10), ("darwin", 3)):
        monkeypatch.setattr(sys, "platform", platform)
        assert processes.peak_memory(torch.device("cpu")) == expected

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


WORKER = """
import signal, torch
from pathlib import Path
torch.set_num_threads(4)
from brics_diffusers.data.images import training_loader
batches = iter(training_loader(torch.arange(8.0), 2, num_workers=1))
next(batches)
for task in Path(f"/proc/{batches._workers[0].pid}/task").iterdir():
    masks = [line.split()[1] for line in (task / "status").read_text().splitlines() if line.startswith("SigBlk")]
    print(int(masks[0], 16) >> (signal.SIGTERM - 1) & 1)
print(signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_thread_of_a_worker_lets_sigterm_in(run_python):
    """Torch starts some before anything of ours runs there, where it has several in the process that forks."""
    *blocked, here = run_python(WORKER).split()
    # Linux lets it in at the one thread that waits for it, while it waits.
    assert len(blocked) > 2 and blocked.count("0") <= 1 and here == "False"


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

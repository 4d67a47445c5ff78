import pytest
from accelerate import PartialState


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Commands run on the CPU, and leave the next test to choose its own device."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    PartialState._reset_state()
    yield
    PartialState._reset_state()


@pytest.fixture
def saved_pipe(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"

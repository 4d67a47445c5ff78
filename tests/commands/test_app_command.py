"""`brics-diffusers app` in a browser: samples, reconstructions, interpolations; and starts that fail."""

import re
import socket
import sys
import threading
import time

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from PIL import Image

from brics_diffusers import BricsKeyCodePipeline
from brics_diffusers.commands import main
from brics_diffusers.data.images import center_crop_resize


gradio = pytest.importorskip("gradio", reason="the page needs gradio")


@pytest.fixture
def asked(monkeypatch):
    """Hosts that this process looks up."""
    hosts, look_up = set(), socket.getaddrinfo

    def record(host, *arguments, **options):
        hosts.add(host.decode() if isinstance(host, bytes) else host)
        return look_up(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", record)
    return hosts


@pytest.fixture
def address(saved_pipe, tmp_path, monkeypatch, capsys, asked):
    """Where the page is, opened by the command, which does not wait for its end here."""
    opened = []
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda app: opened.append(app))
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    main(["app", str(saved_pipe), "--port", str(port)])
    (app,) = opened
    text = capsys.readouterr().out
    assert text == f"Serving {saved_pipe} at http://127.0.0.1:{port}/\n"
    yield f"http://127.0.0.1:{port}/"
    app.close()
    assert asked <= {"127.0.0.1", "localhost"}


@pytest.fixture
def browser(address):
    pytest.importorskip("selenium", reason="tests of the page in a browser need selenium")
    from browser import Browser, programs

    if None in programs():
        pytest.skip("tests of the page in a browser need chromium and chromedriver")
    browser = Browser(address)
    yield browser
    hosts = browser.hosts()
    browser.driver.quit()
    assert hosts == {re.search("//(.*)/", address)[1]}  # it works without a network


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def arrays(images):
    return np.stack([np.array(image) for image in images])


def make(browser, tab):
    """Presses a tab's button, and waits for its pictures to change."""
    before = browser.sources(f"#{tab}-result")
    browser.click(f"#{tab}-button")
    browser.wait(lambda: browser.sources(f"#{tab}-result") not in ([], before))
    return browser.pictures(f"#{tab}-result")


def test_samples_in_a_browser(browser, pipe):
    browser.type("#steps input[type=number]", "3")
    first = make(browser, "sample")
    browser.type("#seed input", "1")
    second = make(browser, "sample")
    browser.type("#seed input", "0")
    again = make(browser, "sample")
    assert (first != second).any() and (first == again).all()

    browser.type("#seed input", "1.5")
    browser.click("#sample-button")
    browser.wait(lambda: "The seed is 1.5; it must be a whole number" in browser.all("body")[0].text)

    browser.type("#seed input", "0")
    browser.click("#sampler input")
    browser.click("[role=option]", "DDIM")
    browser.wait(lambda: browser.all("#steps input[type=number]")[0].get_attribute("value") == "50")
    browser.type("#steps input[type=number]", "3")
    other = make(browser, "sample")

    config = pipe.scheduler.config
    for pictures, scheduler, seed in (
        (first, DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True), 0),
        (second, DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True), 1),
        (other, DDIMScheduler.from_config(config), 0),
    ):
        pipe.scheduler = scheduler
        assert (pictures == arrays(pipe(4, 3, generator=seeded(seed)).images)).all()


def test_reconstructions_in_a_browser(browser, pipe, image_folder):
    browser.click("[role=tab]", "Reconstruct")
    browser.upload("#reconstruct-image", image_folder / "03.png")
    made = make(browser, "reconstruct")
    square = center_crop_resize(Image.open(image_folder / "03.png"), 32)
    assert (browser.pictures("#reconstruct-square") == arrays([square])).all()
    assert (made == arrays(pipe.reconstruct(square).images)).all()


def test_interpolations_in_a_browser(browser, pipe, image_folder):
    browser.click("[role=tab]", "Interpolate")
    files = [image_folder / name for name in ("03.png", "04.png")]
    browser.type("#steps input[type=number]", "4")
    for place, file in zip(("first", "second"), files, strict=True):
        browser.upload(f"#interpolate-{place}", file)
    made = make(browser, "interpolate")
    squares = [center_crop_resize(Image.open(file), 32) for file in files]
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    assert (made == arrays(pipe.interpolate(*squares, 8, 0.3, 4, generator=seeded(0)).images)).all()


def test_one_request_at_a_time(address, image_folder, monkeypatch):
    from gradio_client import Client, handle_file
    from gradio_client.utils import Status

    denoise, running, seen, go_on = BricsKeyCodePipeline._denoise, [], [], threading.Event()

    def slowly(*arguments):
        running.append(None)
        assert go_on.wait(60)
        seen.append(len(running))
        result = denoise(*arguments)
        running.pop()
        return result

    monkeypatch.setattr(BricsKeyCodePipeline, "_denoise", slowly)
    client = Client(address, verbose=False, analytics_enabled=False, download_files=False)
    image = handle_file(image_folder / "00.png")
    jobs = [client.submit(0, 2, "DDIM", 1, api_name="/sample")]
    jobs += [client.submit(0, 2, "DDIM", image, image, 1, 1.0, api_name="/interpolate")]
    while any(job.status().code not in (Status.IN_QUEUE, Status.PROCESSING) for job in jobs):
        time.sleep(0.1)
    time.sleep(1)  # if they could run at once, both would run by now
    go_on.set()
    assert [len(job.result(60)) for job in jobs] == [1, 3]
    assert seen == [1, 1]


def test_port_that_is_taken(saved_pipe):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match=f"brics-diffusers app: .*{port}"):
            main(["app", str(saved_pipe), "--port", str(port)])


def test_without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(
        SystemExit, match=r"the page needs gradio; install it with `pip install brics-diffusers\[app\]`"
    ):
        main(["app", "no-model"])

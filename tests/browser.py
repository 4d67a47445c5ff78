"""A headless Chromium on a page of `brics-diffusers app`."""

import base64
import io
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait


FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--window-size=1280,900",
    "--force-color-profile=srgb",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # the page has to work without a network
)
VISIBLE = "const all = [...document.querySelectorAll(arguments[0])].filter(e => e.getClientRects().length);"
SOURCES = "return all.every(e => e.complete && e.naturalWidth) ? all.map(e => e.src) : [];"
# Pixels as the browser decodes them: canvases of the pictures' own sizes, as PNG.
PICTURES = """
return all.map(picture => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
    canvas.getContext("2d").drawImage(picture, 0, 0);
    return canvas.toDataURL("image/png").split(",")[1];
});
"""
SECONDS = 60  # on a busy machine


def programs() -> tuple[str | None, str | None]:
    """Chromium and its driver, `None` if they are not installed. Selenium is not to look for any, let alone fetch."""
    return shutil.which("chromium"), shutil.which("chromedriver")


class Browser:
    """Chromium with one page open."""

    def __init__(self, address: str):
        options = webdriver.ChromeOptions()
        options.binary_location, driver = programs()
        for flag in FLAGS:
            options.add_argument(flag)
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(driver))
        self.driver.get(address)

    def wait(self, condition):
        """The first true value of `condition()`."""
        return WebDriverWait(self.driver, SECONDS, poll_frequency=0.1).until(lambda _: condition())

    def all(self, selector: str, then: str = "return all;") -> list:
        """Visible elements, or what a script makes of them."""
        return self.driver.execute_script(VISIBLE + then, selector)

    def click(self, selector: str, text: str | None = None) -> None:
        """Clicks the first visible element that has the text, once there is one."""
        self.wait(lambda: [e for e in self.all(selector) if text is None or e.text.strip() == text])[0].click()

    def type(self, selector: str, text: str) -> None:
        """Replaces the text of a field."""
        self.wait(lambda: self.all(selector))[0].send_keys(Keys.CONTROL, "a", Keys.NULL, text, Keys.TAB)

    def upload(self, selector: str, path: Path) -> None:
        """Gives a file to a field for images, until its preview is there."""
        self.driver.find_element(By.CSS_SELECTOR, f"{selector} input[type=file]").send_keys(str(path))
        self.wait(lambda: self.sources(selector))

    def sources(self, selector: str) -> list[str]:
        """Addresses of the pictures within an element; none while one of them is being loaded."""
        return self.all(f"{selector} img", SOURCES)

    def pictures(self, selector: str) -> np.ndarray:
        """Pictures within an element, (N, H, W, 3)."""
        files = [io.BytesIO(base64.b64decode(text)) for text in self.all(f"{selector} img", PICTURES)]
        images = [Image.open(file).convert("RGB") for file in files]
        return np.stack([np.array(image) for image in images])

    def hosts(self) -> set[str]:
        """Whom the page has asked for anything."""
        names = "return performance.getEntriesByType('resource').map(entry => new URL(entry.name).host)"
        return set(self.driver.execute_script(names))

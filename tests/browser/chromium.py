"""A headless Chromium for the pages' tests. It needs Debian's chromium and chromedriver, and no network."""

import importlib.util
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CURE = "apt-get install -y --no-install-recommends chromium chromium-driver"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars --force-color-profile=srgb"
)


def require() -> tuple[str, str]:
    """Paths of browser and driver; where one is missing the test is skipped, or fails if CI asks for it."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    selenium = importlib.util.find_spec("selenium")
    if browser and driver and selenium:
        return browser, driver
    missing = [name for name, found in (("chromium", browser), ("chromedriver", driver)) if not found]
    cures = [CURE] * bool(missing) + ["pip install selenium"] * (selenium is None)
    message = f"browser tests: no {', '.join([*missing, *['selenium'] * (selenium is None)])}: {'; '.join(cures)}"
    if os.environ.get("CI") or os.environ.get("MEGATRON_SAGE_REQUIRE_BROWSER") == "1":
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


class Page:
    """One tab: what a reader does and sees."""

    def __init__(self, driver: Any, downloads: Path) -> None:
        self.driver, self.downloads = driver, downloads

    def open(self, path: Path, query: str = "") -> "Page":
        """A file of this machine, as file://."""
        self.driver.get(path.resolve().as_uri() + query)
        return self

    def run(self, script: str, *arguments: Any) -> Any:
        """The script's return value."""
        return self.driver.execute_script(script, *arguments)

    def click(self, css: str) -> None:
        """Where a mouse would: an element that something hides is an error."""
        self.driver.find_element("css selector", css).click()

    def choose(self, css: str, text: str) -> None:
        """An option of a select by its text."""
        from selenium.webdriver.support.ui import Select

        Select(self.driver.find_element("css selector", css)).select_by_visible_text(text)

    def type(self, css: str, text: str) -> None:
        """Into a field."""
        self.driver.find_element("css selector", css).send_keys(text)

    def key(self, *keys: str) -> None:
        """To the page, wherever the focus is."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def texts(self, css: str) -> list[str]:
        """Texts of all matching elements, as shown."""
        return [element.text for element in self.driver.find_elements("css selector", css)]

    def wait(self, script: str, seconds: float = 10.0) -> Any:
        """Until the script returns something true."""
        return until(lambda: self.run(script), seconds, script)

    def errors(self) -> list[str]:
        """What the console has complained about since the last call."""
        found = self.driver.get_log("browser")
        return [entry["message"] for entry in found if entry["level"] in ("WARNING", "SEVERE")]

    def download(self, name: str) -> Any:
        """The JSON file that the page has saved under this name."""
        file = self.downloads / name
        until(lambda: file.is_file() and file.stat().st_size > 0, 10.0, f"download of {name}")
        return json.loads(file.read_text(encoding="utf-8"))

    def shot(self, name: str, width: int = 1280, height: int = 900) -> Path:
        """A picture of the window, in MEGATRON_SAGE_SCREENSHOTS if that is set."""
        folder = Path(os.environ.get("MEGATRON_SAGE_SCREENSHOTS", self.downloads))
        folder.mkdir(parents=True, exist_ok=True)
        self.driver.set_window_size(width, height)
        time.sleep(0.3)
        self.driver.save_screenshot(str(folder / f"{name}.png"))
        return folder / f"{name}.png"


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Its first true value; AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds:g} s: {what}")


@contextmanager
def browser(flags: str = "") -> Iterator[Page]:
    """A browser with a profile of its own, gone afterwards."""
    binary, driver_path = require()
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory(prefix="chromium_", ignore_cleanup_errors=True) as home:
        downloads = Path(home) / "downloads"
        downloads.mkdir()
        options = webdriver.ChromeOptions()
        options.binary_location = binary
        for flag in [*FLAGS.split(), *flags.split(), f"--user-data-dir={home}/profile", "--window-size=1280,900"]:
            options.add_argument(flag)
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(driver_path))
        driver.set_page_load_timeout(60)
        try:
            yield Page(driver, downloads)
        finally:
            driver.quit()

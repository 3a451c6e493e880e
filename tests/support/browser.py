"""A headless Chromium for tests of pages, driven by Selenium; both come from outside, and a test skips without them."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSERS, DRIVERS = ("chromium", "chromium-browser", "google-chrome"), ("chromedriver",)


def programs() -> tuple[str, str]:
    """The browser and its driver. Skips the test, and says what to install, if one is missing."""
    pytest.importorskip("selenium", reason="selenium of requirements/dev.txt is not installed")
    found = [next(filter(None, map(shutil.which, names)), None) for names in (BROWSERS, DRIVERS)]
    if found[0] is None or found[1] is None:
        pytest.skip("no Chromium with its driver here; Debian's packages are chromium and chromium-driver")
    return found[0], found[1]


@contextlib.contextmanager
def opened(
    downloads: Path, *, width: int = 1280, height: int = 900, dark: bool = False, folder: Path | None = None
) -> Iterator[Any]:
    """A browser's WebDriver. folder: what the browser keeps; a later browser on the same folder finds it again."""
    browser, driver_program = programs()
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    # Debian starts Chromium in a sandbox that a container has not
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.add_argument(f"--window-size={width},{height}")
    options.add_argument(f"--user-data-dir={folder or downloads / 'profile'}")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver_program))
    try:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        yield driver
    finally:
        driver.quit()

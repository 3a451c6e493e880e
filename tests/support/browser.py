"""A headless Chromium for tests of pages, driven by Selenium; both come from outside, and a test skips without them."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ds_dpo.evaluation.pages.page import write_page
from ds_dpo.evaluation.results import Results

BROWSERS, DRIVERS = ("chromium", "chromium-browser", "google-chrome"), ("chromedriver",)


def programs() -> tuple[str, str]:
    """The browser and its driver. Skips the test, and says what to install, if one is missing."""
    pytest.importorskip("selenium", reason="selenium of requirements/dev.txt is not installed")
    found = [next(filter(None, map(shutil.which, names)), None) for names in (BROWSERS, DRIVERS)]
    if found[0] is None or found[1] is None:
        pytest.skip("no Chromium with its driver here; Debian's packages are chromium and chromium-driver")
    return found[0], found[1]


LEFT, RIGHT, UP, BACKSPACE, ENTER, ESCAPE = "\ue012", "\ue014", "\ue013", "\ue003", "\ue007", "\ue00c"
# the text of a prompt that would run if it were taken for markup
NASTY = "<script>window.ran = 1</script><img src=x onerror='window.ran = 2'>"


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


class Page:
    """A page in a browser, and what a person does with it."""

    def __init__(self, driver: Any, path: Path, downloads: Path) -> None:
        self.driver, self.path, self.downloads = driver, path, downloads
        self.open()

    def open(self) -> None:
        self.driver.get(self.path.as_uri())

    def run(self, program: str, *given: object) -> Any:
        return self.driver.execute_script(program, *given)

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def wait(self, program: str, *given: object) -> Any:
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, 30, poll_frequency=0.02).until(lambda _: self.run(program, *given))

    def choose(self, name: str, value: object) -> None:
        """Choose an option of a select, or write into a field."""
        event = "const field = document.getElementById(arguments[0]); field.value = arguments[1];"
        kinds = "for (const kind of ['input', 'change']) field.dispatchEvent(new Event(kind, {bubbles: true}));"
        self.run(event + kinds, name, str(value))

    def click(self, selector: str) -> None:
        self.driver.find_element("css selector", selector).click()

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def texts(self, selector: str) -> list[str]:
        return self.run(
            "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent.trim())", selector
        )

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


def open_page(driver: tuple[Any, Path], folder: Path, results: Results) -> Page:
    page = Page(driver[0], write_page(results, folder), driver[1])
    page.complaints()  # of an earlier page
    return page

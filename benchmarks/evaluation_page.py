"""Print how long the page of an evaluation takes to open in a headless Chromium, and how many elements it holds.

Makes an evaluation of N pairs with images of its own, opens its page from a file, and waits for the first frame of the
summary and of the gallery. Needs Chromium with its driver, and selenium.

Examples:
    python benchmarks/evaluation_page.py
    python benchmarks/evaluation_page.py --pairs 12800 --pixels 512
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import pytest  # noqa: E402
from browser import opened, programs  # noqa: E402
from made_evaluation import made_results  # noqa: E402

from ds_dpo.evaluation.pages.page import write_page  # noqa: E402

FRAME = "requestAnimationFrame(() => requestAnimationFrame(() => arguments[arguments.length - 1](performance.now())))"
GALLERY = "const start = performance.now(); const done = arguments[arguments.length - 1];"
GALLERY += "document.querySelector('[data-view=gallery]').click(); const look = () => {"
GALLERY += "const all = [...document.querySelectorAll('.pair img')].filter((image) => "
GALLERY += "image.getBoundingClientRect().top < innerHeight);"
GALLERY += "if (all.length && all.every((image) => image.complete)) done(performance.now() - start);"
GALLERY += "else requestAnimationFrame(look); }; look();"
SEARCH = "const start = performance.now(); const done = arguments[arguments.length - 1];"
SEARCH += "const field = document.getElementById('search'); field.value = '1'; field.dispatchEvent(new Event('input'));"
SEARCH += "requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - start)));"


def measure(driver: Any, page: Path) -> dict[str, float]:
    start = time.perf_counter()
    driver.get(page.as_uri())
    driver.execute_async_script(FRAME)
    opened_in = time.perf_counter() - start
    gallery = driver.execute_async_script(GALLERY) / 1000
    return {
        "summary shown, s": opened_in,
        "gallery shown with its images, s": gallery,
        "search, s": driver.execute_async_script(SEARCH) / 1000,
        "elements of the gallery": driver.execute_script("return document.querySelectorAll('*').length"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3200, help="Number of pairs (default: 3200).")
    parser.add_argument("--pixels", type=int, default=256, help="Side of each image in pixels (default: 256).")
    parser.add_argument("--times", type=int, default=5, help="Number of openings (default: 5).")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompts = [f"a prompt of usual length, number {number}, with a red cat" for number in range(arguments.pairs)]
        results = made_results(folder, prompts=prompts, pixels=arguments.pixels)
        start = time.perf_counter()
        page = write_page(results, folder)
        print(f"{arguments.pairs} pairs; the page has {page.stat().st_size / 2**20:.1f} MiB, written in "
              f"{time.perf_counter() - start:.2f} s")  # fmt: skip
        try:
            programs()
        except pytest.skip.Exception as error:
            sys.exit(str(error))
        with opened(folder) as driver:
            found = [measure(driver, page) for _ in range(arguments.times)]
        for title in found[0]:
            values = [each[title] for each in found]
            print(f"{title}: median {statistics.median(values):.2f}, largest {max(values):.2f}")


if __name__ == "__main__":
    main()

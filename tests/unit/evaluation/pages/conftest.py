from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import opened


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    downloads = tmp_path_factory.mktemp("downloads")
    with opened(downloads) as driver:
        yield driver, downloads

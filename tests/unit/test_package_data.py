"""What setup.py puts into a wheel beside modules: every data file of the package, wherever it is."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import setuptools
from repository import PACKAGE, ROOT


def test_every_data_file_is_in_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **options: given.update(options))
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    shipped = {
        path
        for package, patterns in given["package_data"].items()
        for pattern in patterns
        for path in (ROOT / Path(*package.split("."))).glob(pattern)
    }
    data = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert {str(path.relative_to(PACKAGE)) for path in data - shipped} == set()
    assert PACKAGE / "export" / "card" / "card.md.jinja" in shipped
    assert {PACKAGE / "assets" / "recipes.yaml", PACKAGE / "presets" / "miniature.yaml"} <= shipped

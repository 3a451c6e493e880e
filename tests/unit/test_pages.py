"""The pages name only files that exist, and the page on the layout names every package."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from repository import PACKAGE, ROOT

FOLDERS = ("ds_dpo", "scripts", "tests", "docs", "benchmarks", "ds_configs", "hostfiles", "requirements")
PAGES = ("README.md", "CONTRIBUTING.md", "docs/*.md", "ds_configs/*.md", "hostfiles/*.md", "tests/**/*.md")
LINK = re.compile(r"\]\(([^)#\s]+)")
PATH = re.compile(rf"(?<![\w./:~-])(?:{'|'.join(FOLDERS)})/[\w./*{{}}-]*")
ASSET = re.compile(r"ds_dpo://([\w./-]+)")
MODULE = re.compile(r"\bds_dpo(?:\.[a-z_]+)+\b(?!/)")
# a module or script by its last name, as trees have it
BARE_NAME = re.compile(r"(?<![\w./:~*<-])(?:[\w-]+/)*[\w-]+\.(?:py|sh|sbatch)\b")
# what other projects call theirs
FOREIGN = {"train_text_to_image.py", "train_diffusion_dpo.py", "utils.py"}


def pages() -> list[Path]:
    return sorted(path for pattern in PAGES for path in ROOT.glob(pattern))


@cache
def files() -> frozenset[str]:
    found = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
    return frozenset(path.relative_to(ROOT).as_posix() for path in [*found, *ROOT.iterdir()])


def missing(text: str, folder: Path) -> Iterator[str]:
    """Yield what a page in a folder names and is not there."""
    for target in LINK.findall(text):
        if "://" not in target and not (folder / target).exists():
            yield target
    for path in [*PATH.findall(text), *(f"ds_dpo/{inside}" for inside in ASSET.findall(text))]:
        if not any(ROOT.glob(path.rstrip("./"))):
            yield path
    for name in MODULE.findall(text):
        module = ROOT.joinpath(*name.split("."))
        # the last part may be a function or a class of the module
        if not any(place.is_dir() or place.with_suffix(".py").is_file() for place in (module, module.parent)):
            yield name
    for name in BARE_NAME.findall(text):
        if name not in FOREIGN and not any(file == name or file.endswith(f"/{name}") for file in files()):
            yield name


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_names_exists(page: Path) -> None:
    assert sorted(set(missing(page.read_text(encoding="utf-8"), page.parent))) == []


def test_what_is_not_there_is_found() -> None:
    text = (
        "[a](docs/gone.md#part) `ds_dpo/gone.py` (scripts/gone/) ds_dpo://assets/gone `ds_dpo.config.gone.name` "
        "gone.py data/order.py hostfiles/gone* see ds_dpo/batch.py. [b](docs/data.md#bar) <https://x.org/scripts/x.py> "
        "ds_dpo/presets/*.yaml ds_dpo.batch.stack_pair runs/gone.py stream/order.py train.py"
    )
    assert sorted(missing(text, ROOT)) == [
        "data/order.py",
        "docs/gone.md",
        "docs/gone.md",  # as a link, and as a path
        "ds_dpo.config.gone.name",
        "ds_dpo/assets/gone",
        "ds_dpo/gone.py",
        "ds_dpo/gone.py",
        "gone.py",
        "hostfiles/gone*",
        "runs/gone.py",
        "scripts/gone/",
    ]


def test_names_of_other_projects_are_still_named() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages())
    assert [name for name in FOREIGN if name not in text] == []


def test_every_package_is_named_in_the_page_on_the_layout() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    packages = [path.parent.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("__init__.py")]
    assert [name for name in packages if f"`{name}/`" not in text and name != "ds_dpo"] == []


def test_the_page_on_the_layout_has_the_layers_that_are_checked() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (layers,) = [each["layers"] for each in contracts if each.get("containers") == ["ds_dpo"]]
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert "\n".join(f"    {row}" for row in layers) in text

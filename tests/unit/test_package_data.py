"""What a wheel holds: every module and data file of the package, and the program ds-dpo."""

import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from repository import PACKAGE, ROOT

from ds_dpo.config.version import VERSION

SOURCES = ("ds_dpo", "ds_configs", "setup.py", "pyproject.toml", "README.md")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel of this checkout, built in a copy of it, since a build leaves folders beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        place = ROOT / name
        if place.is_dir():
            shutil.copytree(place, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(place, folder / "source" / name)
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(folder)]
    subprocess.run(command, cwd=folder / "source", check=True, capture_output=True, timeout=120)
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built)


def _files_of(folder: Path) -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_every_module_and_data_file_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = _files_of(PACKAGE) | {path for path in _files_of(ROOT / "ds_configs") if path.endswith(".json")}
    assert shipped == expected
    assert {
        "ds_dpo/__main__.py",
        "ds_dpo/assets/recipes.yaml",
        "ds_dpo/assets/run.schema.json",
        "ds_dpo/export/card/card.md.jinja",
        "ds_dpo/presets/miniature.yaml",
        "ds_configs/zero2_bf16.json",
    } <= shipped


def test_the_wheel_installs_the_program(wheel: zipfile.ZipFile) -> None:
    info = f"ds_dpo-{VERSION}.dist-info"
    scripts = configparser.ConfigParser()
    scripts.read_string(wheel.read(f"{info}/entry_points.txt").decode())
    assert dict(scripts["console_scripts"]) == {"ds-dpo": "ds_dpo.__main__:main"}
    assert f"\nVersion: {VERSION}\n" in wheel.read(f"{info}/METADATA").decode()


def test_no_shipped_text_has_a_path_of_the_machine_that_made_it() -> None:
    texts = [path for path in PACKAGE.rglob("*") if path.suffix in (".json", ".yaml", ".txt")]
    assert len(texts) > 40
    named = ('"_name_or_path"', "/home/", "/root/", "/tmp/", "/work/", "file://")
    assert not [(path, word) for path in texts for word in named if word in path.read_text(encoding="utf-8")]

"""Printed commands fit how the user started the program, and can be pasted into a shell."""

import shlex
import sys
from pathlib import Path

import pytest
from repository import ROOT

from ds_dpo.config import command_text as module
from ds_dpo.config.command_text import command_text, commands_as_started, with_start
from ds_dpo.errors import DataError

TEXT = "deepspeed --num_gpus 8 scripts/cache.py --out x; python scripts/data_stats.py; see ds_dpo/train.py --help"


@pytest.mark.parametrize(
    ("started_as", "expected"),
    [
        ("scripts/replay.py", "python scripts/data_stats.py"),
        ("/somewhere/ds_dpo/train.py", "python scripts/data_stats.py"),
        ("/venv/bin/ds-dpo", "ds-dpo data-stats"),
        ("/venv/lib/ds_dpo/__main__.py", "python -m ds_dpo data-stats"),
    ],
)
def test_a_command_fits_how_the_program_was_started(
    monkeypatch: pytest.MonkeyPatch, started_as: str, expected: str
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [started_as])
    assert command_text("data-stats") == expected


def test_from_another_folder_a_script_is_named_by_its_whole_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "ds_dpo" / "train.py")])
    assert command_text("consolidate") == f"python {ROOT}/scripts/consolidate.py"


def test_without_a_checkout_the_installed_program_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["/venv/lib/python/site-packages/ds_dpo/train.py"])
    assert command_text("consolidate", "a", "b") == "ds-dpo consolidate a b"


@pytest.mark.parametrize("name", ["runs/my run", "it's", "a;b", "$HOME", "ü (1)", "plain/run"])
def test_arguments_are_quoted(name: str) -> None:
    assert shlex.split(command_text("consolidate", Path(name), "OUT"))[-2:] == [name, "OUT"]


def test_a_checkout_with_a_blank_in_its_path_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "my code" / "scripts").mkdir(parents=True)
    (tmp_path / "my code" / "scripts" / "consolidate.py").touch()
    monkeypatch.setattr(module, "ROOT", tmp_path / "my code")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert command_text("replay", "x") == f"python '{tmp_path}/my code/scripts/replay.py' x"


def test_help_texts_name_the_installed_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/venv/bin/ds-dpo"])
    assert with_start(TEXT) == (
        "deepspeed --num_gpus 8 --module ds_dpo cache --out x; ds-dpo data-stats; see ds-dpo train --help"
    )
    assert with_start("python scripts/launch.py -H f ds_dpo/train.py") == "ds-dpo launch -H f train"
    monkeypatch.setattr(sys, "argv", ["scripts/cache.py"])
    assert with_start(TEXT) == TEXT


def test_a_message_names_the_installed_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/venv/bin/ds-dpo"])
    with pytest.raises(DataError) as raised, commands_as_started():
        raise DataError("it was not finished: run scripts/cache.py --reference again")
    assert str(raised.value) == "it was not finished: run ds-dpo cache --reference again"

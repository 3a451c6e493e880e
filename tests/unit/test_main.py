"""The program ds-dpo: its commands, and that scripts/ starts the same ones."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from repository import ROOT

from ds_dpo.__main__ import COMMANDS
from ds_dpo.config.load import preset_names
from ds_dpo.config.version import VERSION
from ds_dpo.launch.prepare import TRAIN_WORD

SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environ, capture_output=True, text=True, timeout=120
    )


def test_every_command_has_a_main_and_a_script() -> None:
    assert TRAIN_WORD in COMMANDS
    for name, command in COMMANDS.items():
        assert callable(import_module(command.module).main), name
        script = ROOT / ("ds_dpo" if name == "train" else "scripts") / f"{name.replace('-', '_')}.py"
        assert script.is_file()
        if name != "train":
            assert f'run_command("{name}")' in script.read_text(encoding="utf-8")
    modules = {path.stem for path in (ROOT / "ds_dpo" / "commands").glob("*.py")} - {"__init__", "parser"}
    assert {command.module for command in COMMANDS.values()} == {
        "ds_dpo.train",
        *(f"ds_dpo.commands.{name}" for name in modules),
    }


def test_the_entry_lists_its_commands_and_its_version(tmp_path: Path) -> None:
    listed = run("-m", "ds_dpo", "--help", cwd=tmp_path)
    assert listed.returncode == 0
    assert all(f"  {name} " in listed.stdout for name in COMMANDS)
    assert run("-m", "ds_dpo", "--version", cwd=tmp_path).stdout == f"ds_dpo {VERSION}\n"


def test_an_unknown_command_is_refused_with_a_hint() -> None:
    refused = run("-m", "ds_dpo", "consoldate")
    assert (refused.returncode, refused.stderr) == (
        2,
        "error: consoldate is not a command; did you mean consolidate?\n",
    )


def test_the_launcher_s_local_rank_may_come_first(tmp_path: Path) -> None:
    """`deepspeed --module ds_dpo train` puts it in front of all arguments."""
    options = ("--config", "miniature", "--dry_run", "--world_size", "2")
    done = run("-m", "ds_dpo", "--local_rank=1", "train", *options, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 ranks x 8 at once" in done.stdout


@pytest.mark.parametrize("program", ["ds_dpo/train.py", *(f"scripts/{path.name}" for path in SCRIPTS)])
def test_every_program_prints_its_version(program: str) -> None:
    done = run(program, "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"ds_dpo {VERSION}\n", "")


def test_questions_are_answered_whatever_else_is_given(tmp_path: Path) -> None:
    listed = run("-m", "ds_dpo", "train", "--list-presets", "--config", "nothing", cwd=tmp_path)
    assert listed.returncode == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == preset_names()
    assert all(len(line.split()) > 5 for line in listed.stdout.splitlines())
    printed = run("-m", "ds_dpo", "train", "--print_schema", cwd=tmp_path)
    assert json.loads(printed.stdout)["title"] == "ds_dpo: configuration of a run"

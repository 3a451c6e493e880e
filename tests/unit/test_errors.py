"""A program that fails says why in the user's words, once, and leaves with status 2."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from repository import ROOT

from ds_dpo.errors import COLLECTIVES, CheckpointError, ConfigError, DataError, DsDpoError, run_program


def fail_with(error: BaseException) -> object:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_program(main)
    return ended.value.code


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int = 4) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))


@pytest.mark.parametrize("kind", DsDpoError.__subclasses__())
def test_one_message_no_traceback_status_2(kind: type[DsDpoError], capsys: pytest.CaptureFixture[str]) -> None:
    status = fail_with(kind("data.split = 'trian': no such split; train would fit"))
    assert status == 2
    assert capsys.readouterr() == ("", "error: data.split = 'trian': no such split; train would fit\n")


def test_a_success_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    run_program(lambda: None)
    assert capsys.readouterr() == ("", "")


def test_an_error_of_the_program_itself_keeps_its_traceback() -> None:
    def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_program(main)


def test_ctrl_c_is_no_failure_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    status = fail_with(KeyboardInterrupt())
    assert (status, capsys.readouterr().err) == (130, "interrupted\n")


@pytest.mark.parametrize(
    ("error", "rank", "said"),
    [
        (ConfigError("x"), 0, "error: x\n"),
        (ConfigError("x"), 2, ""),  # rank 0 finds the same
        (DataError("x"), 0, "error: x\n"),
        (DataError("x"), 2, "error (rank 2): x\n"),
    ],
)
def test_ranks_do_not_repeat_one_another(
    error: DsDpoError, rank: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_rank(monkeypatch, rank)
    assert fail_with(error) == 2, "silent or not"
    assert capsys.readouterr().err == said


def test_an_error_said_elsewhere_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_rank(monkeypatch, 2)
    error = CheckpointError("x")
    error.is_said_elsewhere = True
    assert fail_with(error) == 2
    assert capsys.readouterr().err == ""


def test_a_program_that_leaves_at_once_has_said_all_it_had_to_say() -> None:
    said = "import sys; print('out'); print('err', file=sys.stderr); sys.stdout.reconfigure(write_through=False)"
    program = f"""
import atexit
from ds_dpo.errors import run_program
atexit.register(print, "waited")
def main(): exec({said!r})
run_program(main, leaves_at_once=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("out\n", "err\n")


FAILS = """
import threading
from ds_dpo.errors import LaunchError, run_program
def main():
    threading.Thread(target=threading.Event().wait).start()  # which an orderly end would wait for
    print("so far", end="")
    raise {error}
run_program(main, fails_at_once=True)
"""


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        ("ZeroDivisionError('by zero')", 1, ["Traceback (most recent call last)", "ZeroDivisionError: by zero"]),
        ("LaunchError('rank 1 did not come')", 2, ["error: rank 1 did not come"]),
    ],
)
def test_a_program_that_fails_at_once_waits_for_nothing(error: str, status: int, said: list[str]) -> None:
    command = [sys.executable, "-c", FAILS.format(error=error)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (status, "so far")
    assert [words for words in said if words not in done.stderr] == []


def test_an_xformers_that_cannot_be_imported_is_advice_and_no_traceback(tmp_path):
    """diffusers imports it whenever it is installed, and wraps what it raises."""
    package = tmp_path / "xformers"
    package.mkdir()
    (package / "__init__.py").write_text(
        'raise ImportError("Requires Flash-Attention version >=2.7.1 but got 2.6.3")\n'
    )
    program = (
        "from ds_dpo.errors import run_program\n"
        "def main():\n"
        "    try:\n"
        "        import xformers\n"
        "    except ImportError as error:\n"
        "        raise RuntimeError('Failed to import diffusers.models.attention_processor') from error\n"
        "run_program(main)\n"
    )
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == (
        "error: xformers cannot be imported (Requires Flash-Attention version >=2.7.1 but got 2.6.3), and diffusers "
        "imports it if it is there; uninstall xformers, or uninstall flash_attn if xformers asks for another version "
        "of it\n"
    )


def test_a_value_from_outside_never_fills_a_message() -> None:
    value = "x" * 10**6
    message = str(DataError(f"column 'a' holds {value}; text would fit"))
    assert message.startswith("column 'a' holds xxx")
    assert message.endswith("xxx; text would fit")
    assert len(message) < 300
    assert len(str(ConfigError("one word after another " * 10**5))) < 8100
    assert str(ConfigError("/a" * 500)) == "/a" * 500, "a path is shown whole"


def test_a_name_that_no_file_can_have_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "from ds_dpo.errors import run_program; from pathlib import Path; run_program(lambda: Path('x' * 300).stat())"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: xxx")
    assert ended.stderr.endswith("is too long for the name of a file or folder\n")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("entry", [{}, {"fails_at_once": True}])
def test_every_program_leaves_the_process_groups_at_its_end(
    monkeypatch: pytest.MonkeyPatch, entry: dict[str, bool]
) -> None:
    left: list[str] = []
    monkeypatch.setitem(sys.modules, COLLECTIVES, SimpleNamespace(leave=lambda: left.append("left")))
    run_program(lambda: left.append("main"), **entry)
    assert left == ["main", "left"]

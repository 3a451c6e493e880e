"""One voice: what is printed is what log.txt keeps."""

import io
import sys
from datetime import datetime
from pathlib import Path

import pytest

from ds_dpo.errors import CollapseError
from ds_dpo.run_folder.log import RunLog
from ds_dpo.run_folder.progress import Length

METRICS = {"step": 7, "loss": 0.69314718, "implicit_accuracy": 0.5, "learning_rate": 2e-4, "pairs_seen": 112}


def texts(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    for line in lines:
        assert datetime.fromisoformat(line.split(" ")[0]).tzinfo is not None, "the time says its zone"
    return [line.partition(" ")[2] for line in lines]


def test_what_is_said_before_there_is_a_file_is_kept_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(speaks=True)
    log.line("attention: sdpa")
    assert capsys.readouterr().out == "attention: sdpa\n", "printed at once"
    log.open(tmp_path / "log.txt", last_step=0, length=Length(max_train_steps=1000, num_pairs=1120))
    log.line("saved")
    log.close()
    assert texts(tmp_path / "log.txt") == ["attention: sdpa", "saved"]
    assert capsys.readouterr().out == "saved\n"


def test_a_later_start_appends(tmp_path: Path) -> None:
    for text in ("first", "second"):
        log = RunLog(speaks=True)
        log.open(tmp_path / "log.txt", last_step=0, length=Length(max_train_steps=1))
        log.line(text)
        log.close()
    assert texts(tmp_path / "log.txt") == ["first", "second"]


def test_a_due_step_is_one_line_of_the_metrics_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(speaks=True)
    log.open(tmp_path / "log.txt", last_step=0, length=Length(max_train_steps=1000, num_pairs=1120))
    log.step({**METRICS, "step": 6}, due=False)
    log.step(METRICS, due=True)
    log.close()
    assert texts(tmp_path / "log.txt") == ["step    7/1000  epoch 0.10  loss 0.6931  accuracy 0.50  lr 2.00e-04"]
    assert capsys.readouterr().out.count("\n") == 1


def test_other_ranks_stay_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(speaks=False)
    log.line("x")
    log.open(tmp_path / "log.txt", last_step=0, length=Length(max_train_steps=10))
    log.step(METRICS, due=True)
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_a_bar_goes_on_from_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    log = RunLog(speaks=True)
    log.open(tmp_path / "log.txt", last_step=6, length=Length(max_train_steps=10))
    log.step(METRICS, due=True)
    log.close()
    shown = terminal.getvalue()
    assert "6/10" in shown
    assert "7/10" in shown
    assert "step  7/10  loss 0.6931" in shown
    assert texts(tmp_path / "log.txt") == ["step  7/10  loss 0.6931  accuracy 0.50  lr 2.00e-04"]


ENDS = {
    "an error for the user": (
        CollapseError("the chosen error rises;\n  stopped"),
        "ended: the chosen error rises; stopped",
    ),
    "an unexpected one": (RuntimeError("reset by peer"), "failed: RuntimeError: reset by peer"),
    "an interrupt": (KeyboardInterrupt(), "failed: KeyboardInterrupt:"),
}


def run_into(error: BaseException, log: RunLog, path: Path | None) -> None:
    """A run that ends by an error. path: of its log, None if that is not open yet."""
    with log.ended_by():
        if path is not None:
            log.open(path, last_step=0, length=Length(max_train_steps=1))
        log.line("saved")
        raise error


@pytest.mark.parametrize("kind", ENDS)
def test_the_last_line_of_the_file_says_why_a_run_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    error, line = ENDS[kind]
    with pytest.raises(type(error)):
        run_into(error, RunLog(speaks=True), tmp_path / "log.txt")
    assert texts(tmp_path / "log.txt") == ["saved", line]
    assert capsys.readouterr().out == "saved\n", "the program prints its error itself"


def test_a_start_that_fails_leaves_no_log(tmp_path: Path) -> None:
    with pytest.raises(CollapseError):
        run_into(CollapseError("refused"), RunLog(speaks=True), None)
    assert list(tmp_path.iterdir()) == []


def test_lines_of_steps_say_what_is_left_by_the_median(tmp_path: Path) -> None:
    log = RunLog(speaks=True)
    log.open(tmp_path / "log.txt", last_step=6, length=Length(max_train_steps=10, num_pairs=160))
    for step, seconds in ((7, 100.0), (8, 30.0), (9, 20.0), (10, 20.0)):
        log.step({"step": step, "pairs_seen": 16 * step, "step_seconds": seconds, "peak_memory_gib": 0.726}, due=True)
    log.close()
    assert texts(tmp_path / "log.txt") == [
        "step  7/10  epoch 0.70  memory 0.726 GiB",
        "step  8/10  epoch 0.80  eta 1 min  memory 0.726 GiB",
        "step  9/10  epoch 0.90  eta 25 s  memory 0.726 GiB",
        "step 10/10  epoch 1.00  memory 0.726 GiB",
    ]

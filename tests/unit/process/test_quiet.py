"""Quiet while all is well, and complete when it is not."""

import subprocess
import sys
import warnings

import pytest

from ds_dpo.process.quiet import quiet_output


def noise() -> None:
    print("on stdout")
    print("on stderr", file=sys.stderr)
    warnings.warn("a warning", UserWarning, stacklevel=2)


def test_nothing_is_heard_while_all_is_well(
    capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    with quiet_output():
        noise()
    assert capsys.readouterr() == ("", "")
    assert len(recwarn) == 0
    print("after")
    assert capsys.readouterr().out == "after\n"


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(3), KeyboardInterrupt()])
def test_all_is_told_when_it_fails_and_the_failure_goes_on(
    error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        noise()
        raise error

    with pytest.raises(type(error)) as raised, quiet_output():
        fail()
    assert raised.value is error
    assert capsys.readouterr().err == "on stdout\non stderr\n"


@pytest.mark.slow
def test_libraries_speak_of_errors_only() -> None:
    program = """
from ds_dpo.process.quiet import quiet_libraries
quiet_libraries()
import datasets, diffusers, logging, transformers
from diffusers import StableDiffusionXLPipeline
for library in ("datasets", "diffusers", "transformers"):
    assert not logging.getLogger(library).isEnabledFor(logging.WARNING), library
    assert logging.getLogger(library).isEnabledFor(logging.ERROR), library
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

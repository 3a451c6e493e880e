"""Errors that speak to the user: what was asked, what was found, what would work."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_STATUS_OF_ERROR = 2


class DsDpoError(Exception):
    """A failure whose message is written for the user; programs print it without a traceback."""

    same_on_all_ranks = False
    is_said_elsewhere = False


class ConfigError(DsDpoError):
    """A configuration that cannot run: names the field, its value and what would fit."""

    same_on_all_ranks = True


class LaunchError(DsDpoError):
    """Ranks that do not find one another, or do not fit together; nothing was loaded."""


class DataError(DsDpoError):
    """A dataset, column, row or image that cannot be used."""


class ModelError(DsDpoError):
    """A model folder, weight file or attention backend that cannot be used."""


class CheckpointError(DsDpoError):
    """A checkpoint that is missing, torn, foreign, or cannot be written."""


class PreflightError(DsDpoError):
    """A check before the first update failed; nothing was trained."""


class ReferenceChangedError(DsDpoError):
    """The frozen reference is not frozen."""


class CollapseError(DsDpoError):
    """Training was stopped by the watchdog; its state is saved."""


class NonFiniteError(DsDpoError):
    """Training was stopped since step after step was not finite; its state is saved, and a file tells how to look."""


def run_program(main: Callable[[], None], *, leaves_at_once: bool = False, fails_at_once: bool = False) -> None:
    """Run a program's main function; print a DsDpoError as one message and exit with status 2.

    A message that every rank would print alike, or that another rank prints, is left to that one. leaves_at_once: do
    not wait, at the end, until the interpreter has taken torch apart, which takes a third of a second. fails_at_once:
    the same after any other error, where an orderly end may wait for other ranks, and in vain, and after a LaunchError,
    where a thread that still waits for them would abort it.
    """
    try:
        main()
    except DsDpoError as error:
        rank = os.environ.get("RANK", "0")
        if not error.is_said_elsewhere and (rank == "0" or not error.same_on_all_ranks):
            where = f" (rank {rank})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 and rank != "0" else ""
            print(f"error{where}: {error}", file=sys.stderr, flush=True)
        if fails_at_once and isinstance(error, LaunchError):
            _leave_at_once(EXIT_STATUS_OF_ERROR)
        sys.stdout.flush()
        sys.exit(EXIT_STATUS_OF_ERROR)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except Exception:
        if not fails_at_once:
            raise
        sys.excepthook(*sys.exc_info())  # torch's names the rank in each line
        _leave_at_once(1)
    if leaves_at_once:
        _leave_at_once(0)


def _leave_at_once(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

"""Errors for the user: what was requested, what was found, what would work."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_STATUS_OF_ERROR = 2


class DsDpoError(Exception):
    """A failure whose message is written for the user; programs print it without a traceback.

    same_on_all_ranks: only rank 0 prints it. is_said_elsewhere: another rank prints it.
    """

    same_on_all_ranks = False
    is_said_elsewhere = False


class ConfigError(DsDpoError):
    """A configuration that cannot run; the message names the field, its value and what would fit."""

    same_on_all_ranks = True


class LaunchError(DsDpoError):
    """Ranks that do not find each other or do not fit together; nothing was loaded."""


class DataError(DsDpoError):
    """A dataset, column, row or image that cannot be used."""


class ModelError(DsDpoError):
    """A model folder, weight file or attention backend that cannot be used."""


class CheckpointError(DsDpoError):
    """A checkpoint that is missing, torn, foreign, or cannot be written."""


class PreflightError(DsDpoError):
    """A check before the first update failed; nothing was trained."""


class ReferenceChangedError(DsDpoError):
    """The frozen reference has changed."""


class CollapseError(DsDpoError):
    """The watchdog stopped training; its state is saved."""


class NonFiniteError(DsDpoError):
    """Training stopped after several steps that were not finite; its state and a record are saved."""


def run_program(main: Callable[[], None], *, leaves_at_once: bool = False, fails_at_once: bool = False) -> None:
    """Run a program's main function; print a DsDpoError as one message and exit with status 2.

    If several ranks have the same message, only one prints it. leaves_at_once: after success, exit with os._exit (saves
    0.3 s of torch's teardown). fails_at_once: do the same after an unexpected error or a LaunchError: a normal exit
    could block on ranks that never come.
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
        sys.excepthook(*sys.exc_info())  # torch's hook prints the rank in each line
        _leave_at_once(1)
    if leaves_at_once:
        _leave_at_once(0)


def _leave_at_once(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

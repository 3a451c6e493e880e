"""Errors for the user: what was requested, what was found, what would work."""

from __future__ import annotations

import errno
import os
import re
import reprlib
import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_STATUS_OF_ERROR = 2
SHOWN_CHARACTERS = 200
MESSAGE_CHARACTERS = 8000  # a message may list files or parameters, each value in it is shorter
LONG_WORD = re.compile(r"\S{1001,}")  # longer than what a user types; a path may have 4096 characters
COLLECTIVES = "ds_dpo.distributed.collectives"
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxlong, _REPR.maxother = 3, SHOWN_CHARACTERS, 40, SHOWN_CHARACTERS


class DsDpoError(Exception):
    """A failure whose message is written for the user; programs print it without a traceback.

    same_on_all_ranks: only rank 0 prints it. is_said_elsewhere: another rank prints it. exit_status: of the program.
    """

    same_on_all_ranks = False
    is_said_elsewhere = False
    exit_status = EXIT_STATUS_OF_ERROR

    def __str__(self) -> str:
        """Return the message within bounds, whatever a file from outside has put into it."""
        message = LONG_WORD.sub(lambda word: cut(word[0]), super().__str__())
        return cut(message, characters=MESSAGE_CHARACTERS) if len(message) > MESSAGE_CHARACTERS else message


class ConfigError(DsDpoError):
    """A configuration that cannot run; the message names the field, its value and what would fit."""

    same_on_all_ranks = True


class LaunchError(DsDpoError):
    """Ranks that do not find each other or do not fit together; nothing was loaded."""


class LostRankError(LaunchError):
    """Another rank is gone without a verdict, such as one that was killed; the same start may well succeed."""

    exit_status = 1


class StopAskedError(DsDpoError):
    """A request to stop came before training began; nothing is wrong, and nothing was trained."""


class DataError(DsDpoError):
    """A dataset, column, row or image that cannot be used."""


class ModelError(DsDpoError):
    """A model folder, weight file or attention backend that cannot be used."""


class ScorerError(DsDpoError):
    """A scorer of images that cannot be loaded or has failed; the message says what to install, download or mend."""


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


def shown(value: object) -> str:
    """Return a value as a message shows it: as Python writes it, in one line of at most 200 characters or so.

    It takes no longer for a large value, nor for one that holds itself many times.
    """
    try:
        return cut(_REPR.repr(value))
    except ValueError:  # an integer of more digits than Python writes
        return f"a number of more than {sys.get_int_max_str_digits()} digits"


def cut(text: str, *, characters: int = SHOWN_CHARACTERS) -> str:
    """Return a text without line breaks, and without its middle if it is longer than that."""
    long = len(text) > characters
    kept = f"{text[: characters // 2]} ... {text[-characters // 4 :]}" if long else text
    return " ".join(kept.split()) if "\n" in kept or "\r" in kept else kept


def run_program(main: Callable[[], None], *, leaves_at_once: bool = False, fails_at_once: bool = False) -> None:
    """Run a program's main function; print a DsDpoError as one message and exit with status 2.

    If several ranks have the same message, only one prints it. leaves_at_once: after success, exit with os._exit (saves
    0.3 s of torch's teardown). fails_at_once: do the same after an unexpected error or a LaunchError: a normal exit
    could block on ranks that never come.
    """
    try:
        main()
        _leave_process_groups()
    except DsDpoError as error:
        rank = os.environ.get("RANK", "0")
        if not error.is_said_elsewhere and (rank == "0" or not error.same_on_all_ranks):
            where = f" (rank {rank})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 and rank != "0" else ""
            print(f"error{where}: {error}", file=sys.stderr, flush=True)
        if fails_at_once and isinstance(error, LaunchError):
            _leave_at_once(error.exit_status)
        sys.stdout.flush()
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except Exception as error:
        advice = _advice_on(error)
        if advice is not None:
            if os.environ.get("LOCAL_RANK", "0") == "0":  # each host has its own packages
                print(f"error: {advice}", file=sys.stderr, flush=True)
            _leave_at_once(EXIT_STATUS_OF_ERROR)
        if not fails_at_once:
            raise
        sys.excepthook(*sys.exc_info())  # torch's hook prints the rank in each line
        _leave_at_once(1)
    if leaves_at_once:
        _leave_at_once(0)


def _leave_process_groups() -> None:
    """Leave them at the end of a program: NCCL warns otherwise, and a second start in one process needs them."""
    collectives = sys.modules.get(COLLECTIVES)  # without it there are none, and its import takes seconds
    if collectives is not None:
        collectives.leave()


def _advice_on(error: BaseException | None) -> str | None:
    """Return a message for a name that no file can have, and if xformers cannot be imported.

    diffusers imports xformers whenever it is installed.
    """
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"{cut(str(error.filename))} is too long for the name of a file or folder"
    while error is not None:
        frame = error.__traceback__
        while frame is not None and isinstance(error, ImportError):
            if frame.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "xformers":
                return (
                    f"xformers cannot be imported ({cut(str(error))}), and diffusers imports it if it is there; "
                    "uninstall xformers, or uninstall flash_attn if xformers asks for another version of it"
                )
            frame = frame.tb_next
        error = error.__cause__ or error.__context__
    return None


def _leave_at_once(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

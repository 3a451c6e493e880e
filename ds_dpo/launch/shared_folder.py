"""Whether all hosts see one run folder: a token is written by one of them, and read by all."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ds_dpo.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Token:
    """path: the file that holds text, where the one who wrote it sees it."""

    path: Path
    text: str


@contextmanager
def token_in(output_dir: Path) -> Iterator[Token]:
    """Leave a token in the run folder for as long as hosts look for it; a folder that was not there goes again.

    Raises ConfigError where it cannot be written.
    """
    folder = output_dir.absolute()
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    text = secrets.token_hex(16)
    token = Token(path=folder / f".launch_{text[:8]}", text=text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        token.path.write_text(text, encoding="utf-8")
    except OSError as error:
        _take_away(token, missing)
        raise ConfigError(f"output_dir {output_dir} cannot be written ({error.strerror})") from error
    try:
        yield token
    finally:
        _take_away(token, missing)


def _take_away(token: Token, made: list[Path]) -> None:
    with suppress(OSError):  # it never came to be
        token.path.unlink(missing_ok=True)
    for folder in made:
        with suppress(OSError):  # the same, or something else lies in it by now
            folder.rmdir()


def read_token(path: str | None) -> str | None:
    """Return what this host reads there, None where it reads nothing."""
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None

"""Check that all hosts see one run folder: one host writes a token there, and all hosts read it."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ds_dpo.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Token:
    """path: the file, as its writer sees it. text: what it holds."""

    path: Path
    text: str


@contextmanager
def token_in(output_dir: Path) -> Iterator[Token]:
    """Keep a token in the run folder while hosts look for it; afterwards remove folders that were made for it.

    Raises ConfigError if it cannot be written.
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
    with suppress(OSError):  # the token was never written
        token.path.unlink(missing_ok=True)
    for folder in made:
        with suppress(OSError):  # the folder was never made, or is not empty any more
            folder.rmdir()


def read_token(path: str | None) -> str | None:
    """Return the text that this host reads at a path, None if it cannot."""
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None

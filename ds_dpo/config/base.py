"""The base of every section of the run configuration: a frozen model that refuses unknown names.

Each field is `identity` (a change makes it another run, and an existing run folder refuses it) or `free` (a change is
accepted and logged). A description is the text of `--help`: whole sentences that are understood alone, N for a number,
"(off if unset)" or the like where the field may be None.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

UNSETTING = ("none", "null")  # words for an option that is off


def identity_field(description: str, **constraints: Any) -> Any:
    """Return a field whose change makes it another run."""
    return Field(description=description, json_schema_extra={"identity": True}, **constraints)


def free_field(description: str, **constraints: Any) -> Any:
    """Return a field that may change from one start of a run to the next."""
    return Field(description=description, json_schema_extra={"identity": False}, **constraints)


NAME_BYTES, PATH_BYTES = 255, 4095  # the most that Linux takes


def home() -> Path | None:
    """Return this user's home folder; None if neither HOME nor the list of users has one."""
    whole = os.path.expanduser("~")
    return Path(whole) if os.path.isabs(whole) else None


def in_home(path: str) -> str:
    """Return a path with its leading ~ or ~user replaced by that home folder.

    Raises ValueError without such a user, and for a path that no file can have.
    """
    whole = os.path.expanduser(path)
    _require_nameable(whole)
    if whole.startswith("~"):
        user = whole[1:].partition("/")[0]
        raise ValueError(
            f"there is no home folder of {f'user {user}' if user else 'this user'}; for a folder of this name give "
            f"./{whole}"
        )
    return whole


def _require_nameable(path: str) -> None:
    encoded = path.encode("utf-8", errors="replace")
    if len(encoded) > PATH_BYTES:
        raise ValueError(f"the path has {len(encoded)} bytes; {PATH_BYTES} are the most that a path may have")
    longest = max(map(len, encoded.split(b"/")))
    if longest > NAME_BYTES:
        raise ValueError(
            f"a name in the path has {longest} bytes; {NAME_BYTES} are the most that a file or folder may have"
        )


# The type of each field that may hold a path of this machine, also beside hub ids.
PathText = Annotated[str, AfterValidator(in_home)]


class Section(BaseModel):
    """A frozen section that refuses unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

"""The base of every section of the run configuration: a frozen model that refuses unknown names.

Each field is `identity` (a change makes it another run, and an existing run folder refuses it) or `free` (a change is
accepted and logged). A description is the text of `--help`: whole sentences that are understood alone, N for a number,
"(off if unset)" or the like where the field may be None.
"""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

UNSETTING = ("none", "null")  # words for an option that is off


def identity_field(description: str, **constraints: Any) -> Any:
    """Return a field whose change makes it another run."""
    return Field(description=description, json_schema_extra={"identity": True}, **constraints)


def free_field(description: str, **constraints: Any) -> Any:
    """Return a field that may change from one start of a run to the next."""
    return Field(description=description, json_schema_extra={"identity": False}, **constraints)


def in_home(path: str) -> str:
    """Return a path with its leading ~ or ~user replaced by that home folder. Raises ValueError without such a user."""
    whole = os.path.expanduser(path)
    if whole.startswith("~"):
        user = whole[1:].partition("/")[0]
        raise ValueError(
            f"there is no home folder of {f'user {user}' if user else 'this user'}; for a folder of this name give "
            f"./{whole}"
        )
    return whole


# The type of each field that may hold a path of this machine, also beside hub ids.
PathText = Annotated[str, AfterValidator(in_home)]


class Section(BaseModel):
    """A frozen section that refuses unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

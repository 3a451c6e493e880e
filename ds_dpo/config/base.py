"""The base of every section of the run configuration: a frozen model that refuses unknown names.

Each field is `identity` (a change makes it another run, and an existing run folder refuses it) or `free` (a change is
accepted and logged). A description is the text of `--help`: whole sentences that are understood alone, N for a number,
"(off if unset)" or the like where the field may be None.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def identity_field(description: str, **constraints: Any) -> Any:
    """Return a field whose change makes it another run."""
    return Field(description=description, json_schema_extra={"identity": True}, **constraints)


def free_field(description: str, **constraints: Any) -> Any:
    """Return a field that may change from one start of a run to the next."""
    return Field(description=description, json_schema_extra={"identity": False}, **constraints)


class Section(BaseModel):
    """A frozen section that refuses unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

"""What every section of the run configuration is made of: closed, frozen models whose fields say what they mean.

Each field is `identity` (a change makes it another run: refused against an existing run folder) or `free` (taken
and logged). Descriptions are the text of `--help`; a new field is one line.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def identity_field(description: str, **constraints: Any) -> Any:
    """A field whose change makes another run."""
    return Field(description=description, json_schema_extra={"identity": True}, **constraints)


def free_field(description: str, **constraints: Any) -> Any:
    """A field that may change from one start of a run to the next."""
    return Field(description=description, json_schema_extra={"identity": False}, **constraints)


class Section(BaseModel):
    """Frozen, and closed to unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

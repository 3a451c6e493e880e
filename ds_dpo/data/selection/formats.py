"""How columns of a dataset give its pairs: for each format the roles, the column names tried for them, and layouts.

A role is the use of a column, such as `prompt`. A format can have several layouts; the first one whose roles all have a
column is read. A new format is one row of FORMATS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ds_dpo.config.data import DataConfig
from ds_dpo.errors import DataError

FileKind = Literal["parquet", "text", "tar"]
# text: a string. image: bytes, {bytes, path}, or a path. number: float, int or bool. With `s`: one, or a list of them
RoleKind = Literal["text", "texts", "image", "images", "number", "numbers", "name"]
LayoutName = Literal["labelled", "ordered", "rank", "score", "preference"]

KIND_OF_ROLE: Mapping[str, RoleKind] = {
    "prompt": "text",
    "image_0": "image",
    "image_1": "image",
    "label": "number",
    "chosen": "image",
    "rejected": "image",
    "images": "images",
    "rank": "numbers",
    "score": "numbers",
    "preference": "numbers",
    "group": "name",
    "confidence": "number",
    "has_label": "number",
    "model_0": "text",
    "model_1": "text",
    "models": "texts",
    "id": "name",
    "ranking_id": "name",
    "image_0_id": "name",
    "image_1_id": "name",
}

ROLES_OF_LAYOUT: Mapping[LayoutName, tuple[str, ...]] = {
    "labelled": ("prompt", "image_0", "image_1", "label"),
    "ordered": ("prompt", "chosen", "rejected"),
    "rank": ("prompt", "images", "rank"),
    "score": ("prompt", "images", "score"),
    "preference": ("prompt", "images", "preference"),
}
# roles that depend on the layout: only those of the chosen layout are read
ROLES_OF_SOME_LAYOUT = frozenset(role for roles in ROLES_OF_LAYOUT.values() for role in roles)


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format. roles: column names tried for each role, in order. layouts: preferred first. files: kinds of files."""

    roles: Mapping[str, tuple[str, ...]]
    layouts: tuple[LayoutName, ...]
    files: tuple[FileKind, ...]


FORMATS: Mapping[str, Format] = {
    "pickapic": Format(
        roles={
            "prompt": ("caption",),
            "image_0": ("jpg_0",),
            "image_1": ("jpg_1",),
            "label": ("label_0",),
            "confidence": ("confidence",),
            "has_label": ("has_label",),
            "model_0": ("model_0",),
            "model_1": ("model_1",),
            "id": (),
            # All three are needed: the dataset cards do not promise that a ranking_id is unique, copies renumber it or
            # leave it constant, and two people may have ranked the same two images.
            "ranking_id": ("ranking_id",),
            "image_0_id": ("image_0_uid",),
            "image_1_id": ("image_1_uid",),
        },
        layouts=("labelled",),
        files=("parquet",),
    ),
    "chosen_rejected": Format(
        roles={
            "prompt": ("prompt", "caption", "text"),
            "chosen": ("chosen", "chosen_image", "image_chosen", "img_better"),
            "rejected": ("rejected", "rejected_image", "image_rejected", "img_worse"),
            "confidence": ("confidence",),
            "model_0": ("chosen_model", "model_chosen"),
            "model_1": ("rejected_model", "model_rejected"),
            "id": (),
        },
        layouts=("ordered",),
        files=("parquet",),
    ),
    "ranked": Format(
        roles={
            "prompt": ("prompt", "caption", "text"),
            "images": ("images", "image", "image_path", "file_path", "image_paths"),
            "rank": ("rank", "ranks", "ranking"),
            "score": ("score", "scores"),
            "preference": ("human_preference", "preference"),
            "group": ("prompt_id", "group"),
            "confidence": ("confidence",),
            "models": ("models", "model"),
            "id": (),
        },
        layouts=("rank", "score", "preference"),
        files=("text", "parquet"),
    ),
    "manifest": Format(
        roles={
            "prompt": ("prompt", "caption", "text"),
            "chosen": ("chosen", "chosen_path", "chosen_image", "path1", "winner", "win"),
            "rejected": ("rejected", "rejected_path", "rejected_image", "path2", "loser", "lose"),
            "image_0": ("image", "image_0", "image1", "jpg_0"),
            "image_1": ("image2", "image_1", "jpg_1"),
            "label": ("label_0", "label"),
            "confidence": ("confidence",),
            "model_0": ("chosen_model", "model_chosen", "model1", "model_0"),
            "model_1": ("rejected_model", "model_rejected", "model2", "model_1"),
            "id": (),
        },
        layouts=("ordered", "labelled"),
        files=("text",),
    ),
    "webdataset": Format(
        roles={
            "prompt": (
                "original_prompt.txt",
                "prompt.txt",
                "caption.txt",
                "txt",
                "caption",
                "json:prompt",
                "json:caption",
            ),
            "image_0": ("jpg_0.jpg", "jpg_0.png", "jpg_0"),
            "image_1": ("jpg_1.jpg", "jpg_1.png", "jpg_1"),
            "label": ("label_0.txt", "label_0", "json:label_0"),
            "chosen": ("chosen.jpg", "chosen.jpeg", "chosen.png", "chosen.webp"),
            "rejected": ("rejected.jpg", "rejected.jpeg", "rejected.png", "rejected.webp"),
            "confidence": ("confidence.txt", "json:confidence"),
            "has_label": ("has_label.txt", "has_label", "json:has_label"),
            "model_0": ("model_0.txt", "model_0", "json:model_0"),
            "model_1": ("model_1.txt", "model_1", "json:model_1"),
        },
        layouts=("labelled", "ordered"),
        files=("tar",),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The column of each role. of_role: only the roles of the layout, and those that do not depend on a layout."""

    layout: LayoutName
    of_role: Mapping[str, str]


def asked_columns(data: DataConfig) -> dict[str, str]:
    """Return data.columns as role -> column. Raises DataError for bad syntax, an unknown role, or a repeated one."""
    roles = FORMATS[data.format].roles
    asked: dict[str, str] = {}
    for entry in data.columns:
        role, equals, column = entry.partition("=")
        if not (role and equals and column):
            raise DataError(f"data.columns has {entry!r}; role=column would fit, such as prompt=text")
        if role not in roles:
            raise DataError(
                f"data.columns has {entry}, and format {data.format} has no role {role}; it has {', '.join(roles)}"
            )
        if role in asked:
            raise DataError(f"data.columns gives role {role} twice: {asked[role]} and {column}")
        asked[role] = column
    return asked


def find_columns(available: Sequence[str], data: DataConfig, name: str) -> Columns:
    """Return the layout, and the column of each role that has one. name: the dataset's, for messages.

    Raises DataError if a column of data.columns does not exist, or no layout has all its columns.
    """
    asked = asked_columns(data)
    for role, column in asked.items():
        if column not in available:
            raise DataError(f"{name}: data.columns has {role}={column}; its columns are {', '.join(available)}")
    found = dict(asked)
    for role, names in FORMATS[data.format].roles.items():
        if role not in found and (present := [each for each in names if each in available]):
            found[role] = present[0]
    return choose_columns(found, available, data, name)


def choose_columns(found: Mapping[str, str], available: Sequence[str], data: DataConfig, name: str) -> Columns:
    """Return the layout that fits the found columns, and its columns. Raises DataError if no layout fits."""
    format_ = FORMATS[data.format]
    asked = asked_columns(data)
    layout = _choose_layout(format_, found, asked)
    if missing := [role for role in ROLES_OF_LAYOUT[layout] if role not in found]:
        raise _missing_columns(format_, layout, missing, found, available, name)
    others = ROLES_OF_SOME_LAYOUT - set(ROLES_OF_LAYOUT[layout])
    if unread := [role for role in asked if role in others]:
        raise DataError(
            f"{name}: data.columns has {unread[0]}={asked[unread[0]]}, which is not read together with "
            f"{', '.join(ROLES_OF_LAYOUT[layout])}; leave it out"
        )
    return Columns(layout=layout, of_role={role: column for role, column in found.items() if role not in others})


def require_columns_of_settings(columns: Columns, data: DataConfig, name: str) -> None:
    """Raise DataError if a setting would have no effect, because no column has the role that it needs."""
    has = columns.of_role.keys()
    has_models = "models" in has or {"model_0", "model_1"} <= has
    has_confidence = "confidence" in has or data.labels is not None
    for setting, is_set, has_column, roles in (
        ("has_label require", data.has_label == "require", "has_label" in has, "has_label"),
        (f"models {', '.join(data.models)}", bool(data.models), has_models, "model_0 and model_1, or models"),
        (f"min_confidence {data.min_confidence}", data.min_confidence is not None, has_confidence, "confidence"),
        (f"confidence {data.confidence}", data.confidence != "ignore", has_confidence, "confidence"),
    ):
        if is_set and not has_column:
            raise DataError(
                f"{name}: data.{setting} needs a column for role {roles}, but none was found; name it with data.columns"
            )


def _choose_layout(format_: Format, found: Mapping[str, str], asked: Mapping[str, str]) -> LayoutName:
    """Return the layout with most of the roles asked for, then with the fewest missing columns, then the first."""

    def cost(layout: LayoutName) -> tuple[int, int]:
        roles = ROLES_OF_LAYOUT[layout]
        return -sum(role in roles for role in asked), sum(role not in found for role in roles)

    return min(format_.layouts, key=cost)


def _missing_columns(
    format_: Format,
    layout: LayoutName,
    missing: Sequence[str],
    found: Mapping[str, str],
    available: Sequence[str],
    name: str,
) -> DataError:
    def usual(role: str) -> str:
        return found.get(role) or next(iter(format_.roles[role]), role)

    needed = [usual(role) for role in ROLES_OF_LAYOUT[layout]]
    tried = "; ".join(f"{role}: {', '.join(format_.roles[role])}" for role in missing)
    return DataError(
        f"{name} has no column {', '.join(map(usual, missing))}; it has {', '.join(available)}, and "
        f"{', '.join(needed)} are needed. The names tried are {tried}; data.columns can name others, such as "
        f"{missing[0]}=NAME"
    )

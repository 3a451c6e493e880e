"""Lay configurations upon each other: the upper value wins, and what belongs to a replaced thing no longer holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from ds_dpo.config.command_line import same_value
from ds_dpo.config.fields import FIELDS

# Fields that name a data set: with another value than a preset's, none of its OF_DATA_SET hold.
NAMES_DATA_SET = ("data.dataset", "data.format")
# What describes one data set, and means nothing for another: where its pairs are, what its columns are called, and
# filters that need one of its columns. How pairs are cut, mirrored, counted or limited holds for any data set.
OF_DATA_SET = (
    *NAMES_DATA_SET,
    "data.name",
    "data.revision",
    "data.split",
    "data.files",
    "data.columns",
    "data.image_root",
    "data.cache",
    "data.labels",
    "data.confidence",
    "data.min_confidence",
    "data.models",
    "data.has_label",
    "data.expected_pairs",
    "held_out.dataset",
    "held_out.name",
    "held_out.split",
    "held_out.format",
    "held_out.columns",
    "held_out.every_steps",
)
# Fields that name pairs to hold out: if a user gives one, a preset's held_out.every_steps holds for them.
NAMES_HELD_OUT_PAIRS = ("held_out.dataset", "held_out.split", "held_out.share")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Values by dotted name, of a file or a command. is_preset: whether it comes with the package."""

    values: Mapping[str, Any]
    is_preset: bool = False


@dataclass(frozen=True, kw_only=True)
class Merged:
    """All values by dotted name. remarks: lines for the user on values of a preset that no longer hold."""

    values: dict[str, Any]
    remarks: list[str] = field(default_factory=list)


def merge(layers: Sequence[Layer]) -> Merged:
    """Lay layers upon each other, the lowest first; a preset is below all layers of the user.

    Another objective or adapter inherits none of the lower one's settings. A user's data set inherits none of
    OF_DATA_SET from a preset for another one. What the user's own layers give holds for whatever data set they name.
    """
    preset = _joined(layer.values for layer in layers if layer.is_preset)
    of_user = _joined(layer.values for layer in layers if not layer.is_preset)
    dropped = _of_another_data_set(preset, of_user)
    values = _overlay({name: value for name, value in preset.items() if name not in dropped}, of_user)
    return Merged(values=values, remarks=_remarks(preset, dropped, values))


def _joined(layers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for layer in layers:
        values = _overlay(values, layer)
    return values


def _overlay(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    for section in ("objective", "adapter"):
        kind = upper.get(f"{section}.type")
        if kind is not None and kind != lower.get(f"{section}.type"):
            lower = {path: value for path, value in lower.items() if not path.startswith(f"{section}.")}
    return {**lower, **upper}


def _of_another_data_set(preset: Mapping[str, Any], of_user: Mapping[str, Any]) -> set[str]:
    """Return the fields of a preset that the user's data set does not inherit."""
    if not preset or all(_is_same(name, preset, of_user) for name in NAMES_DATA_SET):
        return set()
    dropped = set(preset).intersection(OF_DATA_SET)
    if any(of_user.get(name) is not None for name in NAMES_HELD_OUT_PAIRS):
        dropped.discard("held_out.every_steps")
    return dropped


def _is_same(name: str, preset: Mapping[str, Any], of_user: Mapping[str, Any]) -> bool:
    """Return whether a user's value, if there is one, names the same as a preset's; a copy has the same last name."""
    of_preset = preset.get(name, FIELDS[name].default)
    value = of_user.get(name, of_preset)
    return same_value(value, of_preset) or PurePath(str(value)).name == PurePath(str(of_preset)).name


def _remarks(preset: Mapping[str, Any], dropped: set[str], values: Mapping[str, Any]) -> list[str]:
    """Return a line on the values of a preset that no longer hold, and no line if all hold by default."""
    gone = {
        name: preset[name]
        for name in preset
        if name in dropped and name not in values and not same_value(preset[name], FIELDS[name].default)
    }
    if not gone:
        return []
    listed = ", ".join(f"{name} {_shown(value)}" for name, value in gone.items())
    advice = "; held_out.share 0.05 holds out pairs of your own" if "held_out.every_steps" in gone else ""
    data_set = values.get("data.dataset", "another data set")
    return [f"data.dataset {data_set}: the preset's data set is another, so these no longer hold: {listed}{advice}"]


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)

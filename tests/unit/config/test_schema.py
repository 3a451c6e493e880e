"""The committed JSON schema is that of the code, takes every configuration that is taken, and refuses what is not."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from repository import PACKAGE

from ds_dpo.config.documents import parse_yaml
from ds_dpo.config.fields import FIELDS
from ds_dpo.config.load import PRESETS, config_to_yaml, load_config, preset_names
from ds_dpo.config.names import ALIASES, FLAT_NAMES
from ds_dpo.config.schema import schema_text

SCHEMA = json.loads((PACKAGE / "assets" / "run.schema.json").read_text(encoding="utf-8"))
KINDS: dict[str, Any] = {"string": str, "number": int | float, "integer": int, "boolean": bool, "object": dict}
KINDS |= {"array": list, "null": type(None)}
BOUNDS = {
    "minimum": lambda value, bound: value >= bound,
    "maximum": lambda value, bound: value <= bound,
    "exclusiveMinimum": lambda value, bound: value > bound,
    "exclusiveMaximum": lambda value, bound: value < bound,
    "multipleOf": lambda value, bound: value % bound == 0,
    "minItems": lambda value, bound: len(value) >= bound,
}
CHECKED = {"anyOf", "enum", "type", "properties", "additionalProperties", "items", "$ref", *BOUNDS}
WORDS = {"description", "default", "$schema", "title"}


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Return whether a value fits, by the words of JSON schema that this schema uses."""
    assert set(schema) <= CHECKED | WORDS, schema
    if "$ref" in schema:
        place = SCHEMA
        for part in schema["$ref"].removeprefix("#/").split("/"):
            place = place[part]
        return fits(value, place)
    if "anyOf" in schema and not any(fits(value, one) for one in schema["anyOf"]):
        return False
    if "enum" in schema and not any(value == one and type(value) is type(one) for one in schema["enum"]):
        return False
    kinds = schema.get("type", list(KINDS))
    if not any(_is_of(value, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)):
        return False
    if any(not holds(value, schema[word]) for word, holds in BOUNDS.items() if word in schema):
        return False
    if isinstance(value, dict):
        known = schema.get("properties", {})
        return set(value) <= set(known) and all(fits(inner, known[name]) for name, inner in value.items())
    return not isinstance(value, list) or all(fits(part, schema.get("items", {})) for part in value)


def _is_of(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, KINDS[kind]) or (kind == "integer" and isinstance(value, float) and value.is_integer())


def test_the_committed_schema_is_that_of_the_code() -> None:
    """After a change: python ds_dpo/train.py --print_schema > schema; mv schema ds_dpo/assets/run.schema.json"""
    assert json.loads(schema_text()) == SCHEMA


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_and_every_saved_configuration_fits(name: str) -> None:
    assert fits(parse_yaml((PRESETS / f"{name}.yaml").read_text(encoding="utf-8")), SCHEMA)
    assert fits(yaml.safe_load(config_to_yaml(load_config(["--config", name]).config)), SCHEMA)


@pytest.mark.parametrize(
    ("text", "does_fit"),
    [
        ("base: miniature\nmodel: {vae: none, revision: null}\nema: {decay: none}\nschedule: {decay_steps: ~}", True),
        ("base: miniature\nlearning_rate: 1e-5\nmax_grad_norm: none\noptimizer.weight_decay: 0", True),
        ("data: {size_conditioning: true, flip: off}\nobjective: {type: kto}", True),
        ("adapter:\nobjective: {type: dpo, beta: 5000}", True),
        ("ema: {decay: nothing}", False),
        ("ema: {decay: 1}", False),
        ("seed: none", False),
        ("objectve: {type: dpo}", False),
        ("optimizer: {lr: 1e-5}", False),
        ("objective: {type: rlhf}", False),
        ("max_train_steps: 1:30", False),
        ("max_train_steps: 0", False),
    ],
)
def test_the_schema_tells_right_from_wrong(text: str, does_fit: bool) -> None:
    assert fits(parse_yaml(text), SCHEMA) is does_fit


def test_every_field_is_described_under_each_of_its_names() -> None:
    properties = SCHEMA["properties"]
    assert {*FIELDS, *FLAT_NAMES, *ALIASES, "base"} <= set(properties)
    for path, spec in FIELDS.items():
        section, _, name = path.rpartition(".")
        inside = properties[section]["properties"] if section else properties
        assert inside[name]["description"] == spec.description


def test_the_page_names_the_schema(tmp_path: Path) -> None:
    page = (PACKAGE.parent / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert "# yaml-language-server: $schema=" in page
    assert "ds_dpo/assets/run.schema.json" in page

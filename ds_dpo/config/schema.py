"""The JSON schema of a run's YAML file, from which editors complete and check names and values.

ds_dpo/assets/run.schema.json holds it; `python ds_dpo/train.py --print_schema` prints it anew.
"""

from __future__ import annotations

import json
from typing import Any

from ds_dpo.config.base import UNSETTING
from ds_dpo.config.fields import FIELDS, SECTIONS
from ds_dpo.config.names import ALIASES, FLAT_NAMES
from ds_dpo.config.run import RunConfig

DRAFT = "http://json-schema.org/draft-07/schema#"
LEFT_OUT = ("title", "identity")


def schema_text() -> str:
    """Return the schema as JSON."""
    return json.dumps(run_schema(), indent=1) + "\n"


def run_schema() -> dict[str, Any]:
    """Return the schema of a file: every field in its section, and beside the sections by each of its other names.

    No field is required, since a preset or the command line may give it. Rules between fields are not part of it.
    """
    whole = RunConfig.model_json_schema()
    fields = {path: _of_field(path, whole) for path in FIELDS}
    sections = {
        section: {
            "description": _section_text(section, whole),
            "type": ["object", "null"],
            "additionalProperties": False,
            "properties": {
                path.rpartition(".")[2]: schema for path, schema in fields.items() if FIELDS[path].section == section
            },
        }
        for section in SECTIONS
    }
    dotted = {path: path for path in fields if "." in path}
    others = {name: {"$ref": _place(path)} for name, path in {**FLAT_NAMES, **ALIASES, **dotted}.items()}
    base = {"description": "Preset or file that this one builds on.", "type": "string"}
    without_section = {path: schema for path, schema in fields.items() if "." not in path}
    return {
        "$schema": DRAFT,
        "title": "ds_dpo: configuration of a run",
        "type": "object",
        "additionalProperties": False,
        "properties": {"base": base, **without_section, **sections, **others},
    }


def _place(path: str) -> str:
    section, _, name = path.rpartition(".")
    return f"#/properties/{section}/properties/{name}" if section else f"#/properties/{name}"


def _of_field(path: str, whole: dict[str, Any]) -> dict[str, Any]:
    spec = FIELDS[path]
    found = next(section[path.rpartition(".")[2]] for section in _properties(spec.section, whole, path))
    schema = {name: value for name, value in found.items() if name not in LEFT_OUT}
    if path == "objective.type":
        schema = {"description": spec.description, "enum": list(spec.choices)}
    if "enum" in schema and "true" in spec.choices:
        # YAML reads the word as a truth value
        schema = {**schema, "type": ["string", "boolean"], "enum": [*schema["enum"], True]}
    if spec.is_optional:
        schema["anyOf"] = [*schema["anyOf"], {"enum": list(UNSETTING)}]
    return schema


def _properties(section: str, whole: dict[str, Any], path: str) -> list[dict[str, Any]]:
    """Return the properties of each class of a section that has the field."""
    classes = [whole] if not section else [whole["$defs"][name] for name in _classes(section, whole)]
    return [found["properties"] for found in classes if path.rpartition(".")[2] in found["properties"]]


def _classes(section: str, whole: dict[str, Any]) -> list[str]:
    schema = whole["properties"][section]
    references = [one["$ref"] for one in schema.get("oneOf", [schema])]
    return [reference.rpartition("/")[2] for reference in references]


def _section_text(section: str, whole: dict[str, Any]) -> str:
    classes = _classes(section, whole)
    return "The loss." if len(classes) > 1 else str(whole["$defs"][classes[0]]["description"])

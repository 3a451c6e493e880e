"""The settings by which a folder's images were drawn: recorded in DIR/evaluation.json, and refused if they change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ds_dpo.errors import ConfigError, cut, shown
from ds_dpo.evaluation.run.prompt_sets import PromptSet
from ds_dpo.outside import parse_json, read_regular
from ds_dpo.process.say import Say
from ds_dpo.storage.replace import replace_file

RECORD_NAME = "evaluation.json"
FORMAT = 1
MAX_BYTES = 16 * 2**20
SOFTWARE = ("torch", "diffusers", "transformers")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What images depend on beside their model and prompt. seeds: images of each prompt. resolution: side in pixels.

    first_seed: see seed_of. batch: images drawn at once; other batches round a few pixels to another level.
    """

    seeds: int
    first_seed: int
    steps: int
    guidance: float
    scheduler: str
    resolution: int
    batch: int
    dtype: str
    vae: str | None = None
    variant: str | None = None


def seed_of(settings: Settings, *, place: int, number: int) -> int:
    """Return the seed of an image: first_seed + place * seeds + number.

    place: of the prompt in its set, from 0 on. number: of the image among those of the prompt, from 0 on.
    """
    return settings.first_seed + place * settings.seeds + number


@dataclass(frozen=True)
class EvaluationRecord:
    """The content of DIR/evaluation.json.

    id: made from the first call; votes name it. versions: of libraries, at the first call. prompt_sets: number and
    digest of the prompts, by name. models: source and digest, by folder of images.
    """

    id: str
    settings: Settings
    versions: Mapping[str, str]
    prompt_sets: Mapping[str, Mapping[str, Any]]
    models: Mapping[str, Mapping[str, Any]]


def read_record(out: Path) -> EvaluationRecord | None:
    """Return what an earlier call recorded; None if there is no record. Raises ConfigError if it cannot be read."""
    path = out / RECORD_NAME
    try:
        content = parse_json(read_regular(path, max_bytes=MAX_BYTES))
        found = content["format"]
        if found != FORMAT:
            raise ConfigError(f"{path}: format {shown(found)}, this version reads {FORMAT}; name another folder")
        return EvaluationRecord(
            id=str(content["id"]),
            settings=Settings(**content["settings"]),
            versions=dict(content["versions"]),
            prompt_sets=dict(content["prompt_sets"]),
            models=dict(content["models"]),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: not the record of an evaluation ({cut(str(error))}); name another folder"
        ) from error


def agree(
    out: Path,
    old: EvaluationRecord | None,
    settings: Settings,
    sets: Sequence[PromptSet],
    models: Mapping[str, Mapping[str, Any]],
    *,
    say: Say,
) -> EvaluationRecord:
    """Return the record of a folder with what this call adds to it.

    Raises ConfigError that names each setting with its old and its new value, or a prompt set whose prompts changed.
    """
    prompt_sets = {each.name: {"prompts": len(each.prompts), "sha256": each.sha256} for each in sets}
    versions = {name: version(name) for name in SOFTWARE}
    if old is None:
        identity = json.dumps([asdict(settings), prompt_sets, models], sort_keys=True)
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        return EvaluationRecord(digest, settings, versions, prompt_sets, models)
    before, now = asdict(old.settings), asdict(settings)
    changes = [f"--{name} {now[name]}, but {before[name]} was used" for name in now if now[name] != before[name]]
    changes += [
        f"prompt set {name}: {facts['prompts']} prompts, but other ones were used ({old.prompt_sets[name]['prompts']})"
        for name, facts in prompt_sets.items()
        if facts != old.prompt_sets.get(name, facts)
    ]
    if changes:
        raise ConfigError(
            f"--out {out} holds an evaluation with other settings: {'; '.join(changes)}; restore them, or name "
            "another folder"
        )
    others = [f"{name} {old.versions.get(name)} then, {versions[name]} now" for name in versions]
    others = [words for name, words in zip(versions, others, strict=True) if versions[name] != old.versions.get(name)]
    if others:
        say(f"warning: images of this folder were drawn with other libraries: {', '.join(others)}")
    return EvaluationRecord(
        old.id, settings, old.versions, {**old.prompt_sets, **prompt_sets}, {**old.models, **models}
    )


def write_record(out: Path, record: EvaluationRecord) -> None:
    """Write DIR/evaluation.json. Raises ConfigError if it cannot be written."""
    content = {
        "format": FORMAT,
        "id": record.id,
        "settings": asdict(record.settings),
        "versions": dict(record.versions),
        "prompt_sets": dict(record.prompt_sets),
        "models": dict(record.models),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / RECORD_NAME, json.dumps(content, indent=2, ensure_ascii=False) + "\n", sync=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from error

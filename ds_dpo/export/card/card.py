"""The model card of an export: where the weights come from, how to use them, but no path of the machine."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ds_dpo.config.asset_paths import ASSET_PREFIX
from ds_dpo.config.documents import read_yaml
from ds_dpo.config.families import DEFAULT_FAMILY
from ds_dpo.config.objective_section import ObjectiveSection
from ds_dpo.config.objectives import OBJECTIVE_SECTIONS, DpoConfig
from ds_dpo.models.families.table import FAMILIES
from ds_dpo.precision import TORCH_NAMES, Precision
from ds_dpo.run_folder.folder import RunFolder, flatten, precision_of

CARD_NAME = "README.md"
TEMPLATE = Path(__file__).with_name("card.md.jinja")
Format = Literal["denoiser", "pipeline", "single-file", "lora"]

# The license of each base, and for "other" its name and address, as in the base's own card.
LICENSES: dict[str, tuple[str, str | None, str | None]] = {
    "stabilityai/stable-diffusion-xl-base-1.0": ("openrail++", None, None),
    "stabilityai/stable-diffusion-xl-refiner-1.0": ("openrail++", None, None),
    "stabilityai/stable-diffusion-2-1": ("openrail++", None, None),
    "stabilityai/stable-diffusion-2-1-base": ("openrail++", None, None),
    "stabilityai/sdxl-turbo": (
        "other",
        "sai-nc-community",
        "https://huggingface.co/stabilityai/sdxl-turbo/blob/main/LICENSE.md",
    ),
    "black-forest-labs/flux.1-dev": (
        "other",
        "flux-1-dev-non-commercial-license",
        "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
    ),
    "black-forest-labs/flux.1-schnell": ("apache-2.0", None, None),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ("creativeml-openrail-m", None, None),
    "runwayml/stable-diffusion-v1-5": ("creativeml-openrail-m", None, None),
    "compvis/stable-diffusion-v1-4": ("creativeml-openrail-m", None, None),
    f"{ASSET_PREFIX}assets/miniature/model": ("apache-2.0", None, None),
}
UNKNOWN_LICENSE = ("other", None, None)


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """The facts of a card; unknown ones are left out of it.

    base, vae: as the user gave them; only the last part of a path is published. repo_id: repository on the hub.
    file_name: file of the weights, for a single file or a LoRA. holds_denoiser_only: for a single file. details:
    further lines of the table, such as a LoRA's rank. license: replaces the base's. config: the run's, by dotted names.
    """

    format: Format
    title: str | None = None
    repo_id: str | None = None
    file_name: str | None = None
    holds_denoiser_only: bool = False
    dtype: Precision | None = None
    is_ema: bool = False
    base: str | None = None
    family: str | None = None
    vae: str | None = None
    steps: int | None = None
    precision: str | None = None
    zero_stage: int | None = None
    ranks: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    license: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str | None = None


def facts_of_run(run_folder: Path, exported: CardFacts) -> CardFacts:
    """Add the facts in the run folder to those of an export; given facts stay.

    It accepts the folder of a run of another version. Raises ConfigError if a file of the folder is not valid.
    """
    run = RunFolder(run_folder)
    config = flatten(read_yaml(run.config, dict, advice="no model card can be written without it"))
    settings = run.saved_settings() if run.deepspeed.is_file() else {}
    start = run.newest_start()
    found: dict[str, Any] = {
        "base": config.get("model.pretrained"),
        "family": config.get("model.family"),
        "vae": config.get("model.vae"),
        "precision": precision_of(settings) if settings else None,
        "zero_stage": settings.get("zero_optimization", {}).get("stage"),
        "ranks": start.get("world_size"),
    }
    added = {name: value for name, value in found.items() if getattr(exported, name) is None}
    return replace(exported, **added, config=config, versions=start.get("packages", {}), commit=start.get("commit"))


def write_card(folder: Path, facts: CardFacts) -> None:
    """Write or replace folder/README.md, from the template beside this module."""
    from huggingface_hub import ModelCard

    objective = objective_of(facts)
    family = FAMILIES[facts.family if facts.family in FAMILIES else DEFAULT_FAMILY]
    card = ModelCard.from_template(
        _metadata(facts, objective),
        template_path=str(TEMPLATE),
        facts=facts,
        objective=objective,
        family=family.published,
        denoiser=family.denoiser,
        title=_title(facts),
        dtype=f"torch.{TORCH_NAMES[facts.dtype or 'fp16']}",
        published=published_name,
        is_hub_id=is_hub_id,
        quoted=partial(json.dumps, ensure_ascii=False),
    )
    card.save(folder / CARD_NAME)


def objective_of(facts: CardFacts) -> type[ObjectiveSection] | None:
    """Return the section of the run's objective; Diffusion-DPO's without a run, None for an unknown objective."""
    name = facts.config.get("objective.type")
    return DpoConfig if name is None else OBJECTIVE_SECTIONS.get(name)


def published_name(name: str) -> str:
    """Return the published form of a model's or dataset's name: a hub id or ds_dpo:// name, or a path's last part."""
    if name.startswith(ASSET_PREFIX) or is_hub_id(name):
        return name
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def is_hub_id(name: str) -> bool:
    """Return whether a name means owner/name on the hub, and no folder or file here."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and not Path(name).exists()


def license_of(facts: CardFacts) -> tuple[str, str | None, str | None]:
    """Return license, its name and its address for the hub's metadata; "other" if the base's is unknown."""
    if facts.license is not None:
        return (facts.license, None, None)
    return LICENSES.get((facts.base or "").lower(), UNKNOWN_LICENSE)


def _metadata(facts: CardFacts, objective: type[ObjectiveSection] | None) -> Any:
    from huggingface_hub import ModelCardData

    base, dataset = facts.base or "", facts.config.get("data.dataset") or ""
    license_id, license_name, license_link = license_of(facts)
    family = [FAMILIES[facts.family].published.hub_tag] if facts.family in FAMILIES else []
    on_dpo = ["diffusion-dpo"] if objective is not None and objective.builds_on_dpo else []
    lora = ["lora"] if facts.format == "lora" else []
    data = ModelCardData(
        base_model=base if is_hub_id(base) else None,
        datasets=[dataset] if is_hub_id(dataset) else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=license_id,
        license_name=license_name,
        license_link=license_link,
        tags=["text-to-image", "diffusers", *family, *on_dpo, *lora, "ds_dpo"],
    )
    if is_hub_id(base):
        data["base_model_relation"] = "adapter" if facts.format == "lora" else "finetune"
    return data


def _title(facts: CardFacts) -> str:
    if facts.title or facts.repo_id:
        return " ".join((facts.title or str(facts.repo_id).rpartition("/")[2]).split())
    base = published_name(facts.base).rpartition("/")[2] if facts.base else "model"
    return f"{base}-{facts.config.get('objective.type') or 'tuned'}"

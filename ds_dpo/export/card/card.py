"""The model card of an export: where the weights come from, how to use them, but no path of the machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from ds_dpo.config.asset_paths import ASSET_PREFIX
from ds_dpo.config.documents import read_yaml
from ds_dpo.config.objectives import OBJECTIVE_SECTIONS, DpoConfig
from ds_dpo.export.card.usage import usage
from ds_dpo.models.families.table import FAMILIES
from ds_dpo.precision import Precision
from ds_dpo.run_folder.folder import RunFolder, flatten, precision_of

CARD_NAME = "README.md"
Format = Literal["unet", "pipeline", "single-file", "lora"]

# Of each base: license, and for "other" its name and address, as the base's own card states them.
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
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ("creativeml-openrail-m", None, None),
    "runwayml/stable-diffusion-v1-5": ("creativeml-openrail-m", None, None),
    "compvis/stable-diffusion-v1-4": ("creativeml-openrail-m", None, None),
    f"{ASSET_PREFIX}assets/miniature/model": ("apache-2.0", None, None),
}
UNKNOWN_LICENSE = ("other", None, None)

FORMAT_TAGS = {"lora": ("lora",)}
CONTENT_WORDS = {
    "unet": "The UNet",
    "pipeline": "A whole pipeline",
    "single-file": "A single-file checkpoint",
    "lora": "A LoRA",
}

CITATION = """\
@misc{wallace2023diffusion,
  title         = {Diffusion Model Alignment Using Direct Preference Optimization},
  author        = {Bram Wallace and Meihua Dang and Rafael Rafailov and Linqi Zhou and Aaron Lou and
                   Senthil Purushwalkam and Stefano Ermon and Caiming Xiong and Shafiq Joty and Nikhil Naik},
  year          = {2023},
  eprint        = {2311.12908},
  archivePrefix = {arXiv},
  primaryClass  = {cs.CV}
}"""


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card states; what is not known is left out of it.

    base, vae, dataset: as the user named them; of a path only the last part is published. repo_id: where on the hub it
    goes. file_name: of the weights, for a single file or a LoRA. holds_unet_only: of a single file. objective: its row
    in OBJECTIVES, with its options. details: further lines of the table, such as a LoRA's rank. license: in place of
    what the base implies.
    """

    format: Format
    title: str | None = None
    repo_id: str | None = None
    file_name: str | None = None
    holds_unet_only: bool = False
    dtype: Precision | None = None
    is_ema: bool = False
    base: str | None = None
    family: str | None = None
    vae: str | None = None
    dataset: str | None = None
    dataset_split: str | None = None
    objective: str | None = None
    objective_options: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    pairs_per_step: int | None = None
    resolution: int | None = None
    optimizer: str | None = None
    learning_rate: float | None = None
    schedule: str | None = None
    warmup_steps: int | None = None
    precision: str | None = None
    zero_stage: int | None = None
    ranks: int | None = None
    seed: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str | None = None
    license: str | None = None


def facts_of_run(run_folder: Path, exported: CardFacts) -> CardFacts:
    """Add to the facts of an export what its run folder tells; what is given already stays.

    Read leniently, as a run of another version is no less a run. Raises ConfigError if a file of the folder holds
    something else than it should.
    """
    run = RunFolder(run_folder)
    config = flatten(read_yaml(run.config, dict, advice="no model card can be written without it"))
    settings = run.saved_settings() if run.deepspeed.is_file() else None
    start = run.newest_start()
    found: dict[str, Any] = {
        "base": config.get("model.pretrained"),
        "family": config.get("model.family"),
        "vae": config.get("model.vae"),
        "dataset": config.get("data.dataset"),
        "dataset_split": config.get("data.split"),
        "resolution": config.get("data.resolution"),
        "objective": config.get("objective.type"),
        "objective_options": {
            **_section(config, "objective", leave_out=("type",)),
            **{name: weight for name, weight in _section(config, "terms", leave_out=()).items() if weight},
        },
        "pairs_per_step": config.get("batch.pairs_per_step"),
        "optimizer": config.get("optimizer.type"),
        "learning_rate": config.get("optimizer.learning_rate"),
        "schedule": config.get("schedule.name"),
        "warmup_steps": config.get("schedule.warmup_steps"),
        "seed": config.get("seed"),
        "precision": None if settings is None else precision_of(settings),
        "zero_stage": None if settings is None else settings.get("zero_optimization", {}).get("stage"),
        "ranks": start.get("world_size"),
        "commit": start.get("commit"),
        "versions": start.get("packages", {}),
    }
    return replace(exported, **{name: value for name, value in found.items() if not _is_given(exported, name)})


def write_card(folder: Path, facts: CardFacts) -> None:
    """Write folder/README.md, in place of one that is there; as huggingface_hub.ModelCard reads it."""
    from huggingface_hub import ModelCard

    card = ModelCard(f"---\n{_metadata(facts).to_yaml()}\n---\n\n{_body(facts)}")
    card.save(folder / CARD_NAME)


def published_name(name: str) -> str:
    """A model's or dataset's name as others may read it: a hub id or ds_dpo:// name, of a path only its last part."""
    if name.startswith(ASSET_PREFIX) or is_hub_id(name):
        return name
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def is_hub_id(name: str) -> bool:
    """Return whether a name means owner/name on the hub, and no folder or file here."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and not Path(name).exists()


def license_of(facts: CardFacts) -> tuple[str, str | None, str | None]:
    """License, its name and its address, as the hub's metadata has them; "other" where the base's is not known."""
    if facts.license is not None:
        return (facts.license, None, None)
    return LICENSES.get((facts.base or "").lower(), UNKNOWN_LICENSE)


def _section(config: Mapping[str, Any], section: str, *, leave_out: tuple[str, ...]) -> dict[str, Any]:
    own = {name.removeprefix(f"{section}."): value for name, value in config.items() if name.startswith(f"{section}.")}
    return {name: value for name, value in own.items() if name not in leave_out}


def _is_given(facts: CardFacts, name: str) -> bool:
    assert name in {known.name for known in fields(facts)}
    return getattr(facts, name) not in (None, {})


# ---- metadata ----


def _metadata(facts: CardFacts) -> Any:
    from huggingface_hub import ModelCardData

    base = facts.base if facts.base is not None and is_hub_id(facts.base) else None
    license_id, license_name, license_link = license_of(facts)
    data = ModelCardData(
        base_model=base,
        datasets=[facts.dataset] if facts.dataset is not None and is_hub_id(facts.dataset) else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=license_id,
        license_name=license_name,
        license_link=license_link,
        tags=_tags(facts),
    )
    if base is not None:
        data["base_model_relation"] = "adapter" if facts.format == "lora" else "finetune"
    return data


def _tags(facts: CardFacts) -> list[str]:
    family = [FAMILIES[facts.family].published.hub_tag] if facts.family in FAMILIES else []
    objective = ["diffusion-dpo"] if _cites_dpo(facts) else []
    return ["text-to-image", "diffusers", *family, *objective, *FORMAT_TAGS.get(facts.format, ()), "ds_dpo"]


# ---- text ----


def _body(facts: CardFacts) -> str:
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in _training(facts))
    parts = [
        f"# {_title(facts)}",
        _introduction(facts),
        "## Use",
        usage(facts, base=published_name(facts.base) if facts.base else None, name=facts.repo_id or _title(facts)),
        "## Training",
        f"| | |\n|---|---|\n{rows}",
        "This card tells how the weights were made. How good they are it does not: no evaluation is recorded in it.",
        "## License",
        _license_sentence(facts),
    ]
    if _cites_dpo(facts):
        parts += ["## Citation", f"```bibtex\n{CITATION}\n```"]
    return "\n\n".join(parts) + "\n"


def _title(facts: CardFacts) -> str:
    if facts.title or facts.repo_id:
        return _line(facts.title or str(facts.repo_id).rpartition("/")[2])
    base = published_name(facts.base).rpartition("/")[2] if facts.base else "model"
    return f"{base}-{facts.objective or 'tuned'}"


def _introduction(facts: CardFacts) -> str:
    base = f" of {_linked(facts.base, kind='')}" if facts.base else ""
    data = f" on {_linked(facts.dataset, kind='datasets/')}" if facts.dataset else ""
    method, paper = _method(facts.objective) if facts.objective else (DpoConfig.title, DpoConfig.paper)
    link = "" if paper is None else f" ([{_paper_name(paper)}]({paper}))"
    return f"{CONTENT_WORDS[facts.format]}{base}, tuned{data} by {method}{link} with ds_dpo, on DeepSpeed."


def _method(objective: str) -> tuple[str, str | None]:
    """Return an objective's title and paper; of one that is not known, such as another version's, its name alone."""
    section = OBJECTIVE_SECTIONS.get(objective)
    return (objective, None) if section is None else (section.title, section.paper)


def _cites_dpo(facts: CardFacts) -> bool:
    if facts.objective is None:
        return True
    section = OBJECTIVE_SECTIONS.get(facts.objective)
    return section is not None and section.builds_on_dpo


def _paper_name(address: str) -> str:
    arxiv = re.fullmatch(r"https://arxiv\.org/abs/([\d.]+)", address)
    return "paper" if arxiv is None else f"arXiv:{arxiv[1]}"


def _linked(name: str, *, kind: str) -> str:
    shown = _line(published_name(name))
    return f"[{shown}](https://huggingface.co/{kind}{shown})" if is_hub_id(name) else f"`{shown}`"


def _training(facts: CardFacts) -> list[tuple[str, Any]]:
    """The table's lines; what is not known is left out."""
    options = ", ".join(
        f"{name} {_plain(value)}" for name, value in facts.objective_options.items() if value is not None
    )
    method = None if facts.objective is None else _method(facts.objective)[0]
    split = f" ({facts.dataset_split})" if facts.dataset_split else ""
    warmup = f", {facts.warmup_steps} warm-up steps" if facts.warmup_steps else ""
    sharding = None if facts.zero_stage is None else f"ZeRO-{facts.zero_stage}"
    rows = [
        ("base", published_name(facts.base) if facts.base else None),
        ("VAE", published_name(facts.vae) if facts.vae else None),
        ("data", published_name(facts.dataset) + split if facts.dataset else None),
        ("objective", f"{method}, {options}" if options else method),
        ("optimizer steps", facts.steps),
        ("pairs a step", facts.pairs_per_step),
        ("resolution", None if facts.resolution is None else f"{facts.resolution} px"),
        ("optimizer", facts.optimizer),
        ("peak learning rate", facts.learning_rate),
        ("schedule", None if facts.schedule is None else f"{facts.schedule}{warmup}"),
        ("precision", facts.precision),
        ("sharding", sharding),
        ("ranks", facts.ranks),
        ("seed", facts.seed),
        ("weights", "moving average (EMA) of the trained ones" if facts.is_ema else None),
        ("stored as", None if facts.dtype is None else f"{facts.format}, {facts.dtype}"),
        *facts.details.items(),
        ("versions", ", ".join(f"{package} {version}" for package, version in facts.versions.items()) or None),
        ("ds_dpo commit", facts.commit),
    ]
    return [(name, value) for name, value in rows if value is not None]


def _license_sentence(facts: CardFacts) -> str:
    license_id, license_name, license_link = license_of(facts)
    if facts.license is not None:
        return f"`{license_id}`, as the publisher states."
    if license_link is not None:
        return f"That of the base: [{license_name}]({license_link})."
    if license_id != "other":
        return f"That of the base: `{license_id}`."
    return (
        "**Not known**: ds_dpo does not know the license of the base. Whoever publishes these weights must set "
        "`license` above to what the licenses of base and data allow."
    )


def _cell(value: Any) -> str:
    return _line(_plain(value)).replace("|", "\\|")


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _line(text: str) -> str:
    return " ".join(text.split())

"""The formats of an export: what each needs, and how it writes its weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.errors import ConfigError
from ds_dpo.export.base_weights import prediction_type_of, required_weights, scheduler_of
from ds_dpo.export.card.modelspec import describe_model
from ds_dpo.export.clients import (
    CHECKPOINT_PLACES,
    DENOISER_PLACES,
    DIFFUSERS_LORA_NOTE,
    KOHYA_LORA_PLACES,
    TRANSFORMER_LORA_PLACES,
    is_known_to_kohya,
    kohya_remarks,
    sampling_remarks,
)
from ds_dpo.export.denoiser import MAX_FILE_BYTES, check_parameters, expected_shapes, write_denoiser
from ds_dpo.export.destination import RECORD_KEY
from ds_dpo.export.lora.adapter import Adapter, file_layers, is_untrained, read_part
from ds_dpo.export.lora.file import (
    DIFFUSERS_NAME,
    LoraLayer,
    Produce,
    diffusers_metadata,
    kohya_metadata,
    lora_specs,
    write_lora_file,
)
from ds_dpo.export.lora.svd import ChangeLora, lora_layers
from ds_dpo.export.pipeline import list_copies, locate_pipeline, locate_vae
from ds_dpo.export.request import ALL_TARGETS, FILE_SUFFIX, Request, is_one_file
from ds_dpo.export.single_file import (
    EMA_PREFIX,
    check_base_file,
    check_carried,
    others_of,
    read_base_file,
    single_file_shapes,
    write_single_file,
)
from ds_dpo.export.source import BaseModel
from ds_dpo.export.tensors.safetensors_stream import TensorSpec
from ds_dpo.export.tensors.verification import Distance
from ds_dpo.export.tensors.weights import Weights
from ds_dpo.models.families.family import DenoiserKind
from ds_dpo.models.families.table import family_of, kind_of
from ds_dpo.models.families.unet import UNET
from ds_dpo.models.weights.file_flags import flags_of
from ds_dpo.precision import torch_dtype


@dataclass(frozen=True, kw_only=True)
class Job:
    """An export that is ready to be planned: its weights, and what is known of its base.

    held: the weights as the checkpoint holds them. weights: the denoiser's, with the run's LoRA, if any, merged in.
    base_weights: None if they are not available. record: lets a later export replace this one.
    """

    request: Request
    held: Weights
    weights: Weights
    adapter: Adapter | None
    config: Mapping[str, Any]
    base: BaseModel | None
    base_weights: Mapping[str, Tensor] | None
    record: Mapping[str, Any]

    @property
    def kind(self) -> DenoiserKind:
        return kind_of(self.config)

    @property
    def title(self) -> str:
        return self.request.out.stem if is_one_file(self.request) else self.request.out.name


@dataclass(frozen=True)
class Written:
    """Files that were written, the tensors that they should hold, and remarks for the user.

    others: names of further tensors: those that come from a base file, and flags.
    """

    paths: list[Path]
    specs: list[TensorSpec]
    others: frozenset[str] = frozenset()
    remarks: list[str] = field(default_factory=list)
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """How a format is written: into a folder, or as file_name inside of one.

    usage: the line that loads it. copies: further files and their names. write: gets the folder or file, and the
    distance from the base if it was measured.
    """

    write: Callable[[Path, Distance | None], Written]
    needed_bytes: int
    usage: str
    file_name: str | None = None
    copies: list[tuple[Path, str]] = field(default_factory=list)
    needs_distance: bool = False


def weights_bytes(job: Job) -> int:
    """Return the bytes of the denoiser's weights in the output's dtype."""
    return torch_dtype(job.request.dtype).itemsize * sum(place.numel for place in job.weights.parameters.values())


def _variant_argument(request: Request) -> str:
    return f', variant="{request.variant}"' if request.variant else ""


def plan_denoiser(job: Job) -> Plan:
    """Plan a folder with the denoiser alone, for from_pretrained of its class, with the subfolder of its kind."""
    request = job.request
    check_parameters(job.weights, expected_shapes(job.config))
    arguments = f'subfolder="{job.kind.folder}"{_variant_argument(request)}, torch_dtype={torch_dtype(request.dtype)}'
    usage = f'{job.kind.class_name}.from_pretrained("{request.out}", {arguments})'
    return Plan(partial(_write_denoiser, job), weights_bytes(job), usage)


def plan_pipeline(job: Job) -> Plan:
    """Plan a whole pipeline: copies of the base's parts, this denoiser, and another VAE if one is given."""
    request, base = job.request, job.base
    if base is None:
        raise ConfigError(f"--format pipeline: {request.source} does not name its base pipeline; add --base MODEL")
    pipeline = locate_pipeline(base, replaced=job.kind.folder)
    vae = request.vae or base.vae  # the run's VAE made the latents that it was trained on
    own_vae = locate_vae(resolve_asset(vae)) if vae else None
    copies = list_copies(pipeline, replaced=job.kind.folder, variant=base.variant, vae=own_vae)
    arguments = f"torch_dtype={torch_dtype(request.dtype)}{_variant_argument(request)}"
    plan = plan_denoiser(job)
    copied_bytes = sum(path.stat().st_size for path, _ in copies)
    usage = f'DiffusionPipeline.from_pretrained("{request.out}", {arguments})'
    return Plan(plan.write, plan.needed_bytes + copied_bytes, usage, copies=copies)


def _write_denoiser(job: Job, folder: Path, distance: Distance | None) -> Written:
    request, dtype = job.request, torch_dtype(job.request.dtype)
    gigabytes = request.max_shard_gb
    written = write_denoiser(
        job.weights,
        job.config,
        folder / job.kind.folder,
        dtype=dtype,
        max_file_bytes=MAX_FILE_BYTES if gigabytes is None else int(gigabytes * 1e9),
        variant=request.variant,
    )
    specs = [TensorSpec(name, shape, dtype) for name, shape in expected_shapes(job.config).items()]
    return Written([folder / job.kind.folder / name for name in written.files], specs)


def plan_single_file(job: Job) -> Plan:
    """Plan one file with the names of A1111, Forge and ComfyUI: the denoiser alone, or inside a base file."""
    request = job.request
    check_parameters(job.weights, expected_shapes(job.config))
    check_carried(job.config)
    shapes = single_file_shapes(job.config)
    base = None if request.base_file is None else read_base_file(request.base_file)
    if base is not None:
        check_base_file(base, shapes, job.kind)
    family, scheduler = family_of(job.config), scheduler_of(job.base)
    states_prediction = family is None or family.published.reads_flags
    flags = None if scheduler is None else flags_of(scheduler, states_prediction=states_prediction)
    others = frozenset() if base is None else others_of(base, shapes, flags)
    remarks = _remarks_on(others) + sampling_remarks(scheduler, family, is_whole=base is not None)

    def write(path: Path, distance: Distance | None) -> Written:
        metadata = {
            **describe_model(job.config, title=job.title, prediction_type=prediction_type_of(job.base)),
            RECORD_KEY: json.dumps(job.record),
        }
        dtype = torch_dtype(request.dtype)
        specs = write_single_file(path, job.weights, job.config, dtype=dtype, metadata=metadata, base=base, flags=flags)
        return Written([path], specs, others | (flags or frozenset()), remarks)

    copied_bytes = 0 if base is None else sum(base.tensors[name].num_bytes for name in others)
    places = DENOISER_PLACES if base is None else CHECKPOINT_PLACES
    return Plan(write, weights_bytes(job) + copied_bytes, places, file_name=f"{job.title}{FILE_SUFFIX}")


def _remarks_on(others: frozenset[str]) -> list[str]:
    if not others:
        return [
            "the file holds the denoiser alone, but A1111 and Forge need a whole checkpoint; give one with --base_file"
        ]
    lines = [f"copied {len(others)} tensors of the base file unchanged"]
    averages = sum(name.startswith(EMA_PREFIX) for name in others)
    if averages:
        lines.append(
            f"{averages} of them are {EMA_PREFIX}*, the base's own moving average: a program that uses them gets the "
            "base model"
        )
    return lines


def plan_lora(job: Job) -> Plan:
    """Plan a LoRA: that of the run, or one of a given rank computed from the change of a full run."""
    return _plan_trained_lora(job, job.adapter) if job.adapter is not None else _plan_computed_lora(job)


def _plan_trained_lora(job: Job, adapter: Adapter) -> Plan:
    request = job.request
    if request.rank is not None:
        ranks = sorted({layer.rank for layer in adapter.layers.values()})
        raise ConfigError(f"--rank {request.rank}: this run trained a LoRA of rank {ranks}; leave the option out")
    if request.lora_targets != ALL_TARGETS:
        raise ConfigError(
            f"--lora_targets {request.lora_targets}: this run trained a LoRA, which is written whole; leave the option "
            "out, or train one with adapter.targets"
        )
    layers = file_layers(job.held, adapter, expected_shapes(job.config))

    def write(path: Path, distance: Distance | None) -> Written:
        produce = partial(read_part, job.held, adapter)
        specs = _write_lora(job, path, layers, produce, adapter.settings)
        nothing = ["WARNING: this run trained nothing: every lora_B is zero"] if is_untrained(job.held, adapter) else []
        return Written([path], specs, remarks=nothing + _kohya_remarks(job, layers), details=_lora_details(layers))

    return _lora_plan(job, layers, write)


def _plan_computed_lora(job: Job) -> Plan:
    request = job.request
    if request.rank is None:
        raise ConfigError(
            f"--format lora: {request.source} holds a fully trained model and no LoRA; add --rank R, such as 64, to "
            "approximate its change by a LoRA"
        )
    check_parameters(job.weights, expected_shapes(job.config))
    rank, base = request.rank, job.base_weights or required_weights(job.base, why="--format lora of a full run")
    shapes = {name: place.shape for name, place in job.weights.parameters.items()}
    most = lora_layers(shapes, rank=rank, targets=request.lora_targets)

    def write(path: Path, distance: Distance | None) -> Written:
        assert distance is not None
        dtype = torch_dtype(request.dtype)
        change = ChangeLora(job.weights, base, distance, rank=rank, dtype=dtype, targets=request.lora_targets)
        layers = change.layers()
        specs = _write_lora(job, path, layers, change.produce, {})
        remarks = change.describe() + _kohya_remarks(job, layers, share_of=change.share_of)
        return Written([path], specs, remarks=remarks, details=_lora_details(layers))

    return _lora_plan(job, most, write, needs_distance=True)


def _kohya_remarks(
    job: Job, layers: Mapping[str, LoraLayer], share_of: Callable[[list[str]], float] | None = None
) -> list[str]:
    if job.request.lora_naming != "kohya":
        return []
    unknown = [module for module in layers if not is_known_to_kohya(module)]
    return kohya_remarks(layers, share=None if share_of is None else share_of(unknown))


def _lora_plan(
    job: Job,
    layers: Mapping[str, LoraLayer],
    write: Callable[[Path, Distance | None], Written],
    *,
    needs_distance: bool = False,
) -> Plan:
    """layers: those of the file, or all that may be in it."""
    request = job.request
    specs = lora_specs(layers, naming=request.lora_naming, folder=job.kind.folder, dtype=torch_dtype(request.dtype))
    is_kohya, family = request.lora_naming == "kohya", family_of(job.config)
    if is_kohya and family is not None and not family.published.reads_loras:
        raise ConfigError(
            f"--lora_naming kohya: no program is known to read a LoRA of {family.name} under such names; give "
            "--lora_naming diffusers"
        )
    name = f"{job.title}{FILE_SUFFIX}" if is_kohya or is_one_file(request) else DIFFUSERS_NAME
    usage = (
        (KOHYA_LORA_PLACES if job.kind is UNET else TRANSFORMER_LORA_PLACES)
        if is_kohya
        else f'pipeline.load_lora_weights("{request.out}") of diffusers; {DIFFUSERS_LORA_NOTE}'
    )
    return Plan(write, sum(spec.num_bytes for spec in specs), usage, file_name=name, needs_distance=needs_distance)


def _write_lora(
    job: Job, path: Path, layers: Mapping[str, LoraLayer], produce: Produce, settings: Mapping[str, Any]
) -> list[TensorSpec]:
    request = job.request
    own = METADATA_OF_NAMING[request.lora_naming](layers, settings, job.config)
    spec = describe_model(job.config, title=job.title, prediction_type=prediction_type_of(job.base), is_lora=True)
    metadata = {**spec, **own, RECORD_KEY: json.dumps(job.record)}
    return write_lora_file(
        path,
        layers,
        produce,
        naming=request.lora_naming,
        folder=job.kind.folder,
        dtype=torch_dtype(request.dtype),
        metadata=metadata,
    )


METADATA_OF_NAMING: dict[
    str, Callable[[Mapping[str, LoraLayer], Mapping[str, Any], Mapping[str, Any]], dict[str, str]]
] = {
    "diffusers": lambda layers, settings, config: diffusers_metadata(layers, settings, folder=kind_of(config).folder),
    "kohya": lambda layers, _, config: kohya_metadata(layers, config),
}


def _lora_details(layers: Mapping[str, LoraLayer]) -> dict[str, Any]:
    ranks = sorted({layer.rank for layer in layers.values()})
    return {"LoRA rank": ", ".join(map(str, ranks)), "LoRA layers": len(layers)}


FORMATS: dict[str, Callable[[Job], Plan]] = {
    "denoiser": plan_denoiser,
    "pipeline": plan_pipeline,
    "single-file": plan_single_file,
    "lora": plan_lora,
}

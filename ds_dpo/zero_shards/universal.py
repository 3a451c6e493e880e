"""DeepSpeed's universal checkpoints, in which each trained weight has its own files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ds_dpo.errors import CheckpointError
from ds_dpo.zero_shards.files import UNIVERSAL_FOLDER, TagFiles, check_number_of_ranks
from ds_dpo.zero_shards.frozen import (
    fragment_table,
    module_weights,
    place_fragments,
    place_whole,
    whole_table,
    with_shared,
)
from ds_dpo.zero_shards.layout import place_split_parameter
from ds_dpo.zero_shards.tables import MOMENTS, FileRow, Shards, Table
from ds_dpo.zero_shards.unpickle import Shard


def open_universal(files: TagFiles, model: Sequence[Shard]) -> Shards:
    """Open the universal form: a folder of files per trained weight, and frozen weights as their stage saved them."""
    shapes = {name: shape for group in model[0].content["param_shapes"] for name, shape in group.items()}
    settings = model[0].content["ds_config"]
    stage = int(settings["zero_optimization"]["stage"]) if isinstance(settings, dict) else 0
    shared = model[0].content.get("shared_params") or {}
    placements = {
        name: place_split_parameter(shape, group=group, offset=0, world_size=1)
        for group, (name, shape) in enumerate(shapes.items())
    }
    frozen = {name: weight for name, weight in module_weights(model[0]).items() if name not in {*shapes, *shared}}
    is_split = stage == 3
    check_number_of_ranks(files.model, expected=int(model[0].content["dp_world_size"]) if is_split else 1)
    unfrozen = place_fragments(model[0], world_size=len(files.model)) if is_split else place_whole(frozen)
    return Shards(
        stage=stage,
        placements=with_shared({**placements, **unfrozen}, shared),
        tables={
            **_parameter_files(files.folder / UNIVERSAL_FOLDER, {name: p.numel for name, p in placements.items()}),
            "frozen": fragment_table(files, model) if is_split else whole_table(model[0], frozen),
        },
    )


def _parameter_files(folder: Path, numels: Mapping[str, int]) -> dict[str, Table]:
    """Return tables of the weights and of each saved moment. Raises CheckpointError that names a missing file."""
    tables: dict[str, Table] = {}
    for quantity in ("fp32", *MOMENTS):
        paths = [folder / name / f"{quantity}.pt" for name in numels]
        absent = [path for path in paths if not path.is_file()]
        # before the first update there are no moments at all
        if absent and (quantity == "fp32" or len(absent) < len(paths)):
            raise CheckpointError(f"{absent[0]}: missing, so the universal checkpoint is incomplete")
        if not absent:
            tables[quantity] = [FileRow(paths, list(numels.values()))]
    return tables

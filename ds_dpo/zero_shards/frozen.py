"""The places of frozen weights, and of second names of trained weights, in each stage's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ds_dpo.errors import CheckpointError
from ds_dpo.zero_shards.files import TagFiles
from ds_dpo.zero_shards.layout import Placement, place_split_parameter
from ds_dpo.zero_shards.tables import ShardRow, Table, shard_rows
from ds_dpo.zero_shards.unpickle import Shard


def module_weights(model: Shard) -> dict[str, Tensor]:
    """Return the module's weights by name, without buffers."""
    buffers = set(model.content["buffer_names"])
    return {name: weight for name, weight in model.content["module"].items() if name not in buffers}


def whole_table(model: Shard, frozen: Mapping[str, Tensor]) -> Table:
    """Return the table of frozen weights that one file holds whole."""
    return [ShardRow(model.archive, list(frozen.values()))]


def place_whole(frozen: Mapping[str, Tensor]) -> dict[str, Placement]:
    """Place frozen weights that are not divided; each is its own group."""
    return {
        name: place_split_parameter(weight.shape, group=group, offset=0, world_size=1, is_frozen=True)
        for group, (name, weight) in enumerate(frozen.items())
    }


def place_fragments(model: Shard, *, world_size: int) -> dict[str, Placement]:
    """Place the frozen weights of ZeRO 3, of which each rank holds an equal part."""
    shapes = model.content.get("frozen_param_shapes") or {}
    return {
        name: place_split_parameter(shape, group=group, offset=0, world_size=world_size, is_frozen=True)
        for group, (name, shape) in enumerate(shapes.items())
    }


def fragment_table(files: TagFiles, model: Sequence[Shard]) -> Table:
    """Return each rank's parts of the frozen weights. Raises CheckpointError for a file with other parts."""
    shapes = model[0].content.get("frozen_param_shapes") or {}
    for path, shard in zip(files.model, model, strict=False):
        fragments = shard.content.get("frozen_param_fragments") or {}
        expected = {name: -(-shape.numel() // len(files.model)) for name, shape in shapes.items()}
        found = {name: fragment.numel() for name, fragment in fragments.items()}
        if found != expected:
            raise CheckpointError(f"{path}: holds other parts of frozen weights than {files.model[0].name} lists")
    return shard_rows(model, [[shard.content["frozen_param_fragments"][name] for name in shapes] for shard in model])


def with_shared(placements: dict[str, Placement], shared: Mapping[str, str]) -> dict[str, Placement]:
    """Add the other names of shared parameters. shared: other name -> name under which it was saved."""
    return placements | {other: placements[name] for other, name in shared.items() if name in placements}

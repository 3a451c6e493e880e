"""The files of a DeepSpeed tag folder by kind and rank, and whether any is missing or left over."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ds_dpo.errors import CheckpointError

MODEL_STATES = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt")
# moving averages of the weights: those to export, and those that a reference follows
AVERAGE_KINDS = ("ema", "reference")
AVERAGES = re.compile(rf"(?P<kind>{'|'.join(AVERAGE_KINDS)})_rank_(?P<rank>\d{{5}})\.pt")
UNIVERSAL_FOLDER = "zero"  # in a universal checkpoint: it has a folder per parameter
OPTIMIZER_STATES = re.compile(r"(?P<bf16>bf16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt")


@dataclasses.dataclass(frozen=True)
class TagFiles:
    """Files of a tag folder in order of rank.

    optimizer: empty without ZeRO and in a universal checkpoint. model: one file below ZeRO 3. averages: files of this
    project by kind, without the kinds that were not saved.
    """

    folder: Path
    model: tuple[Path, ...]
    optimizer: tuple[Path, ...]
    averages: Mapping[str, tuple[Path, ...]] = dataclasses.field(default_factory=dict)

    @property
    def is_universal(self) -> bool:
        """Whether DeepSpeed's ds_to_universal wrote this folder."""
        return not self.optimizer and (self.folder / UNIVERSAL_FOLDER).is_dir()


def is_tag_folder(folder: Path) -> bool:
    """Return whether DeepSpeed saved a checkpoint in this folder."""
    return any(folder.glob("*_model_states.pt"))


def find_files(folder: Path) -> TagFiles:
    """Sort the files of a tag folder by kind and rank.

    Raises CheckpointError for a folder without model states, a missing rank, files of two precisions or two layouts
    side by side, and for model, pipeline or expert parallel checkpoints, which this project neither makes nor reads.
    """
    names = sorted(path.name for path in folder.glob("*_states.pt"))
    model = [match for name in names if (match := MODEL_STATES.fullmatch(name))]
    optimizer = [match for name in names if (match := OPTIMIZER_STATES.fullmatch(name))]
    foreign = sorted(set(names) - {match[0] for match in (*model, *optimizer)})
    parallel = [match[0] for match in (*model, *optimizer) if int(match["mp"]) != 0]
    if foreign or parallel:
        raise CheckpointError(
            f"{folder / (foreign + parallel)[0]}: not a file of a data-parallel ZeRO checkpoint; "
            "model, pipeline and expert parallel checkpoints are not supported"
        )
    if not model:
        raise CheckpointError(f"{folder}: not a DeepSpeed checkpoint folder, since it has no *_model_states.pt")
    if len({match["bf16"] for match in optimizer}) > 1:
        raise CheckpointError(f"{folder}: optimizer shards with and without bf16_ are mixed; two runs were saved in it")
    if len({match["rank"] is None for match in model}) > 1:
        raise CheckpointError(
            f"{folder}: model states of ZeRO 3 and of another stage are mixed; two runs were saved in it"
        )
    averages = [match for path in folder.glob("*_rank_*") if (match := AVERAGES.fullmatch(path.name))]
    by_kind = {kind: [match for match in averages if match["kind"] == kind] for kind in AVERAGE_KINDS}
    return TagFiles(
        folder,
        model=_in_order(folder, model),
        optimizer=_in_order(folder, optimizer),
        averages={kind: _in_order(folder, matches) for kind, matches in by_kind.items() if matches},
    )


def check_saved_name(path: Path, stem: str) -> None:
    """Raise CheckpointError if a file was saved under the name of another rank or kind.

    stem: the name that torch.save wrote into the file; a file that was saved through a stream has no useful one.
    """
    saved = f"{stem}.pt"
    is_telling = any(pattern.fullmatch(saved) for pattern in (MODEL_STATES, OPTIMIZER_STATES, AVERAGES))
    if is_telling and saved != path.name:
        raise CheckpointError(f"{path}: was saved as {saved}; files have been renamed or swapped")


def _in_order(folder: Path, matches: Sequence[re.Match[str]]) -> tuple[Path, ...]:
    by_rank = {int(match["rank"] or 0): match for match in matches}
    missing = sorted(set(range(max(by_rank, default=-1) + 1)) - by_rank.keys())
    if missing:
        name = _name_of_rank(next(iter(by_rank.values()))[0], missing[0])
        raise CheckpointError(f"{folder / name}: missing, so the checkpoint is incomplete")
    return tuple(folder / by_rank[rank][0] for rank in sorted(by_rank))


def _name_of_rank(example: str, rank: int) -> str:
    # zero-padded if the example is
    return re.sub(r"(?<=rank_)\d+", lambda found: str(rank).zfill(len(found[0])), example, count=1)


def check_number_of_ranks(files: Sequence[Path], *, expected: int) -> None:
    """Raise CheckpointError unless there is one file per expected rank."""
    if len(files) < expected:
        raise CheckpointError(
            f"{files[0].with_name(_name_of_rank(files[0].name, len(files)))}: missing; "
            f"{expected} ranks wrote the checkpoint, but there are {len(files)} files"
        )
    if len(files) > expected:
        raise CheckpointError(f"{files[expected]}: left over from a run of more ranks; this checkpoint has {expected}")

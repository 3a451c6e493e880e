"""Find the files of one split of a dataset in a file, a folder, a save_to_disk folder, or on the hub."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from datasets import Dataset, DatasetDict, load_from_disk
from huggingface_hub import snapshot_download

from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.config.data import DataConfig, refuse_slice
from ds_dpo.data.reading.arrow_check import require_sound
from ds_dpo.data.reading.arrow_copy import cache_folder
from ds_dpo.data.reading.file_names import (
    SUFFIXES,
    files_of_patterns,
    kind_of,
    require_all_shards,
    require_one_set,
    splits_of,
    suffixes_of,
)
from ds_dpo.data.reading.folder_files import files_in, patterns_of_subset
from ds_dpo.data.reading.shards import first_line
from ds_dpo.data.selection.formats import FORMATS, FileKind
from ds_dpo.errors import DataError
from ds_dpo.storage.hub_failures import hub_failure

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class SplitFiles:
    """A split's files, in order. root: the folder to which names and image paths are relative.

    dataset: opened, for a save_to_disk folder only.
    """

    kind: FileKind
    files: Sequence[Path]
    root: Path
    dataset: Dataset | None = None


def find_split(data: DataConfig) -> SplitFiles:
    """Return the files of data.split of data.dataset; downloads them if it is a hub id.

    A single file counts as any split that is asked for. In a folder, the files are those that data.files names, or
    those whose name before the number is the split (train-00000-of-00003.parquet, train.jsonl), or whose folder is if
    they have only a number (train/0000.parquet, train/part-00000.parquet). Raises DataError; if the split is missing,
    it lists the splits that exist.
    """
    refuse_slice(data.split)
    location = Path(resolve_asset(data.dataset)).expanduser().absolute()
    kinds = FORMATS[data.format].files
    if location.is_dir() and not _is_saved(location):
        return _in_folder(location, data)
    if location.is_file() or location.is_dir():
        if data.files:
            raise DataError(f"data.files names files of a folder or of a hub dataset, and {data.dataset} is neither")
        return _one_file(location, data) if location.is_file() else _saved(location, data)
    if not HUB_ID.fullmatch(data.dataset) or data.dataset.startswith((".", "-")):
        raise DataError(f"data.dataset {data.dataset}: there is no such file or folder ({location})")
    downloadable = [kind for kind in kinds if kind != "text"]
    if not downloadable:
        raise DataError(
            f"data.dataset {data.dataset}: format {data.format} is read from local files, because its images are "
            f"separate files; download it (hf download {shlex.quote(data.dataset)} --repo-type dataset --local-dir "
            "FOLDER), unpack its images, and give the manifest's path"
        )
    return _in_folder(_download(data, downloadable[0]).absolute(), data)


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file()


def _one_file(path: Path, data: DataConfig) -> SplitFiles:
    if "+" in data.split:
        raise DataError(
            f"data.split {data.split}: splits are not joined; name one split, or the files of all of them as data.files"
        )
    kinds = FORMATS[data.format].files
    if (kind := kind_of(path, kinds)) is None:
        raise DataError(
            f"data.dataset {data.dataset} is a file of another kind; data.format {data.format} needs a "
            f"{suffixes_of(kinds)} file"
        )
    return SplitFiles(kind=kind, files=[path], root=path.parent)


def _saved(folder: Path, data: DataConfig) -> SplitFiles:
    if "parquet" not in FORMATS[data.format].files:
        raise DataError(
            f"data.dataset {data.dataset} is a save_to_disk folder, which data.format {data.format} cannot read"
        )
    require_sound(folder, cache_folder(data))
    try:
        saved = load_from_disk(str(folder))
    # also AttributeError and others: `datasets` takes what is in its JSON files for granted
    except Exception as error:
        raise DataError(
            f"data.dataset {data.dataset}, a save_to_disk folder, cannot be read, or has no rows: {first_line(error)}"
        ) from error
    if isinstance(saved, DatasetDict):
        splits = {str(name): dataset for name, dataset in saved.items()}
    else:
        # a dataset that was saved alone may not know its split; then it counts as the one asked for
        splits = {str(saved.split or data.split): saved}
    if data.split not in splits:
        raise _no_such_split(data, splits)
    dataset = splits[data.split]
    files = [Path(each["filename"]) for each in dataset.cache_files]
    return SplitFiles(kind="parquet", files=files, root=folder, dataset=dataset)


def _in_folder(folder: Path, data: DataConfig) -> SplitFiles:
    kinds = FORMATS[data.format].files
    card = None if data.name is None else patterns_of_subset(folder, data.name)
    # a manifest is at the top; subfolders may hold millions of images
    needs_all = bool(data.files) or any(kind != "text" for kind in kinds)
    kind, chosen = _choose_files(files_in(folder, below=needs_all), kinds, data, card=card)
    return SplitFiles(kind=kind, files=[folder / path for path in chosen], root=folder)


def _choose_files(
    paths: Iterable[PurePath], kinds: Sequence[FileKind], data: DataConfig, *, card: Mapping[str, list[str]] | None
) -> tuple[FileKind, list[PurePath]]:
    """Return the kind and the files of the split. paths: all files of the dataset, relative to its folder.

    Raises DataError if there is no such split, or its files are not one complete set.
    """
    paths = list(paths)
    if data.files:
        chosen = files_of_patterns(paths, data)
        kind = kind_of(chosen[0], kinds)
        assert kind is not None, "patterns of other kinds are refused"
        return kind, chosen
    there: set[str] = set()
    for kind in kinds:
        of_kind = paths if kind != "text" else [path for path in paths if len(path.parts) == 1]
        splits = splits_of(of_kind, kind, data, card=card)
        if data.split in splits:
            chosen = splits[data.split]
            require_one_set(chosen, data)
            require_all_shards(chosen, data)
            return kind, chosen
        there |= splits.keys()
    raise _no_such_split(data, there)


def _download(data: DataConfig, kind: FileKind) -> Path:
    """Return the folder with a hub dataset's files of the split, downloaded now or earlier; no other split is.

    The files are chosen from the hub's list, so that a split that is missing or not complete is refused before anything
    is downloaded. Where the hub cannot be reached, earlier downloads are returned. Raises DataError.
    """

    def snapshot(patterns: Sequence[str], *, dry_run: bool = False) -> Any:
        cache_dir = None if data.cache_dir is None else Path(data.cache_dir) / "hub"
        return snapshot_download(
            data.dataset,
            repo_type="dataset",
            revision=data.revision,
            allow_patterns=list(patterns),
            cache_dir=cache_dir,
            dry_run=dry_run,
        )

    suffix = SUFFIXES[kind][0]
    try:
        card = None if data.name is None else patterns_of_subset(Path(snapshot(["README.md"])), data.name)
        try:
            listed = [PurePath(file.filename) for file in snapshot([f"*{suffix}"], dry_run=True)]
        # of which kind depends on the client, the network, and what the cache holds
        except Exception:
            of_subset = "" if data.name is None else f"{data.name}/"
            expected = [f"{of_subset}*{data.split}*{suffix}"] if card is None else card.get(data.split, [])
            return Path(snapshot([*(data.files or expected), "README.md"]))
        _, chosen = _choose_files(listed, [kind], data, card=card)
        return Path(snapshot([*(_literal(path.as_posix()) for path in chosen), "README.md"]))
    except DataError:
        raise
    # a hub client's errors (network, HTTP, names, cache) have no common base class
    except Exception as error:
        raise DataError(
            f"data.dataset {data.dataset} is not a local file or folder, and its split {data.split} cannot be "
            f"downloaded from the hub: {hub_failure(error)}; or give a local folder"
        ) from error


def _literal(name: str) -> str:
    """Return the pattern that matches a name alone."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _no_such_split(data: DataConfig, splits: Iterable[str]) -> DataError:
    subset = "" if data.name is None else f", subset {data.name},"
    there = ", ".join(sorted(set(splits)))
    kinds = suffixes_of(FORMATS[data.format].files)
    advice = f"; data.files can name the files of a split, such as part-*{SUFFIXES[FORMATS[data.format].files[0]][0]}"
    return DataError(
        f"data.dataset {data.dataset}{subset} has no split {data.split}; it has "
        f"{there + advice if there else f'no {kinds} file'}"
    )

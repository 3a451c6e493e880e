"""Find one split of a dataset, wherever it is, and open it through `datasets`: mapped from disk, not in memory."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from huggingface_hub import snapshot_download

from ds_dpo.config import DataConfig, resolve_asset
from ds_dpo.errors import DataError

FILE_NAME = re.compile(r"(?P<split>.*?)(?:(?:^|[-_])(?P<number>\d+)(?:-of-(?P<total>\d+))?)?\.parquet")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def open_split(data: DataConfig) -> Dataset:
    """Open data.split of data.dataset: a parquet file, a folder of them, a save_to_disk folder, or a hub id.

    A parquet file is whatever split is asked for. In a folder, the split is the file's name before its number
    (train-00000-of-00003.parquet, train.parquet), or where there is only a number, the name of its subfolder
    (train/0000.parquet). Raises DataError, which names the splits there are where it is the split that is missing.
    """
    location = Path(resolve_asset(data.dataset)).expanduser()
    if location.is_file():
        if location.suffix != ".parquet":
            raise DataError(f"data.dataset {data.dataset} is a file of another kind; a .parquet file would fit")
        return _open_parquet([location], data)
    if (location / "dataset_info.json").is_file() or (location / "dataset_dict.json").is_file():
        return _open_saved(location, data)
    if location.is_dir():
        return _open_folder(location, data)
    if not HUB_ID.fullmatch(data.dataset) or data.dataset.startswith((".", "-")):
        raise DataError(f"data.dataset {data.dataset}: there is no such file or folder ({location.absolute()})")
    return _open_folder(_download(data), data)


def _open_parquet(files: list[Path], data: DataConfig) -> Dataset:
    # escaped, as `datasets` takes names for patterns; only this split, as each is copied to Arrow as a whole
    paths = {data.split: [glob.escape(str(path)) for path in files]}
    try:
        return load_dataset("parquet", data_files=paths, split=data.split, cache_dir=data.cache_dir)
    except (OSError, ValueError, pa.ArrowException, DatasetsError) as error:
        cause = error.__cause__ or error  # `datasets` says only that it failed, its cause says why
        raise DataError(
            f"data.dataset {data.dataset}, split {data.split} cannot be read as parquet: {cause}"
        ) from error


def _open_saved(folder: Path, data: DataConfig) -> Dataset:
    try:
        saved = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(f"data.dataset {data.dataset}, a save_to_disk folder, cannot be read: {error}") from error
    if isinstance(saved, DatasetDict):
        splits = {str(name): dataset for name, dataset in saved.items()}
    else:
        # a dataset saved on its own may not know its split; it is then the one asked for
        splits = {str(saved.split or data.split): saved}
    if data.split not in splits:
        raise _no_such_split(data, splits)
    return splits[data.split]


def _open_folder(folder: Path, data: DataConfig) -> Dataset:
    inside = [path.relative_to(folder) for path in sorted(folder.rglob("*.parquet"))]
    visible = [path for path in inside if not any(part.startswith(".") for part in path.parts)]
    files = [folder / path for path in visible if _split_of(path) == data.split]
    if not files:
        raise _no_such_split(data, map(_split_of, visible))
    if len(folders := sorted({str(path.parent) for path in files})) > 1:
        raise DataError(
            f"data.dataset {data.dataset}: files of split {data.split} lie in {', '.join(folders)}; give one of them"
        )
    _check_all_shards(files, data)
    return _open_parquet(files, data)


def _split_of(path: PurePath) -> str:
    """Return the split that a file's name says; path: relative to the dataset's folder."""
    match = FILE_NAME.fullmatch(path.name)
    assert match is not None, "every name that ends in .parquet fits"
    return match["split"] or path.parent.name or "train"


def _check_all_shards(files: list[Path], data: DataConfig) -> None:
    """Raise DataError where file names say that there are more: a copy cut short would train on less, silently."""
    names = [match for path in files if (match := FILE_NAME.fullmatch(path.name)) and match["total"]]
    for total in sorted({int(name["total"]) for name in names}):
        present = {int(name["number"]) for name in names if int(name["total"]) == total}
        if missing := sorted(set(range(total)) - present):
            raise DataError(
                f"data.dataset {data.dataset}, split {data.split}: {len(missing)} of {total} files are missing, the "
                f"first is {data.split}-{missing[0]:05}-of-{total:05}.parquet; copy or download them all"
            )


def _download(data: DataConfig) -> Path:
    """Return the folder of a hub dataset's files of the split, got now or before; other splits are left out."""

    def snapshot(pattern: str, *, dry_run: bool) -> Any:
        cache_dir = None if data.cache_dir is None else Path(data.cache_dir) / "hub"
        return snapshot_download(
            data.dataset, repo_type="dataset", allow_patterns=pattern, cache_dir=cache_dir, dry_run=dry_run
        )

    try:
        folder = Path(snapshot(f"*{data.split}*.parquet", dry_run=False))
        splits = {_split_of(path.relative_to(folder)) for path in folder.rglob("*.parquet")}
        if data.split not in splits:
            splits = {_split_of(PurePath(file.filename)) for file in snapshot("*.parquet", dry_run=True)}
    # what a hub client raises has no common base: of the network, of HTTP, of the name, of the cache
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"data.dataset {data.dataset} is no file or folder here, and split {data.split} of it cannot be had from "
            f"the hub ({reason}); give a local folder, or check the name, the network, and that you may read it"
        ) from error
    if data.split not in splits:
        raise _no_such_split(data, splits)
    return folder


def _no_such_split(data: DataConfig, splits: Iterable[str]) -> DataError:
    there = ", ".join(sorted(set(splits)))
    return DataError(f"data.dataset {data.dataset} has no split {data.split}; it has {there or 'no parquet file'}")

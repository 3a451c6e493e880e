"""The copy of parquet as Arrow that training reads in any order: where it is, whether it fits, how it is made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
from datasets import config as datasets_config
from huggingface_hub.utils import WeakFileLock

from ds_dpo.config.data import DataConfig
from ds_dpo.data.reading.parquet_rows import ParquetRows
from ds_dpo.data.reading.rows import ArrowRows
from ds_dpo.data.reading.stored_table import Hasher, place_of_rows, read_stored, store
from ds_dpo.errors import DataError
from ds_dpo.process.say import Say
from ds_dpo.storage.replace import remove_partials_of

# parquet stores repeated text in dictionary pages, smaller than Arrow does
SIZE_MARGIN = 1.03


def cache_folder(data: DataConfig) -> Path:
    """Return the folder of copies and of indices of pairs: data.cache_dir, or the one of `datasets`."""
    if data.cache_dir is None:
        return Path(datasets_config.HF_DATASETS_CACHE)
    return Path(data.cache_dir).expanduser()


def open_copy(key: str, open_rows: Callable[[], ParquetRows], data: DataConfig, *, say: Say) -> ArrowRows:
    """Return parquet files as memory-mapped Arrow; copies the columns that are read if there is no copy yet.

    key: identifies the files and the columns. say: called before copying, with the size and place of the copy.
    open_rows: opens the files, if there is no copy; DataError from there is passed on. Raises DataError if the disk has
    too little room, or the copy cannot be written. Of several processes one copies, and the others wait.
    """
    place = place_of_rows(cache_folder(data), key)
    if (found := read_stored(place)) is not None:
        return found
    rows = open_rows()

    def make(hasher: Hasher) -> Iterator[pa.RecordBatch]:
        hasher.update(rows.content.encode())
        return rows.batches()

    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(place.with_suffix(".lock")):
            if (found := read_stored(place)) is not None:
                return found
            remove_partials_of(place)
            _require_room(rows.uncompressed_bytes, place, data, say=say)
            store(make, place)
    except OSError as error:
        raise DataError(
            f"data.dataset {data.dataset}: its copy in Arrow cannot be written to {place.parent} "
            f"({error.strerror or error}); set data.cache_dir to a folder that can be written, or encode the pairs "
            "with scripts/cache.py, which makes no copy, and train with data.cache"
        ) from error
    if (found := read_stored(place)) is None:
        raise DataError(f"{place} is not what was just written there; check the disk of data.cache_dir")
    return found


def _require_room(num_bytes: int, place: Path, data: DataConfig, *, say: Say) -> None:
    needed = int(num_bytes * SIZE_MARGIN)
    free = shutil.disk_usage(place.parent).free
    say(
        f"data.dataset {data.dataset}, split {data.split}: copying parquet to Arrow, once; the copy takes "
        f"{_size(needed)} in {place.parent}; {_size(free)} are free there"
    )
    if needed > free:
        raise DataError(
            f"data.dataset {data.dataset}, split {data.split} needs {_size(needed)} in {place.parent} for its copy in "
            f"Arrow, and {_size(free)} are free; set data.cache_dir to a folder on a larger disk, or encode the "
            "pairs with scripts/cache.py, which makes no copy, and train with data.cache"
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"

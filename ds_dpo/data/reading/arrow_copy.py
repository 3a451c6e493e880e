"""Parquet opened by `datasets`, which copies it to Arrow at first use: the size of the copy, and whether it fits."""

from __future__ import annotations

import glob
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import DatasetBuilder, load_dataset_builder
from datasets import config as datasets_config
from datasets.exceptions import DatasetsError
from datasets.naming import filenames_for_dataset_split

from ds_dpo.config.data import DataConfig
from ds_dpo.data.reading.arrow_streams import ArrowStreams, map_streams
from ds_dpo.errors import DataError
from ds_dpo.process.say import Say

COMPLETE_COPY = datasets_config.DATASET_INFO_FILENAME  # `datasets` writes it last
# parquet stores repeated text in dictionary pages, smaller than Arrow does
SIZE_MARGIN = 1.03


def cache_folder(data: DataConfig) -> Path:
    """Return the folder of the copies of `datasets`, and of this package's indices."""
    return Path(datasets_config.HF_DATASETS_CACHE if data.cache_dir is None else data.cache_dir)


def open_as_arrow(files: Sequence[Path], data: DataConfig, *, say: Say) -> ArrowStreams:
    """Return parquet files as memory-mapped Arrow; copies them if there is no copy yet.

    say: called before copying, with the size and place of the copy. Raises DataError if the disk has too little room,
    or a file is not parquet.
    """
    # escaped, because `datasets` reads names as patterns; one split only, because it copies each one completely
    paths = {data.split: [glob.escape(str(path)) for path in files]}
    try:
        builder = load_dataset_builder("parquet", data_files=paths, cache_dir=data.cache_dir)
        if not (Path(builder.cache_dir) / COMPLETE_COPY).is_file():
            _require_room(files, Path(builder.cache_dir), data, say=say)
            builder.download_and_prepare()
    except (OSError, ValueError, pa.ArrowException, DatasetsError) as error:
        cause = error.__cause__ or error  # the error of `datasets` says only that it failed; its cause says why
        raise DataError(
            f"data.dataset {data.dataset}, split {data.split} cannot be read as parquet: {cause}"
        ) from error
    return _open_copy(builder, data.split)


def _open_copy(builder: DatasetBuilder, split: str) -> ArrowStreams:
    """Map the files of a split of a prepared builder. Raises DataError if they are not complete."""
    info = builder.info.splits[split]
    names = filenames_for_dataset_split(builder.cache_dir, builder.dataset_name, split, "arrow", info.shard_lengths)
    streams = map_streams([Path(name) for name in names])
    if streams.num_rows != info.num_examples:
        raise DataError(
            f"{builder.cache_dir} has {streams.num_rows} of {info.num_examples} rows of split {split}; delete the "
            "folder and start again"
        )
    return streams


def uncompressed_bytes(files: Sequence[Path]) -> int:
    """Return the unpacked size of all columns of parquet files, from their footers."""
    metadata = [pq.read_metadata(path) for path in files]
    return sum(each.row_group(group).total_byte_size for each in metadata for group in range(each.num_row_groups))


def _require_room(files: Sequence[Path], place: Path, data: DataConfig, *, say: Say) -> None:
    needed = int(uncompressed_bytes(files) * SIZE_MARGIN)
    existing = next(parent for parent in place.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    say(
        f"data.dataset {data.dataset}, split {data.split}: copying parquet to Arrow, once; the copy takes "
        f"{_size(needed)} in {place}; {_size(free)} are free there"
    )
    if needed > free:
        raise DataError(
            f"data.dataset {data.dataset}, split {data.split} needs {_size(needed)} in {place} for its copy in "
            f"Arrow, and {_size(free)} are free; set data.cache_dir to a folder on a larger disk, or encode the "
            "pairs with scripts/cache.py, which makes no copy, and train with data.cache"
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"

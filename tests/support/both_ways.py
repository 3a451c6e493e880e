"""Read a set as training does and as the programs do that read straight from the files: one outcome, given by hand."""

import pytest
from pair_files import config, file_of, picture
from shard_writers import NUM_ROWS

from ds_dpo.data.reading.open_source import open_source
from ds_dpo.errors import DataError

FIRST, BOTH = range(NUM_ROWS), range(2 * NUM_ROWS)  # rows of a set of one file, and of two


def opened(tmp_path, dataset, *, in_file_order, **fields):
    data = config(dataset, cache_dir=str(tmp_path / "cache"), **fields)
    return open_source(data, say=lambda line: None, in_file_order=in_file_order)


def require_one_outcome(case, tmp_path):
    """case: writes a set into a folder, and returns its place, fields of data, and its rows or what an error says."""
    dataset, fields, outcome = case(tmp_path / "set")
    said = []
    for in_file_order in (True, False):
        if isinstance(outcome, str):
            with pytest.raises(DataError, match=outcome) as caught:
                opened(tmp_path, dataset, in_file_order=in_file_order, **fields)
            said.append(str(caught.value))
            assert "\n" not in said[-1]
            continue
        source = opened(tmp_path, dataset, in_file_order=in_file_order, **fields)
        records = [source.read(index) for index in range(len(source))]
        assert [record.prompt for record in records] == [f"prompt {row}" for row in outcome]
        for row, record in zip(outcome, records, strict=True):
            winner = 2 * row + row % 2
            chosen = record.chosen if isinstance(record.chosen, bytes) else record.chosen["bytes"]
            assert chosen == file_of(picture(winner))
        said.append([(record.pair_id, record.uid) for record in records])
    assert said[0] == said[1]

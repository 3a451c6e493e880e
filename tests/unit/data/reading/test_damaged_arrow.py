"""A damaged file of a save_to_disk folder is named, where pyarrow would end the process or read other memory."""

import re
import struct

import pytest
from datasets import Dataset
from pair_files import config, file_of, picture, row

from ds_dpo.data.reading import arrow_check
from ds_dpo.data.reading.open_source import open_source
from ds_dpo.errors import DataError


@pytest.fixture
def saved(tmp_path):
    Dataset.from_list([row(number) for number in range(3)]).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def opened(saved):
    data = config(saved, cache_dir=str(saved.parent / "cache"))
    return open_source(data, say=lambda line: None)


def test_offsets_that_lead_out_of_a_column_are_refused_and_a_whole_file_is_checked_once(saved, monkeypatch):
    assert len(opened(saved)) == 3
    monkeypatch.setattr(arrow_check, "_check", lambda files: pytest.fail("checked again"))
    assert len(opened(saved)) == 3
    monkeypatch.undo()
    path = saved / "data-00000-of-00001.arrow"
    content = path.read_bytes()
    ends = [len(file_of(picture(2 * number))) for number in range(3)]
    offsets = struct.pack("<4i", 0, ends[0], ends[0] + ends[1], sum(ends))
    assert offsets in content
    path.write_bytes(content.replace(offsets, struct.pack("<4i", 0, 2**30, ends[0] + ends[1], sum(ends))))
    with pytest.raises(DataError, match=r"/data-00000-of-00001\.arrow is not a whole Arrow file \(.*ffset"):
        opened(saved)


def test_a_file_that_ends_its_reader_is_named(saved, tmp_path, monkeypatch):
    for program, status in (("import os; print('at 0', flush=True); os.abort()", -6), ("print('at 0'); exit(3)", 3)):
        child = tmp_path / "child.py"
        child.write_text(program)
        monkeypatch.setattr(arrow_check, "CHILD", child)
        said = rf"/data-00000-of-00001\.arrow is not a whole .*ended a process with status {status}\)"
        with pytest.raises(DataError, match=said):
            opened(saved)


def test_a_file_cut_short_is_named(saved):
    path = saved / "data-00000-of-00001.arrow"
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(DataError, match=re.escape(str(path))):
        opened(saved)


def test_text_that_is_not_utf8_is_sound(saved):
    path = saved / "data-00000-of-00001.arrow"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"prompt 1", b"prompt \xff"))
    assert len(opened(saved)) == 3

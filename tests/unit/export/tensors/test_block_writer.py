"""What is taken piece by piece lies in the file byte by byte, however the pieces and blocks fall."""

import errno
import os
import random

import pytest
import torch

from ds_dpo.export.tensors import block_writer
from ds_dpo.export.tensors.block_writer import BLOCK_BYTES, BlockWriter


def write_pieces(path, sizes, *, buffer_bytes):
    generator = random.Random(0)
    pieces = [generator.randbytes(size) for size in sizes]
    with BlockWriter(path, buffer_bytes=buffer_bytes) as writer:
        for piece in pieces:
            place = writer.take(len(piece))
            assert place.dtype == torch.uint8
            if piece:
                place.copy_(torch.frombuffer(bytearray(piece), dtype=torch.uint8))
    return b"".join(pieces)


SIZES = {
    "nothing": [],
    "one byte": [1],
    "whole blocks": [BLOCK_BYTES] * 7,
    "as much as fits": [10_000] * 5,
    "a byte less and more than a block": [BLOCK_BYTES - 1, BLOCK_BYTES + 1, 2, 0, BLOCK_BYTES - 3],
    "any": [random.Random(index).randrange(10_000) for index in range(200)],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_bytes_lie_end_to_end(tmp_path, sizes):
    content = write_pieces(tmp_path / "file", sizes, buffer_bytes=10_000)
    assert (tmp_path / "file").read_bytes() == content


def test_the_cache_is_passed_by_where_it_can_be(tmp_path, monkeypatch):
    flags = []
    opened = os.open
    monkeypatch.setattr(os, "open", lambda path, flag, *rest: flags.append(flag) or opened(path, flag, *rest))
    write_pieces(tmp_path / "file", [100], buffer_bytes=100)
    assert flags[0] & os.O_DIRECT


@pytest.mark.parametrize("refused", ["open", "write"])
def test_a_file_system_that_knows_only_the_cache_is_written_too(tmp_path, monkeypatch, refused):
    real = getattr(os, refused)

    def call(target, *rest):
        is_direct = rest[0] if refused == "open" else block_writer.fcntl.fcntl(target, block_writer.fcntl.F_GETFL)
        if is_direct & os.O_DIRECT:
            raise OSError(errno.EINVAL, "not here")
        return real(target, *rest)

    monkeypatch.setattr(os, refused, call)
    content = write_pieces(tmp_path / "file", SIZES["any"], buffer_bytes=10_000)
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == content


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(OSError, match="no space left"):
        write_pieces(tmp_path / "file", SIZES["any"], buffer_bytes=10_000)

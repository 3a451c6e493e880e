"""A checkpoint may come from anyone: nothing of it is run."""

import collections
import contextlib
import os
import resource
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from ds_dpo.errors import CheckpointError
from ds_dpo.zero_shards.archive import saved_stem
from ds_dpo.zero_shards.unpickle import load_shard


class Payload:
    """Writes a file when unpickled, by whatever function is given."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("named", ["posix.system", "shutil.copy"])
def test_pickled_code_is_refused_and_not_run(tmp_path, named):
    shard, target = tmp_path / "mp_rank_00_model_states.pt", tmp_path / "owned"
    payload = {
        "posix.system": Payload(os.system, f"touch {target}"),
        "shutil.copy": Payload(shutil.copy, __file__, str(target)),
    }[named]
    torch.save({"module": {"weight": torch.ones(2)}, "extra": payload}, shard)
    with pytest.raises(CheckpointError, match=f"{shard.name}: refused, because it asks for {named}"):
        load_shard(shard)
    assert not target.exists()
    torch.load(shard, weights_only=False)  # the payload is real
    assert target.exists()


def test_plain_data_comes_back_and_tensors_stay_in_the_file(tmp_path):
    shard = tmp_path / "shard.pt"
    content = {"a": torch.arange(3), "b": collections.OrderedDict(c=[1, None, "x"]), "shape": torch.Size([2])}
    torch.save(content, shard)
    found = load_shard(shard).content
    assert found["a"].tolist() == [0, 1, 2]
    assert {key: found[key] for key in ("b", "shape")} == {key: content[key] for key in ("b", "shape")}
    assert str(shard) in Path("/proc/self/maps").read_text()


def test_torn_foreign_and_missing_files_are_named(tmp_path):
    whole = tmp_path / "whole.pt"
    torch.save({"a": torch.arange(1000)}, whole)
    damaged = {
        "torn.pt": whole.read_bytes()[:4000],
        "text.pt": b"not a checkpoint",
        "empty.pt": b"",
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
    torch.save([1, 2], tmp_path / "list.pt")
    for name in (*damaged, "list.pt", "absent.pt"):
        with pytest.raises(CheckpointError, match=name):
            load_shard(tmp_path / name)


def rewrite(path, source, change):
    """Copy a file of torch.save with its pickle changed and all checksums right."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, change(content) if entry.filename.endswith("/data.pkl") else content)


def test_tensors_lie_within_their_storage(tmp_path):
    whole = tmp_path / "whole.pt"
    torch.save({"a": torch.arange(5, dtype=torch.int32)}, whole)
    assert load_shard(whole).content["a"].tolist() == [0, 1, 2, 3, 4]
    # the size, a tuple of one small integer, from 5 to 6
    rewrite(tmp_path / "long.pt", whole, lambda content: content.replace(b"K\x05\x85", b"K\x06\x85"))
    with pytest.raises(CheckpointError, match=r"long.pt: damaged.*requiring"):
        load_shard(tmp_path / "long.pt")


def test_what_is_set_on_the_names_of_the_list_stays_in_its_file(tmp_path):
    # GLOBAL, then BUILD with a dictionary: an attempt to change the stand-in itself
    pickled = (
        b"\x80\x02}cdeepspeed.runtime.fp16.loss_scaler\nLossScaler\n}X\x05\x00\x00\x00stateK\x01sbX\x01\x00\x00\x00ks."
    )
    source = tmp_path / "source.pt"
    torch.save({}, source)
    for content in (pickled, b"\x80\x02}X\x01\x00\x00\x00kcdeepspeed.runtime.fp16.loss_scaler\nLossScaler\n)\x81s."):
        rewrite(tmp_path / "other.pt", source, lambda _, content=content: content)
        try:
            found = load_shard(tmp_path / "other.pt").content
        except CheckpointError:
            continue
        assert not hasattr(found["k"], "state")


@pytest.mark.parametrize("name", ["data.pkl", "data/0"])
def test_changed_bits_are_found(tmp_path, name):
    shard = tmp_path / "shard.pt"
    torch.save({"a": torch.arange(1000)}, shard)
    with zipfile.ZipFile(shard) as archive:
        record = archive.read(f"shard/{name}")
    content = bytearray(shard.read_bytes())
    content[content.index(record) + len(record) // 2] ^= 4
    shard.write_bytes(content)

    def read():
        loaded = load_shard(shard)
        loaded.archive.verify_tensor(loaded.content["a"])

    with pytest.raises(CheckpointError, match=rf"shard.pt: record '{name}' differs from its checksum"):
        read()


def with_pickle(path, content):
    """A file of torch.save with another pickle in it."""
    torch.save({"a": torch.arange(3)}, path)
    with zipfile.ZipFile(path) as source:
        records = {entry.filename: source.read(entry) for entry in source.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for name, record in records.items():
            target.writestr(name, content if name.endswith("data.pkl") else record)
    return path


MODULES = (b"__builtin__", b"builtins")
STAGE = b"cdeepspeed.runtime.zero.config\nZeroStageEnum\n"
KEY = b"\x80\x02}X\x05\x00\x00\x00stage"


def text(word):
    return b"X" + len(word).to_bytes(4, "little") + word.encode()


@pytest.mark.parametrize(
    "value",
    [
        STAGE + b"K\x02\x85R",
        *(b"c" + module + b"\ngetattr\n" + STAGE + text("gradients") + b"\x86R" for module in MODULES),
    ],
    ids=["by value", "by name", "by name, as protocol 3 writes it"],
)
def test_a_member_of_an_enumeration_is_read_as_every_python_writes_it(tmp_path, value):
    """Python 3.11.0 to 3.11.3 write getattr(ZeroStageEnum, 'gradients')."""
    assert load_shard(with_pickle(tmp_path / "a.pt", KEY + value + b"s.")).content == {"stage": 2}


@pytest.mark.parametrize(
    "call",
    [
        STAGE + text("__subclasses__"),
        STAGE + text("from_bytes"),
        STAGE + b"K\x02",
        b"ccollections\nOrderedDict\n" + text("gradients"),
        b"ctorch\nSize\n" + text("weights"),
    ],
)
def test_getattr_gives_nothing_else(tmp_path, call):
    path = with_pickle(tmp_path / "a.pt", KEY + b"c__builtin__\ngetattr\n" + call + b"\x86Rs.")
    with pytest.raises(CheckpointError, match=r"a.pt: refused, because it asks for the attribute "):
        load_shard(path)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02}r\xff\xff\xff\x0f.",  # LONG_BINPUT: room for 268 million entries
        b"\x80\x02}p268435455\n.",  # PUT, the same
        b"\x80\x05\x96" + (2**33).to_bytes(8, "little") + b"ab.",  # BYTEARRAY8 of 8 GiB
        b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"ab.",  # BINBYTES8
        b"\x80\x02X\xff\xff\xff\x7fab.",  # BINUNICODE
        b"\x80\x02\x8b\xff\xff\xff\x7fab.",  # LONG4
        b"\x80\x02}",  # no end
        b"\x80\x02\xff.",  # no instruction
        b"(" * 100_000 + b".",
        b"I" + b"1" * 5000 + b"\n.",
        b"ctorch\n",
    ],
    ids=["memo", "memo-text", "bytearray", "bytes", "text", "number", "endless", "nothing", "marks", "digits", "cut"],
)
def test_a_pickle_takes_no_more_memory_than_its_size_explains(tmp_path, content):
    path = with_pickle(tmp_path / "a.pt", content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"a.pt: damaged, its pickle is not one of torch") as refused:
        load_shard(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB
    assert len(str(refused.value)) < 500


def test_a_tensor_has_no_more_elements_than_are_stored(tmp_path):
    torch.save({"a": torch.zeros(1).expand(10**12)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="1000000000000 elements over 1 stored"):
        load_shard(tmp_path / "a.pt")


def test_every_byte_of_a_directory_may_be_wrong(tmp_path):
    whole = tmp_path / "whole.pt"
    torch.save({"a": torch.arange(3)}, whole)
    content = whole.read_bytes()
    start = content.index(b"PK\x01\x02")  # zip's directory
    path = tmp_path / "a.pt"
    for place in range(start, len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            load_shard(path)


def test_a_named_pipe_is_no_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "a.pt")
    for read in (load_shard, saved_stem):
        with pytest.raises(CheckpointError, match="a named pipe, not a regular file"):
            read(tmp_path / "a.pt")

"""A checkpoint may come from anyone: nothing of it is run."""

import collections
import os
import shutil
from pathlib import Path

import pytest
import torch

from ds_dpo.errors import CheckpointError
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
    with pytest.raises(CheckpointError, match=f"{shard.name}: refused, it asks for {named}"):
        load_shard(shard)
    assert not target.exists()
    torch.load(shard, weights_only=False)  # the payload is real
    assert target.exists()


def test_plain_data_comes_back_and_tensors_stay_in_the_file(tmp_path):
    shard = tmp_path / "shard.pt"
    content = {"a": torch.arange(3), "b": collections.OrderedDict(c=[1, None, "x"]), "shape": torch.Size([2])}
    torch.save(content, shard)
    found = load_shard(shard)
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
